"""The token at which an answer ends: trained always, and here asked whether serving stops at it.

An engine stops at the ends that the base names. A base model that is taught a chat template learns an end of turn that
it does not name: its answers would go on until their limit. The adapter then carries a ``generation_config.json`` with
that token; `ah serve` stops there, and an export too.
"""

from __future__ import annotations

import json
from typing import Any

from adapterhub.base import BaseModel
from adapterhub.trainers.config import TrainConfig
from adapterhub.trainers.labels.labels import Labeler
from adapterhub.trainers.labels.tokenizer import generation_ends, served_end

GENERATION = "generation_config.json"


def taught_end(base: BaseModel, config: TrainConfig, labeler: Labeler) -> str | None:
    """The token that ends a trained answer and that serving does not stop at by itself; None where it does."""
    end = labeler.end_of_turn() if labeler.template else None
    end = end or labeler.tokenizer.eos_token
    number = labeler.tokenizer.convert_tokens_to_ids(end) if end else None
    stops = {*generation_ends(base), served_end(base, config, labeler.tokenizer)}
    return None if number is None or number in stops else end


def generation_config(base: BaseModel, end: int) -> dict[str, Any]:
    """The base's own, which also stops at ``end``, a token's id."""
    file = base.path / GENERATION
    own = json.loads(file.read_bytes()) if file.is_file() else {}
    return own | {"eos_token_id": list(dict.fromkeys([*generation_ends(base), end]))}

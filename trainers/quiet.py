"""Silence from below: the libraries' warnings and progress bars go to a log, so a person sees our lines only."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from adapterhub.errors import MissingDependency


@contextlib.contextmanager
def quiet(log: Path | None) -> Iterator[None]:
    """Inside, everything that is logged or warned goes to ``log`` (None: nowhere), and no foreign bar is drawn.

    Raises:
        MissingDependency: the ``train`` extra is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # TRL draws one over the reference's log probabilities
    handler = logging.FileHandler(log, encoding="utf-8") if log else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    others, root.handlers = root.handlers, [handler]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(True)
        try:
            _hush_libraries()
            yield
        finally:
            logging.captureWarnings(False)
            root.handlers = others
            handler.close()


def _hush_libraries() -> None:
    try:
        import datasets
        import peft  # noqa: F401
        import transformers
        import trl  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "training needs torch, transformers, peft, trl and datasets",
            why=str(error),
            hint='pip install "adapterhub[train]"',
        ) from error
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()

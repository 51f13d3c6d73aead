"""The model card: what this model was made of, for the next person who finds the folder."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub.export.plan import Plan
from adapterhub.manifest import Record


def model_card(plan: Plan, record: Record | None, *, weights_sha256: str, made_of: Sequence[str] = ()) -> str:
    """README.md of the model. ``weights_sha256`` is that of the adapter's weight file; ``made_of`` are adapters that it
    was added up from."""
    name = str(record.ref) if record else " + ".join(made_of) or plan.adapter.path.name
    rows = {
        "base": f"{plan.base.name}" + (f" ({plan.base.commit})" if plan.base.commit else ""),
        "adapter": name,
        "digest": record.digest if record else "",
        "adapter weights": f"sha256:{weights_sha256}",
        **(_training(record) if record else {}),
        "rank": str(plan.adapter.shape.rank),
        "merged tensors": str(len(plan.merged)),
        "base weights": "dequantised" if plan.base_precision == "dequantized" else "",
        "dtype": plan.dtype or "as the base",
        "quantised": f"{plan.scheme.told} (compressed-tensors), linear layers" if plan.scheme else "",
    }
    quantised = ", then quantised" if plan.scheme else ""
    adapters = "adapters" if made_of else "adapter"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
    return f"""{_front_matter(plan)}
# {name}, merged

{plan.base.name} with the LoRA {adapters} {name} merged into its weights: `W + s·B·A` in float32, rounded
once{quantised}. It needs neither AdapterHub nor PEFT. `export.json`, where it is there, tells what was checked.

| | |
|---|---|
{table}
"""


def _front_matter(plan: Plan) -> str:
    base = f"base_model: {plan.base.name}\n" if "/" in plan.base.name else ""  # the Hub takes nothing but its own ids
    return f"---\n{base}library_name: transformers\ntags: [adapterhub, lora, merged]\n---\n"


def _training(record: Record) -> dict[str, str]:
    lineage = record.manifest.lineage
    return {
        "method": lineage.method,
        "parents": ", ".join(lineage.parents),
        "training config": f"sha256:{lineage.config_sha256}" if lineage.config_sha256 else "",
        "training data": ", ".join(f"sha256:{sha256}" for sha256 in lineage.data_sha256),
        "metrics": ", ".join(f"{key} {value:.4g}" for key, value in lineage.metrics.items()),
        "published": f"{record.created} by {record.author}",
    }

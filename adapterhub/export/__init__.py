"""Export: base + adapter → a standalone model that needs neither AdapterHub nor PEFT.

    from adapterhub.base import find_base
    from adapterhub.export import export_model

    result = export_model(Path("runs/support/adapter"), find_base("Qwen/Qwen3-0.6B"), Path("support-model"))
    print(result.path, result.certificate.worst)

A model is exported in this order, and nothing of it has its final name before the end:

    plan         from headers alone: every factor's tensor, scale and place, or the reason why not
    merge        streams the weights: float32 W + s·B·A in row blocks, rounded once; memory does not grow with the model
    sidecars     config, tokenizer, chat template, generation config · card    the lineage, for people
    certificate  reads it all again with other arithmetic; `export.json`
    staging      a locked folder beside the target, a journal, fsync, rename

Other ways: `gguf` (one file for llama.cpp), `combine` (several adapters), `extract` (a tuned model back to an adapter).
Where next: `model` (the main path), `layout` (what happens to each byte), `certificate` (what is proven).
Paths in, path out: nothing here knows where versions live.
"""

from __future__ import annotations

from adapterhub.export.certificate import verify
from adapterhub.export.evidence import Certificate
from adapterhub.export.model import ExportResult, export_model
from adapterhub.export.plan import Plan, plan_export
from adapterhub.export.speed import last_speed, remember, seconds

__all__ = [
    "Certificate",
    "ExportResult",
    "Plan",
    "export_model",
    "last_speed",
    "plan_export",
    "remember",
    "seconds",
    "verify",
]

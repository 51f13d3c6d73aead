"""What is said where an adapter and a base do not go together."""

from __future__ import annotations

from adapterhub.base import BaseModel
from adapterhub.errors import BaseMismatch, Unsupported
from adapterhub.peftdir import PeftDir


def cannot(adapter: PeftDir, why: str) -> Unsupported:
    return Unsupported(f"{adapter.path} cannot be merged", why=why, hint="serve it as an adapter, or merge with PEFT")


def lacks(base: BaseModel, module: str, parameter: str) -> BaseMismatch:
    return _another(base, f"the base has no {parameter} for {module}")


def mismatch(base: BaseModel, module: str, shape: tuple[int, ...], made: tuple[int, ...]) -> BaseMismatch:
    return _another(base, f"{module} is {list(shape)} there, the adapter makes {list(made)}")


def _another(base: BaseModel, why: str) -> BaseMismatch:
    return BaseMismatch(
        f"the adapter does not match the base {base.name}",
        why=why,
        hint="name the base that it was trained on with --base",
    )

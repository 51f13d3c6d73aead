"""What was found of each tensor of a model, and of all of them: what `export.json` says, and people read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapterhub.export.answers import Divergence
from adapterhub.export.dequantise import BOUND
from adapterhub.manifest import to_plain


@dataclass(frozen=True)
class TensorCheck:
    """What was found of one merged tensor."""

    tensor: str
    rank: int
    scale: float
    norm_planned: float  # ‖s·B·A‖, Frobenius, from the factors; with DoRA ‖m‖
    norm_found: float  # ‖W' − W‖; with DoRA ‖W'‖
    sampled: int  # elements compared with float64
    not_nearest: int  # of these, how many are not the float64 sum rounded once
    worst: float  # largest distance to that sum, as a share of what is allowed: 1 would be the limit


@dataclass(frozen=True)
class QuantisedCheck:
    """What was found of one quantised tensor; its dequantised weights against those rounded to the model's dtype."""

    tensor: str
    merged: bool
    error: float  # relative, in the Frobenius norm
    clipped: int  # weights beyond the largest code
    worst: float  # largest distance between a code and its weight, as a share of what is allowed


@dataclass(frozen=True)
class Certificate:
    """All checks passed; otherwise there is none."""

    merged: tuple[TensorCheck, ...]  # but those that are quantised, too
    planned: int  # tensors to be merged
    cast: int  # tensors whose dtype changed and nothing else
    kept: int  # tensors with the base's bytes
    kept_bytes: int  # bytes compared with their source's
    saved: int = 0  # tensors that are the adapter's in place of the base's, or some of whose rows are
    quantised: tuple[QuantisedCheck, ...] = ()
    error: float = 0.0  # of all quantised tensors as one, relative
    divergence: Divergence | None = None  # of the quantised model's answers, where they were compared

    @property
    def applied(self) -> int:
        return len(self.merged) + sum(check.merged for check in self.quantised)

    @property
    def sampled(self) -> int:
        return sum(check.sampled for check in self.merged)

    @property
    def not_nearest(self) -> int:
        return sum(check.not_nearest for check in self.merged)

    @property
    def worst(self) -> float:
        return max((check.worst for check in self.merged), default=0.0)

    def summary(self) -> dict[str, Any]:
        return {
            "merged": {"planned": self.planned, "applied": self.applied},
            "cast": self.cast,
            "saved": self.saved,
            "kept": {"tensors": self.kept, "bytes_identical": self.kept_bytes},
            "float64": {
                "sampled": self.sampled,
                "not_nearest": self.not_nearest,
                "worst": round(self.worst, 6),
            },
            **({"quantised": self._quantised_summary()} if self.quantised else {}),
        }

    def _quantised_summary(self) -> dict[str, Any]:
        farthest = max(self.quantised, key=lambda check: check.error)
        return {
            "tensors": len(self.quantised),
            "relative_error": round(self.error, 6),
            "largest": {"tensor": farthest.tensor, "relative_error": round(farthest.error, 6)},
            "bound": BOUND,
            "worst": round(max(check.worst for check in self.quantised), 6),
            "kl_divergence": self.divergence.to_json() if self.divergence else None,
        }

    def to_json(self) -> dict[str, Any]:
        tensors = [to_plain(check) for check in (*self.merged, *self.quantised)]
        return {**self.summary(), "tensors": tensors}

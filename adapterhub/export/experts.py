"""LoRA on fused experts: which tensors of the checkpoint its factors change, and by what. No torch.

In memory the experts of a layer are parameters of one module, (experts, out, in), and PEFT wraps the module once for
each parameter that it adapts, the module's last one outermost:

    …experts.lora_A              (experts · rank, in)    of down_proj
    …experts.base_layer.lora_A   (experts · rank, in)    of gate_up_proj
    …lora_B                      (out, rank · experts)

A checkpoint holds such a parameter as it is, or one tensor an expert, gate and up apart: then each takes its share.
The layout is PEFT's since 0.19; before, an untransposed parameter had its two sides the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from adapterhub import names
from adapterhub.base import BaseModel
from adapterhub.export.layout import Delta, Share
from adapterhub.export.packing import Stored
from adapterhub.export.refusals import cannot, lacks, mismatch
from adapterhub.peftdir import Factor, PeftDir, is_parameter, pattern_value, scale_of

_LAYOUT = (0, 19)  # PEFT's version from which on the layout is the one above


def find_experts(
    factor: Factor, adapter: PeftDir, base: BaseModel, weights: Mapping[str, Stored]
) -> dict[str, Delta] | None:
    """Tensor of the checkpoint → what is added to it; None where the factor is not of fused experts.

    Raises BaseMismatch, Unsupported.
    """
    match = names.FUSED.fullmatch(factor.module)
    architecture = names.architecture(base.config)
    if match is None or architecture.experts is None:
        return None
    module, experts = match["module"], architecture.experts
    adapted = [name for name in experts.parameters if is_parameter(adapter.config, f"{module}.{name}")]
    depth = match["inside"].count(".base_layer")
    if depth >= len(adapted):
        raise cannot(adapter, f"{factor.module} has factors, and target_parameters does not say of which parameter")
    name = adapted[-1 - depth]
    named = replace(factor, module=f"{module}.{name}")
    stack = _Stack(named, adapter, base, experts.transposed)
    for stored in architecture.stored(named.module):
        if stored in weights:
            return {stored: stack.whole(weights[stored])}
    for stored in architecture.stored(module):
        parts = experts.parts.get(name, ())
        if parts and f"{stored}.0.{parts[0]}.weight" in weights:
            return dict(stack.shares(stored, parts, weights))
    raise lacks(base, module, name)


@dataclass(frozen=True)
class _Stack:
    """Factors of one parameter of all experts."""

    factor: Factor
    adapter: PeftDir
    base: BaseModel
    transposed: bool

    @property
    def made(self) -> tuple[int, int]:
        """(out, in) of one expert."""
        return self.factor.b.shape[0], self.factor.a.shape[1]

    def whole(self, stored: Stored) -> Delta:
        """For a parameter that the checkpoint has as it is."""
        shape = stored.tensor.shape
        if len(shape) == 2:  # a bias: PEFT takes it for the matrix of a single layer
            self._check(shape, self.made)
            return Delta(self._of(1))
        if stored.packing:
            raise cannot(self.adapter, f"{stored.tensor.name} holds all experts of a layer, quantised")
        if self.transposed and shape[0] == 1:
            raise cannot(self.adapter, "PEFT has no LoRA for the transposed parameter of a single expert")
        self._check(shape, (shape[0], *(self.made[::-1] if self.transposed else self.made)))
        return Delta(self._of(shape[0]), transposed=self.transposed, experts=shape[0])

    def shares(self, module: str, parts: tuple[str, ...], weights: Mapping[str, Stored]) -> Iterator[tuple[str, Delta]]:
        """For a checkpoint with tensors of each expert. ``parts``: what it calls the parameter's rows, from the top."""
        count = 0
        while f"{module}.{count}.{parts[0]}.weight" in weights:
            count += 1
        factor = self._of(count)
        for expert in range(count):
            first = 0
            for part in parts:
                name = f"{module}.{expert}.{part}.weight"
                if name not in weights:
                    raise lacks(self.base, f"{module}.{expert}.{part}", "weight")
                rows, columns = weights[name].tensor.shape
                self._check((rows * len(parts), columns), self.made)
                yield name, Delta(factor, share=Share(expert, count, first, first + rows))
                first += rows

    def _check(self, shape: tuple[int, ...], made: tuple[int, ...]) -> None:
        if shape != made:
            turned = shape == (*made[:-2], *made[:-3:-1])
            why = (
                f"the sides of {self.factor.module} are swapped, as PEFT before 0.19 had them: save it with a newer one"
            )
            raise cannot(self.adapter, why) if turned else mismatch(self.base, self.factor.module, shape, made)
        if made[-1] == made[-2] and not self.transposed and _version(self.adapter) < _LAYOUT:
            why = f"{self.factor.module} is square, and PEFT before 0.19 had its sides the other way round"
            raise cannot(self.adapter, why)

    def _of(self, experts: int) -> Factor:
        """The factor with the rank and the scale of one expert; an expert that the checkpoint lacks shows here."""
        config, rows = self.adapter.config, self.factor.rank
        rank = int(pattern_value(config.get("rank_pattern") or {}, self.factor.module, config.get("r", 8)))
        if rank * experts != rows:
            raise cannot(
                self.adapter,
                f"{self.factor.module} has {experts} experts of rank {rank}, and {rows} rows of A for them",
            )
        return replace(self.factor, rank=rank, scale=scale_of(config, self.factor.module, rank))


def _version(adapter: PeftDir) -> tuple[int, ...]:
    """PEFT's, as the config records it since 0.18; (0,) where it does not."""
    numbers = re.match(r"(\d+)\.(\d+)", str(adapter.config.get("peft_version", "")))
    return tuple(map(int, numbers.groups())) if numbers else (0,)

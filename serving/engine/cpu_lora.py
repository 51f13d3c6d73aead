"""The LoRA product on CPU: correct and fast. Stands in for vLLM's own until that is both.

vLLM 0.32's torch fallback takes each token's factors by ``weights[slot]``; a token *without* an adapter has slot −1,
which in torch is the last slot, so the base is answered with somebody's adapter. It also copies whole factors for every
token. Here a step of the engine, with T tokens and S slots in use, is:

- few tokens (decode): all slots as one wide LoRA. h = x·Aᵀ with the A of the slots stacked, (T, S·n·r); the columns
  that are not the token's slot are set to zero; y += h·B, one product a projection. n + 2 operations, whatever T and S.
- many tokens (prompts): slot by slot on its own rows, so no token pays for another's adapter.
- no token with an adapter: nothing.

n is the number of merged projections (3 for qkv) and r the largest real rank of the loaded adapters, not
``max_lora_rank``. Factors are kept packed in float32 as the products want them; a slot is packed again when vLLM wrote
to its stacked tensors, which their version counters tell. Sums are float32 whatever the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

_STOCK = f"{PunicaWrapperCPU.__module__}.{PunicaWrapperCPU.__name__}"
WIDE = 8192  # tokens · slots · rank: up to here a wide product wastes less than slot by slot costs in calls


def install() -> None:
    """Make vLLM build this wrapper where it would build its own CPU one. May be called any number of times."""
    if not active() and current_platform.get_punica_wrapper() == _STOCK:
        qualified = f"{AdapterProduct.__module__}.{AdapterProduct.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda platform: qualified)


def active() -> bool:
    """Whether vLLM in this process builds this wrapper."""
    return bool(current_platform.get_punica_wrapper() == f"{AdapterProduct.__module__}.{AdapterProduct.__qualname__}")


class Run:
    """Slots that stand together and are used in a batch, from ``first`` up to ``last``, which is not among them."""

    def __init__(self, first: int, last: int, slots: Sequence[int]) -> None:
        """``slots`` is one slot a row of the batch, −1 for none."""
        self.first, self.last, self._slots = first, last, slots

    @cached_property
    def foreign(self) -> torch.Tensor | None:
        """(T, slots of the run, 1): True where the slot is not the row's. None: nowhere."""
        if self.last - self.first == 1 and all(slot == self.first for slot in self._slots):
            return None
        return (torch.tensor(self._slots)[:, None] != torch.arange(self.first, self.last))[:, :, None]


class Rows:
    """Which rows of a batch use which slot. ``slots`` is one slot a row, −1 for none."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.used = sorted({s for s in slots if s >= 0})
        self.count = len(slots)
        self._slots = slots
        self._of: dict[int, slice | torch.Tensor] = {}

    @cached_property
    def runs(self) -> list[Run]:
        """The used slots, those together that stand together."""
        starts = [i for i, slot in enumerate(self.used) if i == 0 or slot - self.used[i - 1] > 1]
        ends = [*starts[1:], len(self.used)]
        pairs = zip(starts, ends, strict=True)
        return [Run(self.used[start], self.used[end - 1] + 1, self._slots) for start, end in pairs]

    def of(self, slot: int) -> slice | torch.Tensor:
        """The rows of one slot: a slice where they stand together, else their indices."""
        if slot not in self._of:
            rows = [i for i, s in enumerate(self._slots) if s == slot]
            together = rows[-1] - rows[0] + 1 == len(rows)
            self._of[slot] = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows)
        return self._of[slot]


class Packed:
    """The factors of one module for all slots, packed for the products.

    ``a`` is (slots · n · r, in): a slot's projections stand together, so that one product makes h for all of them.
    ``b`` is one (slots · r, width) for each of the n projections.
    """

    def __init__(
        self,
        lora_a: tuple[torch.Tensor, ...],
        lora_b: tuple[torch.Tensor, ...],
        widths: tuple[int, ...],
    ) -> None:
        """``lora_a``: n tensors (slots, 1, max rank, in); ``lora_b``: n of (slots, 1, width, max rank)."""
        self._stacked = (lora_a, lora_b)
        self.widths = list(widths)
        self.slots = lora_a[0].shape[0]
        self._ranks = [0] * self.slots  # when each was last packed
        self._fresh: tuple[int, Rows | None] = (-1, None)  # the version and the batch that were last looked at
        self._resize(0)

    def refresh(self, rows: Rows) -> None:
        """Pack the slots of a batch that vLLM wrote to since they were packed."""
        lora_a, lora_b = self._stacked
        # vLLM clears all of a slot's factors before it writes any, so the first and the last tell of every write
        version = lora_a[0]._version + lora_b[-1]._version
        seen, last_rows = self._fresh
        if seen == version and last_rows is rows:
            return
        self._repack([slot for slot in rows.used if self._seen[slot] != version], version, rows.used)
        self._fresh = version, rows

    def factors(self, first: int, last: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Of the slots from ``first`` up to ``last``: Aᵀ (in, slots · n · r), and B of each projection."""
        views = self._views.get((first, last))
        if views is None:
            a = self.a[first * self.block : last * self.block].T
            views = self._views[first, last] = a, [b[first * self.rank : last * self.rank] for b in self.b]
        return views

    def _repack(self, stale: Sequence[int], version: int, used: Sequence[int]) -> None:
        if not stale:
            return
        lora_a, lora_b = self._stacked
        for slot in stale:
            self._ranks[slot] = max(_rank(a[slot, 0], b[slot, 0]) for a, b in zip(lora_a, lora_b, strict=True))
        if max(self._ranks) != self.rank:
            self._resize(max(self._ranks))
            stale = used
        for slot in stale:
            self._pack(slot)
            self._seen[slot] = version
        self.finite = all(self._finite)

    def _resize(self, rank: int) -> None:
        lora_a, _ = self._stacked
        self.rank = rank
        self.block = rank * len(lora_a)  # rows of one slot
        self.a = torch.zeros(self.slots * self.block, lora_a[0].shape[-1])
        self.b = [torch.zeros(self.slots * rank, width) for width in self.widths]
        self._views: dict[tuple[int, int], tuple[torch.Tensor, list[torch.Tensor]]] = {}
        self._seen = [-1] * self.slots  # the version at which each slot was packed
        self._finite = [True] * self.slots
        self.finite = True  # all of them: zeros beside an infinity or a NaN would not be zeros in a wide product

    def _pack(self, slot: int) -> None:
        own_a = self.a[slot * self.block : (slot + 1) * self.block]
        own_b = [b[slot * self.rank : (slot + 1) * self.rank] for b in self.b]
        parts = own_a.view(len(own_b), self.rank, own_a.shape[-1])  # of rank 0 too, where no slot has these modules
        for a, b, part, target in zip(*self._stacked, parts, own_b, strict=True):
            part.copy_(a[slot, 0, : self.rank])
            target.copy_(b[slot, 0, :, : self.rank].T)
        self._finite[slot] = all(bool(factor.isfinite().all()) for factor in (own_a, *own_b))


class Filled:
    """Which slots of a stack of factors hold anything."""

    def __init__(self, factors: torch.Tensor) -> None:
        """``factors``: (slots, …)."""
        self._factors = factors
        self._seen = -1  # the version at which they were looked at
        self._known: dict[int, bool] = {}

    def among(self, slots: Sequence[int]) -> list[int]:
        if self._factors._version != self._seen:
            self._seen, self._known = self._factors._version, {}
        for slot in slots:
            if slot not in self._known:
                self._known[slot] = bool(self._factors[slot].any())
        return [slot for slot in slots if self._known[slot]]


def _rank(a: torch.Tensor, b: torch.Tensor) -> int:
    """The real rank of a pair padded with zeros: ``a`` (max rank, in), ``b`` (out, max rank)."""
    counts = (a != 0).any(dim=1) & (b != 0).any(dim=0)
    return int(counts.nonzero().max()) + 1 if bool(counts.any()) else 0


class AdapterProduct(PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's CPU wrapper with every product over slots replaced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed: dict[int, Packed] = {}
        self._filled: dict[int, Filled] = {}
        self._tokens = self._samples = Rows(())

    def update_metadata(self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any) -> None:
        """Called when the batch changes: which token and which sampled position belongs to which adapter."""
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        slot_of = {adapter: slot for slot, adapter in enumerate(lora_index_to_id)}
        self._tokens = Rows([slot_of[adapter] if adapter > 0 else -1 for adapter in mapping.index_mapping])
        self._samples = Rows([slot_of[adapter] if adapter > 0 else -1 for adapter in mapping.prompt_mapping])

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y (T, out) += the token's adapter applied to x (T, in), for each of the n merged projections."""
        rows = self._tokens
        if not rows.used:
            return
        packed = self._packed.get(id(lora_a_stacked))
        if packed is None:  # it keeps the tuple alive, so its id stays its own
            packed = self._packed[id(lora_a_stacked)] = Packed(lora_a_stacked, lora_b_stacked, output_slices)
        packed.refresh(rows)
        if packed.rank == 0:
            return
        y, x = _flat(y), _flat(x)
        if x.dtype != torch.float32:
            x = x.float()
        if packed.finite and rows.count * len(rows.used) * packed.rank <= WIDE:
            for run in rows.runs:
                _add_wide(y, x, packed, run, scale)
        else:
            _add_by_slot(y, x, packed, rows, scale)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """The same for the output layer: y (samples, vocabulary), x (samples, width)."""
        filled = self._filled_slots(lora_a_stacked, self._samples)
        if not filled:
            return
        x = _flat(x)
        h = torch.zeros(x.shape[0], lora_a_stacked.shape[-2])
        _add_stacked(h, x, lora_a_stacked, self._samples, slots=filled, scale=scale)
        _add_stacked(_flat(y), h, lora_b_stacked, self._samples, slots=filled)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """The same for the input layer, where x (T, max rank) is looked up already."""
        filled = self._filled_slots(lora_b_stacked, self._tokens)
        _add_stacked(_flat(y), _flat(x), lora_b_stacked, self._tokens, slots=filled)

    def _filled_slots(self, factors: torch.Tensor, rows: Rows) -> list[int]:
        """The used slots whose factors are not all zero. Nearly every adapter leaves these two layers alone."""
        filled = self._filled.get(id(factors))
        if filled is None:  # it keeps the tensor alive, so its id stays its own
            filled = self._filled[id(factors)] = Filled(factors)
        return filled.among(rows.used)

    def add_shrink(
        self, y: Sequence[torch.Tensor], x: torch.Tensor, lora_a_stacked: Sequence[torch.Tensor], scale: float, **_: Any
    ) -> None:
        """First half of a layer whose factors are sharded: y[i] (T, rank) += x·Aᵀ."""
        for h, a in zip(y, lora_a_stacked, strict=True):
            _add_stacked(_flat(h), _flat(x), a, self._tokens, slots=self._tokens.used, scale=scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Sequence[torch.Tensor],
        lora_b_stacked: Sequence[torch.Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        **_: Any,
    ) -> None:
        """Second half: y (T, out) += x[i]·Bᵀ, one output slice after the other."""
        column = offset_start
        for h, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
            target = _flat(y)[:, column : column + width]
            _add_stacked(target, _flat(h), b, self._tokens, slots=self._tokens.used)
            column += width


def _add_wide(y: torch.Tensor, x: torch.Tensor, packed: Packed, run: Run, scale: float) -> None:
    """All slots of a run at once."""
    a, b = packed.factors(run.first, run.last)
    h = x.mm(a)
    if run.foreign is not None:
        h.view(h.shape[0], -1, packed.block).masked_fill_(run.foreign, 0.0)
    _expand(y, h, b, packed, scale)


def _add_by_slot(y: torch.Tensor, x: torch.Tensor, packed: Packed, rows: Rows, scale: float) -> None:
    """Each slot on its own rows."""
    for slot in rows.used:
        of_slot = rows.of(slot)
        a, b = packed.factors(slot, slot + 1)
        target = y[of_slot]  # a view, or a copy where the rows are apart
        _expand(target, x[of_slot].mm(a), b, packed, scale)
        if not isinstance(of_slot, slice):
            y[of_slot] = target


def _expand(y: torch.Tensor, h: torch.Tensor, b: list[torch.Tensor], packed: Packed, scale: float) -> None:
    """y += scale · h·B, projection by projection: h is (T, slots · n · r)."""
    n, rank = len(b), packed.rank
    if n == 1:
        _add_product(y, h, b[0], scale)
        return
    if h.shape[1] == packed.block:
        parts = h.split(rank, 1)
    else:  # projection after projection
        parts = h.view(h.shape[0], -1, n, rank).permute(2, 0, 1, 3).reshape(n, h.shape[0], -1).unbind()
    for target, part, factor in zip(y.split(packed.widths, 1), parts, b, strict=True):
        _add_product(target, part, factor, scale)


def _add_stacked(
    y: torch.Tensor,
    x: torch.Tensor,
    factors: torch.Tensor,
    rows: Rows,
    *,
    slots: Sequence[int],
    scale: float = 1.0,
) -> None:
    """y += scale · x·fᵀ, f the row's own of vLLM's ``factors`` (slots, 1, out, in). For rare layers: not packed."""
    for slot in slots:
        of_slot, f = rows.of(slot), factors[slot].squeeze(0).float()
        target = y[of_slot]
        width = min(target.shape[1], f.shape[0])  # adapter and base may pad the vocabulary differently
        _add_product(target[:, :width], x[of_slot].float(), f[:width].T, scale)
        if not isinstance(of_slot, slice):
            y[of_slot] = target


def _add_product(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """y += scale · h·b, summed in float32 and rounded once."""
    if y.dtype == torch.float32:
        y.addmm_(h, b, alpha=scale)
    else:
        y.add_(h @ b, alpha=scale)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])

"""Every byte of the new file is written once, whatever the tensors, dtypes and block sizes."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapterhub.export.layout import DTYPES, WIDTH, Copy, Delta, Operation, blocks, lay_out, spread
from adapterhub.peftdir import Factor, Tensor, read_header

NUMBERS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}

tensor = st.tuples(
    st.sampled_from(sorted(NUMBERS)), st.integers(1, 9), st.integers(1, 9), st.booleans()
)  # dtype, rows, columns, merged


@settings(deadline=None)  # a busy machine is no failure
@given(
    tensors=st.lists(tensor, min_size=1, max_size=6),
    dtype=st.sampled_from([None, *DTYPES.values()]),
    cloned=st.booleans(),
    size=st.integers(1, 40),
)
def test_every_byte_is_written_exactly_once(
    tensors: list[tuple[str, int, int, bool]], dtype: str | None, cloned: bool, size: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "model.safetensors"
        made = {
            f"t{i}.weight": torch.zeros(rows, columns, dtype=NUMBERS[d])
            for i, (d, rows, columns, _) in enumerate(tensors)
        }
        save_file(made, file, metadata={"format": "pt"})
        deltas = {f"t{i}.weight": DELTA for i, (d, _, _, merged) in enumerate(tensors) if merged and d in WIDTH}
        (plan,) = lay_out(operations(file, deltas, dtype), {file.name: file})
    cloned = cloned and plan.same_layout
    written = [0] * plan.size
    for block in blocks(plan, cloned=cloned, size=size):
        if isinstance(block, Copy):
            spans = range(block.target, block.target + block.length)
        else:
            spans = range(block.target, block.target + block.elements * WIDTH[block.operation.dtype])
            assert block.elements <= max(size, block.columns)
        for i in spans:
            written[i] += 1
    kept = [op for op in plan.operations if op.kept]
    if cloned:
        assert all(written[i] == 0 for op in kept for i in range(op.start, op.start + op.size))
        assert all(
            written[i] == 1 for op in plan.operations if not op.kept for i in range(op.start, op.start + op.size)
        )
    else:
        header = 0 if plan.same_layout else len(plan.header)  # a new header is written when the file is made
        assert written == [0] * header + [1] * (plan.size - header)


def test_a_new_header_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    made = {"a.weight": torch.ones(3, 5), "b.weight": torch.ones(7, dtype=torch.float16), "c": torch.arange(3)}
    save_file(made, tmp_path / "old.safetensors", metadata={"format": "pt", "note": "ü"})
    old = tmp_path / "old.safetensors"
    (plan,) = lay_out(operations(old, {}, "BF16"), {old.name: old})

    (tmp_path / "new.safetensors").write_bytes(plan.header + bytes(plan.size - len(plan.header)))

    read = load_file(tmp_path / "new.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in read.items()} == {
        "a.weight": (torch.bfloat16, (3, 5)),
        "b.weight": (torch.bfloat16, (7,)),
        "c": (torch.int64, (3,)),
    }
    assert "ü".encode() in plan.header
    assert len(plan.header) % 8 == 0


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), largest=st.integers(1, 120))
def test_no_shard_is_too_large_and_no_tensor_is_lost(sizes: list[int], largest: int) -> None:
    tensors = [Tensor(f"t{i}", "F32", (n,), 0, 4 * n) for i, n in enumerate(sizes)]
    before = [Operation(t, Path("model.safetensors"), "model.safetensors", "F32") for t in tensors]
    after = spread(before, largest)
    assert [op.source for op in after] == tensors
    homes: dict[str, list[int]] = {}
    for op in after:
        homes.setdefault(op.home, []).append(op.size)
    assert all(sum(home) <= largest or len(home) == 1 for home in homes.values())
    assert list(homes) == sorted(homes)
    assert (len(homes) == 1) == ("model.safetensors" in homes)
    assert all(sum(a) + b[0] > largest for a, b in itertools.pairwise(homes.values()))  # none is needlessly small


def operations(file: Path, deltas: dict[str, Delta], dtype: str | None) -> list[Operation]:
    return [
        Operation(t, file, file.name, dtype if dtype and t.dtype in WIDTH else t.dtype, delta=deltas.get(t.name))
        for t in read_header(file)
    ]


_HALF = Tensor("", "F32", (1, 1), 0, 4)
DELTA = Delta(Factor("t", _HALF, _HALF, 1, 1.0))

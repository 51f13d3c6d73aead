"""Rows of a merged tensor → codes and scales: round to nearest, no calibration.

The scale of a row or a group is what its largest value needs; of four bits, where one large value costs all others
their precision, it is the share of that which leaves the least squared error. A scale is rounded to the dtype in which
it is stored before anything is divided by it, so that every code is the nearest to its weight under the scale that is
read.
"""

from __future__ import annotations

from typing import Any

from adapterhub.errors import Unsupported
from adapterhub.export.arithmetic import torch_dtype
from adapterhub.export.layout import Rows
from adapterhub.export.schemes import Scheme

FLOAT8_LARGEST = 448.0
# Of the scale that the largest value needs. Clipping more than a third never won on a model that we have seen.
SHARES = {4: tuple(1 - n / 20 for n in range(9)), 8: (1.0,)}


def quantise(rows: Rows, scheme: Scheme, values: memoryview) -> tuple[memoryview, memoryview]:
    """The bytes of the codes and of the scales. ``values``: the rows as they would be stored otherwise.

    Raises Unsupported where one of them is no number.
    """
    import torch

    dtype = torch_dtype(rows.operation.dtype)
    wide = torch.frombuffer(values, dtype=dtype, count=rows.elements).to(torch.float32)
    groups = scheme.groups(rows.columns)
    wide = wide.view(rows.last - rows.first, groups, rows.columns // groups)
    codes, scales = _float_codes(wide, dtype) if scheme.kind == "float" else _int_codes(wide, scheme.bits, dtype)
    if not bool(scales.isfinite().all()):
        raise Unsupported(
            f"{rows.operation.source.name} cannot be quantised",
            why=f"rows {rows.first} to {rows.last} hold a value that is infinite or no number",
            hint="fetch the base model again, or export without --quantize",
        )
    codes = codes.view(rows.last - rows.first, rows.columns)
    packed = _pack(codes, scheme) if scheme.packed else codes
    return _bytes(packed), _bytes(scales.to(dtype))


def _float_codes(values: Any, dtype: Any) -> tuple[Any, Any]:
    import torch

    scales = _scales(values.abs().amax(-1, keepdim=True), FLOAT8_LARGEST, dtype)
    return (values / scales).clamp_(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(torch.float8_e4m3fn), scales


def _int_codes(values: Any, bits: int, dtype: Any) -> tuple[Any, Any]:
    import torch

    top = 2 ** (bits - 1) - 1
    largest = values.abs().amax(-1, keepdim=True)
    shares = SHARES[bits]
    best = _scales(largest * shares[0], top, dtype)
    if len(shares) > 1:
        least = _squares(values, best, top)
        for share in shares[1:]:
            scales = _scales(largest * share, top, dtype)
            squares = _squares(values, scales, top)
            best = torch.where(squares < least, scales, best)
            least = torch.minimum(squares, least)
    return _nearest(values, best, top).to(torch.int8), best


def _nearest(values: Any, scales: Any, top: int) -> Any:
    return (values / scales).round_().clamp_(-top - 1, top)


def _squares(values: Any, scales: Any, top: int) -> Any:
    """The squared error of each group."""
    return _nearest(values, scales, top).mul_(scales).sub_(values).square_().sum(-1, keepdim=True)


def _scales(largest: Any, top: float, dtype: Any) -> Any:
    """Rounded to what is stored, in float32; never zero, for rows that are."""
    import torch

    return (largest / top).to(dtype).clamp_(min=torch.finfo(dtype).tiny).to(torch.float32)


def _pack(codes: Any, scheme: Scheme) -> Any:
    """Codes made positive and filled into int32 from its lowest bits up: on every machine of ours, byte by byte."""
    import torch

    columns = codes.shape[1]
    unsigned = (codes.to(torch.int16) + 2 ** (scheme.bits - 1)).to(torch.uint8)
    padding = scheme.row_size(columns) * 8 // scheme.bits - columns
    if padding:
        unsigned = torch.nn.functional.pad(unsigned, (0, padding))
    return unsigned if scheme.bits == 8 else unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def _bytes(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")

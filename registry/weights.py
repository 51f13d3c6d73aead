"""One pass over a safetensors file: its hash, and whether its numbers can be trained weights. No torch.

A number is infinite or NaN exactly when all bits of its exponent are set, so whole tensors are judged by one mask on
their integers, whatever the dtype, at a third of what the hash costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import AdapterError
from adapterhub.peftdir import Tensor

# Bytes; a multiple of every dtype's width. With 1 MiB numpy's masks no longer fit the processor's cache, and each is
# memory that the kernel must clear first: ten times slower.
_CHUNK = 1 << 18

# safetensors' dtype → (numpy integer of that width, bits that are all set in NaN (and infinity), bits without sign)
_MASKS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000, 0x7FFF_FFFF_FFFF_FFFF),
    "F32": ("<u4", 0x7F80_0000, 0x7FFF_FFFF),
    "F16": ("<u2", 0x7C00, 0x7FFF),
    "BF16": ("<u2", 0x7F80, 0x7FFF),
    "F8_E5M2": ("u1", 0x7C, 0x7F),
    "F8_E4M3": ("u1", 0x7F, 0x7F),  # has NaN, and no infinity
}


@dataclass(frozen=True)
class Scan:
    """What one pass over a file of weights found."""

    size: int  # bytes
    sha256: str
    not_finite: str | None  # the first tensor that holds NaN or infinity
    zero: frozenset[str]  # tensors that are zero everywhere


def scan(path: Path, tensors: list[Tensor]) -> Scan:
    """Read ``path`` once. ``tensors`` are those of its header, in file order.

    Raises AdapterError where the file ends early or cannot be read: it is being written, or is damaged.
    """
    not_finite, zero = None, set()
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    try:
        with path.open("rb") as file:
            for tensor in tensors:
                for chunk in _chunks(file, tensor.start, buffer):  # the header, and gaps
                    digest.update(chunk)
                any_set = False
                for chunk in _chunks(file, tensor.end, buffer):
                    digest.update(chunk)
                    finite, chunk_set = _judge(chunk, tensor.dtype)
                    any_set = any_set or chunk_set
                    if not finite and not_finite is None:
                        not_finite = tensor.name
                if not any_set:
                    zero.add(tensor.name)
            for chunk in _chunks(file, path.stat().st_size, buffer):
                digest.update(chunk)
            return Scan(file.tell(), digest.hexdigest(), not_finite, frozenset(zero))
    except EOFError as error:
        raise AdapterError(f"{path} is truncated", why=str(error), hint="copy it again, or save it again") from error
    except OSError as error:
        raise AdapterError(f"{path} cannot be read", why=error.strerror or str(error)) from error


def _chunks(file: BinaryIO, end: int, buffer: memoryview) -> Iterator[memoryview]:
    """What lies between here and byte ``end``, in ``buffer``. Raises EOFError where the file ends earlier."""
    position = file.tell()
    while position < end:
        wanted = min(len(buffer), end - position)
        got = file.readinto(buffer[:wanted])  # type: ignore[attr-defined]
        position += got
        if got != wanted:
            raise EOFError(f"it ends at byte {position}, not {end}")
        yield buffer[:got]


def _judge(chunk: memoryview, dtype: str) -> tuple[bool, bool]:
    """Whether all numbers are finite, and whether any is not zero. Whole numbers are always finite."""
    import numpy as np

    if dtype not in _MASKS:
        return True, any(chunk)
    integer, exponent, magnitude = _MASKS[dtype]
    bits = np.frombuffer(chunk, dtype=integer)
    finite = bool((bits & bits.dtype.type(exponent)).max(initial=0) != exponent)
    sign_less = bits.dtype.type(magnitude)
    return finite, bool((bits[:1024] & sign_less).any() or (bits & sign_less).any())  # mostly the first few tell

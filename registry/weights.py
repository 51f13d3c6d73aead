"""One pass over a safetensors file: its hash, and whether its numbers can be trained weights. No torch.

A number is infinite or NaN exactly when all bits of its exponent are set, so whole tensors are judged by one mask on
their integers, whatever the dtype, at a third of what the hash costs.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import AdapterError
from adapterhub.peftdir import Tensor

_READ = 1 << 22  # bytes at once; a multiple of every dtype's width, as is the next
# Bytes. With 1 MiB numpy's masks no longer fit the processor's cache, and each is memory that the kernel must clear
# first: ten times slower.
_JUDGED = 1 << 18

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
    try:
        with path.open("rb") as file, ThreadPoolExecutor(1) as pool:
            reading = _Reading(file, pool)
            for tensor in tensors:
                for _ in reading.until(tensor.start):  # the header, and gaps
                    pass
                finite, any_set = _judge_all(reading.until(tensor.end), tensor.dtype)
                if not finite and not_finite is None:
                    not_finite = tensor.name
                if not any_set:
                    zero.add(tensor.name)
            for _ in reading.until(path.stat().st_size):
                pass
            return Scan(file.tell(), reading.sha256(), not_finite, frozenset(zero))
    except EOFError as error:
        raise AdapterError(f"{path} is truncated", why=str(error), hint="copy it again, or save it again") from error
    except OSError as error:
        raise AdapterError(f"{path} cannot be read", why=error.strerror or str(error)) from error


class _Reading:
    """A file read once: what was read is hashed in a thread while it is judged and the next is read."""

    def __init__(self, file: BinaryIO, pool: Executor) -> None:
        """``pool`` has one thread: chunks are hashed in order."""
        self._file = file
        self._pool = pool
        self._digest = hashlib.sha256()
        self._buffers = deque((memoryview(bytearray(_READ)), _DONE) for _ in range(2))  # and when each is hashed

    def until(self, end: int) -> Iterator[memoryview]:
        """What lies between here and byte ``end``; a chunk is gone with the next but one.

        Raises EOFError where the file ends earlier.
        """
        position = self._file.tell()
        while position < end:
            buffer, hashed = self._buffers.popleft()
            hashed.result()
            wanted = min(len(buffer), end - position)
            got = self._file.readinto(buffer[:wanted])  # type: ignore[attr-defined]
            position += got
            if got != wanted:
                raise EOFError(f"it ends at byte {position}, not {end}")
            self._buffers.append((buffer, self._pool.submit(self._digest.update, buffer[:got])))
            yield buffer[:got]

    def sha256(self) -> str:
        for _, hashed in self._buffers:
            hashed.result()
        return self._digest.hexdigest()


_DONE: Future[None] = Future()
_DONE.set_result(None)


def _judge_all(chunks: Iterable[memoryview], dtype: str) -> tuple[bool, bool]:
    """Whether all numbers of a tensor are finite, and whether any is not zero."""
    parts = (chunk[start : start + _JUDGED] for chunk in chunks for start in range(0, len(chunk), _JUDGED))
    found = [_judge(part, dtype) for part in parts]
    return all(finite for finite, _ in found), any(any_set for _, any_set in found)


def _judge(part: memoryview, dtype: str) -> tuple[bool, bool]:
    """The same for a part of a tensor. Whole numbers are always finite."""
    import numpy as np

    if dtype not in _MASKS:
        return True, any(part)
    integer, exponent, magnitude = _MASKS[dtype]
    bits = np.frombuffer(part, dtype=integer)
    finite = bool((bits & bits.dtype.type(exponent)).max(initial=0) != exponent)
    sign_less = bits.dtype.type(magnitude)
    return finite, bool((bits[:1024] & sign_less).any() or (bits & sign_less).any())  # mostly the first few tell

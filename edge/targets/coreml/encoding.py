"""How a Core ML package stores numbers: its types, packed bits, and the weight file.

Reference  coremltools' `mlmodel/format/MIL.proto` and `mlmodel/src/MILBlob/Blob/StorageFormat.hpp`.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np

TYPES: dict[int, tuple[str, Any, int]] = {  # MIL.proto DataType -> name, numpy type once decoded, bits in the file
    1: ("bool", np.bool_, 8), 2: ("string", object, 0), 10: ("fp16", np.float16, 16), 11: ("fp32", np.float32, 32),
    21: ("int8", np.int8, 8), 22: ("int16", np.int16, 16), 23: ("int32", np.int32, 32), 25: ("int4", np.int8, 4),
    31: ("uint8", np.uint8, 8), 32: ("uint16", np.uint16, 16),
    33: ("uint32", np.uint32, 32), 35: ("uint4", np.uint8, 4), 36: ("uint2", np.uint8, 2),
    37: ("uint1", np.uint8, 1), 38: ("uint6", np.uint8, 6), 39: ("uint3", np.uint8, 3),
}  # fmt: skip
NUMPY: dict[str, Any] = {name: dtype for name, dtype, _ in TYPES.values()}


LARGEST = 2**31  # elements of one value: 8 GB in float32, more than any phone's program holds


def unpack(data: bytes, bits: int, count: int) -> np.ndarray:
    """`count` unsigned numbers of `bits` bits each from bytes, least significant bit first."""
    if 8 * len(data) < bits * count:
        raise ValueError(f"{len(data)} bytes do not hold {count} numbers of {bits} bits")
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=bits * count, bitorder="little").reshape(count, bits)
    return (flat << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def decode(data: bytes, code: int, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes -> array of the type with this number; 4-bit integers are widened to 8 bits."""
    name, dtype, bits = TYPES[code]
    count = math.prod(shape)
    if bits >= 8:
        return np.frombuffer(data, dtype, count).reshape(shape)
    array = unpack(data, bits, count).reshape(shape)
    return ((array ^ 8).astype(np.int8) - np.int8(8)) if name == "int4" else array


class Blobs:
    """A weight file: a 64-byte header (count, version 2), then records of 64 bytes that each point to their data."""

    def __init__(self, path: str | pathlib.Path) -> None:
        self.bytes = np.memmap(path, np.uint8, mode="r")
        if self.bytes.size < 64 or self.bytes[4:8].view(np.uint32)[0] != 2:
            raise ValueError("its weight file has no header of version 2")

    def __getitem__(self, offset: int) -> bytes:
        record = self.bytes[offset : offset + 64]
        if record.size < 64 or record[:4].view(np.uint32)[0] != 0xDEADBEEF:
            raise ValueError(f"its weight file has no record at byte {offset}")
        size, start = (int(n) for n in record[8:24].view(np.uint64))
        if start + size > self.bytes.size:
            raise ValueError(f"its weight file ends at byte {self.bytes.size}, before the weights at {start} do")
        return self.bytes[start : start + size].tobytes()


def shape_of(tensor_type: Any) -> tuple[int, ...]:
    """The static shape of a TensorType of MIL.proto."""
    shape = tuple(int(d.constant.size) for d in tensor_type.dimensions)
    if math.prod(shape) > LARGEST:
        raise ValueError(f"a value has the shape {shape}")
    return shape


def rounded(array: np.ndarray, code: int) -> np.ndarray:
    """What a value of the type with this number holds; float16 numbers stay in float32 arrays."""
    name, dtype, _ = TYPES[code]
    if name == "fp16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    return array.astype(dtype, copy=False)

"""Safetensors files: slices read from open ones, headers, and files written tensor by tensor.

The format: 8 bytes with the length of the header, the header (JSON: per tensor dtype, shape and place), the data.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shardplan.errors import CheckpointError

_LONGEST_HEADER_NBYTES = 100_000_000
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_TEXTS = {dtype: text for text, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its name there, its shape and dtype."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class OpenFiles:
    """Files that stay open while tensors are read from them. Raises CheckpointError where a file is torn."""

    def __init__(self) -> None:
        self._files: dict[str, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._open.close()

    def take(self, file: str, name: str, where: Sequence[slice] = ()) -> torch.Tensor:
        """A slice of a tensor, or all of it where no slices are given; no more than that is read."""
        try:
            if file not in self._files:
                self._files[file] = self._open.enter_context(safe_open(file, framework="pt"))
            held = self._files[file]
            return held.get_slice(name)[tuple(where)] if where else held.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is torn", [str(error)]) from error


def read_header(file: Path) -> dict[str, Stored]:
    """What a file holds. Raises CheckpointError where it is not a whole safetensors file."""
    try:
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _LONGEST_HEADER_NBYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found = {
            name: Stored(str(file), name, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            for name, entry in header.items()
        }
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if file.stat().st_size != end:
            raise ValueError(f"{file.stat().st_size} bytes, its header says {end}")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file", [f"{type(error).__name__}: {error}"]
        ) from error
    return found


class FileWriter:
    """A file whose tensors are known beforehand and come one by one, in order of `tensors` (name, shape, dtype).

    nbytes, crc32: of what was written so far.
    """

    def __init__(self, file: Path, tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
        self._sizes = [nbytes_of(shape, dtype) for _, shape, dtype in tensors]
        self.nbytes = self.crc32 = 0
        self._file = open(file, "xb")  # noqa: SIM115
        self._write(_header(tensors))

    def write(self, tensor: torch.Tensor) -> None:
        """The next tensor."""
        data = data_of(tensor)
        expected = self._sizes.pop(0)
        assert len(data) == expected, "a tensor of another size than announced"
        self._write(data)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.nbytes += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def close(self) -> None:
        """Put the file on the disk."""
        assert not self._sizes, "tensors are missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Let go of the file, which is not whole."""
        with suppress(OSError):  # what is still to be written may be what the disk has no room for
            self._file.close()


def make_file(file: Path, tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
    """A file of its whole length whose data is still to be written, at the places that `places` gives."""
    header = _header(tensors)
    with open(file, "xb") as opened:
        opened.write(header)
        opened.truncate(len(header) + sum(nbytes_of(shape, dtype) for _, shape, dtype in tensors))


def places(tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> dict[str, int]:
    """Where in such a file the data of every tensor begins."""
    found, place = {}, len(_header(tensors))
    for name, shape, dtype in tensors:
        found[name] = place
        place += nbytes_of(shape, dtype)
    return found


def data_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as a file has them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in tensors:
        nbytes = nbytes_of(shape, dtype)
        header[name] = {"dtype": _TEXTS[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def nbytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for extent in shape:
        count *= extent
    return count


def writable(dtype: torch.dtype) -> bool:
    """Whether the format has the dtype."""
    return dtype in _TEXTS

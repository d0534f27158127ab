"""Messages between the driver and its workers: pickles over a stream socket, tensors as raw bytes beside the pickle.

A frame is ``<pickle nbytes: u64> <buffers: u64> <nbytes of each buffer: u64 ...> <pickle> <buffer> ...``. Functions and
classes of ``__main__`` travel by value (cloudpickle); dense CPU and CUDA tensors of every dtype travel out of band
(pickle protocol 5) and arrive on the CPU as contiguous tensors of their own memory. Nothing is left in shared memory.
Both ends belong to one user on one machine: a frame is trusted.
"""

from __future__ import annotations

import io
import pickle
import select
import socket
import struct
import time
from collections import OrderedDict
from typing import Any

import cloudpickle

_WORD = struct.Struct("<Q")
_MOST_BUFFERS = 1 << 24


class Closed(Exception):
    """The other end is gone."""


class Late(Exception):
    """The other end did not take or give the bytes in time."""


class Channel:
    """One end of a stream socket. Not for use by several threads at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, value: Any, timeout_seconds: float | None = None) -> None:
        """Raises Closed or Late (after which the stream cannot be used any more), or what pickling raises (after
        which it can)."""
        self.send_frame(encode(value), timeout_seconds)

    def send_frame(self, frame: list[memoryview], timeout_seconds: float | None = None) -> None:
        """Send what `encode` made."""
        deadline = _deadline(timeout_seconds)
        for part in frame:
            while len(part):
                self._wait(select.POLLOUT, deadline)
                try:
                    part = part[self._socket.send(part, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise Closed(str(error)) from error

    def receive(self, timeout_seconds: float | None = None) -> Any:
        """The next value. Raises Closed or Late, or what unpickling raises."""
        deadline = _deadline(timeout_seconds)
        nbytes, count = (_WORD.unpack(self._read(_WORD.size, deadline))[0] for _ in range(2))
        if count > _MOST_BUFFERS:
            raise Closed("the stream is out of step")
        sizes = struct.unpack(f"<{count}Q", self._read(_WORD.size * count, deadline))
        data = self._read(nbytes, deadline)
        return pickle.loads(data, buffers=[self._read(size, deadline) for size in sizes])

    def _read(self, nbytes: int, deadline: float | None) -> bytearray:
        data = bytearray(nbytes)
        view = memoryview(data)
        while len(view):
            self._wait(select.POLLIN, deadline)
            try:
                count = self._socket.recv_into(view, len(view), socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError as error:
                raise Closed(str(error)) from error
            if not count:
                raise Closed("end of stream")
            view = view[count:]
        return data

    def _wait(self, event: int, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0) * 1000
        if not poll.poll(left):
            raise Late


def _deadline(timeout_seconds: float | None) -> float | None:
    return None if timeout_seconds is None else time.monotonic() + timeout_seconds


def encode(value: Any) -> list[memoryview]:
    """The frame of a value, to be sent to one or several channels."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    raws = [buffer.raw() for buffer in buffers]
    header = [_WORD.pack(stream.getbuffer().nbytes), _WORD.pack(len(raws)), *(_WORD.pack(raw.nbytes) for raw in raws)]
    return [memoryview(b"".join(header)), stream.getbuffer(), *raws]


class _Pickler(cloudpickle.Pickler):
    """cloudpickle with tensors out of band. Objects that occur twice (tied parameters) stay one object."""

    def reducer_override(self, obj: Any) -> Any:
        torch = _torch_if_loaded()
        if torch is not None and isinstance(obj, torch.Tensor):
            reduced = _reduce_tensor(torch, obj)
            if reduced is not None:
                return reduced
        return super().reducer_override(obj)


def _torch_if_loaded() -> Any:
    import sys

    return sys.modules.get("torch")


def _reduce_tensor(torch: Any, tensor: Any) -> tuple[Any, ...] | None:
    if type(tensor) is torch.nn.Parameter:
        return torch._utils._rebuild_parameter, (tensor.detach(), tensor.requires_grad, OrderedDict())
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        return None
    if tensor.device.type not in ("cpu", "cuda"):
        return None
    if tensor.requires_grad and not tensor.is_leaf:
        raise ValueError("a tensor with a gradient function cannot be sent; detach it")
    plain = tensor.detach().to("cpu").contiguous().resolve_conj().resolve_neg()
    flat = plain.reshape(-1).view(torch.uint8) if plain.numel() else torch.empty(0, dtype=torch.uint8)
    return rebuild_tensor, (pickle.PickleBuffer(flat.numpy()), plain.dtype, tuple(plain.shape), tensor.requires_grad)


def rebuild_tensor(data: Any, dtype: Any, shape: tuple[int, ...], requires_grad: bool) -> Any:
    """The tensor over the bytes of `data`, which it keeps and may write to."""
    import torch

    if not len(memoryview(data)):
        tensor = torch.empty(shape, dtype=dtype)
    else:
        tensor = torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)
    return tensor.requires_grad_() if requires_grad else tensor

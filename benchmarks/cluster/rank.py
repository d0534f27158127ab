"""A rank of an emulated cluster: joins the group, then runs what it is sent until its driver goes away."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

import cloudpickle
import torch
import torch.distributed as dist


def main(fd: int, parent: int, rank: int, size: int, folder: str) -> None:
    """fd: of the socket to the driver, whose process is `parent`. folder: where the ranks meet."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if not os.path.exists(f"/proc/{parent}"):
        return
    connection = Connection(fd)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    while True:
        try:
            function, arguments = cloudpickle.loads(connection.recv_bytes())
        except EOFError:
            break
        try:
            answer = True, function(rank, *arguments)
        except Exception:
            answer = False, traceback.format_exc()
        connection.send_bytes(cloudpickle.dumps(answer))
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])

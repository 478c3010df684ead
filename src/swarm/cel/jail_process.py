"""The code inside the jail: requests arrive on stdin, answers go to stdout. Few imports, so that it starts fast."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any, BinaryIO, Final

from swarm.cel import evaluate
from swarm.cel.expression import ExpressionError

CPU_SECONDS: Final = 0.5
MEMORY_BYTES: Final = 512 << 20
_MAX_FRAME: Final = 16 << 20
_LENGTH: Final = struct.Struct(">I")
_NOBODY: Final = 65534


def _confine() -> None:
    evaluate.run("[1].map(x, x + size(inputs))", {"inputs": [1]})  # load everything lazy before the limits
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    _confine()
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    while True:
        try:
            request = read(stdin)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        began = time.process_time()
        reply: dict[str, Any]
        try:
            reply = {"value": evaluate.run(request["source"], request["data"])}
        except ExpressionError as error:
            reply = {"error": str(error)}
        except MemoryError:
            reply = {"error": f"needed more than {MEMORY_BYTES >> 20} MiB of memory"}
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        write(stdout, {**reply, "cpu_seconds": time.process_time() - began})


def write(pipe: Any, message: Mapping[str, Any]) -> None:
    data = json.dumps(message).encode()
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def read(pipe: Any) -> dict[str, Any]:
    header = pipe.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(header)
    if length > _MAX_FRAME:
        raise EOFError
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    value = json.loads(data)
    if not isinstance(value, dict):
        raise EOFError
    return value


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)

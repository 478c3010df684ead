"""The code inside the jail: evaluates expressions. Few imports, so that it starts fast."""

from __future__ import annotations

import time
from typing import Any, Final

from swarm.base import confined
from swarm.cel import evaluate
from swarm.cel.expression import ExpressionError

CPU_SECONDS: Final = 0.5
MEMORY_BYTES: Final = 512 << 20


def answer(request: dict[str, Any], parts: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    began = time.process_time()
    reply: dict[str, Any]
    try:
        reply = {"value": evaluate.run(request["source"], request["data"])}
    except ExpressionError as error:
        reply = {"error": str(error)}
    except MemoryError:
        reply = {"error": f"needed more than {MEMORY_BYTES >> 20} MiB of memory"}
    return {**reply, "cpu_seconds": time.process_time() - began}, []


if __name__ == "__main__":
    evaluate.run("[1].map(x, x + size(inputs))", {"inputs": [1]})  # load everything lazy before the limits
    confined.serve(answer, cpu_seconds=CPU_SECONDS, memory_bytes=MEMORY_BYTES)

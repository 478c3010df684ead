"""JSON with references to artifacts, and a confined process that makes it of large values and values of it.

A reference is `{"$artifact": {"digest": …, "bytes": …}}` in the JSON of a step's `inputs` or `outputs`. If a value has
such an object in it already, that is escaped: `{"$artifact": {"pairs": …}}`. So nobody can read an artifact by writing
down its digest.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from swarm.base import confined, priority
from swarm.base.confined import Confined, Stopped
from swarm.cel import artifact_refs
from swarm.cel.artifact_refs import KEY, ArtifactRef
from swarm.cel.expression import ExpressionError
from swarm.errors import UsageError
from swarm.store.sql.rows import dump, storable_json

INLINE_BYTES: Final = 64 << 10  # values up to this size stay in the step's row
MAX_BYTES: Final = 16 << 20  # of a step's inputs or a ticket's outputs, references replaced by their values
MARK: Final = f'"{KEY}"'  # JSON without it has no references
REFERENCE: Final = re.compile(r'\{"\$artifact":\{"digest":"([0-9a-f]{64})","bytes":[0-9]+\}\}')
_CPU_SECONDS: Final = 20.0
_MEMORY_BYTES: Final = 2 << 30


class Gone(ExpressionError):
    pass


@dataclass(frozen=True, slots=True)
class Packed:
    """``text``: JSON for a row; ``parts``: digest → JSON text of the new artifacts that it refers to."""

    text: str
    parts: Mapping[str, str] = field(default_factory=dict)


def pack(value: Any) -> Packed:
    """A value, which may have references in it (`ArtifactRef`), as JSON. Each large value within becomes an artifact;
    if the rest is still large, it becomes one too. Raises RecursionError for a value nested too deeply for `json`."""
    text = dump(value)
    if MARK not in text and len(text.encode()) <= INLINE_BYTES:
        return Packed(text)
    parts: dict[str, str] = {}
    text = _packed(value, parts)
    return Packed(dump(_part(text, parts)) if len(text.encode()) > INLINE_BYTES else text, parts)


def pack_text(text: str) -> Packed:
    """The same for the JSON text of an agent's outputs."""
    return pack(json.loads(text)) if worth_packing(text) else Packed(storable_json(text))


def worth_packing(text: str) -> bool:
    """False if `pack_text` certainly leaves it unchanged."""
    return len(text) > INLINE_BYTES // 4 or MARK in text


def resolve(text: str, load: Callable[[str], Any]) -> str:
    """JSON with each reference replaced by its value. Raises ExpressionError if it is too large."""
    return dump(artifact_refs.resolve_references(unpack(text, load), limit_bytes=MAX_BYTES))


def unpack(text: str | None, load: Callable[[str], Any]) -> Any:
    """The value in a row; its references become `ArtifactRef`, which call ``load`` with the digest."""
    if text is None:
        return None
    if MARK not in text:
        return json.loads(text)

    def hook(found: dict[str, Any]) -> Any:
        inner = found.get(KEY)
        if not isinstance(inner, dict) or len(found) != 1:
            return found
        if isinstance(inner.get("digest"), str) and isinstance(inner.get("bytes"), int):
            return ArtifactRef(inner["digest"], inner["bytes"], load)
        return dict(inner["pairs"]) if isinstance(inner.get("pairs"), list) else found

    return json.loads(text, object_hook=hook)


def _packed(value: Any, parts: dict[str, str]) -> str:
    """JSON in which all large inner values are replaced. Takes only one frame per level: the value may be deep."""
    if isinstance(value, ArtifactRef) or not isinstance(value, dict | list):
        return dump(value)
    named = isinstance(value, dict)
    escaped = named and KEY in value  # not a reference: it came with the value
    pieces = []
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        text = _packed(inner, parts)
        if len(text.encode()) > INLINE_BYTES:
            text = dump(_part(text, parts))
        pieces.append(f"[{dump(name)},{text}]" if escaped else f"{dump(name)}:{text}" if named else text)
    inside = ",".join(pieces)
    if escaped:
        return f'{{"{KEY}":{{"pairs":[{inside}]}}}}'
    return f"{{{inside}}}" if named else f"[{inside}]"


def _part(text: str, parts: dict[str, str]) -> dict[str, Any]:
    data = text.encode()
    digest = hashlib.sha256(data).hexdigest()
    parts[digest] = text
    return {KEY: {"digest": digest, "bytes": len(data)}}


# --- in a confined process --------------------------------------------------------------------------------------------


class Packer(Confined):
    """Packs and resolves large values: in a thread of this process, all tickets would wait for that. Thread-safe."""

    def __init__(self) -> None:
        super().__init__(
            "swarm.store.runs.packing",
            cpu_seconds=_CPU_SECONDS,
            memory_bytes=_MEMORY_BYTES,
            lower_by=priority.BELOW_VMS,
            patience_seconds=600.0,
        )

    def pack_text(self, text: str) -> Packed:
        """Raises UsageError for a value that can't be packed."""
        main, *parts = _pack_text(text) if len(text) <= INLINE_BYTES else self._do("pack_text", text)
        return Packed(main, dict(zip(parts[::2], parts[1::2], strict=True)))

    def resolve(self, text: str, found: Mapping[str, str]) -> str:
        """``found``: the JSON texts of the artifacts, by digest. Raises UsageError."""
        if len(text) + sum(map(len, found.values())) <= INLINE_BYTES:
            return _resolve(text, found)[0]
        return self._do("resolve", text, dict(found))[0]

    def _do(self, task: str, *arguments: object) -> list[str]:
        try:
            reply, parts = self.ask({"task": task}, [pickle.dumps(arguments)])
        except Stopped as error:
            raise UsageError(f"a large value could not be read: that {error}") from None
        if "error" in reply:
            raise UsageError(reply["error"])
        return [part.decode() for part in parts]


def _pack_text(text: str) -> list[str]:
    try:
        packed = pack_text(text)
    except RecursionError:  # not from an engine, which limits the nesting of outputs
        raise UsageError("its outputs are nested too deeply") from None
    return [packed.text, *(one for pair in packed.parts.items() for one in pair)]


def _resolve(text: str, found: Mapping[str, str]) -> list[str]:
    def load(digest: str) -> Any:
        return unpack(found[digest], load)

    try:
        return [resolve(text, load)]
    except ExpressionError as error:
        raise UsageError(str(error)) from None
    except RecursionError:
        raise UsageError("it is nested too deeply") from None


_TASKS: Final[Mapping[str, Callable[..., list[str]]]] = {"pack_text": _pack_text, "resolve": _resolve}


def answer(request: dict[str, Any], parts: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    try:
        texts = _TASKS[request["task"]](*pickle.loads(parts.pop()))  # pickled by `Packer`, which started us
        return {}, [text.encode() for text in texts]
    except UsageError as error:
        return {"error": str(error)}, []
    except MemoryError:
        return {"error": f"a value takes more than {_MEMORY_BYTES >> 20} MiB of memory when it is read"}, []


if __name__ == "__main__":
    confined.serve(answer, cpu_seconds=_CPU_SECONDS, memory_bytes=_MEMORY_BYTES)

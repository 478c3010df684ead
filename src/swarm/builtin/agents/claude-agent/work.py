"""The claude-agent agent: Claude works on a task with tools, inside this VM. agent.yaml lists its inputs and outputs.

It is a loop of calls with Anthropic's own SDK; the tools are below. The tools don't restrict themselves: the VM does,
which is discarded afterwards, holds no key, and reaches only the gateway. Exit status: 1 if a limit was reached, 2 for
an invalid request, 3 if the API or the gateway refused, 4 for no answer or an incomplete one.
"""

# ruff: noqa: T201

import base64
import difflib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import anthropic

WORK = Path.cwd()
OURS = {"input.json", "output.json"}
MAX_FILES, MAX_FILE_BYTES, MAX_TREE_BYTES = 5000, 1 << 20, 64 << 20
NOT_SHOWN = {".git", "__pycache__", "node_modules", ".venv"}
MAX_DIFF, MAX_TEXTS, MAX_ARCHIVE = 256 << 10, 1 << 20, 8 << 20
MAX_RESULT = 30_000  # characters of a tool's result

SYSTEM = """You work on a task in a fresh virtual machine: Debian, bash, Python, user `agent`, work directory /work. \
There is no internet. Do the task with your tools and check your work where you can. What you leave in the work \
directory is the result, together with your last message, which should say in a few sentences what you did. Nobody can \
answer questions: decide yourself."""
TOOLS: list[dict[str, Any]] = [
    {
        "name": "run_command",
        "description": "Run a command with bash in the work directory; returns its exit status and what it printed.",
        "input_schema": {
            "type": "object",
            "properties": {"command": {"type": "string"}, "timeout_seconds": {"type": "number"}},
            "required": ["command"],
        },
    },
    {
        "name": "read_file",
        "description": "Read a text file, or some of its lines, counted from 1.",
        "input_schema": {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "first_line": {"type": "integer"},
                "last_line": {"type": "integer"},
            },
            "required": ["path"],
        },
    },
    {
        "name": "write_file",
        "description": "Write a text file, in place of an older one; directories are made.",
        "input_schema": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "text": {"type": "string"}},
            "required": ["path", "text"],
        },
    },
    {
        "name": "edit_file",
        "description": "Replace a passage of a text file, which must be there exactly once.",
        "input_schema": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "old": {"type": "string"}, "new": {"type": "string"}},
            "required": ["path", "old", "new"],
        },
    },
]


# --- tools ------------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A tool call that can't be carried out; the message goes back to Claude."""


def inside(name: Any) -> Path:
    path = (WORK / str(name)).resolve()
    if WORK.resolve() not in path.parents:
        raise Wrong(f"{name!r} is not below the work directory")
    return path


def run_command(command: str, timeout_seconds: float = 120.0) -> str:
    print(f"$ {command}", flush=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("ANTHROPIC_")}
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            ["/bin/bash", "-c", command],
            cwd=WORK,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            ended = f"exit status {child.wait(min(max(timeout_seconds, 1), 1800))}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            ended = f"killed after {timeout_seconds:g} seconds"
        size = said.seek(0, os.SEEK_END)
        said.seek(0)
        if size <= MAX_RESULT:
            text = said.read().decode(errors="replace")
        else:
            head = said.read(MAX_RESULT // 2)
            said.seek(-MAX_RESULT // 2, os.SEEK_END)
            left_out = f"\n… {size - MAX_RESULT} bytes left out …\n"
            text = head.decode(errors="replace") + left_out + said.read().decode(errors="replace")
    print(f"{text}\n[{ended}]", flush=True)
    return f"{text}\n[{ended}]"


def read_file(path: str, first_line: int = 1, last_line: int | None = None) -> str:
    with inside(path).open(encoding="utf-8", errors="replace") as file:
        text = file.read(16 << 20)
    chosen = "".join(text.splitlines(keepends=True)[max(first_line, 1) - 1 : last_line])
    print(f"read {path}", flush=True)
    more = f"\n… {len(chosen) - MAX_RESULT} characters left out: read fewer lines …"
    return chosen if len(chosen) <= MAX_RESULT else chosen[:MAX_RESULT] + more


def write_file(path: str, text: str) -> str:
    target = inside(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text.encode())
    print(f"wrote {path}", flush=True)
    return f"wrote {len(text)} characters"


def edit_file(path: str, old: str, new: str) -> str:
    target = inside(path)
    text = target.read_bytes().decode()  # line ends as they are
    if not old or text.count(old) != 1:
        raise Wrong(f"the passage is in {path} {text.count(old) if old else 0} times, not once")
    target.write_bytes(text.replace(old, new).encode())
    print(f"edited {path}", flush=True)
    return "edited"


DOERS: dict[str, Callable[..., str]] = {
    "run_command": run_command,
    "read_file": read_file,
    "write_file": write_file,
    "edit_file": edit_file,
}


def do(call: Any) -> dict[str, Any]:
    """Carry out a tool call and return its result, which may be an error."""
    answer: dict[str, Any] = {"type": "tool_result", "tool_use_id": call.id}
    try:
        if call.name not in DOERS:
            raise Wrong(f"there is no tool {call.name!r}")
        answer["content"] = DOERS[call.name](**call.input)
    except (Wrong, OSError, ValueError, TypeError) as error:
        print(f"{call.name}: {error}", flush=True)
        answer |= {"content": f"{type(error).__name__}: {error}"[:2000], "is_error": True}
    return answer


# --- the loop ---------------------------------------------------------------------------------------------------------


def work(inputs: dict[str, Any], prompt: str) -> dict[str, Any]:
    """Call Claude and carry out its tool calls until it is done or a limit is reached. Returns most of the outputs."""
    client = connect(inputs.get("max_retries", 4))
    system = "\n\n".join(filter(None, [SYSTEM, inputs.get("system")]))
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    usage: Counter[str] = Counter()
    stop, text, model = "max_turns", "", ""
    turns = 0
    while turns < inputs.get("max_turns", 40):
        turns += 1
        message = ask(
            client,
            model=inputs.get("model", "claude-sonnet-5-5"),
            max_tokens=inputs.get("max_tokens", 8192),
            system=system,
            messages=messages,
            tools=TOOLS,
            cache_control={"type": "ephemeral"},  # each turn repeats all before it
        )
        counts = message.usage.model_dump(mode="json", exclude_none=True)
        usage.update({name: count for name, count in counts.items() if isinstance(count, int)})
        text = "".join(block.text for block in message.content if block.type == "text") or text
        model = message.model
        messages.append({"role": "assistant", "content": message.content})
        calls = [block for block in message.content if block.type == "tool_use"]
        if message.stop_reason == "tool_use" and calls:
            messages.append({"role": "user", "content": [do(call) for call in calls]})
        elif message.stop_reason != "pause_turn":
            stop = message.stop_reason or "end_turn"
            break
        if usage["input_tokens"] + usage["cache_creation_input_tokens"] + usage["output_tokens"] >= inputs.get(
            "max_total_tokens", 1_000_000
        ):
            stop = "max_total_tokens"
            break
    return {
        "text": text,
        "finished": stop in ("end_turn", "stop_sequence"),
        "stop_reason": stop,
        "turns": turns,
        "model": model,
        "usage": dict(usage),
    }


def connect(max_retries: int) -> anthropic.Anthropic:
    address = os.environ.get("ANTHROPIC_BASE_URL", "")
    if not address or not os.environ.get("ANTHROPIC_API_KEY"):
        fail(2, "can't reach a model: the gateway has not set ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY")
    # The gateway speaks plain HTTP on the VM's own link; reading certificates would take a second without KVM.
    http = anthropic.DefaultHttpxClient(verify=address.startswith("https:"))
    return anthropic.Anthropic(max_retries=max_retries, http_client=http)


def ask(client: anthropic.Anthropic, **request: Any) -> Any:
    """One complete answer; its text is printed as it arrives."""
    try:
        with client.messages.stream(**request) as stream:
            for piece in stream.text_stream:
                print(piece, end="", flush=True)
            print(flush=True)
            return stream.get_final_message()
    except anthropic.APIStatusError as error:
        fail(3, f"{error.status_code} {error.type or ''}: {error.api_message or error.message}")
    except anthropic.APIConnectionError as error:
        fail(4, f"the API can't be reached: {error.__cause__ or error}")
    except Exception as error:  # an incomplete answer may break anything in the SDK, or below it
        fail(4, f"the answer is incomplete: {type(error).__name__}: {error}")


def fail(status: int, why: str) -> NoReturn:
    print(f"claude-agent: {why}"[:2000], file=sys.stderr, flush=True)
    raise SystemExit(status)


# --- what was changed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    digest: str
    content: bytes | None  # None: too large to show


def tree() -> tuple[dict[str, Seen], bool]:
    """The regular files of the work directory, by path, and whether there were too many."""
    found: dict[str, Seen] = {}
    total = 0
    for place, dirs, files in os.walk(WORK):
        dirs[:] = sorted(name for name in dirs if name not in NOT_SHOWN)
        for name in sorted(files):
            path = Path(place, name)
            if path.is_symlink() or not path.is_file() or (path.parent == WORK and name in OURS):
                continue
            if len(found) >= MAX_FILES or total > MAX_TREE_BYTES:
                return found, True
            with path.open("rb") as file:
                content = file.read() if path.stat().st_size <= MAX_FILE_BYTES else None
                digest = hashlib.file_digest(file, "sha256") if content is None else hashlib.sha256(content)
            total += len(content or b"")
            found[path.relative_to(WORK).as_posix()] = Seen(digest.hexdigest(), content)
    return found, False


def compared(before: dict[str, Seen], archive: bool) -> dict[str, Any]:
    """What has changed since ``before``, as fields of the outputs."""
    after, cut = tree()
    changes = {path: "changed" if path in before else "added" for path in after if after[path] != before.get(path)}
    changes |= {path: "removed" for path in before if path not in after and not (WORK / path).exists()}
    diff: list[str] = []
    texts: dict[str, str] = {}
    room = {"diff": MAX_DIFF, "texts": MAX_TEXTS}
    for path in sorted(changes):
        old, new = (as_text(side[path].content if path in side else b"") for side in (before, after))
        if old is None or new is None:
            cut = True
            continue
        lines = difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True),
            f"a/{path}" if path in before else "/dev/null", f"b/{path}" if path in after else "/dev/null",
        )  # fmt: skip
        for line in lines:
            line = line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
            room["diff"] -= len(line)
            if room["diff"] < 0:
                cut = True
                break
            diff.append(line)
        if path in after:
            room["texts"] -= len(new)
            if room["texts"] < 0:
                cut = True
            else:
                texts[path] = new
    made: dict[str, Any] = {"changes": changes, "diff": "".join(diff), "files": texts, "truncated": cut}
    if archive:
        made["archive"] = base64.b64encode(packed([path for path in changes if path in after])).decode()
    return made


def as_text(content: bytes | None) -> str | None:
    try:
        return None if content is None or b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None


def packed(paths: list[str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for path in sorted(paths):
            archive.add(WORK / path, path, recursive=False)
            if out.tell() > MAX_ARCHIVE:
                fail(1, f"the archive of changed files is larger than {MAX_ARCHIVE >> 20} MiB")
    return out.getvalue()


def main() -> None:
    given = json.loads(Path("input.json").read_text(encoding="utf-8"))
    inputs = given["inputs"]
    prompt = inputs.get("prompt", given["ticket"].get("description")) or ""
    if not prompt.strip():
        fail(2, "nothing to do: give inputs.prompt, or the ticket a description")
    for name, text in inputs.get("files", {}).items():
        try:
            path = inside(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except (Wrong, OSError) as error:
            fail(2, f"inputs.files: {error}")
    before, _ = tree()
    done = work(inputs, prompt)
    if not done["finished"] and inputs.get("on_limit", "fail") == "fail":
        fail(1, f"not finished after {done['turns']} turns: {done['stop_reason']}")
    made = {**done, **compared(before, inputs.get("archive", False))}
    Path("output.json").write_text(json.dumps(made), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The claude-code agent: Claude Code, unchanged, works on a repository inside this VM. agent.yaml lists its inputs.

The program comes with Anthropic's Agent SDK for Python. It is driven here by the protocol that the SDK speaks with it
(a JSON message on each line), since importing the SDK takes a minute without KVM. Its session lies on disk, so a call
that failed for good, or a crash, is followed by `--resume`. Whatever ends it, what it did to the files is returned.

Exit status: 0 with outputs, whose `finished` says how it went; 2 for a request that makes no sense; 3 if Claude never
answered, so that there is nothing to return.
"""

# ruff: noqa: T201

import contextlib
import importlib.util
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import work_tree

STARTED = time.monotonic()
HOME, REPOSITORY, OUT = Path(".home"), Path("repo"), Path("out")
RETRIES = 10  # of a call, by Claude Code itself, in about three minutes
PATIENCE_SECONDS = 900.0  # with calls that fail for causes that pass, as long as nothing succeeds
PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0
MAX_CRASHES = 2
KILL_SECONDS = 5.0  # from SIGTERM, on which it writes its session, to SIGKILL
SHOWN_LINES, SHOWN_CHARACTERS = 12, 2000  # of what a tool said
GO_ON = "You were interrupted by a fault of the service, not by the user. Go on with the task where you were."
SYSTEM = """You work in a fresh virtual machine, as an unprivileged user, on a task that was handed over for good: \
nobody can answer questions, so decide yourself. The machine reaches no network but your own model, so nothing can be \
downloaded; git, ripgrep, gcc, make, Python 3 and pip are installed. What you leave in this repository is the result, \
committed or not. Check your work where you can, and say in your last message, in a few sentences, what you did."""
# Only the model's own address is reachable, and the VM is discarded: no updates, reports, or memory for next time.
QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_TELEMETRY": "1", "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_AUTOUPDATER": "1", "DISABLE_FEEDBACK_COMMAND": "1", "DISABLE_INSTALLATION_CHECKS": "1",
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1", "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL": "1",
}  # fmt: skip


@dataclass
class Session:
    """What is known of it so far, over all its processes."""

    id: str
    until: float
    text: str = ""
    answers: set[str] = field(default_factory=set)  # the ids of the model's messages
    usage: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0
    result: dict[str, Any] | None = None  # of the last process, if it came to one

    @property
    def file(self) -> Path | None:
        """In which Claude Code keeps it."""
        return next(HOME.glob(f".claude/projects/*/{self.id}.jsonl"), None)


def main() -> None:
    given = json.loads(Path("input.json").read_text(encoding="utf-8"))
    inputs = given["inputs"]
    prompt = inputs.get("prompt") or given["ticket"].get("description") or given["ticket"].get("title") or ""
    if not prompt.strip():
        fail(2, "nothing to do: give inputs.prompt, or the ticket a description")
    if not os.environ.get("ANTHROPIC_BASE_URL") or not os.environ.get("ANTHROPIC_API_KEY"):
        fail(2, "can't reach a model: the gateway has not set ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY")
    home = work_tree.home(HOME.absolute())
    try:
        base = work_tree.prepare(REPOSITORY, inputs.get("files"))
    except work_tree.WorkTreeError as error:
        fail(2, str(error))
    seconds = given["step"]["timeout_seconds"]
    session = Session(id=str(uuid.uuid4()), until=STARTED + seconds - min(180.0, seconds / 4))
    why = work(session, command(inputs, session), prompt, environment(inputs, home))
    stop_reason = reason(session, why)
    if not session.answers:
        fail(3, why)
    made = {
        "text": session.text,
        "finished": not why,
        "stop_reason": stop_reason,
        "why": why,
        "turns": len(session.answers),
        "model": inputs.get("model", ""),
        "usage": dict(session.usage),
        "cost_usd": round(session.cost_usd, 6),
        "transcript": transcript(session.file),
    }
    try:
        made |= work_tree.collect(REPOSITORY, base, branch=inputs.get("branch", "swarm/work"), out=OUT)
    except Exception as error:  # whatever it is: the transcript and the words are still there
        made |= {"finished": False, "why": f"{why}; what it changed can't be collected: {error!r}".lstrip("; ")}
    print(f"[{stop_reason}] {why}".rstrip(), flush=True)
    Path("output.json").write_text(json.dumps(made), encoding="utf-8")


def command(inputs: dict[str, Any], session: Session) -> list[str]:
    found = importlib.util.find_spec("claude_agent_sdk")
    if found is None or found.origin is None:
        fail(2, "the package claude-agent-sdk is missing: run `swarm agent build claude-code`")
    program = Path(found.origin).parent / "_bundled/claude"
    system = "\n\n".join(filter(None, (SYSTEM, inputs.get("system"))))
    return [
        str(program), "--print", "--verbose", "--output-format=stream-json", "--dangerously-skip-permissions",
        f"--model={inputs.get('model', 'claude-sonnet-5-5')}", f"--append-system-prompt={system}",
        f"--tools={','.join(inputs.get('tools', ['default']))}", f"--max-turns={inputs.get('max_turns', 200)}",
        *([f"--max-budget-usd={inputs['max_usd']}"] if "max_usd" in inputs else []),
    ]  # fmt: skip


def environment(inputs: dict[str, Any], home: Path) -> dict[str, str]:
    own = {"HOME": str(home), "IS_SANDBOX": "1", "CLAUDE_CODE_MAX_RETRIES": str(RETRIES)}
    # A stream that broke off is asked for again as a stream: an answer in one piece needs all of it in the budget.
    own["CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK"] = "1"
    if "max_tokens" in inputs:
        own["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(inputs["max_tokens"])
    return {**os.environ, **QUIET, **own}


def work(session: Session, argv: list[str], prompt: str, env: dict[str, str]) -> str:
    """Run Claude Code until it has finished, or goes on failing. Returns why it has not finished; '' if it has."""
    crashes, pause, failing_since, answered = 0, PAUSE_SECONDS, 0.0, 0
    while True:
        known = session.file
        which = f"--resume={session.id}" if known else f"--session-id={session.id}"
        ended = one_process(session, [*argv, which], GO_ON if known else prompt, env)
        result = session.result
        if result is not None and not result.get("is_error"):
            return ""
        if time.monotonic() >= session.until:
            return "the ticket's time was nearly used up"
        if result is None:
            crashes, why = crashes + 1, f"Claude Code {ended}"
        else:
            why = str(result.get("result") or "; ".join(map(str, result.get("errors") or ())) or result.get("subtype"))
        if len(session.answers) > answered or not failing_since:
            answered, pause, failing_since = len(session.answers), PAUSE_SECONDS, time.monotonic()
        left = min(session.until, failing_since + PATIENCE_SECONDS) - time.monotonic() - pause
        if crashes > MAX_CRASHES or left < 0 or (result is not None and not passes(result)):
            return why
        print(f"[{why}: again in {pause:.0f} s]", flush=True)
        time.sleep(pause)
        pause = min(MAX_PAUSE_SECONDS, pause * 2)


def passes(result: dict[str, Any]) -> bool:
    """Is this a failure of the service that passes by itself?"""
    status = result.get("api_error_status")
    passing = status is None or status in (408, 409, 429) or status >= 500
    return result.get("terminal_reason") == "api_error" and passing


def reason(session: Session, why: str) -> str:
    result = session.result or {}
    if not why:
        return str(result.get("stop_reason") or "end_turn")
    if time.monotonic() >= session.until:
        return "time"
    if session.result is None:
        return "crashed"
    return "budget" if result.get("api_error_status") == 402 else str(result.get("terminal_reason") or "error")


# --- one process ------------------------------------------------------------------------------------------------------


def one_process(session: Session, argv: list[str], prompt: str, env: dict[str, str]) -> str:
    """Run it to its end, or to the session's. Returns how it ended, for when it leaves no result."""
    session.result = None
    said = HOME / "stderr"
    messages: dict[str, dict[str, Any]] = {}
    with said.open("wb") as errors, (HOME / "prompt").open("w+b") as given:
        given.write(prompt.encode(errors="replace"))
        given.seek(0)
        try:
            child = subprocess.Popen(
                argv, stdin=given, stdout=subprocess.PIPE, stderr=errors, cwd=REPOSITORY, env=env,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return f"can't be started: {error}"
        for line in lines(child, session.until):
            with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError):  # a message of another kind
                hear(session, json.loads(line), messages)
        code = end(child)
    if session.result is None:  # it could not add them up itself
        for one in messages.values():
            add_usage(session, one)
    last = said.read_bytes()[-500:].decode(errors="replace").strip()
    how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    return f"{how} before it was done" + (f": {last}" if last else "")


def lines(child: subprocess.Popen[bytes], until: float) -> Iterator[bytes]:
    assert child.stdout is not None
    left = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while (now := time.monotonic()) < until:
            if not selector.select(min(1.0, until - now)):
                if child.poll() is not None:  # what it started may have kept its output open
                    return
                continue
            data = os.read(child.stdout.fileno(), 1 << 16)
            if not data:
                yield left
                return
            *whole, left = (left + data).split(b"\n")
            yield from whole


def end(child: subprocess.Popen[bytes]) -> int:
    assert child.stdout is not None
    for seconds, how in ((1.0, signal.SIGTERM), (KILL_SECONDS, signal.SIGKILL)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
            break
        child.send_signal(how)
    with contextlib.suppress(OSError):  # also what its tools left running: files must not change while they are read
        os.killpg(child.pid, signal.SIGKILL)
    child.stdout.close()
    return child.wait()


def hear(session: Session, message: dict[str, Any], messages: dict[str, dict[str, Any]]) -> None:
    """One message of Claude Code's: shown, and counted."""
    kind = message["type"]
    if kind == "result":
        session.result = message
        session.text = message.get("result") or session.text
        session.cost_usd += message.get("total_cost_usd") or 0.0
        add_usage(session, message["usage"])
    elif kind == "system" and message.get("subtype") == "api_retry":
        seconds, why = message["retry_delay_ms"] / 1000, message.get("error_status") or message.get("error")
        show(f"[the model can't be asked ({why}): again in {seconds:.0f} s]")
    elif kind == "assistant" and message["message"].get("model") != "<synthetic>":
        session.answers.add(message["message"]["id"])
        messages[message["message"]["id"]] = message["message"]["usage"]
        for block in message["message"]["content"]:
            if block["type"] == "text":
                session.text = block["text"]
                show(block["text"])
            elif block["type"] == "tool_use":
                show(call(block["name"], block["input"]))
    elif kind == "user":
        for block in message["message"]["content"]:
            if block["type"] == "tool_result":
                show(shortened(block["content"]))


def add_usage(session: Session, usage: dict[str, Any]) -> None:
    session.usage.update({name: count for name, count in usage.items() if name.endswith("_tokens") and count})


def call(name: str, given: dict[str, Any]) -> str:
    if name == "Bash":
        return f"$ {given.get('command')}"
    about = next((given[one] for one in ("file_path", "notebook_path", "description", "pattern") if one in given), "")
    return f"{name} {about}"


def shortened(content: Any) -> str:
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    text = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
    shown = text.splitlines()
    return "\n".join([*shown[:SHOWN_LINES], *(["…"] if len(shown) > SHOWN_LINES else [])])


def show(text: str) -> None:
    print(text.encode(errors="replace").decode().rstrip(), flush=True)


def transcript(file: Path | None) -> str:
    """Its name in `out`; '' if there is none."""
    if file is None:
        return ""
    OUT.mkdir(exist_ok=True)
    return shutil.copyfile(file, OUT / "transcript.jsonl").name


def fail(status: int, why: str) -> NoReturn:
    print(f"claude-code: {why}"[:2000], file=sys.stderr, flush=True)
    raise SystemExit(status)


if __name__ == "__main__":
    main()

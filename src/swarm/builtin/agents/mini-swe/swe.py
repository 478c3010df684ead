"""The mini-swe agent: mini-swe-agent, by LiteLLM, works on a repository inside this VM. agent.yaml lists its inputs.

Its loop and its prompts are its own. Three of its parts are replaced: calls that fail for causes that pass are repeated
for minutes, a command that leaves something running doesn't hold up the next one, and a lone surrogate that the model
wrote is not sent back, which no service takes. Whatever ends it, what it did to the files is returned.

Exit status: 0 with outputs, whose `finished` says how it went; 2 for a request that makes no sense; 3 if the model
never answered, so that there is nothing to return.
"""

# ruff: noqa: T201

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import work_tree

# Of these imports nothing is left to do if `warm` was preloaded.
import warm  # isort: skip
import litellm
import yaml

STARTED = time.monotonic()
HOME, REPOSITORY, OUT = Path(".home"), Path("repo"), Path("out")
PATIENCE_SECONDS = 900.0  # with calls that fail for causes that pass, as long as nothing succeeds
MAX_PAUSE_SECONDS = 60.0
MAX_CALL_SECONDS = 900.0
MAX_FORMAT_ERRORS = 10  # in a row: answers without a command, or with half of one
SHOWN = 5000  # characters of each end of what a command printed; mini-swe-agent's own templates send as much
TASK = """{prompt}

(The work directory is a git repository on a fresh Debian machine; you are an unprivileged user. Nothing can be \
downloaded; git, ripgrep, gcc, make, Python 3 and pip are installed. What you leave in the repository is the result, \
committed or not. Nobody can answer questions: decide yourself.)"""


class Model(warm.litellm_model.LitellmModel):  # type: ignore[misc]
    """LiteLLM's model, with patience."""

    until: float
    usage: Counter[str]
    answers = 0

    def _prepare_messages_for_api(self, messages: list[dict[str, Any]]) -> Any:
        return clean(super()._prepare_messages_for_api(messages))

    def _query(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        pause, began = 1.0, time.monotonic()
        while True:
            try:
                timeout = max(5.0, min(MAX_CALL_SECONDS, self.until - time.monotonic()))
                answer = super()._query(messages, timeout=timeout, **options)
                break
            except Exception as error:
                left = min(self.until, began + PATIENCE_SECONDS) - time.monotonic()
                if not passes(error) or left <= pause:
                    raise
                print(f"[{first_line(error)}; again in {pause:g} s]", flush=True)
            time.sleep(pause)
            pause = min(pause * 2, MAX_PAUSE_SECONDS)
        self.answers += 1
        counts = answer.usage.model_dump() if getattr(answer, "usage", None) else {}
        self.usage.update({name: count for name, count in counts.items() if type(count) is int})
        return answer


class Environment(warm.local.LocalEnvironment):  # type: ignore[misc]
    """Commands by bash in the repository. What they print goes to a file, so what they leave behind holds nobody up."""

    until: float

    def execute(self, action: dict[str, Any], cwd: str = "", *, timeout: int | None = None) -> dict[str, Any]:
        command = str(action.get("command", ""))
        print(f"$ {command}".encode(errors="replace").decode(), flush=True)
        seconds = max(1.0, min(timeout or self.config.timeout, self.until - time.monotonic()))
        with tempfile.TemporaryFile(dir=HOME.absolute()) as said:
            code, why = -1, ""
            try:
                child = subprocess.Popen(
                    ["/bin/bash", "-c", command],
                    cwd=self.config.cwd,
                    env=self.config.env,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    code = child.wait(seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
                    why = f"The command was killed after {seconds:g} seconds."
            except (OSError, ValueError) as error:  # its directory is gone; it has a NUL or a lone surrogate
                why = f"The command could not be started: {error}"
            output = shown(said)
        print(f"{output}[{why or f'exit status {code}'}]", flush=True)
        ended = {"output": output, "returncode": code, "exception_info": why}
        self._check_finished(ended)
        return ended

    def serialize(self) -> dict[str, Any]:
        return {}  # the environment has nothing that a transcript needs


class Agent(warm.default.DefaultAgent):  # type: ignore[misc]
    """mini-swe-agent's loop; what the model says is printed as well."""

    said = ""

    def add_messages(self, *messages: dict[str, Any]) -> Any:
        for message in messages:
            if message.get("role") == "assistant" and isinstance(message.get("content"), str):
                self.said = message["content"]
                print(clean(self.said), flush=True)
        return super().add_messages(*messages)


def main() -> None:
    given = json.loads(Path("input.json").read_text(encoding="utf-8"))
    inputs = given["inputs"]
    prompt = inputs.get("prompt") or given["ticket"].get("description") or given["ticket"].get("title") or ""
    if not prompt.strip():
        fail(2, "nothing to do: give inputs.prompt, or the ticket a description")
    address = os.environ.get("ANTHROPIC_BASE_URL", "")
    if not address or not os.environ.get("ANTHROPIC_API_KEY"):
        fail(2, "can't reach a model: the gateway has not set ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY")
    home = work_tree.home(HOME.absolute())
    try:
        base = work_tree.prepare(REPOSITORY, inputs.get("files"))
    except work_tree.WorkTreeError as error:
        fail(2, str(error))
    seconds = given["step"].get("timeout_seconds", 3600)
    agent = made_of(inputs, address, home, STARTED + seconds - min(180.0, seconds / 4))
    stop_reason, why = work(agent, prompt)
    if not agent.model.answers:
        fail(3, why)
    made: dict[str, Any] = {
        "text": agent.said,
        "finished": not why,
        "stop_reason": stop_reason,
        "why": why,
        "turns": agent.model.answers,
        "model": inputs.get("model", ""),
        "usage": dict(agent.model.usage),
        "transcript": "",
    }
    try:
        OUT.mkdir(exist_ok=True)
        (OUT / "transcript.json").write_text(json.dumps(clean(agent.serialize()), default=repr), encoding="utf-8")
        made["transcript"] = "transcript.json"
        made |= work_tree.collect(REPOSITORY, base, branch=inputs.get("branch", "swarm/work"), out=OUT)
    except Exception as error:  # whatever it is: the words are still there
        made |= {"finished": False, "why": f"{why}; what it changed can't be collected: {error!r}".lstrip("; ")}
    print(f"[{stop_reason}] {why}".rstrip(), flush=True)
    Path("output.json").write_text(json.dumps(clean(made)), encoding="utf-8")


def made_of(inputs: dict[str, Any], address: str, home: Path, until: float) -> Any:
    """mini-swe-agent as its command `mini` makes it, by the same settings."""
    settings = yaml.safe_load((Path(warm.default.__file__).parents[1] / "config/mini.yaml").read_text(encoding="utf-8"))
    name = inputs.get("model", "claude-sonnet-5-5")
    options = {
        **settings["model"].pop("model_kwargs", {}),
        "api_base": address,
        "max_tokens": inputs.get("max_tokens", 8192),
        "num_retries": 0,
    }
    model = Model(
        model_name=name if "/" in name else f"anthropic/{name}",
        model_kwargs=options,
        set_cache_control="default_end",
        cost_tracking="ignore_errors",
        **settings["model"],
    )
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("ANTHROPIC_", "MSWEA_", "LITELLM"))
    }
    env = {**ours, **settings["environment"]["env"], "HOME": str(home)}
    environment = Environment(cwd=str(REPOSITORY.absolute()), env=env, timeout=inputs.get("command_seconds", 600))
    model.until = environment.until = until
    model.usage = Counter()
    templates = {name: settings["agent"][name] for name in ("system_template", "instance_template")}
    limits = {
        "step_limit": inputs.get("max_turns", 200),
        "cost_limit": 0.0,
        "max_consecutive_format_errors": MAX_FORMAT_ERRORS,
    }
    left = max(1, int(until - time.monotonic()))
    return Agent(model, environment, **templates, **limits, wall_time_limit_seconds=left)


def work(agent: Any, prompt: str) -> tuple[str, str]:
    """Returns the stop reason, and why it has not finished; '' if it has."""
    os.environ["MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT"] = "1"  # looked for at each call; `Model` repeats them
    litellm.suppress_debug_info = True
    try:
        ended = agent.run(clean(TASK.format(prompt=prompt)))
    except Exception as error:
        status = getattr(error, "status_code", None)
        return f"api_error_{status}" if status else type(error).__name__, first_line(error)
    status = str(ended.get("exit_status"))
    if status == "Submitted":
        return "submitted", ""
    turns = f"after {agent.model.answers} answers"
    ends = {
        "LimitsExceeded": ("max_turns", f"max_turns was reached {turns}"),
        "TimeExceeded": ("time", f"the ticket's time was nearly used up {turns}"),
        "RepeatedFormatError": ("format", f"{MAX_FORMAT_ERRORS} answers in a row had no complete command"),
    }
    return ends.get(status, (status, f"{status} {turns}"))


def passes(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, litellm.exceptions.APIConnectionError | litellm.exceptions.Timeout):
        return True
    status = getattr(error, "status_code", None)
    return isinstance(status, int) and (status in (408, 409, 429) or status >= 500)


def shown(said: Any) -> str:
    """What a command printed, without its middle if it is long."""
    size, room = said.seek(0, os.SEEK_END), 4 * SHOWN
    said.seek(0)
    if size <= 2 * room:
        return str(said.read().decode(errors="replace"))
    head = said.read(room).decode(errors="replace")
    said.seek(size - room)
    return f"{head}\n[{size - 2 * room} bytes left out]\n{said.read().decode(errors='replace')}"


def clean(value: Any) -> Any:
    """JSON's values, with texts that UTF-8 can hold."""
    match value:
        case str():
            return value.encode(errors="replace").decode()
        case dict():
            return {clean(key): clean(inner) for key, inner in value.items()}
        case list() | tuple():
            return [clean(inner) for inner in value]
    return value


def first_line(error: Exception) -> str:
    return str(clean((str(error).strip() or type(error).__name__).splitlines()[0][:500]))


def fail(status: int, why: str) -> NoReturn:
    print(f"mini-swe: {why}"[:2000], file=sys.stderr, flush=True)
    raise SystemExit(status)


if __name__ == "__main__":
    main()

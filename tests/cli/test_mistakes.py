"""Careless mistakes: each ends with exit status 1 or 2 and a line (or one for each problem) that names the thing and
says what to do, in our words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from swarm import config
from swarm.agents.package import read
from swarm.base.manifest import Invalid
from swarm.errors import UsageError
from swarm.gateway import prices, upstreams
from swarm.workflow import parse

# Words of pydantic, jsonschema, Python and regular expressions.
FOREIGN = re.compile(
    r"Input should|String should|List should|Value error|valid (list|tuple|string|dictionary|integer|boolean)"
    r"|should match|under any of the given|_type\b|\b_[A-Z]\w+|Traceback|Error\b:|Errno|unexpected:"
    r"|\[a-z|\^\[|object at 0x"
)
# Starts once; each command runs in a copy of the process.
PROGRAM = """
import json, os, sys, tempfile
import swarm.app.serve, swarm.app.wiring, swarm.store.store
from swarm.cli import cleanup, engine, main, vm
for argv, settings in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            os.environ.update(settings)
            for fd in (1, 2):
                os.dup2(out.fileno(), fd)
            sys.argv = argv
            {"swarm": main, "swarm-engine": engine, "swarm-cleanup": cleanup}[argv[0]].run()
            sys.stdout.flush()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        print(json.dumps([status, out.read()]), flush=True)  # else the next copy writes it too
"""
LINES: list[tuple[str, dict[str, str], str]] = [
    ("swarm prune --older-than 99999999d", {}, "'99999999d' is not an age up to a century: write"),
    ("swarm prune --older-than soon", {}, "'soon' is not an age"),
    ("swarm prune", {}, "missing option '--older-than'; `swarm prune -h`"),
    ("swarm tikcet list", {}, "Did you mean 'ticket'"),
    ("swarm ticket lst", {}, "Did you mean 'list'?"),
    ("swarm start", {}, "swarm has no command 'start'; it is `swarm-engine start`"),
    ("swarm-engine ticket list", {}, "swarm-engine has no command 'ticket'; it is `swarm ticket`"),
    ("swarm ticket frobnicate", {}, "no such command 'frobnicate'; `swarm ticket -h` shows how"),
    ("swarm ticket list --stat ready", {}, "no such option: --stat; did you mean --state?"),
    ("swarm sandbox create --name x", {}, "--name; NAME is given without one; `swarm sandbox create -h`"),
    ("swarm agent show --agent echo", {}, "--agent; AGENT is given without one; `swarm agent show -h`"),
    ("swarm ticket list --state redy", {}, "--state: 'redy' is not one of 'draft', 'ready'"),
    ("swarm ticket list --limit many", {}, '--limit must be a whole number, but is "many"'),
    ("swarm ticket list --limit 0", {}, '--limit must be at least 1, but is "0"'),
    ("swarm ticket list --limit 99999999999999999999", {}, "--limit must be at most 1,000,000,000"),
    ("swarm ticket list extra", {}, "(extra); `swarm ticket list -h` shows how"),
    ("swarm ticket add", {}, "missing argument 'TITLE'; `swarm ticket add -h`"),
    ("swarm ticket add t --agent nope", {}, "no agent 'nope'"),
    ("swarm ticket add t --agent echo --input x", {}, "--input 'x': write NAME=VALUE"),
    ("swarm ticket add t --agent echo --input x=@nowhere", {}, "No such file or directory"),
    ("swarm ticket add t --agent echo --priority high", {}, '--priority must be a whole number, but is "high"'),
    ("swarm ticket add t --agent echo --require zone", {}, "--require 'zone': write LABEL=VALUE"),
    ("swarm ticket add t --agent echo --require zone=a --require zone=b", {}, "zone is there twice, and no host has"),
    ("swarm ticket add t --agent echo --require zone=a,b", {}, "can't be used: requires must be a JSON object of"),
    ("swarm ticket show nothing", {}, "no ticket 'nothing'; `swarm ticket list`"),
    ("swarm workflow show nothing", {}, "no workflow 'nothing'; `swarm workflow list`"),
    ("swarm workflow add nowhere.yaml", {}, "nowhere.yaml can't be read"),
    ("swarm agent add nowhere", {}, "nowhere does not exist; name an agent's directory"),
    ("swarm agent add main.py", {}, "main.py is a file, not an agent: name an agent's directory"),
    ("swarm agent init Bad_Name", {}, "must be lower-case letters"),
    ("swarm cost --by banana", {}, "--by: 'banana' is not one of 'ticket'"),
    ("swarm cost --since yesterday", {}, "write 2026-01-31"),
    ("swarm serve --port 99999999", {}, "--port must be at most 65,535"),
    ("swarm secret set A=b", {}, "use letters, digits and '_'"),
    ("swarm-engine stpo", {}, "Did you mean 'stop'?"),
    ("swarm-engine run-ticket", {}, "missing argument 'ID'"),
    ("swarm-engine run-ticket nothing", {}, "no ticket 'nothing'"),
    ("swarm-engine start --foreground --max-vms=x", {}, '--max-vms must be a whole number, but is "x"'),
    ("swarm-engine start --foreground --driver=docker", {}, "--driver: 'docker' is not one of 'auto', 'firecracker'"),
    ("swarm-engine start --foreground --warm=lots", {}, "--warm takes a number of VMs up to 1000, or auto"),
    ("swarm-cleanup now", {}, "(now); `swarm-cleanup -h` shows how"),
    ("swarm ticket list --home /nowhere", {}, "run `swarm init`"),
    ("swarm ticket list", {"SWARM_LEASE_SECONDS": "abc"}, "lease_seconds is 'abc'; it must be a number from 0.1"),
    ("swarm ticket list", {"SWARM_LEASE_SECOND": "3"}, "SWARM_LEASE_SECOND; did you mean SWARM_LEASE_SECONDS?"),
    ("swarm ticket list", {"SWARM_DRIVER": "docker"}, "driver must be 'auto', 'firecracker', 'qemu' or 'process'"),
    ("swarm ticket list", {"SWARM_OVER_BUDGET": "no"}, "over_budget must be 'fail' or 'wait', but is \"no\""),
    ("swarm ticket list", {"SWARM_EGRESS_PRIVATE": "10.0.0.0/8"}, "it must be a list in JSON"),
    ("swarm ticket list", {"SWARM_EGRESS_PRIVATE": '["x"]'}, "egress_private must be a network such as 192.168.7.0/24"),
    ("swarm ticket list", {"SWARM_JAILER": "maybe"}, 'jailer must be true or false, but is "maybe"'),
    ("swarm ticket list", {"SWARM_SUBNET": "10.0.0.0/99"}, "subnet must be a network such as"),
]
SETTINGS = {
    'driver = "xen"': "driver must be 'auto'",
    "driver = qemu": 'texts need quotes, as in NAME = "VALUE"; fix the file',
    "lease_second = 3": "did you mean 'lease_seconds'?",
    'egress_private = "10.0.0.0/8"': 'egress_private must be a list, but is "10.0.0.0/8": write ["10.0.0.0/8"]',
    "image = 3": "image must be text, but is the number 3: put it in quotes",
    "[swarm": "can't read the settings in",
}
MANIFEST = "name: a\nversion: 1.0.0\nentry: [main.py]\n"
MANIFESTS = {
    "hello": "must be a mapping of fields, such as `name: my-agent`",
    "name: a": "version: is missing",
    MANIFEST.replace("[main.py]", "main.py"): 'entry: must be a list, but is "main.py": write ["main.py"]',
    MANIFEST.replace("1.0.0", "1.0"): "version: must be text, but is the number 1.0: put it in quotes",
    MANIFEST + "timeout_second: 3": "did you mean 'timeout_seconds'?",
    MANIFEST + "memory_mb: 1GB": 'memory_mb: must be a whole number from 128 to 1,048,576, but is "1GB"',
    MANIFEST + "network: no": "network: must be 'none', 'gateway' or 'open', or a mapping, but is \"no\"",
    MANIFEST + "network: {alow: [x.com]}": "network.alow: unknown field; did you mean 'allow'?",
    MANIFEST + "retry: {max: 3}": "retry.max: unknown field; docs/agents.md lists all",
    MANIFEST + "env: {A: 3}": "env.A: must be text, but is the number 3: put it in quotes",
    MANIFEST + "inputs: {a: {type: strin}}": "type must be one of string, integer",
    MANIFEST + "name: b": "line 4, column 1: the key 'name' is here twice",
    MANIFEST + "\tvcpus: 2": "line 4, column 1: not YAML: found character '\\t' that cannot start any token; indent",
    MANIFEST + "description: @me": "put a text that begins with '@' in quotes",
    MANIFEST + "description: a: b": "put a text with ': ' in quotes",
    MANIFEST + "description: 'x": "a quote is not closed",
    MANIFEST + "secrets: [A": "a [ or { is not closed",
    MANIFEST + ' entry2: "x"': "begin the fields of a mapping, and the items of a list, in one column",
    MANIFEST + "---\nname: b": "remove what follows the line ---",
}
FLOW = "name: w\nversion: 1.0.0\n"
STEP = "steps:\n- id: a\n  agent: echo\n"
FLOWS = {
    FLOW: "the field 'steps' is missing",
    FLOW + "steps: []": "steps must be a list that isn't empty",
    FLOW + "steps: {a: {agent: echo}}": "steps must be a list",
    FLOW + "steps: [a]": 'each of steps must be a mapping, but is "a"',
    FLOW + "steps:\n- agent: echo": "the field 'id' is missing",
    FLOW + "steps:\n- id: A B\n  agent: echo": "id must be letters, digits, underscores and hyphens",
    FLOW + STEP + "  agnet: echo": "unknown field 'agnet'; did you mean 'agent'?",
    FLOW + STEP + "  if: yes": "unknown field 'if'; here it is 'when'",
    FLOW + STEP + "  inputs: 3": "inputs must be a mapping, but is 3",
    FLOW + STEP + "  timeout_seconds: 5m": 'timeout_seconds must be a number from 0.001 to 2,592,000, but is "5m"',
    FLOW + STEP + "  max_parallel: 0": "max_parallel must be at least 1, but is 0",
    FLOW + STEP + "  inputs: {x: ${inputs.x}}": "put the expression in quotes",
    FLOW + STEP + "  frobnicate: 1": "unknown field 'frobnicate'; docs/workflows.md lists all",
    FLOW + "on:\n  push: main\n" + STEP: "unknown field 'on'; here it is 'schedule'",
    FLOW + "schedule: */5 * * * *\n" + STEP: "quotes, such as a schedule: '*/5 * * * *'",
    FLOW + "schedule:\n- cron: * * * * *\n" + STEP: "put a text that begins with * in quotes",
    FLOW.replace("1.0.0", "1") + STEP: "version must be text, but is the number 1: put it in quotes",
}
UPSTREAMS = {
    '[anthropic]\nbase_urll = "x"': "[anthropic]: base_urll: unknown field; did you mean 'base_url'?",
    "[anthropic]\nbase_url = 3": "base_url: must be text, but is the number 3: put it in quotes",
    '[mine]\nbase_url = "https://x.com"': "[mine]: key: is missing",
    '[mine]\nlike = ["anthropic"]': "[mine]: `like` must be the name of a service above",
    '["Bad Name"]\nlike = "anthropic"': "name: must be lower-case letters",
    '[anthropic]\nmetered = "POST /x"': 'metered: must be a list, but is "POST /x": write ["POST /x"]',
    "[anthropic": "it is not TOML: expected ']'",
}
PRICES = {
    "[models.x]\ninput = 3": "models.x.output: is missing",
    "[models.x]\ninput = 3\noutput = -1": "models.x.output: must be at least 0, but is -1",
    "[models.x]\ninputt = 3\noutput = 1": "models.x.inputt: unknown field; did you mean 'input'?",
    "[model.x]\ninput = 3": "model: unknown field; did you mean 'models'?",
    "[models]\nx = 3": "models.x: must be a mapping, but is 3",
    "[models.x]\ninput=3\noutput=2\nabove={token=3}": "models.x.above.token: unknown field; did you mean 'tokens'?",
}


def ours(said: str, expected: str) -> None:
    assert expected in said
    assert not FOREIGN.search(said), said
    lines = said.rstrip("\n").splitlines()
    assert len(lines) == 1 or all("line " in line for line in lines[1:]), said


@pytest.mark.slow  # starts programs
def test_command_lines_and_variables(tmp_path: Path) -> None:
    env = os.environ | {"SWARM_HOME": str(tmp_path / "home"), "TERM": "dumb"}
    program = [sys.executable, "-c"]
    init = [*program, "from swarm.cli.main import run; run()", "init", "--no-image"]
    subprocess.run(init, check=True, env=env, capture_output=True)
    (tmp_path / "main.py").write_text("print(1)")
    cases = json.dumps([[line.split(), settings] for line, settings, _ in LINES])
    argv = [*program, PROGRAM, cases]
    done = subprocess.run(argv, check=True, env=env, capture_output=True, text=True, cwd=tmp_path, input="")
    for (line, _, expected), found in zip(LINES, done.stdout.splitlines(), strict=True):
        status, said = json.loads(found)
        assert status in (1, 2) and said.startswith("error: "), (line, status, said)
        ours(said, expected)


@pytest.mark.parametrize("text", SETTINGS)
def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for name in [name for name in os.environ if name.startswith("SWARM_")]:
        monkeypatch.delenv(name)
    (tmp_path / "swarm.toml").write_text(text)
    monkeypatch.setenv("SWARM_CONFIG", str(tmp_path / "swarm.toml"))
    with pytest.raises(UsageError) as refused:
        config.load()
    ours(str(refused.value), SETTINGS[text])


@pytest.mark.parametrize("text", MANIFESTS)
def test_manifests(tmp_path: Path, text: str) -> None:
    (tmp_path / "main.py").touch()
    (tmp_path / "agent.yaml").write_text(text)
    with pytest.raises(UsageError) as refused:
        read(tmp_path)
    ours(str(refused.value), MANIFESTS[text])


@pytest.mark.parametrize("text", FLOWS)
def test_workflows(text: str) -> None:
    try:
        _, _, problems = parse.read(text, name="w.yaml")
    except Invalid as error:
        problems = list(error.problems)
    ours("\n".join(map(str, problems)), FLOWS[text])


@pytest.mark.parametrize("text", UPSTREAMS)
def test_upstreams(tmp_path: Path, text: str) -> None:
    (tmp_path / "upstreams.toml").write_text(text)
    with pytest.raises(UsageError) as refused:
        upstreams.load(tmp_path / "upstreams.toml", {})
    ours(str(refused.value), UPSTREAMS[text])


@pytest.mark.parametrize("text", PRICES)
def test_prices(tmp_path: Path, text: str) -> None:
    (tmp_path / "prices.toml").write_text(text)
    with pytest.raises(UsageError) as refused:
        prices.load(tmp_path / "prices.toml")
    ours(str(refused.value), PRICES[text])

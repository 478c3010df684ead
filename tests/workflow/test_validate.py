"""workflow.yaml: every problem at once, each with its place; and the frozen form of a good one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import schema
from swarm.base import manifest
from swarm.base.manifest import Invalid
from swarm.errors import NotFound
from swarm.model import Agent, FailureReason, RetryPolicy
from swarm.workflow import definition, graph, parse, pinning, validate
from swarm.workflow.definition import (
    Approval,
    ForEach,
    Repeat,
    Schedule,
    Step,
    Webhook,
    Workflow,
)
from swarm.workflow.structure import Graph
from tests.workflow.execute import agent

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

TYPED = dataclasses.replace(
    agent("echo"),
    id="typed",
    name="typed",
    inputs_schema=schema.text(schema.expand({"repo": "string", "depth": "integer?"})),
    outputs_schema=schema.text(schema.expand({"files": ["string"], "count": "integer", "note": "string?"})),
)
BIG = dataclasses.replace(agent("echo"), id="big", name="big", memory_mb=4096)
LAYERED = dataclasses.replace(agent("echo"), id="layered", name="layered", packages=("git", "make"))
HEAD = "name: mine\nversion: 1.0.0\n"


def find(reference: str) -> Agent:
    name = reference.partition("@")[0]
    return {"typed": TYPED, "big": BIG, "layered": LAYERED}.get(name) or agent(reference)


def read(text: str) -> Workflow:
    workflow, _, found = parse.read(text)
    assert workflow is not None and not found
    return workflow


def inner(reference: str) -> Workflow:
    if reference.partition("@")[0] == "inner":
        return read("name: inner\nversion: 2.0.0\ninputs: {x: string}\nsteps: [{id: a, agent: echo}]\n")
    if reference == "loop":
        return read("name: loop\nversion: 2.0.0\nsteps: [{id: a, workflow: loop}]\n")
    if reference.startswith("wide-"):  # each has thirty of the one before
        n = int(reference.removeprefix("wide-"))
        does = f"workflow: wide-{n - 1}" if n else "agent: echo"
        steps = "".join(f"  - {{id: s{i}, {does}}}\n" for i in range(30))
        return read(f"name: {reference}\nversion: 1.0.0\nsteps:\n{steps}")
    if reference.startswith("deep-"):
        n = int(reference.removeprefix("deep-"))
        does = f"workflow: deep-{n - 1}" if n else "agent: echo"
        return read(f"name: {reference}\nversion: 1.0.0\nsteps: [{{id: a, {does}}}]\n")
    raise NotFound(f"no workflow {reference!r}")


REGISTRY = pinning.Registry(agent=find, workflow=inner)


def problems(text: str) -> list[str]:
    try:
        validate.load(text, REGISTRY)
    except Invalid as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"k{number}: 1\n" for number in range(20_000)),
        HEAD + "steps:\n" + "".join(f"- {{id: s{number}}}\n" for number in range(1000)),
        HEAD + f"steps:\n- {{id: s, agent: echo, needs: [{', '.join(f'no{number}' for number in range(5000))}]}}\n",
        HEAD + "steps:\n" + "- {id: s, agent: echo, when: '${no}'}\n" * 1000,
        HEAD + "steps:\n" + "- {id: s, workflow: {steps: [{id: s, agent: echo, bad: 1}]}}\n" * 1000,
        "k: 1\n" * 20_000,
        "- !x 1\n" * 20_000,
    ],
    ids=["unknown", "empty", "needs", "names", "nested", "twice", "tags"],
)
def test_a_file_of_problems_is_bounded(text: str) -> None:
    """Each takes time to find and to describe: nobody reads thousands."""
    with pytest.raises(Invalid, match="at least 100 problems") as caught:
        validate.load(text, REGISTRY)
    assert len(caught.value.problems) == manifest.MAX_PROBLEMS == 100


EVERYTHING = """
id: 6f1c0a52-3c7a-4f63-8a4e-2f1f9f0e7a11
name: everything
version: 1.2.3-rc1
description: All that a workflow can have.
inputs: {repo: string, tags: [string], dry: {type: boolean, default: false}}
variables: {where: "eu/${inputs.repo}", limits: {cpu: 2}}
schedule: {cron: "0 6 * * mon-fri", time_zone: Europe/Paris, missed: skip, inputs: {repo: main, tags: []}}
webhook: {secret: HOOK, inputs: {repo: "${trigger.body.repo}", tags: []}}
fail_fast: true
steps:
  - id: list
    agent: typed@1
    inputs: {repo: "${inputs.repo}"}
    retry: {max_attempts: 3, on: [timeout, vm_died]}
    timeout_seconds: 30
  - id: each
    agent: echo
    needs: [list]
    for_each: {items: "${steps.list.outputs.files}", max_parallel: 3, join: 2}
    when: ${item != ""}
    inputs: {file: "${item}", number: "${index}", where: "${variables.where}"}
    continue_on_error: true
  - id: fork
    agent: typed
    from: list
    for_each: {items: [1, 2], best: "${outputs.count + index}"}
    inputs: {repo: main}
    keep_vm: failure
  - id: after-best
    agent: echo
    from: fork
    for_each: [1]
    best: ${outputs.n}
    inputs: {n: "${steps.fork.outputs.count}"}
  - id: gate
    needs: list
    approval: {message: "Publish ${steps.list.outputs.count} files?", timeout_seconds: 3600}
  - id: again
    workflow: inner@2
    needs: [each, gate]
    join: any
    inputs: {x: "${steps.gate.outputs.by}"}
    repeat: {until: "${has(steps.again.outputs.done)}", max_times: 2}
  - id: within
    needs: again
    workflow:
      inputs: {n: integer}
      steps: [{id: x, agent: echo, inputs: {n: "${inputs.n}"}, retry: 2}]
    inputs: {n: 3}
on_error:
  - {id: tell, agent: echo, inputs: {text: "${error.step}: ${error.message}"}}
on_success:
  - {id: cheer, agent: echo, from: list, inputs: {n: "${size(steps.each.outputs)}"}}
outputs: {files: "${steps.list.outputs.files}"}
"""


def test_everything() -> None:
    made = validate.load(EVERYTHING, REGISTRY)
    steps = {step.id: step for step in made.all_steps()}
    assert steps["list"].agent == "typed@1.0.0", "pinned"
    assert steps["list"].retry == RetryPolicy(
        max_attempts=3, on=frozenset({FailureReason.TIMEOUT, FailureReason.VM_DIED})
    )
    assert steps["each"].for_each == ForEach(items="${steps.list.outputs.files}", max_parallel=3, join=2)
    assert (steps["fork"].from_step, steps["fork"].needs, steps["fork"].keep_vm) == ("list", ("list",), "failure")
    assert steps["after-best"].for_each == ForEach(items=[1], best="${outputs.n}") and steps["cheer"].needs == ()
    assert isinstance(steps["again"].workflow, Workflow) and steps["again"].workflow.steps[0].agent == "echo@1.0.0"
    assert isinstance(steps["within"].workflow, Workflow) and steps["within"].workflow.steps[0].retry is not None
    assert definition.from_json(json.loads(definition.canonical(made))) == made
    for picture in (graph.text(made), graph.mermaid(made), graph.svg(made)):
        assert all(step.id in picture for step in made.all_steps())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["line 1, column 1: must be a mapping of fields, such as `name: my-workflow`"]),
        ("name: [", ["line 1, column 8: not YAML: expected the node content, but found '<stream end>'; "
                     "a [ or { is not closed"]),
        (HEAD, ["line 1, column 1: the field 'steps' is missing"]),
        (HEAD + "steps: []\n", ["line 3, column 8: steps must be a list that isn't empty"]),
        (HEAD + "name: x\nsteps: [{id: a, agent: echo}]\n", ["line 3, column 1: the key 'name' is here twice"]),
        (HEAD + "steps: [{id: a, agent: echo, needs: [a]}]\n", ["line 3, column 38: the step 'a' needs itself"]),
        (HEAD + "steps: [{id: a, agent: nope}]\n",
         ["line 3, column 24: no agent 'nope'; `swarm agent list` shows those there are"]),
        (HEAD + "steps: [{id: a, agent: echo}, {id: a, agent: echo}]\n",
         ["line 3, column 36: another step already has the id 'a'"]),
        (HEAD + "steps: [{id: a, workflow: loop}]\n",
         ["line 3, column 27: workflows run each other endlessly: loop runs loop"]),
        (HEAD + "steps: [{id: a, agent: echo, workflow: inner, inputs: {x: a}}]\n",
         ["line 3, column 30: a step has an agent or a workflow, not both"]),
        (HEAD + "steps: [{id: a}]\n",
         ["line 3, column 9: the step 'a' does nothing: give it an agent, a workflow or an approval"]),
        (HEAD + "steps: [{id: a, agent: echo, when: no}]\n",
         ["line 3, column 36: when must be true or false: write it as one ${…}"]),
        (HEAD + "steps: [{id: a, agent: echo, when: false}]\n",
         ["line 3, column 36: the step 'a' never runs: its `when` is false"]),
        (HEAD + "steps: [{id: a, agent: echo, retry: {on: [gremlins]}}]\n",
         [f"line 3, column 43: unknown reason 'gremlins'; use some of {', '.join(FailureReason)}"]),
        (HEAD + "steps: [{id: a, agent: echo}]\nschedule: 61 * * * *\n",
         ["line 4, column 11: '61' isn't a minute: use 0 to 59"]),
        (HEAD + "steps: [{id: a, approval: true, retry: 2, timeout_seconds: 5, inputs: {x: 1}}]\n",
         ["line 3, column 33: retry needs an agent; the steps of a nested workflow have their own",
          "line 3, column 43: put the timeout_seconds of an approval alone into `approval:`",
          "line 3, column 63: an approval alone has no use for inputs"]),
        (HEAD + "inputs: {n: integer}\nsteps: [{id: a, agent: echo}]\n"
         "schedule: {cron: '@daily', inputs: {n: x, m: 1}}\n",
         ["line 5, column 40: the input 'n' of the workflow has the wrong type: "
          "it is a string, but must be an integer",
          "line 5, column 43: the workflow has no input 'm'; it has n"]),
        (HEAD + "steps: [{id: a, agent: echo}]\nschedule: {cron: '@daily', inputs: {x: '${trigger.body}'}}\n",
         ["line 4, column 43: trigger has no 'body'; there are type, time, cron, time_zone, missed"]),
        (HEAD + "steps: [{id: a, agent: echo}]\nwebhook: {secret: K, timestamp: no one, "
         "inputs: {x: '${trigger.bdoy.x + trigger.body.x}'}}\n",
         ['line 4, column 33: timestamp must be true or false, but is "no one"',
          "line 4, column 56: trigger has no 'bdoy'; did you mean 'body'?"]),
        (HEAD + "steps: [{id: a, agent: echo}]\nwebhook: {secret: K, inputs: {x: '${trigger.bdoy.x}'}}\n",
         ["line 4, column 37: trigger has no 'bdoy'; did you mean 'body'?"]),
        (HEAD + "steps: [{id: a, agent: echo}]\nschedule: {cron: '0 0 30 2 *', time_zone: Mars/North}\n",
         ["line 4, column 18: '30' isn't a day of month: use 1 to 31, within the month, or L for its last",
          "line 4, column 43: 'Mars/North' isn't a time zone; write one such as Europe/Paris, or UTC"]),
        (HEAD + "steps: [{id: a, agent: echo}]\nschedule: {cron: '@daily', missed: all, overlap: skip}\n",
         ["line 4, column 50: missed: all may start several at once, so it needs overlap: allow"]),
        (HEAD + "steps: [{id: a, agent: !!python/object:os.system echo}]\n",
         ["line 3, column 24: the tag 'tag:yaml.org,2002:python/object:os.system' is not supported here"]),
        (HEAD + "inputs: {a: strin}\nsteps: [{id: a, agent: echo}]\n",
         [f"line 3, column 13: unknown type 'strin'; use one of {', '.join(schema.TYPES)}, optionally followed by"
          " '?'"]),
    ],
)  # fmt: skip
def test_one_problem(text: str, said: list[str]) -> None:
    assert problems(text) == said


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("{id: b, agent: echo, from: zz}", "there is no step 'zz'; there are a, gate, many, b"),
        ("{id: b, agent: echo, from: b}", "the step 'b' can't start from its own VM"),
        ("{id: b, agent: echo, from: gate}",
         "the step 'gate' has no agent, so it leaves no VM to start from"),
        ("{id: b, agent: echo, needs: [gate], join: any, from: a}",
         "the step 'a' may not have ended by then: add it to `needs`"),
        ("{id: b, agent: echo, from: many}",
         "the step 'many' leaves a VM for each item: give it `best` or `join: first_success`"),
        ("{id: b, agent: big, from: a}",
         "the VM of 'a' was made for the agent echo, and big needs memory_mb 4096; that one's is 256"),
        ("{id: b, agent: layered, from: a}",
         "the VM of 'a' was made for the agent echo, and layered needs the packages git, make, which that "
         "one has not"),
        ("{id: b, approval: true, from: a}",
         "from needs an agent: without one, the step has no VM of its own"),
        ("{id: b, approval: true, keep_vm: always}",
         "keep_vm needs an agent: without one, the step has no VM of its own"),
        ("{id: b, agent: echo, keep_vm: sometimes}",
         "keep_vm must be 'never', 'failure' or 'always', but is \"sometimes\""),
        ("{id: b, agent: echo, best: '${outputs.x}'}",
         "best needs a for_each; if that has fields, put it among them"),
        ("{id: b, agent: echo, for_each: {items: [1], best: '${outputs.x}', join: any}}",
         "best waits until all have ended, and takes one of them: leave out join"),
        ("{id: b, agent: echo, for_each: {items: [1], timeout_seconds: 5}}",
         "timeout_seconds for all items together needs best; for each item, put it beside for_each"),
        ("{id: b, agent: typed, for_each: [1], inputs: {repo: x}, best: '${outputs.note}'}",
         "best must be a number: it is a string, but must be a boolean or a number"),
        ("{id: b, agent: typed, for_each: [1], inputs: {repo: x}, best: '${outputs.cout}'}",
         "outputs has no 'cout'; did you mean 'count'?"),
        ("{id: b, agent: echo, inputs: {x: '${outputs.x}'}}", "'outputs' is unknown here"),
        ("{id: b, agent: echo, form: a}", "unknown field 'form'; did you mean 'from'?"),
    ],
)  # fmt: skip
def test_problems_with_from_and_best(step: str, said: str) -> None:
    first = "- {id: a, agent: echo}\n- {id: gate, approval: true}\n- {id: many, agent: echo, for_each: [1]}\n"
    [problem] = problems(f"{HEAD}steps:\n{first}- {step}\n")
    assert problem.startswith("line 7, column ") and problem.partition(": ")[2] == said


def test_a_chain_of_forks_has_the_vm_of_the_first() -> None:
    chain = "- {id: b, agent: echo, from: a}\n- {id: c, agent: layered, from: b}\n"
    assert problems(f"{HEAD}steps:\n- {{id: a, agent: layered}}\n{chain}") == []
    [problem] = problems(f"{HEAD}steps:\n- {{id: a, agent: echo}}\n{chain}")
    assert "the VM of 'b' was made for the agent echo" in problem
    [problem] = problems(f"{HEAD}steps:\n- {{id: a, agent: echo, from: b}}\n- {{id: b, agent: echo, from: a}}\n")
    assert "a cycle" in problem


def test_nested_workflows_are_bounded() -> None:
    """A run holds the definitions of named workflows: 30 steps, each of 30 …, would be too large for any host."""
    assert problems(HEAD + "steps: [{id: a, workflow: wide-1}, {id: b, workflow: deep-7}]\n") == []
    [problem] = problems(HEAD + "steps: [{id: a, workflow: wide-7}]\n")
    assert problem == "line 3, column 27: 27,930 steps, nested workflows included; 10,000 are allowed"
    [problem] = problems(HEAD + "steps: [{id: a, workflow: deep-8}]\n")
    assert problem == "line 3, column 8: workflows are nested more than 8 deep"
    many = "".join(f"  - {{id: s{i}, workflow: wide-1}}\n" for i in range(11))
    [problem] = problems(f"{HEAD}steps:\n{many}")
    assert problem == "line 4, column 3: 10,241 steps, nested workflows included; 10,000 are allowed"
    grown = read(f"{HEAD}steps: [{{id: a, workflow: wide-7}}]\n")
    with pytest.raises(Invalid, match="27,930 steps"):  # one that grew after it was registered
        pinning.pin(grown, REGISTRY)


def test_all_problems_at_once() -> None:
    found = problems("""\
name: mine
version: 1.0.0
stages: 3
inputs: {repo: string, n: "integer?"}
steps:
  - id: a
    agent: typed
    needs: [zz]
    inputs:
      repo: ${inputs.n}
      dept: 1
  - id: b
    agnet: echo
    timeout_seconds: -1
  - id: c
    agent: echo
    needs: d
    inputs:
      x: |
        first
          then ${steps.a.outputs.files} and ${item}
  - id: d
    agent: echo
    needs: c
    when: ${inputs.n}
  - id: e
    agent: echo
    needs: a
    for_each: ${steps.a.outputs.count}
    inputs: {x: "${steps.a.outputs.fils}", y: "${1 +* 2}", z: "${variables.q}"}
outputs: {x: "${steps.f.outputs}"}
""")
    assert found == [
        "line 3, column 1: unknown field 'stages'; did you mean 'steps'?",
        "line 8, column 13: there is no step 'zz' here; there are a, b, c, d, e",
        "line 10, column 13: the input 'repo' of typed has the wrong type: it is an integer, but must be a string",
        "line 11, column 7: typed has no input 'dept'; it has depth, repo",
        "line 13, column 5: unknown field 'agnet'; did you mean 'agent'?",
        "line 14, column 22: timeout_seconds must be a number from 0.001 to 2,592,000, but is -1",
        "line 17, column 12: a cycle: c needs d needs c",
        "line 21, column 47: 'item' is unknown outside of a for_each",
        "line 25, column 11: when must be true or false: it is an integer, but must be a boolean",
        "line 29, column 15: for_each must be a list: it is an integer, but must be an array",
        "line 30, column 20: the outputs of 'a' have no 'fils'; did you mean 'files'?",
        *[one for one in found if "column 53" in one and "bad expression: Syntax error" in one],
        "line 30, column 66: variables has no 'q'",
        "line 31, column 17: there is no step 'f'; there are a, b, c, d, e",
    ]
    assert len(found) == 14


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("${steps.b.outputs}", "uses 'b', which may not have ended by then: add it to `needs`"),
        ("${steps.a.output}", "steps.a has outputs, status, error; write steps.a.outputs"),
        ("${steps}", "name the step: steps.build.outputs"),
        ("${steps.list.outputs}", 'for an id with a hyphen write steps["list-it"]'),
        ("${error.step}", "'error' is unknown here"),
        ("${ticket.titel}", "ticket has no 'titel'; did you mean 'title'?"),
        ("${secrets.KEY}", "unknown name 'secrets(.KEY)?'; use one of"),
    ],
)
def test_names(value: str, said: str) -> None:
    import re

    text = (
        HEAD
        + f"""
steps:
  - {{id: a, agent: echo}}
  - {{id: list-it, agent: echo}}
  - {{id: b, agent: echo}}
  - {{id: c, agent: echo, needs: a, inputs: {{x: {json.dumps(value)}}}}}
"""
    )
    (problem,) = problems(text) or ["none"]
    assert re.search(said.replace("[", "\\["), problem), problem


def test_yaml_is_bounded() -> None:
    laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{c}: &{c} [{', '.join(['*' + p] * 10)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(Invalid, match="more than 100000 values"):
        manifest.load(laughs, name="x")
    with pytest.raises(Invalid, match="nested"):
        manifest.load("[" * 5000 + "]" * 5000, name="x")
    with pytest.raises(Invalid, match="larger than"):
        manifest.load("a" * (2 << 20), name="x")
    assert manifest.load("{on: yes, t: 12:30, n: 0x10, f: 1.5, e: ~, d: 2026-01-01}", name="x").value == {
        "on": "yes", "t": "12:30", "n": 16, "f": 1.5, "e": None, "d": "2026-01-01",
    }  # fmt: skip


# --- frozen -----------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["${inputs.a}", "x ${item}"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=2)
joins: st.SearchStrategy[str | int] = st.sampled_from(["all", "any", "first_success"]) | st.integers(1, 5)
maybe_seconds = st.none() | st.floats(0.1, 1e6)


def steps(depth: int) -> st.SearchStrategy[Step]:
    flows: st.SearchStrategy[Any] = st.just("other@1") if depth == 0 else workflows(depth - 1) | st.just("other@1")
    return st.builds(
        Step,
        id=st.sampled_from(["a", "b", "c-d"]),
        agent=st.none() | st.just("echo@1.0.0"),
        workflow=st.none() | flows,
        description=st.text(max_size=4),
        inputs=objects,
        needs=st.lists(st.sampled_from(["a", "b"]), unique=True).map(tuple),
        join=joins,
        when=st.booleans() | st.just("${inputs.x}"),
        for_each=st.none()
        | st.builds(
            ForEach, items=st.lists(values, max_size=2), max_parallel=st.none() | st.integers(1, 9), join=joins
        ),
        repeat=st.none() | st.builds(Repeat, until=st.just("${true}"), max_times=st.integers(1, 9)),
        approval=st.none() | st.builds(Approval, message=st.text(max_size=4), timeout_seconds=maybe_seconds),
        retry=st.none()
        | st.builds(
            RetryPolicy,
            max_attempts=st.integers(1, 5),
            on=st.frozensets(st.sampled_from(list(FailureReason)), max_size=3),
        ),
        timeout_seconds=maybe_seconds,
        continue_on_error=st.booleans(),
    )


def workflows(depth: int) -> st.SearchStrategy[Workflow]:
    return st.builds(
        Workflow,
        name=st.just("w"),
        version=st.just("1.0.0"),
        steps=st.lists(steps(depth), max_size=2).map(tuple),
        id=st.none() | st.just("an-id"),
        inputs_schema=st.none() | st.just({"type": "object"}),
        outputs_schema=st.none() | st.just({"type": "object"}),
        variables=objects,
        outputs=st.none() | objects,
        on_error=st.lists(steps(0), max_size=1).map(tuple),
        on_success=st.lists(steps(0), max_size=1).map(tuple),
        fail_fast=st.booleans(),
        schedule=st.lists(st.builds(Schedule, cron=st.just("@daily"), inputs=objects), max_size=2).map(tuple),
        webhook=st.none() | st.builds(Webhook, secret=st.just("KEY"), inputs=objects),
    )


@settings(max_examples=300, deadline=None)
@given(workflows(1))
def test_frozen_and_back(one: Workflow) -> None:
    text = definition.canonical(one)
    back = definition.from_json(json.loads(text))
    assert back == one and definition.canonical(back) == text and definition.digest(back) == definition.digest(one)


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format 2"):
        definition.from_json({"format": 2})


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("abc:-[]{}\n #&*!|>'\"%@`?,0123456789 ${}.")), max_size=120))
def test_any_text_is_a_workflow_or_invalid(text: str) -> None:
    for whole in (text, HEAD + text, HEAD + "steps:\n  - id: a\n    agent: echo\n    inputs: {x: " + text + "}\n"):
        try:
            Graph(validate.load(whole, REGISTRY))
        except Invalid as error:
            assert error.problems


@pytest.mark.parametrize(
    ("own", "theirs", "fits"),
    [
        ("agents/one:0123", "agents/two:0123", True),  # the same lists upon the same image
        ("agents/one:0123", "agents/one:4567", False),
        ("debian:12", "debian:12", True),
        ("debian:12", "ubuntu:12", False),
        ("debian:12", None, False),
        (None, "debian:12", True),
    ],
)
def test_an_agents_image_is_what_it_was_made_of(own: str | None, theirs: str | None, *, fits: bool) -> None:
    echo = agent("echo")
    lacks = validate._lacks(dataclasses.replace(echo, image=own), dataclasses.replace(echo, image=theirs))
    assert (lacks == "") is fits

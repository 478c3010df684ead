"""Shared by the tests of workflow runs: workflows, both ways of deciding, and the audit."""

from __future__ import annotations

import pytest

from swarm.admin.prove import judge
from swarm.store.store import Store
from tests.store.databases import Outside, left_overs

CHAIN = """
inputs: {word: {type: string, default: hello}}
steps:
  - {id: first, agent: echo, inputs: {word: "${inputs.word}"}}
  - {id: second, agent: echo, needs: first, inputs: {heard: "${steps.first.outputs.word}"}}
  - {id: third, agent: echo, needs: second, inputs: {heard: "${steps.second.outputs.heard}!"}}
"""
DIAMOND = """
steps:
  - {id: top, agent: echo}
  - {id: left, agent: echo, needs: top}
  - {id: right, agent: echo, needs: top}
  - {id: bottom, agent: echo, needs: [left, right], inputs: {n: 1}}
"""
RACE = """
steps:
  - {id: slow, agent: echo}
  - {id: quick, agent: echo}
  - {id: after, agent: echo, needs: [slow, quick], join: first_success}
"""
APPROVAL = """
steps:
  - {id: draft, agent: echo, inputs: {title: News}}
  - {id: check, needs: draft, approval: 'Publish ${steps.draft.outputs.title}?'}
  - {id: publish, agent: echo, needs: check, inputs: {by: "${steps.check.outputs.by}"}}
"""
NESTED = """
steps:
  - id: both
    for_each: [1, 2]
    workflow:
      inputs: {n: integer}
      steps:
        - {id: one, agent: echo, inputs: {n: "${inputs.n}"}}
        - {id: two, agent: echo, needs: one, inputs: {n: "${steps.one.outputs.n * 10}"}}
      outputs: {n: "${steps.two.outputs.n}"}
    inputs: {n: "${item}"}
  - {id: last, agent: echo, needs: both, inputs: {all: "${steps.both.outputs}"}}
"""
BROKEN = Exception("it broke")

# Both ways of deciding: with a limit below 0 s, no decision is made while the write lock is held.
OUTSIDE, INSIDE = -1.0, 60.0  # also on a busy machine
both_ways = pytest.mark.parametrize("planning_seconds", [INSIDE, OUTSIDE], ids=["in the transaction", "outside"])


async def proved(store: Store, outside: Outside) -> None:
    report = await store.audit(judge)
    assert report.kept, report.violations
    assert left_overs(outside) == 0

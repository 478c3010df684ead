"""Where an attempt's time went: each part of it is counted in the phase that it was spent in, however it ended."""

from __future__ import annotations

from pathlib import Path

from swarm.base.clock import MARKS, PHASES, Timeline
from swarm.engine.run_once import run_ticket
from tests.engine.conftest import Bench, ended, serving

WAIT = "import time\nprint('waiting', flush=True)\ntime.sleep(600)"


def test_what_is_cut_short_is_counted_in_its_own_phase() -> None:
    for number in range(1, len(MARKS) - 1):
        timeline = Timeline()
        for mark, _ in MARKS[1:number]:
            timeline.mark(mark)
        timeline.cut()
        timeline.mark("stopped")
        assert list(timeline.phases()) == [*PHASES[: number + 1], "stop", "total"]
        assert MARKS[number][0] not in timeline, "the mark itself was not reached"
        assert timeline.last == "stop"


def test_a_cut_at_the_end_changes_nothing() -> None:
    timeline = Timeline()
    for mark, _ in MARKS[1:-1]:
        timeline.mark(mark)
    before = timeline.phases()
    timeline.cut()
    assert timeline.phases() == before and "stop" not in before


async def test_each_phase_of_an_attempt_and_their_sum(plain: Bench) -> None:
    ticket = await plain.run("open('output.json', 'w').write('{}')")
    (attempt,) = await plain.attempts()
    assert ticket.state == "done" and list(attempt.timings) == [*PHASES, "total"]
    assert abs(sum(v for k, v in attempt.timings.items() if k != "total") - attempt.timings["total"]) < 1


async def test_a_time_out_is_the_agents_time(plain: Bench) -> None:
    for number, seconds in enumerate((2, 20)):  # its clock begins with the news that it has started
        plain.insert(id := f"t{number}", (await plain.agent(WAIT, id, timeout_seconds=seconds)).id)
        await run_ticket(plain.store, plain.worker, id)
        (attempt,) = await plain.attempts(id)
        if attempt.timings["agent"] > 500 * seconds:
            break
    assert attempt.reason == "timeout"
    assert attempt.timings["agent"] > 500 * seconds  # ms


async def test_a_running_attempt_has_what_it_took_so_far(plain: Bench) -> None:
    plain.insert("t", (await plain.agent(WAIT)).id)
    async with serving(plain):
        await plain.until_it_prints()
        for table in ("attempts", "step_executions"):
            plain.sql(f"UPDATE {table} SET started_at = '2026-01-01T00:00:00.000Z'")
        ((attempt,), (step,)) = await plain.attempts(), await plain.store.steps("t")
        assert attempt.outcome is None and attempt.timings["total"] > 86_400_000
        assert step.duration_ms is not None and step.duration_ms > 86_400_000
        await plain.store.cancel("t", "a test")
        assert await ended(plain, "t") == ["cancelled"]


def test_pages_name_the_phases_that_there_are() -> None:
    pages = Path(__file__).parents[2]
    for page in ("docs/tutorial.md",):
        lines = (pages / page).read_text(encoding="utf-8").split("```")
        shown = [block for block in lines if "\n  queue " in block and "\n  total " in block]
        assert shown, page
        for block in shown:
            rows = [line.split()[0] for line in block.splitlines() if line.startswith("  ") and line.split()]
            assert rows[rows.index("queue") : rows.index("total") + 1] == [*PHASES, "total"], page

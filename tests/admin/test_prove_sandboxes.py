"""What `swarm prove` says of sandboxes: histories that break each promise, made up."""

from __future__ import annotations

import pytest

from swarm.admin.prove import Report, VmFact, judge
from swarm.store.audit import LogEntry, SandboxFact
from tests.admin.test_prove import History

Move = tuple[str, str, str, str]  # kind ('' is a transition), from, to, hold
HELD, RUNS = ("held", "", "", "h1"), ("", "starting", "running", "h1")
PAUSED, ENDED = ("", "running", "paused", "h1"), ("", "running", "ended", "h1")
OVER = ("", "running", "ended", "")
AGAIN, RESUMED = ("held", "", "", "h2"), ("", "paused", "running", "h2")


class Sandboxes(History):
    def __init__(self, moves: list[Move], row: SandboxFact | None, *, traced: bool = True) -> None:
        super().__init__([], ticket=None)
        self.of_sandbox, self.row, self.traced = moves, row, traced

    def log(self) -> list[LogEntry]:
        return [
            LogEntry(
                seq=seq, ticket_id="", sandbox_id="b", kind=kind or "transition", of="" if kind else "sandbox",
                before=before or None, after=after, hold=hold or None, age_ms=20_000.0,
                mended=kind == "released" and hold == "h1",
            )
            for seq, (kind, before, after, hold) in enumerate(self.of_sandbox, 1)
        ]  # fmt: skip

    def sandboxes(self) -> list[SandboxFact]:
        return [] if self.row is None else [self.row]

    def loses_deletions(self, table: str) -> bool:
        return not self.traced


def row(state: str, hold: str | None = None, **more: object) -> SandboxFact:
    return SandboxFact(id="b", state=state, hold_id=hold, has_end=state in ("ended", "lost"), **more)  # type: ignore[arg-type]


def verdict(
    moves: list[Move], one: SandboxFact | None, *, traced: bool = True, vms: list[VmFact] | None = None
) -> Report:
    return judge(Sandboxes(moves, one, traced=traced), vms or [], engine_alive=True)


@pytest.mark.parametrize(
    ("moves", "one"),
    [
        ([], row("starting")),
        ([HELD], row("starting", "h1")),
        ([HELD, RUNS], row("running", "h1")),
        ([HELD, RUNS, PAUSED, AGAIN, RESUMED, ("", "running", "lost", "h2")], row("lost")),
        ([HELD, ("hold_lost", "", "", "h1"), AGAIN], row("starting", "h2")),
        ([HELD, RUNS, ENDED, ("deleted", "", "", "")], None),
        ([RESUMED], row("running", "h2")),  # what was before is pruned
        ([HELD, ("", "starting", "ended", "h1"), AGAIN], row("starting", "h2")),  # started again by another program
    ],
)
def test_what_is_well(moves: list[Move], one: SandboxFact | None) -> None:
    report = verdict(moves, one)
    assert report.kept and not report.changed_by_others, report
    assert report.tickets_seen == 0


@pytest.mark.parametrize(
    ("moves", "one", "kind", "what"),
    [
        ([HELD, RUNS, AGAIN], row("running", "h2"), "finished_twice", "the hold h2 began while h1 had it (event 3)"),
        ([HELD, RUNS, ENDED, OVER], row("ended"), "finished_twice", "ended as ended (event 4) after it had ended"),
        ([HELD, RUNS, PAUSED, AGAIN, ENDED], row("ended"), "finished_twice", "the hold h1 wrote (event 5) when"),
        ([HELD, RUNS], row("paused"), "unrecorded", "it is paused, but the log has it running"),
        ([HELD, RUNS, PAUSED], row("ended"), "unrecorded", "it is ended, but the log has it paused"),
        ([HELD, RUNS, PAUSED], row("paused", "h1"), "unrecorded", "its holder is h1, but the log has nobody"),
        ([HELD, ("", "starting", "paused", "h1")], row("paused"), "unrecorded", "it went from starting to paused"),
        ([HELD, RUNS], None, "lost", "its row is gone, but the log has no deletion"),
        ([HELD, RUNS], row("running", "h1", expired_ms=70_000.0), "lost", "its lease ended 70 s ago"),
        ([HELD, RUNS], row("running"), "changed_by_others", "its holder is nobody, but the log has h1"),
        ([HELD, RUNS], row("running", "mine"), "changed_by_others", "its holder is mine, but the log has h1"),
        ([HELD, RUNS], row("starting"), "changed_by_others", "it is starting, but the log has"),
        ([HELD, RUNS, ENDED], row("paused"), "changed_by_others", "it is paused, but the log has it ended"),
        ([HELD, ("released", "", "", "h1"), AGAIN], row("starting", "h2"), "changed_by_others", "taken from the hold"),
    ],
)  # fmt: skip
def test_what_is_not(moves: list[Move], one: SandboxFact | None, kind: str, what: str) -> None:
    report = verdict(moves, one)
    (found,) = getattr(report, kind)
    assert found.id == "sandbox b" and what in found.what
    assert report.kept == (kind == "changed_by_others")
    assert len(report.violations) + len(report.changed_by_others) == 1


def test_a_row_that_can_go_without_a_trace() -> None:
    assert verdict([HELD, RUNS], None, traced=False).kept


def test_a_vm_that_outlives_its_hold() -> None:
    vms = [VmFact(n=1001, attempt_id=None, owner_alive=True, sandbox_id="b")]
    assert verdict([HELD, RUNS], row("running", "h1"), vms=vms).kept
    (leak,) = verdict([HELD, RUNS, PAUSED], row("paused"), vms=vms).slots_leaked
    assert "it runs, but nobody holds its sandbox b" in leak.what

"""Does this step make engines die? A verdict on evidence (docs/adr/0018-suspects.md).

A lost attempt says that its engine died or froze, not why: whatever ran beside it was lost as well. So the first losses
count against nobody. A step that is lost again is a suspect: from then on it runs alone, with nothing else in its
engine, and only what is lost alone counts. Even that may be chance, where engines are killed all the time: each that
dies without the suspect meanwhile makes it take more. An attempt that ends in any other way clears its step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from swarm.model import AttemptOutcome
from swarm.store.sql.dialect import Sql
from swarm.store.sql.transaction import Row, Tx

SUSPECT_AFTER: Final = 2  # losses; the next attempt runs alone
ALONE: Final = "alone"  # `attempts.reason` of an attempt with nothing beside it, until it ends otherwise
ENOUGH: Final = 3  # losses alone, if no engine died without it since the first of them
_EACH_OTHER: Final = 2  # so many more for each engine that did
MOST: Final = 12  # losses in all, whatever happens elsewhere: a bound for what kills engines in the company of another
# A suspect waits for an engine that runs nothing. After this, one takes nothing else until it can run it.
PATIENCE_SECONDS: Final = 30.0
_MAX_DELAY_SECONDS: Final = 60.0

# Of step `s`: attempts lost since one ended otherwise.
LOSSES: Final = """(SELECT count(*) FROM attempts a WHERE a.step_execution_id = s.id AND a.outcome = 'lost'
    AND a.number > COALESCE((SELECT max(b.number) FROM attempts b
                             WHERE b.step_execution_id = s.id AND b.outcome = 'failed'), 0))"""
_ATTEMPTS: Final = Sql(
    "SELECT id, step_execution_id, worker, outcome, reason FROM attempts WHERE step_execution_id IN :ids "
    "AND outcome IN ('lost', 'failed') ORDER BY number"
)
# Ids are in the order of time. A step is lost with at most `MOST` workers of its own.
_DEAD_SINCE: Final = Sql(
    f"SELECT DISTINCT worker FROM attempts WHERE id > :since AND outcome = 'lost' LIMIT {MOST + 1}"
)


def losses(tx: Tx, rows: Sequence[Row]) -> Mapping[str, list[Row]]:
    """By step execution: the attempts that were lost since one ended otherwise, oldest first, without those of
    ``rows`` (of the fence), which are being lost now."""
    found: dict[str, list[Row]] = {row.step_execution_id: [] for row in rows if row.step_execution_id is not None}
    for attempt in tx.all_in(_ATTEMPTS, found):
        if attempt.outcome == AttemptOutcome.LOST:
            found[attempt.step_execution_id].append(attempt)
        else:
            found[attempt.step_execution_id].clear()
    return found


def verdict(tx: Tx, lost: Row, before: Sequence[Row]) -> str | None:
    """Why no further attempt is made; None if there is to be one. ``before``: see `losses`."""
    all_ = [*before, lost]
    alone = [attempt for attempt in all_ if attempt.reason == ALONE]
    enough = len(alone) >= ENOUGH and len(alone) >= ENOUGH + _EACH_OTHER * _others_died(tx, alone)
    if not enough and len(all_) < MOST:
        return None
    return (
        f"{len(all_)} engines in a row died or froze while they ran it, the last {len(alone)} of them while they ran "
        "nothing else: it is taken for the cause; `swarm ticket retry` starts again"
    )


def _others_died(tx: Tx, alone: Sequence[Row]) -> int:
    """How many workers that did not run it have lost something that began after its first loss alone."""
    dead = {row.worker for row in tx.all(_DEAD_SINCE, since=alone[0].id)}
    return len(dead - {attempt.worker for attempt in alone})


def delay_ms(losses: int) -> int:
    """Back-off after so many losses. Others get their turn between two engines that one may be going to kill."""
    return 0 if losses < SUSPECT_AFTER else round(1000 * min(_MAX_DELAY_SECONDS, 2.0 ** (losses - SUSPECT_AFTER)))

"""The conditions of the partial indexes, and others that several statements share."""

from __future__ import annotations

from typing import Final

from swarm.model import TicketState

# Statements repeat these conditions: SQLite uses a partial index only when the query contains its condition.
UNKNOWN_STATE: Final = "state NOT IN (" + ", ".join(f"'{s}'" for s in TicketState) + ")"
UNFINISHED: Final = "state IN ('in_progress', 'waiting', 'blocked')"
ENDED: Final = "state IN ('done', 'failed', 'cancelled')"
STEP_READY: Final = "status = 'ready' AND available_at IS NULL"
STEP_DELAYED: Final = "status = 'ready' AND available_at IS NOT NULL"
STEP_WAITING: Final = "status = 'waiting' AND available_at IS NOT NULL"
RUN_DUE: Final = "due_at IS NOT NULL"
# Runs that may have no attempt: those of workflows, and those that wait for a person.
LIVE_RUN: Final = "(progress IS NOT NULL OR status = 'waiting') AND status IN ('running', 'waiting')"
ATTEMPT_LIVE: Final = "outcome IS NULL"
SANDBOX_LIVE: Final = "state NOT IN ('ended', 'lost')"  # an unknown state is looked at too
SANDBOX_HELD: Final = "hold_id IS NOT NULL"
# Those that an engine may have to do something with; not those that sleep, or wait for another host.
SANDBOX_DUE: Final = (
    f"{SANDBOX_LIVE} AND hold_id IS NULL AND (state <> 'paused' OR wanted IS NOT NULL) "
    "AND (waits_for = '' OR state <> 'starting' OR wanted = 'ended')"
)
SANDBOX_MARKED: Final = "state = 'starting' AND hold_id IS NULL AND waits_for > ''"  # they wait for another host
SANDBOX_ENDING: Final = f"{SANDBOX_LIVE} AND hold_id IS NULL AND ends_at IS NOT NULL"
# Of a ready step `s`: the snapshot in a fork of which it starts; and whether :host may take it. That is where the
# snapshot is, or, once no engine there has given a sign of life since :silent_since, anywhere: to say that it is gone.
OF_SOURCE: Final = "SELECT {} FROM step_executions f JOIN snapshots n ON n.id = f.snapshot_id WHERE f.id = s.from_step"
SOURCE_HOST: Final = f"({OF_SOURCE.format('n.host')})"
IS_HERE: Final = (
    f"(s.from_step IS NULL OR COALESCE({SOURCE_HOST}, :host) = :host OR s.queued_at <= :silent_since "
    f"AND NOT EXISTS (SELECT 1 FROM workers WHERE workers.seen_at > :silent_since AND workers.host = {SOURCE_HOST}))"
)

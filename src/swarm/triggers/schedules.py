"""Starts workflows on a schedule. (Webhooks: `swarm.api`, which makes its tickets with `ticket` too.)"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any, Final

from swarm import schema
from swarm.base.log import logger
from swarm.cel import template
from swarm.cel.evaluate import Evaluator
from swarm.cel.expression import ExpressionError
from swarm.errors import ChangeRefused, Conflict, StoreError
from swarm.model import ExecutionMode, Ticket, TicketState
from swarm.store.registry.schedules import DueSchedule, FireRequest, moment, ms
from swarm.store.sql.rows import dump, iso, new_id
from swarm.store.store import Store
from swarm.workflow import definition, schedule
from swarm.workflow.definition import Workflow

log = logger(__name__)

# Due times are wall-clock times, but the wait uses another clock. Look this often in case the wall clock was changed.
LOOK_SECONDS: Final = 30.0
# Only commits announce a new schedule, and most commits are about something else.
_PACE_SECONDS: Final = 1.0


class InputsRefused(ValueError):
    """The inputs of a trigger don't fit its workflow."""


def ticket(
    flow: Workflow,
    workflow_id: str,
    given: Mapping[str, Any],
    trigger: Mapping[str, Any],
    *,
    evaluator: Evaluator,
    id: str,
    title: str,
) -> Ticket:
    """A ready ticket that runs the workflow. ``given``: the trigger's `inputs:`; ``trigger``: the value of `trigger` in
    its expressions and in the run's. Raises InputsRefused."""
    try:
        inputs = template.fill({"inputs": dict(given)}, {"trigger": trigger}, evaluator)["inputs"]
    except ExpressionError as error:
        raise InputsRefused(str(error)) from None
    if flow.inputs_schema is not None:
        wrong = schema.issues(schema.with_defaults(inputs, flow.inputs_schema), schema.text(flow.inputs_schema))
        if wrong:
            raise InputsRefused("the inputs don't fit the workflow: " + "; ".join(map(str, wrong)))
    data = {name: value for name, value in trigger.items() if name != "type"}
    return Ticket(
        id=id,
        title=title,
        state=TicketState.READY,
        execution_mode=ExecutionMode.WORKFLOW,
        workflow_id=workflow_id,
        inputs=dump(inputs),
        trigger_type=trigger["type"],
        trigger_data=dump(data),
    )


class Scheduler:
    """Makes the tickets of due schedules. Any number of engines may run one."""

    def __init__(self, *, store: Store, evaluator: Evaluator) -> None:
        self._store = store
        self._evaluator = evaluator
        self._look = asyncio.Event()
        self._store_error = ""  # the last one, logged once
        self._said: set[tuple[str, int, int]] = set()  # schedules whose row says why they wait

    def look(self) -> None:
        """There was a commit: there may be a new schedule."""
        self._look.set()

    async def run(self) -> None:
        """Run for ever: sleep until the next schedule is due, or until `look`."""
        while True:
            self._look.clear()
            looked = time.monotonic()
            try:
                wait = await self.fire()
                self._store_error = ""
            except StoreError as error:
                if str(error) != self._store_error:
                    self._store_error = str(error)
                    log.warning("can't look for schedules", error=self._store_error)
                wait = _PACE_SECONDS
            until = looked + min(LOOK_SECONDS, LOOK_SECONDS if wait is None else wait + 0.001)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
                    await self._look.wait()
                    await asyncio.sleep(looked + _PACE_SECONDS - time.monotonic())

    async def fire(self) -> float | None:
        """Start due schedules. Returns the seconds until the next one is due; None when there is no next one."""
        found = await self._store.due_schedules()
        held = 0
        for one in found.due:
            request = await asyncio.to_thread(self._request, one, found.now_ms)
            if request is None:
                held += 1
                continue
            try:
                fired = await self._store.fire_schedule(request)
            except (ChangeRefused, Conflict) as error:  # an INSERT of its tickets, perhaps: it is tried again
                held += 1
                if (request := self._waits(one, error)) is not None:
                    log.warning("schedule can't run", workflow=one.workflow, error=str(error))
                    with contextlib.suppress(ChangeRefused):
                        await self._store.fire_schedule(request)
                continue
            if fired:
                (log.warning if request.error else log.info)(
                    "schedule can't run" if request.error else "schedule fired",
                    workflow=one.workflow,
                    tickets=[new.id for new in request.new],
                    dropped=request.dropped,
                    **({"error": request.error} if request.error else {}),
                )
        if found.stale:
            raise StoreError("the database refuses changes of the table schedules, so some are not up to date")
        if held < len(found.due):
            return 0.0
        return None if found.next_ms is None else found.next_ms / 1000

    def _request(self, due: DueSchedule, now_ms: int) -> FireRequest | None:
        """None: it waits for its previous ticket to end, which is a commit, so `look` will be called."""
        try:
            flow = definition.from_json(json.loads(due.definition))
            one = flow.schedule[due.number]
            if schedule.is_held(one, due.before):
                return None
            plan = schedule.plan(one, moment(due.next_at), moment(now_ms), due.before)
        except schedule.ZoneMissing as error:
            # Tried again at each look, from the same due time; its row and the log say so once.
            return self._waits(due, error)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError, OverflowError, OSError) as error:
            # A row that was edited. Ignored until it is changed.
            return FireRequest(due=due, next_at=None, last_at=None, dropped=0, new=(), error=str(error))
        dropped = plan.dropped
        tickets = []
        for when in plan.run:
            trigger = {
                "type": "schedule",
                "time": iso(ms(when)),
                "cron": one.cron,
                "time_zone": one.time_zone,
                "missed": dropped,
            }
            tickets.append(self._ticket(flow, due, one.inputs, trigger, when.astimezone(schedule.zone(one.time_zone))))
            dropped = 0  # only the first ticket reports it
        return FireRequest(
            due=due,
            next_at=ms(plan.next),
            last_at=iso(ms(plan.run[-1])) if plan.run else None,
            dropped=plan.dropped,
            new=tickets,
        )

    def _waits(self, due: DueSchedule, error: Exception) -> FireRequest | None:
        """Its row says why, once, and it stays due."""
        if (key := (due.workflow, due.number, due.next_at)) in self._said:
            return None
        self._said = {*list(self._said)[-1000:], key}
        return FireRequest(due=due, next_at=due.next_at, last_at=None, dropped=0, new=(), error=str(error))

    def _ticket(
        self, flow: Workflow, due: DueSchedule, given: Mapping[str, Any], trigger: Mapping[str, Any], when: Any
    ) -> Ticket:
        id_, title = new_id(ms(when)), f"{flow.name}, {when:%Y-%m-%d %H:%M %Z}"
        try:
            return ticket(flow, due.workflow_id, given, trigger, evaluator=self._evaluator, id=id_, title=title)
        except InputsRefused as error:
            return Ticket(
                id=id_,
                title=title,
                state=TicketState.READY,
                execution_mode=ExecutionMode.WORKFLOW,
                workflow_id=due.workflow_id,
                error=f"the schedule {trigger['cron']!r} of {flow.name}@{flow.version}: {error}",
                trigger_type="schedule",
            )

"""Errors as answers: RFC 9457 (application/problem+json), with the sentence that the command line prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from starlette.responses import Response

from swarm.base.log import logger
from swarm.errors import (
    ChangeRefused,
    ChannelError,
    Conflict,
    GuestRefused,
    HostError,
    Locked,
    NoSpace,
    NotFound,
    StoreError,
    SwarmError,
    UsageError,
)

MEDIA_TYPE: Final = "application/problem+json"
RETRY_SECONDS: Final = 2

_STATUS: Final = (
    (UsageError, 400),
    (NotFound, 404),
    (Conflict, 409),
    (ChangeRefused, 409),
    (StoreError, 503),
    (NoSpace, 507),
    (GuestRefused, 409),
    (ChannelError, 502),
    (SwarmError, 500),
)

# Instead of sentences that name this server's files, which are for its log.
_SAID: Final = (
    (Locked, "the database is locked: try again"),
    (StoreError, "the database can't be used: the server's log says why"),
    (NoSpace, "no space on the server's disk: its log says where"),
    (HostError, "the server can't do that now: its log says why"),
)

log = logger(__name__)


class Refused(Exception):
    """A request that is answered with an error which is no SwarmError, such as a missing token."""

    def __init__(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


def problem(status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> Response:
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    text = json.dumps(body, ensure_ascii=False).encode(errors="replace")
    return Response(text, status_code=status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def busy(why: str) -> Refused:
    """For what succeeds soon."""
    return Refused(503, why, headers={"retry-after": str(RETRY_SECONDS)})


def of(error: SwarmError | Refused) -> Refused:
    if isinstance(error, Refused):
        return error
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    detail = str(error)
    if status >= 500:
        log.warning("a request could not be served", error=detail)
        detail = next((said for kind, said in _SAID if isinstance(error, kind)), detail)
    headers = {"retry-after": str(RETRY_SECONDS)} if status == 503 else {}
    return Refused(status, detail, headers=headers)

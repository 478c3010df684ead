"""What the gateway's process may say to the engine. It reads hostile input, so each field is bounded."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

import pydantic
from pydantic import Field

# More than a request may ask for (1,000 answers of 10^9 tokens), at the highest price that a price list may have.
_Usd = Annotated[float, Field(ge=0, le=1e15)]
_Count = Annotated[int, Field(ge=0, le=10**15)]
_Number = Annotated[int, Field(ge=0, le=2**53)]
_Text = Annotated[str, Field(max_length=4000)]
_MAX_EVENT_BYTES: Final = 64 * 1024
_Counts = Annotated[dict[Literal["input", "output", "cache_read", "cache_write"], _Count], Field(max_length=4)]


def _bounded(data: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(data, allow_nan=False)) > _MAX_EVENT_BYTES:
        raise ValueError("an event is too long")
    return data


class _Said(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Spend(_Said):
    tokens: _Count
    usd: _Usd | None


class Reserve(_Said):
    op: Literal["reserve"]
    id: _Number
    n: _Number
    call: str = Field(pattern=r"^[0-9a-f]{32}$")
    upstream: _Text
    model: _Text
    most: _Spend
    least: _Spend
    counts: _Counts


class Booked(_Said):
    model: _Text
    status: int = Field(ge=0, le=999)
    counts: _Counts
    cost_usd: _Usd | None
    latency_ms: float = Field(ge=0)
    first_byte_ms: float | None
    streamed: bool
    estimated: bool
    note: _Text


class Book(_Said):
    op: Literal["book"]
    id: _Number
    n: _Number
    call: _Text
    bill: Booked


class Event(_Said):
    op: Literal["event"]
    n: _Number
    data: Annotated[dict[str, Any], pydantic.AfterValidator(_bounded)]


class Exceeded(_Said):
    op: Literal["exceeded"]
    n: _Number
    message: _Text


class Closed(_Said):
    op: Literal["closed"]
    n: _Number


class Log(_Said):
    op: Literal["log"]
    level: Literal["warning", "error", "critical", "exception"]
    event: _Text
    more: _Text


class Ready(_Said):
    op: Literal["ready"]


ADAPTER: Final = pydantic.TypeAdapter[Any](
    Annotated[Reserve | Book | Event | Exceeded | Closed | Log | Ready, Field(discriminator="op")]
)

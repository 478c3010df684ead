"""What tokens cost: a dated table, `prices.toml`, which users can override."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

import pydantic
from pydantic import Field

from swarm.errors import UsageError
from swarm.fields import reason, sentence

SHIPPED: Final = Path(__file__).with_name("prices.toml")
_DATED: Final = re.compile(r"(-\d{8}|-latest|\[\w+\])$")

_Usd = Annotated[float, Field(ge=0, le=1e6)]
_Factor = Annotated[float, Field(gt=0, le=100)]


class _Rates(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    input: _Usd
    output: _Usd
    # Cached tokens cost the same as plain input, unless the table says otherwise.
    cache_read: _Usd | None = None
    cache_write: _Usd | None = None
    cache_write_1h: _Usd | None = None


class _Above(_Rates):
    tokens: int = Field(gt=0)


class Price(_Rates):
    """USD per 10^6 tokens of each kind. ``each``: USD per unit of things that are not tokens. ``times``: surcharges
    that multiply the price of all tokens; ``factor``: the product of those that apply."""

    above: _Above | None = None
    each: dict[str, _Usd] = Field(default_factory=dict)
    times: dict[str, _Factor] = Field(default_factory=dict)
    factor: _Factor = 1

    def usd(self, counts: Mapping[str, int]) -> float:
        """``counts`` as in `swarm.ledger.Bill`; ``cache_write_1h`` is the part of ``cache_write`` kept for an hour."""
        read, write = counts.get("cache_read", 0), counts.get("cache_write", 0)
        hour = min(counts.get("cache_write_1h", 0), write)
        prompt = counts.get("input", 0) + read + write
        rates = self.above if self.above is not None and prompt > self.above.tokens else self
        total = counts.get("input", 0) * rates.input + counts.get("output", 0) * rates.output
        total += read * (rates.input if rates.cache_read is None else rates.cache_read)
        per_write = rates.input if rates.cache_write is None else rates.cache_write
        total += (write - hour) * per_write
        total += hour * (per_write if rates.cache_write_1h is None else rates.cache_write_1h)
        return total * self.factor / 1e6 + sum(counts.get(kind, 0) * usd for kind, usd in self.each.items())


class _Table(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    date: str = ""
    source: str = ""
    each: dict[str, _Usd] = Field(default_factory=dict)
    times: dict[str, _Factor] = Field(default_factory=dict)
    models: dict[str, Price] = Field(default_factory=dict)


class Prices:
    def __init__(self, models: Mapping[str, Price], *, date: str) -> None:
        self.models = models
        self.date = date

    def of(self, model: str, surcharge: str = "") -> Price | None:
        """By name, or by name without the date at its end. ``surcharge`` follows the name in the table
        (" speed=fast"); one that multiplies prices needs no price of its own."""
        for name in (model, _DATED.sub("", model)):
            if price := self.models.get(name + surcharge):
                return price
            for word in (words := surcharge.split()):
                price = self.of(name, "".join(f" {other}" for other in words if other != word))
                if price is not None and word in price.times:
                    return price.model_copy(update={"factor": price.factor * price.times[word]})
        return None


def load(own: Path | None) -> Prices:
    """Raises UsageError with the file and the field."""
    table = _table(SHIPPED)
    given = _table(own) if own is not None else _Table()
    each, times = {**table.each, **given.each}, {**table.times, **given.times}
    models = {**table.models, **given.models}
    priced = {
        name: price.model_copy(update={"each": {**each, **price.each}, "times": {**times, **price.times}})
        for name, price in models.items()
    }
    return Prices(priced, date=given.date or table.date)


def _table(file: Path) -> _Table:
    try:
        return _Table.model_validate(tomllib.loads(file.read_text()))
    except pydantic.ValidationError as error:
        raise UsageError(f"the price list {file}: {sentence(error, _Table)}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"the price list {file} can't be read: {reason(error)}; correct it") from None

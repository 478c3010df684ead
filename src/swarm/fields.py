"""What agent manifests and workflow files have in common: names, versions, and numbers within `model.BOUNDS`."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, Field, StringConstraints

from swarm.model import BOUNDS, RetryPolicy

NAME: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=NAME)]
Version = Annotated[str, StringConstraints(pattern=r"^\d{1,9}\.\d{1,9}\.\d{1,9}([-+][0-9A-Za-z.-]{1,40})?$")]
# Of environment variables, and of secrets, which become such.
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]


def bounded(name: str, default: Any = ..., **more: Any) -> Any:
    """A pydantic field for the number ``name``, within the bounds that hold for it everywhere."""
    least, most = BOUNDS[name]
    return Field(default=default, ge=least, le=most, **more)


class RetryFields(BaseModel):
    """The numbers of a `retry:` block."""

    max_attempts: int = bounded("max_attempts", RetryPolicy().max_attempts)
    delay_seconds: float = bounded("delay_seconds", RetryPolicy().delay_seconds)
    factor: float = bounded("factor", RetryPolicy().factor)
    max_delay_seconds: float = bounded("max_delay_seconds", RetryPolicy().max_delay_seconds)

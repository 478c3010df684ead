"""Settings, in rising priority: defaults, /etc/swarm/swarm.toml, SWARM_* in the environment, command-line flags."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from swarm.errors import UsageError
from swarm.fields import HOST_PORT, Labels
from swarm.model import BOUNDS, BudgetPolicy

SYSTEM_HOME = Path("/opt/swarm-platform")
SYSTEM_REGISTRY = Path("/opt/swarm-registry")
CONFIG_FILE = Path("/etc/swarm/swarm.toml")

_LISTS: Final = {"egress_private", "notices_private"}
# Smallest and largest allowed value of each numeric setting, which is a whole number if both of them are.
RANGES: Final[dict[str, tuple[float, float]]] = {
    "first_engine_slot": (1, 65_533),  # of the slots that exist: vm/slots/inventory.py
    "budget_usd_per_day": BOUNDS["budget_usd"],
    "budget_tokens_per_day": BOUNDS["budget_tokens"],
    "snapshots_gb": (0.001, 1e6),
    "project_share": (0.001, 1.0),
    "lease_seconds": (0.1, 86_400.0),
    "queue_timeout_seconds": (0.001, 365 * 86_400.0),
    "host_timeout_seconds": (1.0, 365 * 86_400.0),
    "boot_timeout_seconds": (0.1, 86_400.0),
    "max_output_mb": (1, 2048),
    "busy_timeout_seconds": (0.1, 3600.0),  # not 0, which would be "for ever" for PostgreSQL
}


def _number(name: str, default: Any) -> Any:
    least, most = RANGES[name]
    return Field(default=default, ge=least, le=most)


class Settings(BaseModel):
    """All settings. Each field is ``SWARM_<NAME>`` in the environment and ``<name>`` in the file."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    home: Path = SYSTEM_HOME
    database_url: str = ""  # default: sqlite at home/data/swarm.db
    images_dir: Path | None = None  # default: home/images
    templates_dir: Path | None = None  # default: home/templates
    # Snapshots of VMs: paused sandboxes, and VMs of tickets that were kept. For root alone: they may hold secrets. On
    # the file system of state_dir, none of it is copied when a sandbox is paused or resumed.
    snapshots_dir: Path | None = None  # default: home/snapshots
    # How much disk they may take together, in 10^9 bytes. Not set: as much as there is.
    snapshots_gb: float | None = _number("snapshots_gb", None)
    # The largest part that one project may have: of an engine's places for sandboxes, of the memory for VMs, of what
    # snapshots may take. What belongs to no project may have all.
    project_share: float = _number("project_share", 0.5)
    # State of the VMs on this host, shared by all homes: VM directories, slot locks. The path must be short (it holds
    # Unix sockets) and on a disk, not in memory (it holds work disks too).
    state_dir: Path = Path("/var/lib/swarm")

    # What this host has, for agents that require it, beside `host`, `arch` and `kvm`: '{"zone": "a", "gpu": true}'.
    labels: Labels = Field(default_factory=dict)

    # Where this host hands out its images and layers to the other hosts of its database: an address of this host, and a
    # port. '' opens none.
    share_address: str = Field(default="", pattern=HOST_PORT)

    driver: Literal["auto", "firecracker", "qemu", "process"] = "auto"
    # False runs Firecracker as root, outside its jail: only for debugging a VMM, never for agents.
    jailer: bool = True
    # True takes a Firecracker with known holes: only for Swarm's own tests, which run such a version.
    firecracker_holes_allowed: bool = False
    # Digest of the guest image to use, or its first characters; '' is the newest image of this version of Swarm.
    image: str = ""
    subnet: IPv4Network = IPv4Network("10.0.0.0/16")
    bridge: str = "br0"
    # The engine takes slots from this number up, so that it never collides with those of `swarm-spawn-ns N`.
    first_engine_slot: int = _number("first_engine_slot", 1000)

    # What all model calls of one day (UTC) may cost together, over all tickets. Not set: no limit.
    budget_usd_per_day: float | None = _number("budget_usd_per_day", None)
    budget_tokens_per_day: int | None = _number("budget_tokens_per_day", None)
    # What happens to a step that exhausts a budget, unless its ticket or agent says: 'wait' asks a person.
    over_budget: BudgetPolicy = BudgetPolicy.FAIL
    # Private networks in which agents may reach the hosts that their network policy names: '["192.168.7.0/24"]'.
    egress_private: tuple[IPv4Network | IPv6Network, ...] = ()
    # The same for notices (docs/monitoring.md), which the server sends.
    notices_private: tuple[IPv4Network | IPv6Network, ...] = ()
    # How browsers reach `swarm serve` behind a proxy with TLS: https://swarm.example.org.
    public_url: str = Field(default="", pattern=r"^(https?://[A-Za-z0-9.\-\[\]:]+)?$", max_length=300)
    # Tables that override the built-in ones (docs/claude.md): services behind the gateway, and prices. Default: the
    # files in the home, if they exist.
    upstreams: Path | None = None
    prices: Path | None = None

    lease_seconds: float = _number("lease_seconds", 30.0)
    # A ticket that has waited longer when its turn comes fails instead of running late. Not set: it waits for ever.
    queue_timeout_seconds: float | None = _number("queue_timeout_seconds", None)
    # Once no engine of a host has given a sign of life for so long, steps that start from VMs kept there fail.
    host_timeout_seconds: float = _number("host_timeout_seconds", 900.0)
    boot_timeout_seconds: float = _number("boot_timeout_seconds", 120.0)
    max_output_mb: int = _number("max_output_mb", 16)
    busy_timeout_seconds: float = _number("busy_timeout_seconds", 30.0)

    @property
    def data_dir(self) -> Path:
        return self.home / "data"

    @property
    def database(self) -> str:
        """The database's URL, as SQLAlchemy expects it."""
        return self.database_url or f"sqlite:///{quote(str(self.data_dir / 'swarm.db'))}"

    @property
    def registry_link(self) -> Path:
        """A second, documented path to the same database."""
        return (SYSTEM_REGISTRY if self.home == SYSTEM_HOME else self.home / "registry") / "registry.db"

    @property
    def api_socket(self) -> Path:
        """Where `swarm serve` listens for this user's own commands."""
        return self.data_dir / "api.sock"

    @property
    def images(self) -> Path:
        return self.images_dir or self.home / "images"

    @property
    def templates(self) -> Path:
        return self.templates_dir or self.home / "templates"

    @property
    def snapshots(self) -> Path:
        return self.snapshots_dir or self.home / "snapshots"

    @property
    def layers(self) -> Path:
        """Layers of agents, which are built on those images."""
        return self.images / "layers"

    @property
    def agents(self) -> Path:
        return self.home / "agents"


def _from_file(file: Path) -> dict[str, Any]:
    """Raises UsageError for an unknown setting: ignoring it would hide a spelling mistake."""
    try:
        values = tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    for name in values.keys() - Settings.model_fields.keys():
        near = difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(Settings.model_fields))}"
        raise UsageError(f"{file}: unknown setting {name!r}; {hint}")
    return values


def _from_environment() -> dict[str, Any]:
    """An empty variable counts as not set. Raises UsageError for a list that isn't JSON, and a name that is nearly one
    of ours: ignoring it would hide a spelling mistake."""
    for variable in os.environ:
        name = variable.removeprefix("SWARM_").lower()
        if variable.startswith("SWARM_") and name not in Settings.model_fields:
            near = difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.85)
            if near:  # others may use SWARM_… for something else
                raise UsageError(f"unknown setting {variable}; did you mean SWARM_{near[0].upper()}?")
    found: dict[str, Any] = {n: v for n in Settings.model_fields if (v := os.environ.get(f"SWARM_{n.upper()}"))}
    for name in (*_LISTS, "labels"):
        try:
            if name in found:
                found[name] = json.loads(found[name])
        except ValueError:
            like = 'a list in JSON, like ["192.168.7.0/24"]'
            like = 'an object in JSON, like {"zone": "a"}' if name == "labels" else like
            raise UsageError(f"SWARM_{name.upper()} is {found[name]!r}; it must be {like}") from None
    return found


def config_file() -> Path:
    return Path(os.environ.get("SWARM_CONFIG", CONFIG_FILE))


def load(**flags: object) -> Settings:
    """Read the settings; a flag that is None was not given. Raises UsageError that names each bad value."""
    try:
        given = {k: v for k, v in flags.items() if v is not None}
        found = Settings.model_validate(_from_file(config_file()) | _from_environment() | given)
    except pydantic.ValidationError as error:
        places: dict[str, list[Any]] = {}
        for one in error.errors():
            places.setdefault(str(one["loc"][0]) if one["loc"] else "settings", []).append(one)
        raise UsageError("bad settings: " + "; ".join(_sentence(*place) for place in places.items())) from None
    except (OSError, ValueError) as error:  # TOML's own errors, and bytes that are not UTF-8
        from swarm.fields import reason

        message = (
            f"can't read the settings in {config_file()}: {reason(error)}; "
            "fix the file, or point SWARM_CONFIG at another one"
        )
        raise UsageError(message) from None
    for name, value in found:
        if isinstance(value, Path) and any("\ud800" <= char <= "\udfff" for char in str(value)):
            # bytes that are no UTF-8: SQLite, JSON and TOML have no way to say them
            raise UsageError(f"{name} is {str(value)!a}, which is not UTF-8; choose another place")
    return found


def _sentence(name: str, errors: list[Any]) -> str:
    """Pydantic's errors with one setting: its name, its value, and what it must be."""
    from swarm.fields import complaint

    error = errors[0]
    if name in RANGES:
        least, most = RANGES[name]
        whole = "whole " if isinstance(least, int) and isinstance(most, int) else ""
        return f"{name} is {error['input']!r}; it must be a {whole}number from {least:,.16g} to {most:,.16g}"
    return f"{name} {complaint(errors)}"

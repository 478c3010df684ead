"""Settings: defaults < /etc/swarm/swarm.toml < SWARM_* in the environment < command-line flags."""

from __future__ import annotations

import difflib
import os
import tomllib
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal

import pydantic
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from swarm.errors import UsageError
from swarm.model import BudgetPolicy

SYSTEM_HOME = Path("/opt/swarm-platform")
SYSTEM_REGISTRY = Path("/opt/swarm-registry")
CONFIG_FILE = Path("/etc/swarm/swarm.toml")


class Settings(BaseSettings):
    """Every knob. Each field is ``SWARM_<NAME>`` in the environment and ``<name>`` in the file."""

    model_config = SettingsConfigDict(env_prefix="SWARM_", env_ignore_empty=True, extra="ignore", frozen=True)

    home: Path = SYSTEM_HOME
    database_url: str = ""  # default: sqlite at home/data/swarm.db
    images_dir: Path | None = None  # default: home/images
    templates_dir: Path | None = None  # default: home/templates
    # What runs on this host, whatever the home: VM directories, slot locks. Must be short (Unix sockets live below it)
    # and on a disk, not in memory (work disks live below it too).
    state_dir: Path = Path("/var/lib/swarm")

    driver: Literal["auto", "firecracker", "qemu", "process"] = "auto"
    # False runs Firecracker as root and without its jail: for debugging a VMM, never for agents.
    jailer: bool = True
    # Digest, or the beginning of one, of the guest image to use; '' is the newest of this version of Swarm.
    image: str = ""
    subnet: IPv4Network = IPv4Network("10.0.0.0/16")
    bridge: str = "br0"
    # `swarm-spawn-ns N` takes the slot it is told; the engine takes slots from here up, so they never meet.
    first_engine_slot: int = 1000

    # What all model calls of a day (UTC) may cost together, over all tickets. Not set: as much as they like.
    budget_usd_per_day: float | None = None
    budget_tokens_per_day: int | None = None
    # What a step becomes that comes to the end of a budget, where ticket and agent don't say: 'wait' asks a person.
    over_budget: BudgetPolicy = BudgetPolicy.FAIL
    # Private networks that agents may reach all the same, where their policy names a host there: '["192.168.7.0/24"]'.
    egress_private: tuple[IPv4Network | IPv6Network, ...] = ()
    # Tables over those that ship (docs/claude.md): services behind the gateway, prices. Default: in the home, if there.
    upstreams: Path | None = None
    prices: Path | None = None

    lease_seconds: float = 30.0
    # A ticket that waited longer when its turn comes fails, instead of being run too late. Not set: it waits for ever.
    queue_timeout_seconds: float | None = None
    boot_timeout_seconds: float = 120.0
    max_output_mb: int = 16
    busy_timeout_seconds: float = 30.0

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config_file()))

    @property
    def data_dir(self) -> Path:
        return self.home / "data"

    @property
    def database(self) -> str:
        """URL of the database, in SQLAlchemy's form."""
        return self.database_url or f"sqlite:///{self.data_dir / 'swarm.db'}"

    @property
    def registry_link(self) -> Path:
        """The second documented path of the one database."""
        return (SYSTEM_REGISTRY if self.home == SYSTEM_HOME else self.home / "registry") / "registry.db"

    @property
    def images(self) -> Path:
        return self.images_dir or self.home / "images"

    @property
    def templates(self) -> Path:
        return self.templates_dir or self.home / "templates"

    @property
    def layers(self) -> Path:
        """Of agents, upon those images."""
        return self.images / "layers"

    @property
    def agents(self) -> Path:
        return self.home / "agents"


def _check_names(file: Path) -> None:
    """A setting that nobody reads would be a promise that nobody keeps."""
    try:
        names = tomllib.loads(file.read_text())
    except FileNotFoundError:
        return
    for name in names.keys() - Settings.model_fields.keys():
        near = difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(sorted(Settings.model_fields))}"
        raise UsageError(f"{file}: there is no setting {name!r}{hint}")


def config_file() -> Path:
    return Path(os.environ.get("SWARM_CONFIG", CONFIG_FILE))


def load(**flags: object) -> Settings:
    """Read the settings; flags that are None were not given. Raises UsageError naming each bad value."""
    try:
        _check_names(config_file())
        return Settings(**{k: v for k, v in flags.items() if v is not None})  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise UsageError("bad settings: " + "; ".join(lines)) from None
    except (OSError, ValueError) as error:  # TOML's own errors, and bytes that are not UTF-8
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"can't read the settings in {config_file()}: {why}; mend it, or set SWARM_CONFIG") from None

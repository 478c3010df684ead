"""Bad settings are the user's to fix: they get a sentence that says how, not a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm import config
from swarm.errors import UsageError
from swarm.store.sql.database import Database
from swarm.vm.slots.inventory import MAX_SLOT


def test_a_broken_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "swarm.toml"
    file.write_text("[bad")
    monkeypatch.setenv("SWARM_CONFIG", str(file))
    with pytest.raises(UsageError, match=f"can't read the settings in {file}: it is not TOML: expected"):
        config.load()
    file.write_text('subnet = "10.0.0.1/16"')
    with pytest.raises(UsageError, match=r"subnet must be a network .*10\.0\.0\.1/16"):
        config.load()


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty path would be the current directory."""
    monkeypatch.setenv("SWARM_IMAGES_DIR", "")
    monkeypatch.setenv("SWARM_HOME", "")
    assert config.load().images == config.SYSTEM_HOME / "images"


def test_a_misspelt_setting_is_not_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "swarm.toml"
    monkeypatch.setenv("SWARM_CONFIG", str(file))
    file.write_text('lease_secs = 5\ndriver = "qemu"')
    with pytest.raises(UsageError, match=f"{file}: unknown setting 'lease_secs'; did you mean 'lease_seconds'"):
        config.load()
    file.write_text("[xyzzy]\na = 1")
    with pytest.raises(UsageError, match="unknown setting 'xyzzy'; use one of boot_timeout_seconds, "):
        config.load()
    file.write_text("lease_seconds = 5")
    assert config.load().lease_seconds == 5
    file.write_bytes(b'home = "\xff"')
    with pytest.raises(UsageError, match=r"can't read the settings in .*; fix the file, or point SWARM_CONFIG at"):
        config.load()


@pytest.mark.parametrize("name", config.RANGES)
def test_numbers_have_a_range(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends are allowed, nothing beyond them, and nothing that is not a number."""
    least, most = config.RANGES[name]
    for good in (least, most):
        monkeypatch.setenv(f"SWARM_{name.upper()}", str(good))
        assert getattr(config.load(), name) == good
    for bad in ("-1", str(least - 1), str(most + 1), "1e18", "nan", "inf", "-inf", "soon"):
        monkeypatch.setenv(f"SWARM_{name.upper()}", bad)
        with pytest.raises(UsageError) as caught:
            config.load()
        kind = "a number" if name.endswith(("_seconds", "_gb", "_share")) or "usd" in name else "a whole number"
        assert (
            str(caught.value)
            == f"bad settings: {name} is {bad!r}; it must be {kind} from {least:,.16g} to {most:,.16g}"
        )


def test_a_lease_flag_that_makes_no_sense_is_refused() -> None:
    for bad in (0, -1, float("nan"), 1e18):
        with pytest.raises(UsageError) as caught:
            config.load(lease_seconds=bad)
        assert str(caught.value) == f"bad settings: lease_seconds is {bad!r}; it must be a number from 0.1 to 86,400"


def test_every_number_has_a_range() -> None:
    numbers = {
        name for name, field in config.Settings.model_fields.items()
        if any(kind in str(field.annotation) for kind in ("int", "float"))
    }  # fmt: skip
    assert numbers - {"labels"} == set(config.RANGES)  # which may have numbers in them


def test_slots_in_range_exist() -> None:
    assert config.RANGES["first_engine_slot"] == (1, MAX_SLOT)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("oracle://user:secret@host/db", "the database 'oracle' is not supported"),
        ("oracle://user:sec/ret@host/db", "not supported"),
        ("oracle://user:a:secret@host/db", "not supported"),
        ("oracle://user:secret@a@host/db", "not supported"),
        ("oracle://user://secret@host/db", "not supported"),
        ("oracle:user:secret@host/db", "bad database URL"),
        ("postgresql//user:secret@host/db", "bad database URL"),
        ("sqlite://user:secret@host/db", "a file's has three slashes"),
        ("sqlite:///?user:secret@host", "can't be shared"),
    ],
)
def test_a_password_in_a_database_url_is_not_shown(url: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        Database(url, busy_timeout_seconds=1)
    assert not any(part in str(caught.value) for part in ("secret", "sec/", "/ret"))


def test_a_database_url_without_a_password_is_shown() -> None:
    with pytest.raises(UsageError, match="oracle://user@host:1/db"):
        Database("oracle://user@host:1/db", busy_timeout_seconds=1)


@pytest.mark.parametrize("address", ["", "10.0.0.1:1", "host-7.lan:7717", "[::1]:65535", "h:59999"])
def test_an_address_to_share_at(address: str) -> None:
    assert config.load(share_address=address).share_address == address


@pytest.mark.parametrize(
    "address",
    ["7717", ":7717", "h", "h:", "h:0", "h:01", "h:65536", "h:99999", "h:1x", "a b:1", "::1:70", "http://h:1"],
)
def test_no_address_to_share_at(address: str) -> None:
    with pytest.raises(UsageError, match="share_address must be an address with a port"):
        config.load(share_address=address)

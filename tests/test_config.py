"""Settings that can't be read are the user's affair: a sentence, not a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm import config
from swarm.errors import UsageError
from swarm.store.sql.database import Database


def test_a_broken_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "swarm.toml"
    file.write_text("[bad")
    monkeypatch.setenv("SWARM_CONFIG", str(file))
    with pytest.raises(UsageError, match=f"can't read the settings in {file}: Expected"):
        config.load()
    file.write_text('subnet = "10.0.0.1/16"')
    with pytest.raises(UsageError, match=r"subnet: .*10\.0\.0\.1/16"):
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
    with pytest.raises(UsageError, match=f"{file}: there is no setting 'lease_secs'; did you mean 'lease_seconds'"):
        config.load()
    file.write_text("[xyzzy]\na = 1")
    with pytest.raises(UsageError, match="there is no setting 'xyzzy'; there are: boot_timeout_seconds, "):
        config.load()
    file.write_text("lease_seconds = 5")
    assert config.load().lease_seconds == 5
    file.write_bytes(b'home = "\xff"')
    with pytest.raises(UsageError, match="can't read the settings in"):
        config.load()


def test_a_password_in_a_database_url_is_not_shown() -> None:
    with pytest.raises(UsageError, match="the database 'oracle' is not supported") as caught:
        Database("oracle://user:secret@host/db", busy_timeout_seconds=1)
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="bad database URL") as caught:
        Database("postgresql//user:secret@host/db", busy_timeout_seconds=1)
    assert "secret" not in str(caught.value)

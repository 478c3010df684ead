"""Where `Swarm()` finds the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.client import Invalid, Swarm, SwarmError, Unreachable
from swarm.client.where import Where, find, options


@pytest.mark.parametrize(
    ("env", "given", "found"),
    [
        ({}, {"url": "https://swarm.example/"}, ("https://swarm.example", None)),
        ({"SWARM_URL": "http://a:1"}, {}, ("http://a:1", None)),
        ({"SWARM_URL": "http://a:1", "SWARM_TOKEN": "t"}, {}, ("http://a:1", "t")),
        ({"SWARM_URL": "http://a:1", "SWARM_TOKEN": "t"}, {"url": "http://b", "token": "u"}, ("http://b", "u")),
        ({"SWARM_TOKEN": "t"}, {}, ("http://127.0.0.1:8420", "t")),
        ({"SWARM_URL": "", "SWARM_TOKEN": ""}, {}, "swarm serve"),
        ({}, {}, "swarm serve"),
        ({"SWARM_URL": "http://a:1"}, {"home": "/nowhere"}, "nothing answers on /nowhere/data/api.sock"),
        ({}, {"url": "http://a", "home": "/x"}, "not both"),
        ({}, {"url": "unix:/x"}, "must begin with http"),
        ({}, {"url": "localhost:8420"}, "must begin with http"),
        ({}, {"url": "http://"}, "must begin with http"),
        ({}, {"url": "http://a:b"}, "is not valid"),
        ({}, {"url": "http://a", "token": "a\nb"}, "the token"),
    ],
)
def test_what_counts(
    env: dict[str, str], given: dict[str, str], found: tuple[str, str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SWARM_URL", "SWARM_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWARM_HOME", "/nowhere")
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    if isinstance(found, tuple):
        assert find(given.get("url"), given.get("token"), given.get("home")) == Where(url=found[0], token=found[1])
        return
    with pytest.raises(SwarmError) as raised:
        Swarm(**given)  # type: ignore[arg-type]
    assert found in str(raised.value)
    assert isinstance(raised.value, Unreachable if "swarm serve" in found or "nothing" in found else Invalid)


def test_the_socket_of_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_URL", "http://elsewhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "api.sock").touch()
    assert find(None, None, tmp_path).socket == tmp_path / "data" / "api.sock"
    monkeypatch.chdir(tmp_path.parent)
    assert find(None, None, tmp_path.name).socket == tmp_path / "data" / "api.sock"


@pytest.mark.parametrize(
    ("url", "proxied"),
    [
        ("http://127.0.0.1:1", False),
        ("http://[::1]:1", False),
        ("http://localhost", False),
        ("http://swarm", True),
        ("https://swarm.example", True),
    ],
)
def test_proxies_are_for_other_hosts(url: str, proxied: bool) -> None:
    assert options(Where(url=url), 1)["trust_env"] is proxied
    assert options(Where(url=url, socket=Path("/x")), 1)["trust_env"] is False

"""Secrets: sealed at rest, given by name, and taken out of what their agents say."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.admin.vault import Vault
from swarm.app import wiring
from swarm.base.redact import Redactor
from swarm.engine.run_once import run_ticket
from swarm.errors import HostError, NotFound, UsageError
from tests.engine.conftest import Bench
from tests.gateway.conftest import KEY
from tests.gateway.messages_api import MessagesApi
from tests.gateway.test_tickets import PRELUDE

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

VALUE = "s3cret-välue\nof two lines"


@pytest.fixture
async def vault(plain: Bench) -> AsyncIterator[Vault]:
    yield wiring.vault(plain.settings, plain.store)


@given(st.integers(0, 60), st.integers(1, 30))
def test_no_part_of_a_secret_is_left_where_a_text_is_cut(before: int, limit: int) -> None:
    redactor = Redactor({"KEY": VALUE})
    text = "x" * before + VALUE * 20
    assert set(redactor.beginning(text, limit)) <= set("x[KEY]")
    assert redactor.beginning("x" * before, limit) == "x" * min(before, limit)


async def test_sealed_at_rest(plain: Bench, vault: Vault) -> None:
    await vault.set("TOKEN", VALUE)
    assert await vault.get("TOKEN") == VALUE
    assert [(row.name, row.scope) for row in await vault.list()] == [("TOKEN", "all")]
    key = plain.settings.data_dir / "secret.key"
    assert key.stat().st_mode & 0o777 == 0o600
    for file in plain.settings.home.rglob("*"):
        if file.is_file():
            assert b"lue\nof two" not in file.read_bytes(), file
    await vault.set("TOKEN", "another")
    assert await vault.get("TOKEN") == "another"
    await vault.remove("TOKEN")
    assert await vault.get("TOKEN") is None
    with pytest.raises(NotFound, match="no secret 'TOKEN' for all"):
        await vault.remove("TOKEN")


async def test_a_sealed_value_opens_in_its_place_only(plain: Bench, vault: Vault) -> None:
    await vault.set("MINE", VALUE, scope="agent:a")
    plain.sql("UPDATE secrets SET scope = 'all'")
    with pytest.raises(HostError, match="can't be opened") as caught:
        await vault.get("MINE")
    assert VALUE not in str(caught.value)
    await vault.set("MINE", VALUE)
    (plain.settings.data_dir / "secret.key").unlink()
    with pytest.raises(HostError, match="key of all secrets"):
        await vault.get("MINE")
    (plain.settings.data_dir / "secret.key").write_text("c2hvcnQ=")
    (plain.settings.data_dir / "secret.key").chmod(0o600)
    with pytest.raises(HostError, match="does not hold a key"):
        await vault.get("MINE")
    (plain.settings.data_dir / "secret.key").chmod(0o644)
    with pytest.raises(HostError, match="chmod 600"):
        await vault.get("MINE")


async def test_a_systemd_credential_is_the_key(
    plain: Bench, vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "swarm_secret_key").write_text("QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    await vault.set("TOKEN", VALUE)
    assert await vault.get("TOKEN") == VALUE
    assert not (plain.settings.data_dir / "secret.key").exists()
    (credentials / "swarm_secret_key").unlink()
    with pytest.raises(HostError):
        await vault.get("TOKEN")


@pytest.mark.parametrize(("name", "value"), [("1x", "abcd"), ("a b", "abcd"), ("x", "abc"), ("x", "ab\0cd"), ("x", "")])
async def test_what_can_be_no_secret(vault: Vault, name: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        await vault.set(name, value)
    assert not value or value not in str(caught.value)


async def test_an_agent_gets_what_its_manifest_names_and_no_more(plain: Bench, vault: Vault) -> None:
    code = "import json, os; json.dump({n: len(os.environ.get(n, '')) for n in 'ABCD'}, open('output.json', 'w'))"
    await vault.set("A", "for-all")
    await vault.set("A", "for-this-agent-alone", scope="agent:agent")
    await vault.set("B", "for-all-again")
    await vault.set("C", "not-asked-for")
    await vault.set("D", "of-another", scope="agent:other")
    ticket = await plain.run(code, secrets=("A", "B"))
    assert json.loads(ticket.outputs or "") == {
        "A": len("for-this-agent-alone"),
        "B": len("for-all-again"),
        "C": 0,
        "D": 0,
    }


async def test_a_secret_that_is_not_set_is_said_before_a_vm_is_started(plain: Bench, vault: Vault) -> None:
    await vault.set("D", "of-another", scope="agent:other")
    ticket = await plain.run("", secrets=("D",))
    assert ticket.state == "failed"
    assert "it needs the secret 'D', which is not set" in (ticket.error or "")
    assert "`swarm secret set D --agent agent`" in (ticket.error or "")
    assert [(a.vm_id, a.reason) for a in await plain.attempts()] == [(None, "not_configured")]


async def test_secrets_are_taken_out_of_output_errors_and_outputs(plain: Bench, vault: Vault) -> None:
    await vault.set("TOKEN", "hunter22-and-more")
    code = (
        "import json, os, sys, time\nt = os.environ['TOKEN']\n"
        "for c in t: print(c, end='', flush=True); time.sleep(0.005)\n"
        "print(); print(t + t, file=sys.stderr); print('hunter22 alone')\n"
        "json.dump({'a': [t, {t: 'x' + t}]}, open('output.json', 'w'))\nsys.exit(int(os.path.exists('/nonexistent')))"
    )
    ticket = await plain.run(code, secrets=("TOKEN",))
    assert json.loads(ticket.outputs or "") == {"a": ["[TOKEN]", {"[TOKEN]": "x[TOKEN]"}]}
    failing = await plain.agent(
        "import os, sys\nprint(os.environ['TOKEN'])\nsys.exit(3)", "failing", secrets=("TOKEN",)
    )
    plain.insert("u", failing.id)
    failed = await run_ticket(plain.store, plain.worker, "u")
    assert "[TOKEN]" in (failed.error or "")
    events = json.dumps([dict(e.data) for name in "tu" for e in await plain.store.events(name)])
    assert "hunter22-and-more" not in events + (failed.error or "")
    assert "hunter22 alone" in events
    assert b"hunter22-and-more" not in plain.database.read_bytes()


async def test_what_an_agent_was_refused_shows_no_secret(
    api: MessagesApi, plain: Bench, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what it asked a model by the wrong name."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", api.url)
    await vault.set("TOKEN", "hunter22-and-more")
    code = PRELUDE + (
        "import urllib.error, urllib.request\nurl, t = os.environ['ANTHROPIC_BASE_URL'], os.environ['TOKEN']\n"
        "headers = {'x-api-key': os.environ['ANTHROPIC_API_KEY']}\n"
        "try: urllib.request.urlopen(urllib.request.Request(f'{url}/v1/{t}', headers=headers))\n"
        "except urllib.error.HTTPError as error: assert error.code == 404\n"
        "call('x', model=t)"
    )
    agent = await plain.agent(code, network="gateway", secrets=("TOKEN",))
    plain.insert("t", agent.id, budget_usd=1)
    ticket = await run_ticket(plain.store, plain.worker, "t")
    events = [dict(e.data) for e in await plain.store.events("t")]
    assert [e["path"] for e in events if e.get("refused") == "path"] == ["/v1/[TOKEN]"]
    assert "the price of model '[TOKEN]' is unknown" in (ticket.error or "")
    assert "hunter22" not in json.dumps(events) + (ticket.error or "")


async def test_a_secret_of_a_workflow(plain: Bench, vault: Vault) -> None:
    agent = await plain.agent("", secrets=("TOKEN",))
    plain.sql("INSERT INTO workflows (id, name, version) VALUES ('w', 'nightly', '1.0.0')")
    await vault.set("TOKEN", "of-the-workflow", scope="workflow:nightly")
    assert await vault.of(["TOKEN"], agent, "w") == {"TOKEN": "of-the-workflow"}
    with pytest.raises(NotFound):
        await vault.of(["TOKEN"], agent, None)


async def test_the_gateways_key_may_be_a_secret(
    api: MessagesApi, plain: Bench, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", api.url)
    await vault.set("anthropic_api_key", KEY)
    ticket = await plain.run(PRELUDE + "done(call('x'))", network="gateway")
    assert ticket.state == "done", ticket.error
    assert KEY not in json.dumps([dict(e.data) for e in await plain.store.events("t")])


async def test_the_gateways_key_is_no_secret_of_agents(
    api: MessagesApi, plain: Bench, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that names it is not enough: it must be set for this very agent."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    await vault.set("anthropic_api_key", KEY)
    ticket = await plain.run("", secrets=("anthropic_api_key",))
    assert ticket.state == "failed"
    assert "is the gateway's key for anthropic: no VM gets it" in (ticket.error or "")
    assert "`swarm secret set anthropic_api_key --agent agent`" in (ticket.error or "")
    assert [(a.vm_id, a.reason) for a in await plain.attempts()] == [(None, "not_configured")]
    await vault.set("anthropic_api_key", "sk-of-its-own", scope="agent:agent")
    agent = await plain.store.agent("agent")
    assert await vault.of(["anthropic_api_key"], agent, None) == {"anthropic_api_key": "sk-of-its-own"}


async def test_outputs_that_do_not_fit_show_no_secret(plain: Bench, vault: Vault) -> None:
    await vault.set("TOKEN", "hunter22-and-more")
    schema = '{"type": "object", "properties": {"count": {"type": "integer"}}}'
    code = "import json, os; json.dump({'count': 'is ' + os.environ['TOKEN']}, open('output.json', 'w'))"
    ticket = await plain.run(code, secrets=("TOKEN",), outputs_schema=schema)
    assert ticket.state == "failed"
    assert "[TOKEN]" in (ticket.error or "")
    assert "hunter22" not in (ticket.error or "")


SECRETS = {
    "a": "abcab", "b": "abc\u00e9", "c": "bcabcx", "d": "abcabcab", "e": "xxxx", "f": "abcabcabab\nxxxxabcabc\nabc\n",
}  # fmt: skip


@given(
    st.lists(st.sampled_from([*SECRETS.values(), "a", "b", "c", "x", "\u00e9", "ab", "xxxx", "\n", "xxxxabcabc"])),
    st.data(),
)
def test_however_output_is_cut(parts: list[str], data: st.DataObject) -> None:
    """Piece by piece is the same as all at once, and no secret comes through."""
    text = "".join(parts).encode()
    redactor = Redactor(SECRETS)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    stream = redactor.stream()
    pieces = [stream.feed(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    out = b"".join([*pieces, stream.end()])
    assert out == redactor.clean(text) == redactor.text(text.decode()).encode()
    for value in SECRETS.values():
        assert value.encode() not in out


PEM = "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\r\n  hkiG9w0BAQEFAASC\nBKcwggSj==\nQ==\n-----END KEY-----\n"


def test_a_secret_of_several_lines_is_replaced_line_by_line() -> None:
    """Whatever shows a part of it, or writes its line ends in another way."""
    redactor = Redactor({"KEY": PEM})
    assert redactor.text(f"<{PEM}>") == "<[KEY]>"
    masked = ["MIIEvQIBADANBgkq", "hkiG9w0BAQEFAASC", "BKcwggSj=="]
    for shown in (PEM.rstrip(), PEM[:40], json.dumps(PEM), PEM.replace("\n", "\n  | "), *masked, "x" + masked[1]):
        clean = redactor.text(shown)
        assert not [line for line in masked if line in clean], clean
    assert redactor.clean(b"-----BEGIN KEY----- Q==") == b"-----BEGIN KEY----- Q==", "all keys have that"


def test_only_so_many_lines_are_searched_for() -> None:
    lines = [f"line number {number}" for number in range(3000)]
    redactor = Redactor({"KEY": "\n".join(lines)})
    assert redactor.text(lines[0]) == "[KEY]" and redactor.text("\n".join(lines)) == "[KEY]"
    assert redactor.pattern.pattern.count(b"|") <= 64


def test_a_secret_that_begins_as_another_does() -> None:
    stream = Redactor({"user": "admin", "password": "admin-1234"}).stream()
    pieces = [stream.feed(piece) for piece in (b"as admin", b"-1234, not adm", b"in", b" or admin")]
    assert b"".join([*pieces, stream.end()]) == b"as [password], not [user] or [user]"


def swarm(home: Path, *words: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "swarm.cli.main", *words, "--home", str(home)],
        input=given, capture_output=True, timeout=300, env=os.environ,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"token", "token"), (b"token\n", "token"), (b"token\r\n", "token"), (b"\xef\xbb\xbftoken\r\n", "token"),
        (b"to ken\n", "to ken"), (b"token\n\n", "token\n\n"), (b"a b\nc d\n", "a b\nc d\n"), (b"a b\nc d", "a b\nc d"),
        (b"a b\r\nc d\r\n", "a b\r\nc d\r\n"), (PEM.encode(), PEM), (b"\xef\xbb\xbf" + PEM.encode(), PEM),
        (b"12\xef\xbb\xbf34", "12\ufeff34"), (b"x" * (64 << 10) + b"\n", "x" * (64 << 10)),
    ],
)  # fmt: skip
async def test_what_is_read_is_what_is_kept(plain: Bench, vault: Vault, given: bytes, kept: str) -> None:
    done = await asyncio.to_thread(swarm, plain.settings.home, "secret", "set", "S", given=given)
    assert done.returncode == 0, done.stderr
    assert await vault.get("S") == kept


def test_the_commands(home: Path) -> None:
    done = swarm(home, "secret", "set", "CLI_TOKEN", "--agent", "echo", given=b"from stdin\n")
    assert (done.returncode, done.stdout) == (0, b"secret CLI_TOKEN is set for agent:echo\n"), done.stderr
    [row] = json.loads(swarm(home, "secret", "list", "--json").stdout)
    assert (row["name"], row["scope"]) == ("CLI_TOKEN", "agent:echo")
    assert swarm(home, "secret", "rm", "CLI_TOKEN").returncode == 2
    assert swarm(home, "secret", "rm", "CLI_TOKEN", "--agent", "echo").returncode == 0
    refused = swarm(home, "secret", "set", "T", given=b"\xff\xfe\xfd\xfc\xfb")
    assert (refused.returncode, refused.stderr) == (2, b"error: the value on stdin is not UTF-8 text\n")


def test_a_trial_has_secrets_too(home: Path, tmp_path: Path) -> None:
    assert swarm(home, "secret", "set", "TRIED", given=b"just-a-trial").returncode == 0
    (tmp_path / "agent.yaml").write_text("name: tried\nversion: 1.0.0\nentry: [main.py]\nsecrets: [TRIED]\n")
    (tmp_path / "main.py").write_text("import json, os\njson.dump([os.environ['TRIED']], open('output.json', 'w'))")
    done = swarm(home, "agent", "run", str(tmp_path), "--no-vm")
    assert json.loads(done.stdout) == ["[TRIED]"], done.stderr
    assert swarm(home, "secret", "rm", "TRIED").returncode == 0


def test_cost(home: Path) -> None:
    assert swarm(home, "cost").stdout == b"no model calls\n"
    with sqlite3.connect(home / "data" / "swarm.db", timeout=60) as connection:
        connection.executemany(
            "INSERT INTO model_calls (id, at, ticket_id, agent, model, status, input_tokens, tokens, cost_usd) "
            "VALUES (?, ?, ?, 'a', 'm', 200, 10, 10, ?)",
            [("1", "2026-01-01T00:00:00.000Z", "t1", 0.5), ("2", "2026-01-02T00:00:00.000Z", "t2", None)],
        )
    connection.close()
    by_day = swarm(home, "cost", "--by", "day").stdout.decode().splitlines()
    assert [line.split()[0] for line in by_day] == ["DAY", "2026-01-01", "2026-01-02", "total"]
    assert by_day[-1].split()[1:] == ["2", "20", "0", "0", "0", "0.5000"]
    for by, name in (("workflow", "(none)"), ("model", "m")):
        assert json.loads(swarm(home, "cost", "--by", by, "--json").stdout)[0]["name"] == name
    since = swarm(home, "cost", "--by", "ticket", "--since", "2026-01-02")
    assert [line.split()[0] for line in since.stdout.decode().splitlines()] == ["TICKET", "t2"]
    assert b"not priced: 1 call, whose model is in no price list" in since.stderr
    assert swarm(home, "cost", "--since", "yesterday").returncode == 2
    assert json.loads(swarm(home, "cost", "--json").stdout)[0]["calls"] == 2

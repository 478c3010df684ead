"""What a listener refuses, and that it records refusals in the ticket's history."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import anthropic
import psutil
import pytest

from swarm.errors import UsageError
from swarm.gateway import policy, prices, upstreams
from swarm.gateway.attempt_listener import MAX_CONNECTIONS, MAX_REFUSALS
from swarm.gateway.policy import Policy
from swarm.gateway.upstreams import UpstreamKeys
from tests.conftest import PATIENCE_SECONDS
from tests.gateway.conftest import KEY, Harness, ask, client_of, open_harness
from tests.gateway.messages_api import MessagesApi


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


async def post(
    session: aiohttp.ClientSession, url: str, token: str, *, data: object = None, path: str = "/v1/messages"
) -> tuple[int, str]:
    """Status and kind of error."""
    headers = {"x-api-key": token, "content-type": "application/json"}
    body = json.dumps(ask() if data is None else data)
    async with session.post(url + path, data=body, headers=headers) as answer:
        said = await answer.json()
        return answer.status, said.get("error", {}).get("type", "")


async def test_tokens_of_others_and_dead_ones(harness: Harness, session: aiohttp.ClientSession) -> None:
    async with harness.listener(await harness.claim("old")) as old:
        dead = old.token
        assert await post(session, old.env["ANTHROPIC_BASE_URL"], dead) == (200, "")
    async with harness.listener(await harness.claim("one")) as one, harness.listener(await harness.claim("two")) as two:
        url = one.env["ANTHROPIC_BASE_URL"]
        for token in (two.token, dead, KEY, "", "\xff", one.token[:-1]):
            assert await post(session, url, token) == (401, "authentication_error")
        assert await post(session, url, one.token) == (200, "")
    assert [dict(data) for kind, data in harness.events if kind == "egress"] == [
        {"via": "gateway", "refused": "token", "method": "POST", "path": "/v1/messages"}
    ] * 6
    assert len(harness.api.seen) == 2  # none of the others got there


async def test_a_closed_listener_takes_no_connections(harness: Harness, session: aiohttp.ClientSession) -> None:
    async with harness.listener(await harness.claim()) as listener:
        url, token = listener.env["ANTHROPIC_BASE_URL"], listener.token
    with pytest.raises(aiohttp.ClientConnectorError):
        await post(session, url, token)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files", "/v1/messages/batches", "/v1/organizations/me", "/", "//v1/messages", "/v1/../v1/messages",
        "/v1/%6dessages", "/v1/messages/", "/v1/models/../files", "/v1/messages?a=<", "/openai/v1/chat/completions",
    ],
)  # fmt: skip
async def test_paths_outside_the_table(harness: Harness, path: str) -> None:
    """Sent as it is: a client would tidy some of them up."""
    async with harness.listener(await harness.claim()) as listener:
        host, _, port = listener.env["ANTHROPIC_BASE_URL"].removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(ask()).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {listener.token}\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 404"), answer
    assert b"not_found_error" in answer
    assert harness.api.seen == []
    assert [data["refused"] for _, data in harness.events] == ["path"]


async def test_bodies_over_the_limit(harness: Harness, session: aiohttp.ClientSession) -> None:
    async with harness.listener_here(await harness.claim(), body_mb=0.01) as listener:
        url = listener.env["ANTHROPIC_BASE_URL"]
        assert await post(session, url, listener.token, data=ask("x" * 20_000)) == (413, "request_too_large")

        async def endless() -> AsyncIterator[bytes]:  # no content-length to go by
            while True:
                yield b"x" * 4096

        with pytest.raises((aiohttp.ClientError, AssertionError)):
            async with session.post(
                f"{url}/v1/messages", data=endless(), headers={"x-api-key": listener.token}
            ) as answer:
                assert answer.status != 413
        assert await post(session, url, listener.token) == (200, "")
    assert listener.held_bytes == 0
    assert [data["refused"] for _, data in harness.events] == ["body", "body"]


async def test_what_is_no_request_for_a_message(harness: Harness, session: aiohttp.ClientSession) -> None:
    async with harness.listener(await harness.claim()) as listener:
        url = listener.env["ANTHROPIC_BASE_URL"]
        given: list[object] = [[], "text", {"messages": []}, {"model": 7}, None]
        for data in given:
            headers = {"x-api-key": listener.token}
            async with session.post(f"{url}/v1/messages", data=json.dumps(data), headers=headers) as answer:
                assert answer.status == 400
    assert harness.api.seen == []


@pytest.mark.parametrize(
    "twist",
    [
        "transfer-encoding: chunked\r\n", "content-length: 5\r\n", "x-a: 1\r\n folded: 2\r\n", "x-a: 1\rx-b: 2\r\n",
        "x-a: 1\0\r\n", "x a: 1\r\n", "host: evil\r\n", "x-a: " + "x" * 40_000 + "\r\n",
    ],
)  # fmt: skip
async def test_what_two_servers_might_read_in_two_ways(
    harness: Harness, twist: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Smuggling begins with it. Refused, recorded, and not in the engine's log, which it would fill."""
    async with harness.listener(await harness.claim()) as listener:
        host, _, port = listener.env["ANTHROPIC_BASE_URL"].removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(ask()).encode()
        head = (
            f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {listener.token}\r\ncontent-length: {len(body)}\r\n"
        )
        writer.write(f"{head}{twist}\r\n".encode() + body)
        assert (await reader.readline()).split()[1] == b"400"
        writer.transport.abort()
    assert harness.api.seen == []
    assert [data["refused"] for _, data in harness.events] == ["request"]
    assert caplog.records == []


async def test_what_the_guest_says_of_itself_is_not_passed_on(harness: Harness, session: aiohttp.ClientSession) -> None:
    spoofed = {
        "x-api-key": "", "X-Forwarded-For": "10.0.0.1", "Forwarded": "for=10.0.0.1", "Cookie": "a=b",
        "Connection": "x-hop", "X-Hop": "1", "Proxy-Authorization": "Basic x", "Host": "elsewhere.example",
        "Anthropic-Beta": "some-beta",
    }  # fmt: skip
    async with harness.listener(await harness.claim()) as listener:
        spoofed["x-api-key"] = listener.token
        given = [*spoofed.items(), ("Anthropic-Beta", "another")]
        async with session.post(
            f"{listener.env['ANTHROPIC_BASE_URL']}/v1/messages", json=ask(), headers=given
        ) as answer:
            assert answer.status == 200
    headers = {name.lower(): value for name, value in harness.api.seen[0]["headers"].items()}
    gone = {"x-forwarded-for", "forwarded", "cookie", "x-hop", "proxy-authorization"}
    assert not headers.keys() & gone
    assert (headers["x-api-key"], headers["anthropic-beta"]) == (KEY, "some-beta, another")
    assert headers["host"] != "elsewhere.example"


async def test_connections_of_one_vm_are_limited(harness: Harness, session: aiohttp.ClientSession) -> None:
    """All VMs share the engine's descriptors: further connections wait in the kernel until one ends."""
    async with harness.listener(await harness.claim()) as listener:
        host, _, port = listener.env["ANTHROPIC_BASE_URL"].removeprefix("http://").partition(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_CONNECTIONS + 5)]
        call = asyncio.create_task(post(session, listener.env["ANTHROPIC_BASE_URL"], listener.token))

        def held() -> int:
            found = psutil.Process(harness.gateway.pid).net_connections("tcp")
            return sum(one.laddr.port == int(port) for one in found) - 1  # the socket that listens

        async with asyncio.timeout(PATIENCE_SECONDS):
            while held() < MAX_CONNECTIONS:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)
        assert not call.done()
        assert held() == MAX_CONNECTIONS
        for _, writer in idle:
            writer.close()
        assert await asyncio.wait_for(call, 60) == (200, "")


async def test_refusals_do_not_fill_the_database(harness: Harness, session: aiohttp.ClientSession) -> None:
    async with harness.listener(await harness.claim()) as listener:
        for _ in range(MAX_REFUSALS + 50):
            await post(session, listener.env["ANTHROPIC_BASE_URL"], "wrong")
    assert len(harness.events) == MAX_REFUSALS
    assert "not recorded" in str(harness.events[-1][1]["more"])


async def test_the_key_is_nowhere_but_in_the_request(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    async with harness.listener(await harness.claim()) as listener, client_of(listener) as client:
        await client.messages.create(**ask())
        with pytest.raises(anthropic.RateLimitError):
            await client.messages.create(**ask("scenario=429"))
        await harness.booked(2)
        assert KEY not in repr(listener)
        assert listener.token not in repr(listener)
    for file in harness.dir.rglob("*"):
        if file.is_file():
            assert KEY.encode() not in file.read_bytes(), file
    assert KEY not in caplog.text
    assert KEY not in repr(await harness.store.events("t"))


# --- keys, tables, policies -------------------------------------------------------------------------------------------


async def test_where_keys_come_from(tmp_path: Path) -> None:
    upstream = upstreams.load(None, {})["anthropic"]
    (tmp_path / "key").write_text("from-a-file\n")
    (tmp_path / "anthropic_api_key").write_text("from-systemd\n")

    async def secret(name: str) -> str | None:
        return f"from-{name}"

    env = {
        "ANTHROPIC_API_KEY": "from-the-environment",
        "ANTHROPIC_API_KEY_FILE": str(tmp_path / "key"),
        "CREDENTIALS_DIRECTORY": str(tmp_path),
    }
    found = []
    for name in (*env, ""):
        found.append(await UpstreamKeys(environment=env, secret=secret).find(upstream))
        env = {k: v for k, v in env.items() if k != name}
    assert found == ["from-the-environment", "from-a-file", "from-systemd", "from-anthropic_api_key"]
    assert await UpstreamKeys(environment={}).find(upstream) is None
    for bad in ({"ANTHROPIC_API_KEY": "two\nlines"}, {"ANTHROPIC_API_KEY_FILE": str(tmp_path / "none")}):
        with pytest.raises(UsageError, match="ANTHROPIC_API_KEY") as caught:
            await UpstreamKeys(environment=bad).find(upstream)
        assert "two" not in str(caught.value)


async def test_no_key_is_one_sentence(api: MessagesApi, tmp_path: Path) -> None:
    async with open_harness(api, tmp_path, keys=False) as harness:
        with pytest.raises(
            UsageError, match=r"no key for anthropic .*set ANTHROPIC_API_KEY .*swarm secret set anthropic_api"
        ):
            await harness.services.of(Policy(upstreams=("anthropic",)))
        with pytest.raises(UsageError, match=r"no service 'other'; it knows anthropic, openai"):
            await harness.services.of(Policy(upstreams=("other",)))


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "upstreams.toml"
    own.write_text(
        '[anthropic]\nbody_mb = 1\n[github]\nbase_url = "https://api.github.com"\nkey = "github_token"\n'
        'header = { Authorization = "Bearer {key}" }\nenv = { GITHUB_API = "{url}" }\n'
        'paths = ["GET /repos/*/*/issues"]\n'
    )
    table = upstreams.load(own, {"ANTHROPIC_BASE_URL": "http://127.0.0.1:1/"})
    assert (table["anthropic"].base_url, table["anthropic"].body_mb) == ("http://127.0.0.1:1", 1)
    github = table["github"]
    assert github.route("GET", "/repos/me/it/issues") == "plain"
    assert github.route("GET", "/repos/me/it/more/issues") is None
    assert github.route("POST", "/repos/me/it/issues") is None
    for text, says in (
        ("[github]\nbase_url = 'ftp://x'", "base_url"),
        ("[x]\nheder = 1", "heder"),
        ("x = 1", "must be a table"),
        ("[", "can't be read"),
    ):
        own.write_text(text)
        with pytest.raises(UsageError, match=says) as caught:
            upstreams.load(own, {})
        assert str(own) in str(caught.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://localhost:99999", "its port '99999' is no number from 1 to 65535"),
        ("http://localhost:0/v1", "its port '0' is no number"),
        ("http://localhost:", "its port '' is no number"),
        ("http://localhost:http", "its port 'http' is no number"),
        ("https://api.example.com:-1", "its port '-1' is no number"),
        ("https://me:secret@api.example.com:70000", "its port '70000' is no number"),
        ("ftp://api.example.com", "must begin with http:// or https://"),
        ("api.example.com", "must begin with http:// or https://"),
        ("localhost:8080", "must begin with http:// or https://"),
        ("https:/api.example.com", "must begin with http:// or https://"),
        ("http://", "must be a host"),
        ("http:///v1", "must be a host"),
        ("http://:80", "must be a host"),
        ("http://[::1", "must be a host"),
        ("http://a:1:2", "must be a host"),
        ("http://[zz]:1", "is no name or address of a host"),
        ("http://300.1.1.1", "is no name or address of a host"),
        ("http://a..b", "is no name or address of a host"),
        (f"http://{'a' * 64}.com", "is no name or address of a host"),
        ("http://a b", "can't have spaces"),
        ("http://a\n", "can't have spaces"),
        ("http://a/v1?x=1", "can't have spaces"),
        ("http://exa$mple.com", "is no name or address of a host"),
    ],
)
def test_a_base_url_that_no_call_could_use_is_refused_in_a_sentence(tmp_path: Path, url: str, says: str) -> None:
    """When the table is read, which is before any VM is started, wherever the URL is from."""
    own = tmp_path / "upstreams.toml"
    own.write_text(f"[anthropic]\nbase_url = {json.dumps(url)}\n")
    for where, environment in ((own, {}), (None, {"ANTHROPIC_BASE_URL": url})):
        with pytest.raises(UsageError) as caught:
            upstreams.load(where, environment)
        said = str(caught.value)
        assert says in said and "[anthropic]: base_url: " in said
        assert ("ANTHROPIC_BASE_URL" in said) == bool(environment)
        assert "secret" not in said and "pattern" not in said


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost", "https://api.example.com/anthropic", "http://10.0.0.1:1", "http://[::1]:65535/v1",
        "https://bücher.example", "http://my_proxy:4000", "https://me:word@proxy.example:8443/x%20y", "http://a.b.",
    ],
)  # fmt: skip
def test_a_base_url_that_calls_can_use(url: str) -> None:
    assert upstreams.load(None, {"ANTHROPIC_BASE_URL": f"{url}/"})["anthropic"].base_url == url


def test_one_authorization_header_is_enough() -> None:
    with pytest.raises(UsageError, match="`header` has another"):
        upstreams.load(None, {"OPENAI_BASE_URL_HOST": "http://me:word@localhost"})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("paths = ['POST /v1/messages/batches']", "no budget can bound"),
        ("paths = ['POST /v1/messages/*']", "allows POST /v1/messages/batches, which no budget can bound"),
        ("paths = ['POST /v1/**']", "allows POST /v1/complete, which is billed"),
        ("paths = ['POST /v1/Messages/Batches']", "no budget can bound"),
        ("metered = ['POST /v1/messages/batches']", "no budget can bound"),
        ("metered = ['POST /v1/messages', 'POST /v1/*']", "allows POST /v1/batches, which no budget can bound"),
        ("metered = []\npaths = ['POST /v1/messages']", "is billed: it belongs in `metered`"),
        ("paths = ['POST /v1/embeddings']", "is billed: it belongs in `metered`"),
        ("base_url = 'https://x.example/v1'\npaths = ['POST /audio/speech']", "is billed"),
        ("paths = ['POST /v1/sessions/*/events']", "no budget can bound"),
    ],
)
def test_what_is_billed_is_never_free(tmp_path: Path, fields: str, says: str) -> None:
    """It would be in no book, and count against no budget."""
    own = tmp_path / "upstreams.toml"
    own.write_text(f"[anthropic]\n{fields}\n")
    with pytest.raises(UsageError, match=r"\[anthropic\]: 'POST ") as caught:
        upstreams.load(own, {})
    assert says in str(caught.value)


def test_what_costs_nothing_stays_allowed(tmp_path: Path) -> None:
    own = tmp_path / "upstreams.toml"
    free = "paths = ['GET /v1/messages/batches/*', 'POST /v1/files', 'POST /v1/messages/count_tokens', 'GET /v1/**']"
    other = "base_url = 'https://chat.example'\nkey = 'k'\nheader = { a = '{key}' }\npaths = ['POST /**']"
    own.write_text(f"[anthropic]\n{free}\n[chat]\n{other}\n[openai]\nmetered = ['POST /v1/embeddings']\n")
    assert upstreams.load(own, {})["chat"].route("POST", "/api/messages") == "plain"


def test_prices(tmp_path: Path) -> None:
    own = tmp_path / "prices.toml"
    own.write_text(
        'date = "2030-01-01"\n[models]\nmine = { input = 1, output = 2 }\nclaude-haiku-4-5 = { input = 7, output = 7 }'
    )
    table = prices.load(own)
    mine, haiku = table.of("mine"), table.of("claude-haiku-4-5-20251001")
    assert mine is not None
    assert haiku is not None
    assert (table.date, haiku.input) == ("2030-01-01", 7)
    assert table.of("claude-haiku-9") is None
    assert mine.usd({"input": 10**6, "output": 10**6, "cache_read": 10**6}) == 4
    shipped = prices.load(None)
    opus, tiered = shipped.of("claude-opus-4-5"), shipped.of("claude-haiku-5-5")
    assert opus is not None
    assert tiered is not None
    assert opus.usd({"cache_write": 10**6, "cache_write_1h": 10**6}) == 10
    assert opus.usd({"cache_write": 10**6}) == 6.25
    assert tiered.usd({"input": 100_000}) == pytest.approx(0.01)
    assert tiered.usd({"input": 50_000, "cache_read": 50_001}) == pytest.approx(0.025 + 0.0025, rel=1e-3)
    own.write_text("[models]\nx = { input = -1, output = 1 }")
    with pytest.raises(UsageError, match=r"models\.x\.input"):
        prices.load(own)


def test_policies() -> None:
    assert policy.parse("none") == Policy()
    assert policy.parse("gateway") == Policy(upstreams=("anthropic",))
    both = policy.parse("gateway:anthropic,github;allow:example.com,*.example.org")
    assert both == Policy(upstreams=("anthropic", "github"), allow=("example.com", "*.example.org"))
    assert [both.allows(name) for name in ("example.com", "EXAMPLE.com.", "a.example.org", "a.b.example.org")] == [
        True
    ] * 4
    assert [both.allows(name) for name in ("a.example.com", "example.org", "badexample.org", "")] == [False] * 4
    assert policy.parse("open").allows("anything.example")
    for text in ("", "none;open", "allow:", "allow:localhost", "gateway:", "gateway:A", "shut", "open:x"):
        with pytest.raises(UsageError, match="policy"):
            policy.parse(text)

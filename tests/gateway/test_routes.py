"""Which paths a service's table allows, and that no spelling leads around it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import UsageError
from swarm.gateway import upstreams
from swarm.gateway.routes import find, might_mean, why_not
from swarm.gateway.upstreams import Upstream

FITS = [
    ("GET /v1/models", "/v1/models"),
    ("GET /", "/"),
    ("GET /simple/*/", "/simple/requests/"),
    ("GET /simple/*/", "/simple/a+b.c_d~e/"),
    ("GET /repos/*/*/issues", "/repos/me/it/issues"),
    ("GET /files/*.whl", "/files/a-1.0+cpu-py3.whl"),
    ("GET /*-*", "/a-b-c"),
    ("GET /projects/*%2F*/issues", "/projects/group%2fname/issues"),
    ("GET /projects/*%2f*", "/projects/group%2Fname"),
    ("GET /@scope%2fname", "/@scope%2Fname"),
    ("GET /me/it/**", "/me/it/info/refs"),
    ("GET /me/it/**", "/me/it/a%2Fb/"),
    ("GET /simple/**", "/simple/"),
    ("GET /**", "/a"),
    ("GET /**/issues", "/a/b/c/issues"),
    ("GET /a/**/b/*/c", "/a/1/b/2/b/3/c"),
    ("GET /q/*", "/q/caf%C3%A9"),
    ("GET /q/*", "/q/a%20b"),
    ("GET /v1/x:run", "/v1/x:run"),
]
FITS_NOT = [
    ("GET /v1/models", "/v1/models/"),
    ("GET /v1/models", "/v1/Models"),
    ("GET /v1/models", "/v1/mode%6Cs"),
    ("GET /v1/models/*", "/v1/models/"),
    ("GET /v1/models/*", "/v1/models"),
    ("GET /v1/models/*", "/v1/models/a/b"),
    ("GET /v1/models/*", "/v1/models/a%2Fb"),
    ("GET /v1/models/*", "/v1/models/a%2fb"),
    ("GET /projects/*%2F*/issues", "/projects/a%2Fb%2Fc/issues"),
    ("GET /projects/*%2F*", "/projects/a/b"),
    ("GET /simple/*/", "/simple/requests"),
    ("GET /a/**", "/a"),
    ("GET /a/**/b", "/a/b"),
    ("GET /a/b**", "/a/bc/d"),
    ("GET /**", "a"),
    ("GET /**", "http://other.example/a"),
    ("GET /**", ""),
    ("GET /**", "*"),
]
# What no route allows, since servers differ on where it leads.
WAYS_OUT = [
    "/a/..", "/a/../b", "/a/.", "/./a", "/a/%2e%2e/b", "/a/.%2E/b", "/a/%2E", "/a/..%2Fb", "/a%2F..%2Fb", "/a/..;/b",
    "/a/..;x=1/b", "/a/%2e%2e%3B/b", "/a/..%5Cb", "/a%5Cb", "/a\\b", "//a", "/a//b", "/a/%2Fb", "/a%2F%2Fb", "/a/;/b",
    "/a/..%20/b", "/a/%20/b", "/a/%252e%252e/b", "/a%25", "/a%00b", "/a%0Ab", "/a%0D%0Ab", "/a%7F", "/a%3Fb", "/a%23b",
    "/a/%c0%ae%c0%ae/b", "/a/%c0%afb", "/a/%e0%80%af", "/a%ff", "/a/%EF%BC%8E%EF%BC%8E/b", "/a%EF%BC%8F..%EF%BC%8Fb",
    "/a/%E2%80%A5/b", "/a%EF%BC%85", "/a%E2%80%AEb", "/a%2", "/a%zz", "/a b", "/a\n", "/a\tb", "/caf\u00e9", '/a"b',
    "/a<b>", "/a^b", "/a|b", "/a{b}", "/a`b", "/a[1]", "/" + "a" * 2000, "/%E3%80%80/a",
]  # fmt: skip


@pytest.mark.parametrize(("route", "path"), FITS)
def test_what_fits(route: str, path: str) -> None:
    assert find("GET", path, [route]) == route
    assert find("HEAD", path, [route]) == route
    assert find("POST", path, [route]) is None
    assert not why_not(route)


@pytest.mark.parametrize(("route", "path"), FITS_NOT)
def test_what_fits_not(route: str, path: str) -> None:
    assert find("GET", path, [route]) is None


@pytest.mark.parametrize("path", WAYS_OUT)
def test_ways_out_are_allowed_by_none(path: str) -> None:
    anything = ["GET /**", "GET /a/**", "GET /a/*/b", "GET /*", "GET /*%2F*", "GET /*/*"]
    assert find("GET", path, anything) is None
    assert might_mean("GET", path, anything) is None


SPELLINGS = [
    "/v1/messages", "/v1/messages/", "/v1/Messages", "/V1/MESSAGES", "/v1/m%65ssages", "/v1%2Fmessages",
    "/v1/messages;a=b", "/v1/messages%20", "/v1/messages%2F", "/v1;x/messages", "/v1/%EF%BD%8Dessages",
]  # fmt: skip


@pytest.mark.parametrize("path", SPELLINGS)
def test_a_metered_path_is_metered_in_whatever_spelling(path: str) -> None:
    """A table that allows everything besides does not make its metered paths free."""
    fields = {"name": "x", "base_url": "http://127.0.0.1:1", "key": "x", "header": {"x-key": "{key}"}}
    service = Upstream.model_validate({**fields, "metered": ["POST /v1/messages"], "paths": ["POST /**"]})
    assert service.route("POST", path) == "metered"
    assert service.route("POST", "/v1/messages/batches") == "plain"
    assert service.route("GET", path) is None


_SEGMENT = st.text("ab.%2Ff5Ce;+", min_size=0, max_size=6)


@given(st.lists(_SEGMENT, min_size=1, max_size=5))
def test_a_star_never_leaves_its_segment(segments: list[str]) -> None:
    """By a reader that decodes once and resolves dots: what ``/a/*/z`` allows stays below /a, three segments long."""
    path = "/a/" + "/".join(segments) + "/z"
    if find("GET", path, ["GET /a/*/z"]):
        assert len(segments) == 1
        [segment] = segments
        assert segment
        assert not {"/", "\\"} & set(_decoded(segment))
        assert _decoded(segment).partition(";")[0] not in (".", "..", "")


def _decoded(text: str) -> str:
    return unquote(unquote(text))


@pytest.mark.parametrize(
    ("route", "says"),
    [
        ("/v1/models", "is no route"),
        ("FETCH /a", "is no route"),
        ("GET v1", "is no route"),
        ("GET /a?b=c", "is no route"),
        ("GET /a b", "is no route"),
        ("GET /a//b", "no call fits"),
        ("GET /a/../b", "no call fits"),
        ("GET /a%25b", "no call fits"),
    ],
)
def test_a_route_that_allows_nothing_is_refused(route: str, says: str) -> None:
    assert says in why_not(route)


def test_a_table_says_which_route_is_wrong(tmp_path: Path) -> None:
    own = tmp_path / "upstreams.toml"
    own.write_text('[x]\nbase_url = "http://x/"\nkey = "x"\nheader = { a = "{key}" }\npaths = ["GET /a//b"]\n')
    with pytest.raises(UsageError, match=r"\[x\]: paths\.0: .*no call fits the route 'GET /a//b'"):
        upstreams.load(own, {})
    own.write_text('[x]\nbase_url = "http://x/y//"\nkey = "x"\nheader = { a = "{key}" }\n')
    assert upstreams.load(own, {})["x"].base_url == "http://x/y"


def test_no_path_makes_matching_slow() -> None:
    """Backtracking over these would not end within a lifetime."""
    stars = ["GET /*a*a*a*a*a*a*a*b", "GET /**/a/**/a/**/a/**/a/**/b", "GET /**/*a*a*/**/*a*a*/**/*b*"]
    for path in ("/" + "a" * 1990, "/" + "a/" * 990, "/" + "a" * 990 + "/a" * 490):
        assert find("GET", path, stars) is None

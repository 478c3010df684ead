"""Which calls a service's table allows: routes like ``GET /repos/*/issues`` against paths as guests send them.

A route is a method and a path. It allows what it spells, byte for byte, and:

- ``*`` stands for one or more characters of one segment (what is between slashes), but for no encoded slash.
- ``**`` as a whole segment stands for one or more segments, encoded slashes and a slash at the end included.
- ``%2F`` stands for an encoded slash, in either case: ``GET /projects/*%2F*/issues``.
- GET allows HEAD, too.

Nothing is decoded before it is sent. But servers decode paths, some of them twice, resolve dot segments, merge slashes,
strip ``;`` parameters and ignore case. So no route allows a path that could be read as a way out of it, and a path that
could be read as a metered one is metered.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final
from urllib.parse import unquote_to_bytes

# RFC 3986, 3.3. In a route, a star is ours.
_PATH: Final = r"/(?:[A-Za-z0-9._~:@!$&'()*+,;=/-]|%[0-9A-Fa-f]{2})*"
_ROUTE: Final = rf"^(GET|HEAD|POST|PUT|PATCH|DELETE) {_PATH}$"
_MAX_PATH_BYTES: Final = 2000


def find(method: str, path: str, routes: Iterable[str]) -> str | None:
    """The first route that allows this call, or None. ``path`` is raw, and without its query."""
    if _decoded(path) is None:
        return None
    segments = _segments(path)
    for route in routes:
        allowed, _, pattern = route.partition(" ")
        if _method_fits(method, allowed) and _fits(segments, _segments(pattern)):
            return route
    return None


def might_mean(method: str, path: str, routes: Iterable[str]) -> str | None:
    """The first route that a server which reads paths generously might take this call for, or None."""
    if (decoded := _decoded(path)) is None:
        return None
    for route in routes:
        allowed, _, pattern = route.partition(" ")
        generous = ["**" if "*" in segment else segment for segment in _segments(_decoded(pattern) or "")]
        if _method_fits(method, allowed) and _fits(_segments(decoded), generous):
            return route
    return None


def why_not(route: str) -> str:
    """Why this can't be a route; '' if it can."""
    if not re.fullmatch(_ROUTE, route):
        return f"{route[:200]!r} is no route: write a method and a path, like 'GET /v1/models/*'"
    if _decoded(route.partition(" ")[2]) is None:
        return f"no call fits the route {route[:200]!r}: it has an empty or a dot segment, or %25, %5C, %3F or %23"
    return ""


def _method_fits(method: str, allowed: str) -> bool:
    return method == allowed or (method, allowed) == ("HEAD", "GET")


def _segments(path: str) -> list[str]:
    return path.replace("%2f", "%2F").split("/")[1:]


def _fits(segments: Sequence[str], pattern: Sequence[str]) -> bool:
    """Takes time by the product of the lengths: no path makes it backtrack."""
    ends = {0}  # how many segments the pattern so far may have used up
    for part in pattern:
        if part == "**":
            ends = set(range(min(ends) + 1, len(segments) + 1))
        else:
            ends = {at + 1 for at in ends if at < len(segments) and _segment_fits(segments[at], part)}
        if not ends:
            return False
    return len(segments) in ends


def _segment_fits(segment: str, part: str) -> bool:
    if "*" not in part:
        return segment == part
    pieces, parts = segment.split("%2F"), part.split("%2F")
    return len(pieces) == len(parts) and all(
        fnmatchcase(piece, wanted.replace("*", "?*")) for piece, wanted in zip(pieces, parts, strict=True)
    )


def _decoded(path: str) -> str | None:
    """The path as a generous server reads it; None if that might be a way out of a route."""
    if len(path) > _MAX_PATH_BYTES or not re.fullmatch(_PATH, path):
        return None
    try:
        text = unicodedata.normalize("NFKC", unquote_to_bytes(path).decode())
    except UnicodeDecodeError:  # an overlong encoding, say, of a slash
        return None
    # An encoded per cent sign is for who decodes twice, a backslash is a slash to some, the others end a path.
    if not text.isprintable() or set(text) & set("%\\?#"):
        return None
    segments = [segment.partition(";")[0].strip() for segment in text.split("/")[1:]]
    if "" in segments[:-1] or not {".", ".."}.isdisjoint(segments):
        return None
    return f"/{'/'.join(segments)}".lower().rstrip("/")

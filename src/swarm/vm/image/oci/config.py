"""What an image says about its programs, as a `Root`: its config, and its own /etc/passwd, /etc/group and programs.

All of it is hostile text. Paths are looked up below the unpacked root as a program in it would, so no link leads out;
nothing of it is run.
"""

from __future__ import annotations

import os
import re
import signal
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from swarm.errors import ImageError
from swarm.vm.driver import Root

_MAX_LINKS: Final = 40
_MAX_BYTES: Final = 1 << 20  # of /etc/passwd, /etc/group
_MAX_ID: Final = (1 << 31) - 1
_MAX_ENV_BYTES: Final = 32 << 10  # of all variables: they go to the guest in one message
_MAX_WORDS: Final = 256
_MAX_WORD: Final = 4096
_MAX_GROUPS: Final = 64
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PYTHONS: Final = ("python3", "python")
_LEAST_PYTHON: Final = 8  # 3.8


def root_of(config: Mapping[str, Any], root: Path, name: str) -> Root:
    """What the image's config says, with the names in it looked up in ``root``. Raises ImageError, which names the
    image."""
    given = config.get("config") or {}
    if not isinstance(given, dict):
        raise ImageError(f"{name} can't be used: its config is not an object")
    try:
        env = _env(given)
        cwd = _text(given.get("WorkingDir") or "/", "WorkingDir")
        cwd = cwd if cwd.startswith("/") else f"/{cwd}"
        path = env.get("PATH", _PATH)
        return Root(
            env=env,
            cwd=cwd if (place := find(root, cwd)) is not None and place.is_dir() else "/",
            user=_user(_text(given.get("User") or "", "User"), root),
            entry=_entry((*_words(given, "Entrypoint"), *_words(given, "Cmd")), path, cwd, root),
            stop_signal=_signal(given.get("StopSignal")),
            python=_python(path, root),
        )
    except ValueError as error:
        raise ImageError(f"{name} can't be used: {error}") from None


def find(root: Path, path: str) -> Path | None:
    """Where ``path``, as the image has it, is below ``root``: links are followed as they would be in the image, none
    leads out. None if there is nothing."""
    parts, links = [one for one in path.split("/") if one not in ("", ".")][::-1], 0
    here: list[str] = []
    while parts:
        part = parts.pop()
        if part == "..":
            here[-1:] = []
            continue
        place = root.joinpath(*here, part)
        try:
            if not place.is_symlink():
                if parts and not stat.S_ISDIR(place.lstat().st_mode):
                    return None
                place.lstat()
                here.append(part)
                continue
            target = os.readlink(place)  # noqa: PTH115 - a path of the image's, not of ours
        except OSError:  # also a name that is too long
            return None
        links += 1
        if links > _MAX_LINKS:
            return None
        if target.startswith("/"):
            here = []
        parts += [one for one in target.split("/") if one not in ("", ".")][::-1]
    return root.joinpath(*here)


def _env(given: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for one in _list(given, "Env"):
        variable, equals, value = _text(one, "Env", most=_MAX_ENV_BYTES).partition("=")
        if not variable or not equals:
            raise ValueError(f"its Env has {one[:80]!r}, which is not NAME=VALUE")
        found[variable] = value
    if sum(len(variable) + len(value) + 2 for variable, value in found.items()) > _MAX_ENV_BYTES:
        raise ValueError(f"its Env takes more than {_MAX_ENV_BYTES >> 10} KiB")
    return found


def _words(given: Mapping[str, Any], field: str) -> tuple[str, ...]:
    return tuple(_text(one, field) for one in _list(given, field))


def _list(given: Mapping[str, Any], field: str) -> Sequence[Any]:
    value = given.get(field) or []
    if not isinstance(value, list) or len(value) > _MAX_WORDS:
        raise ValueError(f"its {field} is not a list of at most {_MAX_WORDS} texts")
    return value


def _text(value: object, field: str, *, most: int = _MAX_WORD) -> str:
    if not isinstance(value, str) or "\0" in value or len(value.encode(errors="surrogatepass")) > most:
        raise ValueError(f"its {field} has what is not a text of at most {most} bytes without NUL: {str(value)[:80]!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"its {field} has what is no Unicode text: {value[:80]!r}") from None
    return value


def _entry(words: tuple[str, ...], path: str, cwd: str, root: Path) -> tuple[str, ...]:
    """With the program's own path, so that nothing need look it up when it runs."""
    if not words:
        return ()
    program, *arguments = words
    if "/" in program:
        place = program if program.startswith("/") else os.path.normpath(f"{cwd}/{program}")
    else:
        place = next((one for one in _on_path(program, path) if _is_program(find(root, one))), program)
    return (place, *arguments)


def _on_path(program: str, path: str) -> list[str]:
    return [f"{one.rstrip('/')}/{program}" for one in path.split(":") if one.startswith("/")]


def _is_program(place: Path | None) -> bool:
    try:
        status = place.lstat() if place is not None else None
    except OSError:
        return False
    return status is not None and stat.S_ISREG(status.st_mode) and bool(status.st_mode & 0o111)


def _python(path: str, root: Path) -> str:
    """By its name, or that of the library beside it: nothing of the image is run."""
    for program in _PYTHONS:
        for one in _on_path(program, path):
            place = find(root, one)
            if not _is_program(place):
                continue
            assert place is not None
            names = [place.name, *(lib.name for lib in sorted(place.parent.parent.glob("lib/python3.*")))]
            for name in names:
                if (found := re.fullmatch(r"python3\.(\d{1,3})", name)) and int(found[1]) >= _LEAST_PYTHON:
                    return one
    return ""


def _signal(value: object) -> int:
    if not value:
        return int(signal.SIGTERM)
    text = str(value).upper()
    if text.isdecimal() and 0 < int(text[:4]) <= 64:
        return int(text)
    try:
        return int(signal.Signals[text if text.startswith("SIG") else f"SIG{text}"])
    except KeyError:
        raise ValueError(f"its StopSignal {text[:40]!r} is not a signal") from None


# --- users ------------------------------------------------------------------------------------------------------------


def _user(text: str, root: Path) -> tuple[int, int, tuple[int, ...], str]:
    """`NAME|UID[:GROUP|GID]`, as the image's own files have it; without a group, those of the user."""
    name, colon, group = text.partition(":")
    name = name or "0"
    users, groups = _lines(root, "/etc/passwd", 7), _lines(root, "/etc/group", 4)
    number = _number(name)
    found = next((one for one in users if (one[0] == name if number is None else _number(one[2]) == number)), None)
    if found is None and number is None:
        raise ValueError(f"its User is {name[:80]!r}, which its /etc/passwd doesn't have")
    uid = _number(found[2]) if found else number
    gid = _number(found[3]) if found else 0
    if uid is None or gid is None:
        raise ValueError(f"its /etc/passwd has no numbers for {name[:80]!r}")
    home = found[5] if found and found[5].startswith("/") else "/root" if uid == 0 else "/"
    if colon:
        wanted = _number(group)
        if wanted is None:
            wanted = next((_number(one[2]) for one in groups if one[0] == group), None)
        if wanted is None:
            raise ValueError(f"its User has the group {group[:80]!r}, which its /etc/group doesn't have")
        return uid, wanted, (), home
    more = [_number(one[2]) for one in groups if found and found[0] in one[3].split(",")]
    return uid, gid, tuple(sorted({one for one in more if one is not None and one != gid}))[:_MAX_GROUPS], home


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 11 and int(text) <= _MAX_ID else None


def _lines(root: Path, path: str, fields: int) -> list[list[str]]:
    place = find(root, path)
    try:
        if place is None or not stat.S_ISREG(place.lstat().st_mode):
            return []
        with place.open("rb") as file:
            text = file.read(_MAX_BYTES).decode(errors="replace").replace("\0", "")
    except OSError:
        return []
    return [found for line in text.split("\n") if len(found := line.split(":")) >= fields]

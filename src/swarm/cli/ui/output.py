"""How commands print: JSON, tables and lines for people, progress, errors. Rich is loaded when it is needed.

Most of what is shown was written by outsiders (tickets) or guests (output, errors): nothing of it may reach the
terminal as a control sequence or be read as markup. So everything goes through `clean`, and Rich gets Text, no markup.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

STATE_STYLES = {
    "done": "green", "completed": "green", "succeeded": "green", "ok": "green",
    "failed": "red", "fail": "red", "lost": "red",
    "in_progress": "cyan", "running": "cyan",
    "warn": "yellow", "cancelled": "yellow", "blocked": "yellow", "waiting": "yellow", "interrupted": "yellow",
}  # fmt: skip


def clean(text: object, *, one_line: bool = True) -> str:
    """Text without control characters: a hostile title can't move the cursor, nor fake a line."""
    keep = "" if one_line else "\n\t"
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def plain(value: object) -> Any:
    """A value as JSON knows it: dataclasses as objects, enums by value, paths and addresses as text."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value) if not isinstance(value, PurePath) else value.as_posix()


class Out:
    def __init__(self, *, json: bool = False) -> None:
        self.json = json

    # --- for people ---

    def line(self, text: object = "", *, style: str = "") -> None:
        self._print(clean(text), style=style)

    def marked(self, mark: str, style: str, text: str) -> None:
        """A line that begins with a coloured mark."""
        if not sys.stdout.isatty():
            self.line(f"{mark}  {text}")
            return
        from rich.text import Text

        self._console().print(Text.assemble((mark, style), "  ", clean(text)), soft_wrap=True)

    def text(self, text: str) -> None:
        """Text as it came, without control characters but for line ends and tabs."""
        sys.stdout.write(clean(text, one_line=False))

    def error(self, text: str) -> None:
        first, *rest = clean(text, one_line=False).strip().split("\n")
        self._print(f"error: {first}", style="red", file=sys.stderr)
        for line in rest:
            self._print(f"  {line}", file=sys.stderr)

    def note(self, text: str) -> None:
        """A word on stderr, so that it is in nobody's pipe."""
        self._print(clean(text), file=sys.stderr)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str = "nothing") -> None:
        """A table; states get their colour. Not on a terminal: the same without colour and cut nowhere."""
        if not rows:
            self.line(empty)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, overflow="ellipsis" if sys.stdout.isatty() else "fold", no_wrap=True)
        for row in rows:
            cells = ["" if cell is None else clean(cell) for cell in row]
            table.add_row(*(Text(cell, style=STATE_STYLES.get(cell, "")) for cell in cells))
        # Rendered first: Rich would answer a closed pipe by ending the process its own way.
        console = self._console()
        with console.capture() as capture:
            console.print(table)
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())

    def fields(self, pairs: Mapping[str, object]) -> None:
        """Names and values, one a line; what is None is left out; several lines of text are indented."""
        width = max((len(name) for name in pairs), default=0)
        for name, value in pairs.items():
            if value is None:
                continue
            first, *rest = clean(value, one_line=False).split("\n")
            self._print(f"{name:<{width}}  {first}", style=STATE_STYLES.get(first, ""))
            for line in rest:
                self._print(" " * (width + 2) + line)

    @contextmanager
    def progress(self, text: str = "") -> Iterator[Callable[[str, float], None]]:
        """A bar on stderr while something long runs: call it with what is being done and the share done (0 to 1).

        Not on a terminal, one line for each new step. Without ``text`` the steps say themselves what is made.
        """
        if not sys.stderr.isatty():
            last = ""

            def say(step: str, _share: float) -> None:
                nonlocal last
                if step != last:
                    last = step
                    self.note(f"{text}: {step}" if text else step)

            yield say
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.fields[name]}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[step]}"),
        )
        with Progress(*columns, console=self._console(sys.stderr), transient=True) as bar:
            task = bar.add_task("", total=1.0, name=clean(text), step="")
            yield lambda step, share: bar.update(task, completed=share, step=clean(step))

    # --- for programs ---

    def dump(self, value: object) -> None:
        """Print a value as JSON, indented on a terminal."""
        sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")

    def dump_line(self, value: object) -> None:
        """One JSON value on one line, for streams of them."""
        sys.stdout.write(json.dumps(plain(value), ensure_ascii=False) + "\n")

    def _print(self, text: str, *, style: str = "", file: TextIO | None = None) -> None:
        file = file or sys.stdout
        if not style or not file.isatty():
            encoding = file.encoding or "utf-8"
            file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            file.flush()
            return
        from rich.text import Text

        self._console(file).print(Text(text, style=style), soft_wrap=True)

    @staticmethod
    def _console(file: TextIO | None = None) -> Console:
        from rich.console import Console

        file = file or sys.stdout
        return Console(file=file, highlight=False, markup=False, emoji=False, width=None if file.isatty() else 10_000)

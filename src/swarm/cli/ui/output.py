"""How commands print: JSON; tables, lines and progress for people; errors. Rich is loaded only when it is needed.

Most of what is printed was written by outsiders (tickets) or guests (output, errors): none of it may reach the terminal
as a control sequence or be read as markup. So text goes through `clean` and JSON through `escaped`, and Rich gets Text
instead of markup.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from swarm.base.plain import plain
from swarm.base.printable import LINE_END, clean, escaped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from swarm.base.progress import Progress
    from swarm.cli.ui.table import Column

# Each can be read on black and on white (tests/cli/test_golden.py computes the contrasts). The terminal's own yellow,
# cyan and green can't be on white, nor "dim" on grey.
GREEN, RED, TEAL, ORANGE = "color(28)", "color(196)", "color(30)", "color(130)"
STATE_STYLES = {
    "done": GREEN, "completed": GREEN, "succeeded": GREEN, "ok": GREEN,
    "failed": RED, "fail": RED, "lost": RED, "dead": RED,
    "in_progress": TEAL, "running": TEAL,
    "warn": ORANGE, "cancelled": ORANGE, "blocked": ORANGE, "waiting": ORANGE, "interrupted": ORANGE,
}  # fmt: skip


def can_draw(file: TextIO) -> bool:
    """Can what was printed be drawn over? Rich draws nothing at all on a dumb terminal."""
    return file.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def first_line(text: str | None) -> str:
    """For a place that has room for one."""
    return LINE_END.split((text or "").strip(), maxsplit=1)[0]


def _indented(text: str) -> str:
    return clean(text, one_line=False).rstrip().replace("\n", "\n  ")


def _cell(value: object, column: Column, now: datetime | None) -> str:
    """The text of a cell; ``now``: for a person who looks at it then."""
    text = "" if value is None else clean(value)
    if now is None:
        return text
    from swarm.cli.ui import table

    return text[:12] if column.digest else table.ago(text, now)


def _ascii_only() -> bool:
    """Must JSON be escaped, since stdout can't take every character?"""
    return (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"


def joined(line: Sequence[tuple[str, str]]) -> Text:
    """Texts with their styles, two spaces apart."""
    from rich.text import Text

    whole = Text("  ").join(Text(text, style=style) for text, style in line)
    whole.rstrip()
    return whole


class Out:
    def __init__(self, *, json: bool = False) -> None:
        self.json = json

    # --- for people ---

    def line(self, text: object = "", *, style: str = "") -> None:
        self._print(clean(text), style=style)

    def marked(self, mark: str, style: str, text: str) -> None:
        """Print a line that begins with a coloured mark."""
        self._print_styled([[(mark, style), (clean(text), "")]])

    def text(self, text: str) -> None:
        """Print text as it came, without control characters other than line ends and tabs."""
        sys.stdout.write(clean(text, one_line=False))

    def error(self, text: str) -> None:
        self._remark(_indented(f"error: {text.strip()}"), style=RED)

    def note(self, text: str) -> None:
        """Print a remark, on stderr: it must not end up in a pipe. What it quotes can't begin a line: further lines are
        indented."""
        self._remark(_indented(text))

    def table(self, columns: Sequence[str | Column], rows: Sequence[Sequence[object]], *, empty: str = "") -> None:
        """Print a table. On a terminal it fits the width: columns leave or are shortened as each says, states have a
        colour, times are ages. Anywhere else every cell is whole, for programs: nothing depends on who reads it.
        """
        if not rows:
            self.line(empty)
            return
        from swarm.cli.ui import table

        terminal = sys.stdout.isatty()
        named = [table.Column(clean(one)) if isinstance(one, str) else one for one in columns]
        now = datetime.now(UTC) if terminal else None
        cells = [[_cell(value, column, now) for value, column in zip(row, named, strict=True)] for row in rows]
        lines, gone = table.laid_out(named, cells, shutil.get_terminal_size().columns if terminal else None)
        self._print_styled(
            [[(text, STATE_STYLES.get(given, "") if number else "bold") for text, given in line]
             for number, line in enumerate(lines)]
        )  # fmt: skip
        if gone:
            self.note(f"no room for {', '.join(gone)}: a wider terminal or --json shows all")

    def fields(self, pairs: Mapping[str, object]) -> None:
        """Print a name and its value per line, without those that are None; further lines of a value are indented."""
        width = max((len(name) for name in pairs), default=0)
        for name, value in pairs.items():
            if value is None:
                continue
            first, *rest = clean(value, one_line=False).split("\n")
            self._print(f"{name:<{width}}  {first}", style=STATE_STYLES.get(first, ""))
            for line in rest:
                self._print(" " * (width + 2) + line)

    @contextmanager
    def progress(self, text: str = "") -> Iterator[Progress]:
        """A progress bar on stderr; off a terminal, one line for each new step.

        ``text`` names the operation; without it the steps stand alone.
        """
        if not can_draw(sys.stderr):
            last = ""

            def say(step: str, _share: float) -> None:
                nonlocal last
                if step != last:
                    last = step
                    self.note(f"{text}: {step}" if text else step)

            yield say
            return
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.fields[name]}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[step]}"),
        )
        with Bar(*columns, console=self._console(sys.stderr), transient=True) as bar:
            task = bar.add_task("", total=1.0, name=clean(text), step="")
            yield lambda step, share: bar.update(task, completed=share, step=clean(step))

    # --- for programs ---

    def result(self, value: object, line: str) -> None:
        """Print the value with --json, otherwise the line."""
        if self.json:
            self.dump(value)
        else:
            self.line(line)

    def listing(
        self, values: Sequence[object], columns: Sequence[str | Column], rows: Sequence[Sequence[object]], *, empty: str
    ) -> None:
        """Print the values with --json, otherwise a table with a row for each."""
        if self.json:
            self.dump(values)
        else:
            self.table(columns, rows, empty=empty)

    def dump(self, value: object) -> None:
        """Print a value as JSON. What a terminal can't show is escaped, which is the same value."""
        sys.stdout.write(escaped(json.dumps(plain(value), indent=2, ensure_ascii=_ascii_only()), keep="\n") + "\n")

    def json_text(self, text: str) -> None:
        """Print JSON text as it is stored, with the same escapes."""
        sys.stdout.write(escaped(text, keep="\n\t") + "\n")

    def dump_line(self, value: object) -> None:
        """Print a value as JSON on one line, for streams."""
        sys.stdout.write(escaped(json.dumps(plain(value), ensure_ascii=_ascii_only())) + "\n")

    def _remark(self, text: str, *, style: str = "") -> None:
        """Print on stderr, after the log lines that led to it. A remark that can't be written doesn't end the work."""
        from swarm.base.log import LINES

        if not sys.stderr.isatty():
            LINES.say(f"{text}\n")
        LINES.finish()
        if sys.stderr.isatty():
            with contextlib.suppress(OSError):
                self._print(text, style=style, file=sys.stderr)

    def _print(self, text: str, *, style: str = "", file: TextIO | None = None) -> None:
        file = file or sys.stdout
        if not style or not file.isatty():
            encoding = file.encoding or "utf-8"
            file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            file.flush()
            return
        from rich.text import Text

        self._console(file).print(Text(text, style=style), soft_wrap=True)

    def _print_styled(self, lines: Sequence[Sequence[tuple[str, str]]]) -> None:
        """Print lines of texts, each with its style, two spaces apart."""
        if not sys.stdout.isatty():
            for line in lines:
                self._print("  ".join(text for text, _ in line).rstrip())
            return
        console = self._console()
        for line in lines:
            console.print(joined(line), soft_wrap=True)

    @staticmethod
    def _console(file: TextIO | None = None) -> Console:
        from rich.console import Console
        from rich.theme import Theme

        file = file or sys.stdout
        width = None if file.isatty() else 10_000
        theme = Theme({"progress.elapsed": "none"})  # yellow, otherwise
        return Console(file=file, highlight=False, markup=False, emoji=False, width=width, theme=theme)

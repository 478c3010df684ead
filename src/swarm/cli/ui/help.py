"""Help texts: Typer's, without the types of flags, in colours that can be read on black and on white; and commands
whose last arguments are a command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from typer import BadParameter
from typer.core import TyperCommand, TyperGroup, TyperOption

# Typer's own are yellow, cyan and "dim".
_BOLD: Final = (
    "OPTION", "SWITCH", "NEGATIVE_OPTION", "NEGATIVE_SWITCH", "USAGE", "REQUIRED_SHORT", "COMMANDS_TABLE_FIRST_COLUMN",
)  # fmt: skip
_PLAIN: Final = (
    "TYPES", "TYPES_SEPARATOR", "METAVAR", "METAVAR_SEPARATOR", "HELPTEXT", "OPTION_DEFAULT", "OPTION_ENVVAR",
    "REQUIRED_LONG", "OPTIONS_PANEL_BORDER", "COMMANDS_PANEL_BORDER", "DEPRECATED_COMMAND",
)  # fmt: skip


def _set_styles() -> None:
    from typer import rich_utils

    for name in (*_BOLD, *_PLAIN):
        if hasattr(rich_utils, f"STYLE_{name}"):  # versions of Typer differ
            setattr(rich_utils, f"STYLE_{name}", "bold" if name in _BOLD else "")


def _many(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


class _Shown:
    """Mixed into commands and groups: both print help, and take no empty argument, no number that is none, and no empty
    path: pathlib would have it as this directory, of which somebody whose variable was not set did not think."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        for param in self.params:  # type: ignore[attr-defined]
            if isinstance(param, TyperOption) and param.is_flag and param.metavar is None:
                param.metavar = ""  # a flag takes no value: `<bool>` would say it does
        return super().make_context(*args, **kwargs)  # type: ignore[misc]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, raw = list(args), {}
        left: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        if any(one == "" or one.endswith("=") for one in given):
            raw, _, _ = self.make_parser(ctx).parse_args(given)  # type: ignore[attr-defined]
        for param in self.params:  # type: ignore[attr-defined]
            words, read = (_many(found.get(param.name)) for found in (raw, ctx.params))
            if "" in (words[:1] if param.name == "argv" else words):  # what follows in a command line is the program's
                path = any(isinstance(one, Path) for one in read)
                if path or not isinstance(param, TyperOption):
                    raise BadParameter(f"it is empty{'; write . for this directory' if path else ''}", ctx, param)
            if any(isinstance(one, float) and not math.isfinite(one) for one in read):
                raise BadParameter(f"{read[0]} is not a finite number", ctx, param)
        return left

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = ""
        return option

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _set_styles()
        super().format_help(ctx, formatter)  # type: ignore[misc]


class One(_Shown, TyperCommand):
    pass


class OneInThat(One):
    """Its first argument names something, the others are a command line for it, whose options are not this command's.
    Its own options stand before the name or behind it; `--` may stand before the command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own, rest = self._split(ctx, args)
        if rest:
            more, line = self._split(ctx, rest[1:])
            args = [*own, *more, "--", rest[0], *line]
        return super().parse_args(ctx, args)

    def _split(self, ctx: Any, args: list[str]) -> tuple[list[str], list[str]]:
        """Options, and what follows them."""
        parser = type(self.make_parser(ctx))(ctx)
        parser.allow_interspersed_args = False
        for param in self.get_params(ctx):
            if isinstance(param, TyperOption):
                param.add_to_parser(parser, ctx)
        _, rest, _ = parser.parse_args(list(args))
        options = args[: len(args) - len(rest)]
        return options[:-1] if options[-1:] == ["--"] else options, rest


class Group(_Shown, TyperGroup):
    pass

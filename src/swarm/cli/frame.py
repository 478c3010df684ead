"""What all commands share: common options, settings, signals, errors, exit status, output.

A command is ``async def name(cli: Cli, …Typer parameters…) -> int | None``, registered with `command`. It returns the
exit status (None is 0). What it raises is printed as one line on stderr and sets the exit status:

======================================  ======
SwarmError                              its ``exit_status`` (1, or 2 for wrong use)
SIGINT, SIGTERM, SIGHUP                 128 + number, after the command was cancelled and has cleaned up
stdout closed by its reader (`| head`)  141, silently
anything else                           1, with a hint to ``--debug``
======================================  ======

A command that exits with the status of a program elsewhere says by ``fault`` which one means that it failed itself.

A traceback is printed only with ``--debug``. Commands import heavy modules themselves, so that `swarm --help` does not
wait for a database library.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import errno
import functools
import gc
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
import typer

from swarm.cli.ui.help import Group, One, OneInThat
from swarm.cli.ui.output import Out

if TYPE_CHECKING:
    from swarm.config import Settings
    from swarm.store.store import Store

_PANEL = "Common options"
# New ones, until Python looks for garbage; its own number is 700. The imports of a command make many objects and hardly
# any garbage, so that to look for some took 7 % of a short command's time.
_OBJECTS = 50_000

_Home = Annotated[
    Path | None,
    typer.Option(
        "--home",
        metavar="DIR",
        help="Where tickets, agents and images are kept. Default: SWARM_HOME, or /opt/swarm-platform.",
        rich_help_panel=_PANEL,
    ),
]
_Debug = Annotated[bool, typer.Option("--debug", help="Log every step; print tracebacks.", rich_help_panel=_PANEL)]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_PANEL)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cli:
    """Passed to every command: the settings, and how to print."""

    settings: Settings
    out: Out
    debug: bool = False

    @property
    def user(self) -> str:
        """Who runs the command, as events have it."""
        from swarm.base import process

        return process.user()

    def store(self) -> AbstractAsyncContextManager[Store]:
        from swarm.app import wiring

        return wiring.store(self.settings)

    async def record(self, did: str, *, name: str) -> None:
        """An event of what was changed outside the database, if this home has one."""
        from swarm.errors import StoreError

        with contextlib.suppress(StoreError):  # it is done, all the same
            async with self.store() as store:
                if await store.revision() == store.head():
                    await store.record(did, by=self.user, name=name)


_HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}

Command = Callable[..., Coroutine[Any, Any, int | None]]


def new_app(name: str, help: str, *, examples: Sequence[str] = (), many: bool = True) -> typer.Typer:  # noqa: A002
    """A program or a group of commands. ``many`` is False for a program that is a single command."""
    app = typer.Typer(
        name=name,
        help=help,
        epilog=_epilog(examples),
        no_args_is_help=many,
        add_completion=many,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        cls=Group,
        context_settings=_HELP,
    )
    if many:
        app.callback()(_before)
    return app


def _before(home: _Home = None, debug: _Debug = False, as_json: _Json = False) -> None:
    """The common options before the name of a command: `perform` finds them in the context."""


def command(
    app: typer.Typer,
    name: str | None = None,
    *,
    examples: Sequence[str],
    json: bool = False,
    runs: str = "",
    fault: int = 0,
) -> Callable[[Command], Command]:
    """Register an async function as a command, with the common options after its own. ``runs``: its arguments are a
    command line ('here'), or a name and a command line for what has it ('there'), whose options are not its own, with
    or without `--` before it. ``fault``: the exit status for what goes wrong, but for wrong use and signals."""

    def register(function: Command) -> Command:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        common: dict[str, Any] = {"home": _Home, "debug": _Debug} | ({"as_json": _Json} if json else {})
        kind = inspect.Parameter.KEYWORD_ONLY
        extra = [
            inspect.Parameter(n, kind, default=None if n == "home" else False, annotation=a) for n, a in common.items()
        ]

        @functools.wraps(function)
        def run(ctx: typer.Context, **values: Any) -> None:
            given = {name: _nearest(ctx, name) for name in ("home", "debug", "as_json")}
            if given["as_json"] and not json:
                Out().error(f"`{ctx.command_path}` prints no JSON: leave out --json")
                sys.exit(2)
            sys.exit(perform(function, {p.name: values[p.name] for p in own}, fault=fault, **given))

        run.__doc__ = _one_line_per_paragraph(function)
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        parameters = [context, *(p.replace(kind=kind) for p in own), *extra]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {"ctx": typer.Context} | {p.name: p.annotation for p in own} | common
        del run.__wrapped__  # otherwise Typer would read the signature of ``function``
        context_settings = {**_HELP, "allow_interspersed_args": not runs}
        app.command(
            name, cls=OneInThat if runs == "there" else One, epilog=_epilog(examples), context_settings=context_settings
        )(run)
        return function

    return register


def _nearest(ctx: Any, option: str) -> Any:
    """The value of a common option, which may stand behind the command or before it."""
    while ctx is not None:
        if value := ctx.params.get(option):
            return value
        ctx = ctx.parent
    return None if option == "home" else False


def perform(
    function: Command, values: dict[str, Any], *, home: Path | None, debug: bool, as_json: bool, fault: int = 0
) -> int:
    """Run a command to its end. Returns the exit status."""
    out = Out(json=as_json)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # who started us may have some blocked, such as SIGCHLD
    try:
        from swarm import config
        from swarm.base.log import configure

        configure(debug=debug, lazily=not debug)
        cli = Cli(settings=config.load(home=home and home.absolute()), out=out, debug=debug)
        if sys.version_info < (3, 12):  # it would start a thread for each child, and wait for ever if memory is short
            asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
        status = asyncio.run(_until_signalled(function(cli, **values)))
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:
        return _reader_gone()
    except (Exception, KeyboardInterrupt, _Stopped) as error:
        if debug:
            traceback.print_exc()
        only = _only(error)
        status = _explain(only, out, debug)
        from swarm.errors import UsageError

        return fault if fault and isinstance(only, Exception) and not isinstance(only, UsageError) else status


def _reader_gone() -> int:
    # Python flushes stdout at exit, and would print the error again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _explain(error: BaseException, out: Out, debug: bool) -> int:
    """Print in one line what ended the command. Returns the exit status."""
    from swarm.base.files import is_full, named
    from swarm.errors import SwarmError, no_more_threads

    match error:
        case SwarmError():
            out.error(str(error))
            return error.exit_status
        case KeyboardInterrupt():
            return 128 + signal.SIGINT
        case _Stopped():
            out.error("interrupted" if error.number == signal.SIGINT else f"stopped by {error.number.name}")
            return 128 + error.number
        case MemoryError():
            out.error("out of memory: give this process more, or let it do less at once")
            return 1
        case OSError() if error.errno in (errno.EMFILE, errno.ENFILE):
            out.error("out of file descriptors: allow this process more (`ulimit -n`, systemd's LimitNOFILE)")
            return 1
        case OSError() if is_full(error):
            out.error(f"no space left on a disk, or a quota is used up: {error.filename or 'see `df`'}")
            return 1
        case OSError() if said := named(error):
            out.error(said + ("" if debug else " (--debug shows where)"))
            return 1
        case RuntimeError() if str(error).startswith("Symlink loop"):  # of `Path.resolve`
            out.error(str(error))
            return 1
        case ImportError() if "failed to map segment" in str(error):
            out.error(f"out of memory ({error}): give this process more")
            return 1
        case RuntimeError() if no_more_threads(error):
            out.error(f"out of memory or threads ({error}): give this process more, or let it do less at once")
            return 1
    out.error(f"unexpected: {type(error).__name__}: {error}" + ("" if debug else " (--debug shows where)"))
    return 1


def _only(error: BaseException) -> BaseException:
    """The single error inside a TaskGroup's group, if there is only one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class _Stopped(BaseException):
    def __init__(self, number: signal.Signals) -> None:
        self.number = number


_stop: ContextVar[Callable[[signal.Signals], None]] = ContextVar("_stop")  # what a signal does to this command


async def _until_signalled(work: Coroutine[Any, Any, int | None]) -> int | None:
    """Await the work. A signal cancels it; once it has cleaned up, _Stopped is raised."""
    loop = asyncio.get_running_loop()
    seen: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        seen.append(number)
        task.cancel()

    _stop.set(stop)
    task = asyncio.ensure_future(work)  # it sees `_stop`
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]  # `nohup` ignores SIGHUP
    for number in heeded:
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except BaseException:
        if not seen:
            raise
        for number in heeded:  # it has cleaned up: one more would only keep it from saying so
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        raise _Stopped(seen[0]) from None  # also if it failed meanwhile


@contextlib.contextmanager
def interrupts(handle: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """For the length of the block, SIGINT calls ``handle`` and does not end the command. Yields what would."""
    loop, stop = asyncio.get_running_loop(), _stop.get()
    heeded = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if heeded:
        loop.add_signal_handler(signal.SIGINT, handle)
    try:
        yield functools.partial(stop, signal.SIGINT)
    finally:
        if heeded:
            loop.add_signal_handler(signal.SIGINT, stop, signal.SIGINT)


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Each signal calls ``stop``, for a command that shuts down in its own order. After the block signals are ignored:
    the process is ending anyway."""
    loop = asyncio.get_running_loop()
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


def start(app: typer.Typer, name: str) -> None:
    """Run a program: the body of every entry point."""
    _usable_streams()
    gc.set_threshold(_OBJECTS)
    try:
        if sys.argv[1:] == ["--version"]:  # here, since Typer has no place for it in a program that is a single command
            from importlib.metadata import version

            typer.echo(f"{name} {version('swarm-engine')}")
            sys.stdout.flush()
            return
        sys.exit(app(prog_name=name, standalone_mode=False))
    except MemoryError:  # while another error was told: there is none left for a traceback either
        os.write(2, b"error: out of memory: give this process more, or let it do less at once\n")
        os._exit(1)
    except BrokenPipeError:
        sys.exit(_reader_gone())
    except OSError as error:  # help that can't be printed
        status = _explain(error, Out(), debug=False)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(status)
    except typer.Abort:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:  # Typer has one base class of wrong use, and it is not public
        if not hasattr(error, "format_message"):
            raise
        if error.format_message():  # without arguments there is none: the help is printed
            Out().error(_wrong_use(error))
        sys.exit(2)


def _wrong_use(error: Any) -> str:
    """Typer's error with the command line, in one sentence of ours."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    where = f"; `{context.command_path} -h` shows how" if context is not None else ""
    option, others = getattr(error, "option_name", ""), getattr(error, "possibilities", None)
    if others is not None and option:
        name = option.lstrip("-").upper()
        arguments = [one for one in context.command.params if one.param_type_name == "argument"] if context else []
        if name in {(one.metavar or one.name).upper() for one in arguments}:
            return f"no such option: {option}; {name} is given without one{where}"
        near = difflib.get_close_matches(option, others, n=1) or list(others)[:1]
        return f"no such option: {option}" + (f"; did you mean {near[0]}?" if near else where)
    if parameter is not None and isinstance(error.__cause__, pydantic.ValidationError):
        from swarm.fields import complaint

        name = max(getattr(parameter, "opts", None) or [str(parameter.name)], key=len)
        name = name if name.startswith("-") else name.upper()
        said = complaint(error.__cause__.errors())
        return f"{name} {said}{where}" if said.startswith("must be") else f"{name}: {said.rstrip('.')}{where}"
    said = " ".join(error.format_message().split())
    found = re.match(r"No such command '([\w-]+)'", said)
    if found and context is not None and (other := _elsewhere(context.command_path, found[1])):
        return f"{context.command_path} has no command {found[1]!r}; it is `{other} {found[1]}`"
    return said[:1].lower() + said[1:].rstrip(".?") + ("?" if said.endswith("?") else where)


def _elsewhere(program: str, name: str) -> str | None:
    """The program that has this command, if another one has."""
    other, module = {
        "swarm": ("swarm-engine", "swarm.cli.engine"),
        "swarm-engine": ("swarm", "swarm.cli.main"),
    }.get(program, (None, ""))
    return other if other and name in typer.main.get_command(import_module(module).app).commands else None  # type: ignore[attr-defined]


def _usable_streams() -> None:
    """A closed stream (`>&-`) is /dev/null: otherwise the next file that is opened, the database say, would be stdout.
    What a stream's encoding lacks is replaced, and ends nothing."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - until the end
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _one_line_per_paragraph(function: Command) -> str:
    """The docstring, unwrapped: Typer keeps the line breaks of every paragraph but the first."""
    return "\n\n".join(" ".join(each.split()) for each in (inspect.getdoc(function) or "").split("\n\n"))


def _epilog(examples: Sequence[str]) -> str | None:
    if not examples:
        return None
    # One paragraph each, since Typer joins the lines of a paragraph. The backslash keeps `[…]` from being markup.
    return "\n\n".join(["[bold]Examples[/bold]", *(line.replace("[", r"\[") for line in examples)])

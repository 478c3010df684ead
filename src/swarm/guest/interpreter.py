"""Runs a program as ``python3 FILE`` does, in an interpreter that was started before the program was known.

agentd's zygote does so for agents on Swarm's own root. Of an imported image it is the image's own Python, which agentd
starts and gives this text (`wait`): any CPython from 3.8 on. Hence no newer words here, and few imports.
"""
# ruff: noqa: PTH120, SIM105

from __future__ import annotations

import atexit
import gc
import io
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType


def run(
    main: ModuleType, argv: list[str], source: bytes, paths: list[str], ours: set[str], begun: Callable[[], object]
) -> None:
    """Run the program in the module ``main``, with ``paths`` first in sys.path. If it returns, or raises, all that is
    left to do is to end the interpreter. ``ours``: names of modules that are not the program's; ``begun`` is called
    before its first instruction."""
    reseed()
    sys.argv[:] = argv
    sys.path[:0] = paths
    # Not runpy: it costs imports, and removes __main__ before the agent's threads and exit handlers have finished.
    loader = sys.modules["_frozen_importlib_external"].SourceFileLoader("__main__", argv[0])
    main.__dict__.update(__file__=argv[0], __cached__=None, __loader__=loader)
    sys.modules["__main__"] = main
    try:
        try:
            code = compile(source, argv[0], "exec", dont_inherit=True)
        finally:
            begun()
        exec(code, main.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        trace, hook = error.__traceback__ and error.__traceback__.tb_next, sys.excepthook
        # Raised again so that Python exits as usual; only the frames of this file are cut from the traceback.
        sys.excepthook = lambda kind, value, _: hook(kind, value.with_traceback(trace), trace)
        raise
    del main
    end_quickly(ours)


def reseed() -> None:
    """Renew the random state of modules that keep one. (random and OpenSSL also do so at each fork; secrets, uuid4 and
    os.urandom keep none.) Clones share the interpreter's memory, so this must come after the kernel's own reseed."""
    for name in ("random", "numpy.random"):
        if name in sys.modules:
            sys.modules[name].seed()
    if "ssl" in sys.modules:
        try:
            sys.modules["ssl"].RAND_add(os.getrandom(32, os.GRND_NONBLOCK), 32.0)
        except BlockingIOError:
            pass


def end_quickly(ours: set[str]) -> None:
    """Exit as Python does, in the same order, but without tearing down the preloaded modules, which would write to
    hundreds of pages. The agent's own modules are released: files are closed, ``__del__`` runs."""
    threading = sys.modules.get("threading")
    if threading is not None:
        threading._shutdown()
    atexit._run_exitfuncs()
    for name in [name for name in sys.modules if name not in ours or name == "__main__"]:
        del sys.modules[name]
    gc.collect()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except Exception:
            return  # the interpreter will meet the same error at its exit, and reports it
    os._exit(0)


SAMPLE_PROGRAM = """
import json
def main(values):
    return json.loads(json.dumps({str(n): [n, None, f"{n}"] for n in values}))
class Thing:
    def __init__(self, value):
        self.value = value
try:
    things = [Thing(value) for value in main(range(300)).items()]
    raise ValueError(len(things))
except ValueError:
    pass
"""


def touch_pages() -> None:
    """Copy the pages that any Python program writes to into this process, while nobody waits for it."""
    for _ in range(2):
        exec(compile(SAMPLE_PROGRAM, "touch_pages", "exec"), {"__name__": "touch_pages"})
    gc.collect()
    gc.freeze()


def wait(fd: int, common: Iterable[str], preload: Iterable[str]) -> None:
    """As an image's own Python, started as the agent is with ``-c``: import modules, say so on ``fd``, hear there what
    to run (a Python literal: this Python may lack the json module), and run it."""
    if sys.implementation.name != "cpython":
        os._exit(0)
    safe_path = getattr(sys.flags, "safe_path", False)
    if not safe_path:
        del sys.path[0]  # of -c: the current directory
    # What modules print or write when they are imported is no agent's.
    kept, writes_no_bytecode = [os.dup(1), os.dup(2)], sys.dont_write_bytecode
    null = os.open("/dev/null", os.O_RDWR)
    for target in (1, 2):
        os.dup2(null, target)
    sys.dont_write_bytecode = True
    lines = ["ready"]
    for wanted in (common, preload):
        for name in wanted:
            try:
                __import__(name)
            except BaseException as error:
                if wanted is preload:
                    lines.append(" ".join(f"{name}: {type(error).__name__}: {error}".split())[:300])
    touch_pages()
    # What `run` needs to know of its inside. A Python without that fails here, and is not used.
    __import__("threading")._shutdown  # noqa: B018
    assert callable(atexit._run_exitfuncs) and sys.modules["_frozen_importlib_external"].SourceFileLoader
    sys.dont_write_bytecode = writes_no_bytecode
    for target, stream in enumerate((sys.stdout, sys.stderr), 1):
        stream.flush()
        os.dup2(kept[target - 1], target)
    for one in (*kept, null):
        os.close(one)
    ours = set(sys.modules)
    os.write(fd, "\n".join(lines).encode(errors="replace")[:60000])
    told = os.read(fd, 1 << 18)
    os.close(fd)
    if not told:  # agentd doesn't need this process
        os._exit(0)
    words, env, cwd = eval(told)  # bytes, whatever this Python's encoding is
    os.environb.update(env)
    argv = [os.fsdecode(word) for word in words[1:]]
    try:
        os.chdir(cwd)
        with io.open_code(argv[0]) as file:
            source = file.read()
    except OSError:  # Python says it in its own words
        os.execv(words[0], words)
    if hasattr(sys, "orig_argv"):
        sys.orig_argv[1:] = argv
    paths = [] if safe_path else [os.path.dirname(os.path.realpath(argv[0]))]
    run(sys.modules["__main__"], argv, source, paths, ours, begun=bool)

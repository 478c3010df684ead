"""Driver `process`: agentd as a plain subprocess of the host. **No isolation at all**: agents run as the caller.

For agent authors and tests, and only if selected by name. agentd gets ``--unix`` and ``--root``, so /work and /agent
are directories inside the VM's own; it doesn't touch the clock, the host name or /etc.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from swarm.base import priority, process
from swarm.base.log import logger
from swarm.channel.dial import Endpoint
from swarm.errors import BootFailed, HostError, SwarmError
from swarm.vm.driver import Freeze, Image, Probe, Slot, Snapshot, Template, VmSpec

log = logger(__name__)

AGENTD = Path(__file__).parents[2] / "guest" / "agentd.py"
# Runs it as a script, but from its compiled form, which Python keeps only of modules: parsing it takes as long as all
# else of its start.
_RUN_SCRIPT = (
    "import sys; __file__ = sys.argv.pop(1); "
    "exec(sys.modules['_frozen_importlib_external'].SourceFileLoader('__main__', __file__).get_code('__main__'))"
)
_MAX_SOCKET_PATH = 107  # bytes; sun_path of unix(7)
_NO_TEMPLATES = "the process driver has no templates: a plain process can't be cloned"
_NO_SNAPSHOTS = "the process driver has no snapshots: a plain process can't be paused, saved or forked"
_REMOVE_SECONDS = 600.0  # of very many files
_GRACE_SECONDS = 22.0  # agentd gives descendants of an agent 10 s to die, and a stuck agent 20


class NoImages:
    """Replaces the image store with this driver: a plain process needs no image."""

    async def find(self, ref: str | None = None) -> Image:
        none = Path(os.devnull)
        return Image(digest="", dir=none, kernel=none, kernel_elf=none, root=none, initramfs=None, boot_args="")

    def used(self, image: Image) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class ProcessVm:
    """An agentd and its descendants."""

    def __init__(self, *, child: process.Child, dir: Path) -> None:
        self.pid = child.pid
        self.endpoint = Endpoint(unix=_socket(dir))
        self.console = dir / "console.log"
        self._dir = dir
        self._child = child

    async def wait(self) -> str:
        return f"agentd (pid {self.pid}) {process.how_it_ended(await self._child.wait())}"

    async def doing(self) -> str:
        if self._child.returncode is None and process.is_stopped(self.pid):
            return f"agentd was stopped by a signal (`kill -CONT {self.pid}` continues it)"
        return f"agentd {'runs' if self._child.returncode is None else 'has ended'}"

    async def printed(self, text: bytes) -> None:
        raise HostError("the process driver's VMs have no console: there is no guest to boot")

    async def snapshot(self, dir: Path) -> None:
        raise BootFailed(_NO_TEMPLATES, retryable=False)

    async def save(self, dir: Path, *, freeze: Freeze) -> None:
        raise BootFailed(_NO_SNAPSHOTS, retryable=False)

    def pausing(self, dir: Path, *, freeze: Freeze) -> contextlib.AbstractAsyncContextManager[None]:
        raise BootFailed(_NO_SNAPSHOTS, retryable=False)

    async def kill(self) -> None:
        try:
            await asyncio.shield(self._kill())
        except (SwarmError, OSError) as error:
            log.error("failed to kill a VM", vm=str(self._dir), error=str(error))

    async def _kill(self) -> None:
        """On SIGTERM agentd kills its agent and everything that the agent started. If agentd is dead or doesn't react,
        its zygote does the same: it is found by agentd's command line, which a fork keeps."""
        await process.kill(self._child, grace_seconds=_GRACE_SECONDS)
        for pid, started in (await asyncio.to_thread(_family, self._dir)).items():
            await process.gone(pid, started, timeout_seconds=_GRACE_SECONDS)
            await process.kill_stranger(pid, started)
        _socket(self._dir).unlink(missing_ok=True)
        # Not shutil.rmtree, which is recursive: an agent may leave directories in directories, deeper than Python goes.
        await process.run(["rm", "-rf", "--", str(_root(self._dir))], check=False, timeout_seconds=_REMOVE_SECONDS)


class ProcessDriver:
    name = "process"
    networked = False

    async def probe(self) -> Probe:
        return Probe(
            usable=True,
            reason="runs agents as plain processes of this host, without any isolation; never chosen automatically",
            version=f"Python {sys.version.split()[0]}",
        )

    async def boot(
        self,
        spec: VmSpec,
        slot: Slot | None,
        dir: Path,
        *,
        outlive: bool = False,
        for_template: bool = False,
        token: bytes = b"",
    ) -> ProcessVm:
        """Start agentd in ``dir``. Of ``spec`` only the layer applies: memory, CPUs and disk are the host's. Its
        agentd takes its token from the first connection."""
        if len(os.fsencode(_socket(dir))) > _MAX_SOCKET_PATH:
            raise BootFailed(
                f"{_socket(dir)} is too long for a Unix socket ({_MAX_SOCKET_PATH} bytes): set a shorter state_dir",
                retryable=False,
            )
        if spec.layer and spec.layer.root:
            raise BootFailed("an imported image needs a VM: SWARM_DRIVER is process", retryable=False)
        _root(dir).mkdir(parents=True, exist_ok=True)
        try:
            # agentd passes PYTHONPATH on to agents.
            env = {"PYTHONPATH": str(spec.layer.path)} if spec.layer else {}
            child = await process.spawn(
                _argv(dir),
                output=dir / "console.log",
                env=env,
                die_with_parent=not outlive,
                lower_by=priority.BELOW_ENGINE,
            )
        except HostError as error:
            raise BootFailed(f"can't start agentd: {error}") from error
        if process.start_time(child.pid) is None:
            code = await child.wait()
            raise BootFailed(f"agentd ended at once with status {code}; see {dir / 'console.log'}")
        return ProcessVm(child=child, dir=dir)

    async def restore(
        self,
        template: Template,
        slot: Slot | None,
        dir: Path,
        *,
        outlive: bool = False,
    ) -> ProcessVm:
        raise BootFailed(_NO_TEMPLATES, retryable=False)

    async def resume(self, snapshot: Snapshot, slot: Slot | None, dir: Path, *, own: bool) -> ProcessVm:
        raise BootFailed(_NO_SNAPSHOTS, retryable=False)


def _socket(dir: Path) -> Path:
    return dir / "agentd.sock"


def _root(dir: Path) -> Path:
    return dir / "root"


def _argv(dir: Path) -> list[str]:
    return [sys.executable, "-I", "-S", "-B", "-c", _RUN_SCRIPT, str(AGENTD), *_own_words(dir)]


def _own_words(dir: Path) -> list[str]:
    return ["--unix", str(_socket(dir)), "--root", str(_root(dir))]


def _family(dir: Path) -> dict[int, int]:
    """Pid -> start time of the agentd in ``dir``, its zygote, and the agents forked from the zygote."""
    wanted = b"".join(os.fsencode(word) + b"\0" for word in _own_words(dir))
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            started = process.start_time(int(entry.name)) if line.endswith(wanted) else None
            if started is not None:
                found[int(entry.name)] = started
    return found

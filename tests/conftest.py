"""What all tests share: the markers, a home, an image, and the consoles of VMs in reports of failed tests.

``slow`` marks what starts programs or tries very many cases. ``needs`` lists what a test can't run without:

- ``root``: uid 0
- ``netns``: a network namespace of its own, as `make test` and tools/sandbox.py give one
- ``qemu``: netns, and qemu-system-x86_64
- ``cc``: a C compiler
- ``clients``: real clients of model services, in the cache (tests/clients_here.py; `make ready` fetches them)
- ``firecracker``: netns, /dev/kvm, Firecracker, and a kernel that it can boot here (tests/vm/firecracker_here.py)
- ``browser``: netns, Debian's Chromium with its driver, and axe-core in the cache (tests/dashboard/browser.py)
- ``schemathesis``: the package, which `make ready` installs with the other tools of developers
- ``oci``: skopeo, umoci, buildah and docker-registry, as Debian has them (tests/oci_here.py fetches the last)
- ``containers``: Debian's podman in a layer for guests (tests/containers_here.py builds it)
- ``postgres``: PostgreSQL's server, as Debian's package installs it (tests/postgres_here.py starts one)
- ``prometheus``: Debian's Prometheus, in the cache (tests/prometheus_here.py; `make ready` fetches it)
- ``claude-code``: what the agent of this name requires, from PyPI, in the cache (`make ready` puts it there)

Write ``pytestmark = pytest.mark.needs("netns", "qemu")`` for a module, or call ``need("qemu")`` in a test or fixture.
If something is missing, the test is skipped with the reason, or fails if ``SWARM_REQUIRE`` (comma-separated, as in CI)
names it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hypothesis
import pytest

from swarm import config
from swarm.base.process import which
from swarm.config import Settings
from swarm.vm.driver import Image
from swarm.vm.drivers.console import last_lines

if TYPE_CHECKING:
    from tests.store.databases import PostgresBackend

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "images"
REQUIRED = frozenset(filter(None, os.environ.get("SWARM_REQUIRE", "").split(",")))
SANDBOX = os.environ.get("SWARM_SANDBOX", "")
PATIENCE_SECONDS = 300.0  # for what surely happens, in a VM on a slow and busy machine too

# By these, programs that tests start would print or do something else: a CI runner's, a user's, a git hook's.
FOREIGN = (
    *("FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "PYTHONWARNINGS"),
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"),
)

# How fast inputs are made and tried says something about the machine, and nothing about what is tested.
hypothesis.settings.register_profile(
    "swarm", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("swarm")


def lacks(thing: str) -> str:
    """Why this host doesn't have what a test needs; '' if it does."""
    if thing == "root":
        return "" if os.geteuid() == 0 else "needs root"
    if thing == "netns":
        return "" if SANDBOX else "needs a network namespace of its own: run `make test`, or tools/sandbox.py pytest"
    if thing == "cc":
        return "" if which("cc") else "needs a C compiler: apt-get install gcc"
    if thing == "qemu":
        return lacks("netns") or (
            "" if which("qemu-system-x86_64") else "needs qemu-system-x86_64: run tools/bootstrap"
        )
    if thing == "claude-code":
        from tests.agents import claude_code_here

        return claude_code_here.lacks()
    if thing == "schemathesis":
        return "" if find_spec("schemathesis") else "needs schemathesis: run tools/bootstrap"
    if thing == "ray":
        return lacks("netns") or ("" if find_spec("ray") else "needs Ray: run tools/bootstrap")
    if thing == "clients":
        from tests import clients_here

        return clients_here.lacks()
    if thing == "browser":
        from tests.dashboard import browser

        return lacks("netns") or browser.lacks()
    if thing == "postgres":
        from tests import postgres_here

        return postgres_here.lacks()
    if thing == "oci":
        from tests import oci_here

        return lacks("root") or lacks("netns") or oci_here.lacks()
    if thing == "prometheus":
        from tests import prometheus_here

        return prometheus_here.lacks()
    if thing == "firecracker":
        from tests.vm import firecracker_here

        return lacks("netns") or firecracker_here.lacks()
    raise LookupError(f"unknown need {thing!r}: use root, cc, netns, qemu, clients, browser, prometheus, firecracker …")


def need(*things: str) -> None:
    for thing in things:
        if reason := lacks(thing):
            missing(thing, reason)


def missing(thing: str, reason: str) -> NoReturn:
    """End a test that needs it."""
    if thing in REQUIRED:
        pytest.fail(f"SWARM_REQUIRE names {thing}: {reason}", pytrace=False)
    pytest.skip(reason)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "needs(*things): what the test needs: root, cc, netns, qemu, clients, browser, prometheus, …",
    )
    config.addinivalue_line("markers", "slow: starts programs, or tries very many cases; not in `make test-quick`")
    if SANDBOX and not config.option.basetemp:  # short, since Unix sockets live below it; removed with the sandbox
        config.option.basetemp = Path(SANDBOX) / "t"
    for name in FOREIGN:
        os.environ.pop(name, None)
    os.umask(0o022)  # files of the tests stand for those of any user; tests of other umasks set them
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a process keeps something open of each database
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 16)), hard))
    gc.disable()  # thousands of tests are no garbage: to look for some takes a third of the time to collect them


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


# Directories whose tests start commands, engines or servers, most of them one each.
SLOW = frozenset({"api", "bench", "chaos", "cli", "client", "dashboard", "engine", "gateway"})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name == "test_zz_leaks.py")  # last of all tests


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        need(*mark.args)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and SANDBOX:
        for console in sorted(Path(SANDBOX).glob("state/vms/*/console.log")):
            report.sections.append((f"console of VM {console.parent.name}", "\n".join(last_lines(console, lines=60))))
    return report


@pytest.fixture(scope="session", autouse=True)
def _host_as_it_was() -> Iterator[None]:
    """Remove the bridge and the host's rules at the end: they stay between VMs, but the sandbox reports leftovers."""
    yield
    if SANDBOX:
        subprocess.run([sys.executable, "-m", "swarm.cli.cleanup"], check=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a migrated database and the built-in agents registered. It has no image: see `image`."""
    from swarm.app import setup

    place = tmp_path_factory.mktemp("home")
    asyncio.run(setup.init(config.load(home=place, images_dir=CACHE), image=False))
    return place


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresBackend]:
    """One server for all tests. Whoever asks it for a database itself calls `done` at the end of the test."""
    from tests.store.databases import PostgresBackend

    need("postgres")
    backend = PostgresBackend(tmp_path_factory.mktemp("databases"))
    yield backend
    backend.close()


@pytest.fixture
def postgresql_url(postgresql: PostgresBackend) -> Iterator[str]:
    """Of a database as `swarm init` makes it, with the agents `ECHO` and `RETRY` of tests/store/databases.py."""
    yield postgresql.new()
    postgresql.done()


@pytest.fixture(scope="session")
def settings(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    state = Path(os.environ.get("SWARM_STATE_DIR") or tmp_path_factory.mktemp("state"))
    return config.load(home=home, state_dir=state, images_dir=CACHE)


@pytest.fixture(scope="session")
def image(settings: Settings) -> Image:
    """The guest image, from the cache that all checkouts share; built if it isn't there (takes a minute)."""
    from swarm.app import setup

    need("qemu")
    return asyncio.run(setup.ensure_image(settings))

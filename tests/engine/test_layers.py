"""Agents with requirements, from `swarm init` without a registry to the ticket that needs what was not built."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from swarm import config
from swarm.app import doctor_wiring, setup, wiring
from swarm.config import Settings
from swarm.engine.engine import vm_spec
from swarm.engine.run_once import run_ticket
from swarm.model import Agent
from swarm.vm.driver import Image, Layer, Root, kernel_command_line
from tests.engine.conftest import Bench, ended, serving
from tests.vm.packages_here import wheel, wheels_from

USES = "import marked, json; json.dump({'word': marked.WORD, 'from': marked.__file__}, open('output.json', 'w'))"


@pytest.mark.needs("qemu")
def test_init_without_a_registry(
    settings: Settings, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the layer is there, and one line says what to run later."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "1")
    images = tmp_path / "images"
    images.mkdir()
    (images / image.digest).symlink_to(image.dir)
    own = config.load(**{**settings.model_dump(), "home": tmp_path / "home", "images_dir": images})
    said = asyncio.run(setup.init(own, template=False))
    *large, line = sorted((line for line in said if line.startswith("layer")), key=lambda line: "claude 1" in line)
    for words in ("claude 1.1.1", "can't reach the package index", "`swarm agent build`"):
        assert words in line
    for one, name in zip(large, ("claude-code", "mini-swe"), strict=True):
        assert one == f"layer      of {name} 1.0.0 is large: `swarm agent build {name}` makes it"
    assert any(line.startswith("image") for line in said)
    found = [check for check in asyncio.run(doctor_wiring.examine(own)) if check.name == "layers"]
    assert [check.fix for check in found] == ["swarm agent build claude@1.1.1"]
    assert [place.name for place in (images / "layers").iterdir() if place.is_dir()] == []


def test_whose_python_imports_what_is_preloaded() -> None:
    """The image's, if the agent's program is run by that; then the guest's own has nothing to import."""
    nothing = Path(os.devnull)
    image = Image(
        digest="", dir=nothing, kernel=nothing, kernel_elf=nothing, root=nothing, initramfs=None, boot_args=""
    )
    upon = {name: Layer(digest=name, path=nothing, root=root) for name, root in (("own", None), ("image", Root()))}
    agent = Agent(id="", name="a", version="1", path=nothing, entry=("main.py",), runtime="python", preload=("json",))
    specs = [vm_spec(one, image, layer) for one in (agent, replace(agent, runtime="exec")) for layer in upon.values()]
    assert [spec.interpreter for spec in specs] == [False, True, False, False]
    assert [spec.preload for spec in specs] == [("json",), ("json",), (), ()]
    told = ["swarm.preload=json" in kernel_command_line(spec, token=b"") for spec in specs]
    assert told == [True, False, False, False]


async def test_a_ticket_without_its_layer_fails_alone(plain: Bench) -> None:
    agent = await plain.agent(USES, "wanting", requirements=("nosuch==1.0",), idempotent=True)
    fine = await plain.agent("open('output.json', 'w').write('1')", "fine")
    for number, one in enumerate((agent, fine, agent, fine)):
        plain.insert(f"t{number}", one.id)
    async with serving(plain):
        assert await ended(plain, "t0", "t1", "t2", "t3") == ["failed", "done", "failed", "done"]
    (attempt,) = await plain.attempts("t0")
    error = (await plain.store.ticket("t0")).error
    assert attempt.reason == "layer_missing" and error is not None
    assert error.startswith("the layer of the agent wanting@1.0.0") and "run `swarm agent build wanting@1.0.0`" in error


async def test_a_ticket_with_its_layer(plain: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a VM: a directory of modules, found by the warm interpreter and by any Python that the agent starts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel(tmp_path / "wheels", "marked", files={"marked.py": "WORD = 'hello'\n"})
    warm = await plain.agent(USES, "warm", requirements=("marked==1.0",))
    started = await plain.agent(
        USES, "started", requirements=("marked==1.0",), runtime="exec", entry=("/bin/sh", "-c", f'python3 -c "{USES}"')
    )
    with wheels_from(tmp_path / "wheels"):
        layer = await wiring.layers(plain.settings).build(warm, await wiring.image_source(plain.settings).find())
    assert layer is not None
    async with wiring.worker(plain.settings, plain.store) as worker:
        for agent in (warm, started):
            plain.insert(agent.id, agent.id)
            ticket = await run_ticket(plain.store, worker, agent.id)
            assert ticket.outputs, ticket.error
            assert json.loads(ticket.outputs) == {"word": "hello", "from": str(layer.path / "marked.py")}

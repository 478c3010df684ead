"""A ticket on a host that has neither its image nor its layer: it gets them from another host, or builds the layer."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from swarm import agents, config
from swarm.admin import packages
from swarm.app import setup, sharing, wiring
from swarm.config import Settings
from swarm.engine.run_once import run_ticket
from swarm.store.hosts import Machine
from swarm.store.store import Store
from swarm.vm.driver import Image
from tests.admin.test_fetching import free_port, until
from tests.engine.conftest import Bench, engine_process, log_until
from tests.store.databases import SqliteOutside, insert
from tests.vm.image.oci_images import Layout, static
from tests.vm.packages_here import wheel, wheels_from

USES = "import marked, json; json.dump({'word': marked.WORD}, open('output.json', 'w'))"


def host(settings: Settings, place: Path, number: int, url: str) -> Settings:
    own = {"home": place / str(number), "images_dir": None, "templates_dir": None, "driver": "qemu"}
    own |= {"state_dir": place / "state1"} if number == 1 else {}  # VMs run on the second
    return config.load(**{**settings.model_dump(), **own, "database_url": url})


@pytest.mark.needs("qemu", "oci")
async def test_a_ticket_gets_its_image_and_its_layer(settings: Settings, image: Image, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/1/data/swarm.db"
    first = host(settings, tmp_path, 1, url).model_copy(update={"share_address": f"127.0.0.1:{free_port()}"})
    second = host(settings, tmp_path, 2, url)
    await setup.init(first, image=False)
    first.images.mkdir()
    (first.images / image.digest).symlink_to(image.dir)
    source = tmp_path / "source"
    source.mkdir()
    (source / "main.py").write_text(USES)
    (source / agents.MANIFEST).write_text(
        '{"name": "far", "version": "1.0.0", "entry": ["main.py"], "requirements": ["marked==1.0"], "memory_mb": 192}'
    )
    wheel(tmp_path / "wheels", "marked", files={"marked.py": "WORD = 'hello'\n"})
    outside = SqliteOutside(url)

    own = tmp_path / "own"
    own.mkdir()
    (own / agents.MANIFEST).write_text('{"name": "own", "version": "1.0.0", "image": "tool:1", "memory_mb": 192}')
    says = ["/bin/busybox", "sh", "-c", """echo '{"word": "mine"}' > output.json"""]
    tool = Layout(tmp_path / "layout").add("tool", [static()], Entrypoint=says)

    async def ran(id: str, store: Store, *, agent: str = "far") -> str:
        insert(outside, id, agent_id=agent)
        async with wiring.worker(second, store) as worker:
            ticket = await run_ticket(store, worker, id)
        assert ticket.outputs is not None, ticket.error
        return str(json.loads(ticket.outputs)["word"])

    async with wiring.store(first) as one, wiring.store(second) as two:
        agent = await packages.add_agent(one, source, first.agents)
        with wheels_from(tmp_path / "wheels"):
            built = await wiring.guest_layers(first).build(agent, await wiring.images(first).find())
        assert built is not None
        await wiring.imported(first).import_(tool, name="tool:1")
        await packages.add_agent(one, own, first.agents)
        for store, name in ((one, "first"), (two, "second")):
            await store.register_host(
                Machine(id=name, name=name, machine_id=name, boot_id="b", labels={}, capacity={}, versions={})
            )
        outside.execute("UPDATE hosts SET seen_at = :ms WHERE name = 'first'", {"ms": 1 << 50})
        async with sharing.sharing(first, one):
            await until(lambda: outside.execute("SELECT 1 FROM host_files WHERE kind = 'layer'") != [])
            assert await ran("fetched", two) == "hello"
            await until(lambda: outside.execute("SELECT 1 FROM host_files WHERE made_of = 'tool:1'") != [])
            assert await ran("imported", two, agent="own") == "mine"
        (layer,) = wiring.guest_layers(second).list()
        assert layer.digest == built.digest
        assert [found.digest for found in wiring.images(second).list()] == [image.digest]
        assert not (second.images / image.digest).is_symlink()

        wiring.guest_layers(second).remove(layer.key)  # what the first has, and can't give now, is built
        outside.execute("UPDATE hosts SET seen_at = 0 WHERE name = 'first'")
        with wheels_from(tmp_path / "wheels"):
            assert await ran("built", two) == "hello"
        assert len(wiring.guest_layers(second).list()) == 1
    outside.close()


async def test_an_engine_hands_out_files_as_long_as_it_lives(plain: Bench) -> None:
    """However it ends."""
    settings = plain.settings.model_copy(update={"share_address": f"127.0.0.1:{free_port()}"})
    async with engine_process(plain, SWARM_SHARE_ADDRESS=settings.share_address) as process:
        await log_until(process, "handing out images and layers to other hosts")
        await until(lambda: sharing.answers(settings))
        (server,) = [one for one in psutil.Process(process.pid).children() if "swarm.api.shared_files" in one.cmdline()]
        process.kill()
        await until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    assert not await sharing.answers(settings)

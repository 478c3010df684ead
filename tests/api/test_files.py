"""Files over the API: what a ticket is given, what its agents left, and artifacts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Mapping
from typing import Any

import pytest

from swarm.base import process, trees
from swarm.base.trees import Entry
from swarm.engine.files import Left
from swarm.model import Event
from swarm.store.store import Store
from tests.api.served import Served
from tests.api.test_actions import of_project
from tests.api.test_auth import refused
from tests.store import flows


def archive(*members: tuple[str, bytes | str], **fields: Any) -> bytes:
    """Files, and links, whose targets are text."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            for key, value in fields.items():
                setattr(info, key, value)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def unpacked(data: bytes) -> dict[str, bytes | str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found: dict[str, bytes | str] = {}
        for one in tar:
            file = tar.extractfile(one) if one.isfile() else None
            found[one.name] = file.read() if file else one.linkname
        return found


async def left(store: Store, files: Mapping[str, bytes | str]) -> str:
    """Run the next ticket; it leaves these."""
    (claim,) = await flows.claims(store, 1)
    listed = []
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        mode = stat.S_IFLNK | 0o777 if isinstance(content, str) else stat.S_IFREG | 0o644
        listed.append((Entry(name, mode, len(data)), (data,)))
    digest = ""
    for digest, text in trees.pack(listed):
        await store.keep_artifacts(claim.ticket.id, {digest: text})
    event = Left(digest=digest, files=len(files), bytes=1, left_out=(("huge", 1 << 40),), complete=True).event
    await store.append(
        [Event(ticket_id=claim.ticket.id, step_id=claim.step_id, attempt_id=claim.attempt_id, kind="files", data=event)]
    )
    await flows.finish(store, claim)
    return claim.ticket.id


async def test_what_an_agent_left(served: Served) -> None:
    await served.add("t")
    big = bytes(range(256)) * 8192  # two parts
    evil: dict[str, bytes | str] = {
        "evil": "../../etc/passwd",
        ".git/hooks/x": b"#!",
        "bare/HEAD": b"ref: refs/heads/x",
    }
    await left(served.store, {"a.txt": b"hello", "big": big, "dir/odd name \u00fc": b"", "link": "a.txt", **evil})
    get = served.viewer.get
    listed = (await get("/v1/tickets/t/files")).json()
    kinds = {one["name"]: (one["kind"], one["bytes"]) for one in listed["files"]}
    assert kinds["big"] == ("file", len(big)) and kinds["link"][0] == "link" and kinds["huge"][0] == "left out"
    assert listed["complete"] is True
    one = await get("/v1/tickets/t/files/big")
    assert one.content == big and one.headers["content-disposition"] == "attachment; filename*=UTF-8''big"
    assert (await get("/v1/tickets/t/files/dir/odd%20name%20%C3%BC")).content == b""
    for given, said, status in (
        ("bytes=0-4", big[:5], 206),
        ("bytes=1048570-1048590", big[1048570:1048591], 206),
        ("bytes=-3", big[-3:], 206),
        ("bytes=2097150-", big[-2:], 206),
        ("bytes=0-99999999999", big, 206),
        ("bytes=-", big, 200),
        ("lines=1-2", big, 200),
        ("bytes=0-1,4-5", big, 200),
        ("bytes=5-4", big, 200),
    ):
        part = await get("/v1/tickets/t/files/big", headers={"range": given})
        assert (part.status_code, part.content) == (status, said), given
    for bad in ("bytes=2097152-", "bytes=-0"):
        refused(await get("/v1/tickets/t/files/big", headers={"range": bad}), 416, "2,097,152 bytes")
    refused(await get("/v1/tickets/t/files/link"), 409, "is a link to 'a.txt'")
    refused(await get("/v1/tickets/t/files/huge"), 404, "left no file")
    refused(await get("/v1/tickets/t/files/..%2f..%2fetc%2fpasswd"), 404, "left no file")
    whole = unpacked((await get("/v1/tickets/t/archive")).content)
    assert whole == {"a.txt": b"hello", "big": big, "dir/odd name \u00fc": b"", "link": "a.txt"}
    assert set(unpacked((await get("/v1/tickets/t/archive?pattern=*.txt")).content)) == {"a.txt"}
    async with of_project(served, "a") as team:
        for path in ("files", "files/a.txt", "archive"):
            refused(await team.get(f"/v1/tickets/t/{path}"), 404, "no ticket")


async def test_files_are_sent_and_then_their_ticket(served: Served) -> None:
    post = served.operator.post
    data = archive(("./repo/main.py", b"print()"), ("repo/link", "main.py"), ("repo/" + "x" * 200, b"long"))
    tar = {"content-type": "application/x-tar"}
    sent = (await post("/v1/files", content=data, headers=tar)).json()
    assert (sent["files"], sent["bytes"]) == (3, 18)
    body = {"title": "x", "agent": "echo", "id": sent["id"], "inputs": {"$files": {"src/": sent["digest"]}}}
    refused(await post("/v1/tickets", json={**body, "id": "other"}), 404, "no files")
    refused(await post("/v1/tickets", json={**body, "id": None}), 404, "POST /v1/files")
    made = await post("/v1/tickets", json=body, headers={"idempotency-key": "k"})
    assert made.status_code == 201
    assert (await post("/v1/tickets", json=body, headers={"idempotency-key": "k"})).json() == made.json()
    tree = trees.manifest(await served.store.artifact_of(sent["id"], sent["digest"]))
    assert sorted(one.name for one in tree.entries) == ["repo/link", "repo/main.py", "repo/" + "x" * 200]
    refused(await post(f"/v1/files?ticket={sent['id']}", content=data, headers=tar), 409, "is taken")
    refused(await post("/v1/files", content=data, headers={"content-type": "text/plain"}), 415, "application/x-tar")
    gone = (await post("/v1/files", content=archive(("a", b"x")), headers=tar)).json()
    await served.store.prune(0)  # it has no ticket
    gone_body = {"title": "x", "agent": "echo", "id": gone["id"], "inputs": {"$files": {"a": gone["digest"]}}}
    refused(await post("/v1/tickets", json=gone_body), 404, "no files")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"not a tar archive" * 100, "not a tar archive"),
        (archive(("../x", b"")), "plain relative path"),
        (archive(("/x", b"")), "plain relative path"),
        (archive(("x", "../y")), "leads out"),
        (archive(("x", b""), ("x", b"")), "twice"),
        (archive(("x", b""), ("x/y", b"")), "twice"),
        (archive(("x/y", b""), ("x", b"")), "twice"),
        (archive(("x", b""), type=tarfile.LNKTYPE, linkname="y"), "neither a plain file"),
        (archive(("x", b""), type=tarfile.CHRTYPE), "neither a plain file"),
        (archive(("/".join("x" * 200), b"")), "nested"),
        (archive(("x" * 300, b"")), "plain relative path"),
        (archive(("x", b"y" * 2000))[:1024], "cut off"),
        (archive(("x", b""), pax_headers={"comment": "y" * 100_000}), "too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_archives(served: Served, data: bytes, said: str) -> None:
    tar = {"content-type": "application/x-tar"}
    refused(await served.operator.post("/v1/files", content=data, headers=tar), 400, said)


async def test_artifacts(served: Served) -> None:
    for id, project in (("a", "a"), ("b", "b")):
        await served.add(id, project_id=project)
    digests = {}
    for id in ("a", "b"):
        text = json.dumps(f"of {id} \u00fc", ensure_ascii=False)
        digests[id] = hashlib.sha256(text.encode()).hexdigest()
        await served.store.keep_artifacts(id, {digests[id]: text})
    get = served.viewer.get
    assert {one["digest"] for one in (await get("/v1/artifacts")).json()} == set(digests.values())
    assert [one["digest"] for one in (await get("/v1/artifacts?ticket=a")).json()] == [digests["a"]]
    assert (await get(f"/v1/artifacts/{digests['a'][:10]}")).json() == "of a \u00fc"
    part = await get(f"/v1/artifacts/{digests['a']}", headers={"range": "bytes=1-4"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"of a", "bytes 1-4/9")
    refused(await get("/v1/artifacts/zz"), 404, "no artifact")
    async with of_project(served, "a") as team:
        refused(await team.get("/v1/artifacts"), 400, "name a `ticket`")
        refused(await team.get("/v1/artifacts?ticket=b"), 404, "no ticket")
        assert len((await team.get("/v1/artifacts?ticket=a")).json()) == 1
        assert (await team.get(f"/v1/artifacts/{digests['a']}")).json() == "of a \u00fc"
        refused(await team.get(f"/v1/artifacts/{digests['b']}"), 404, "in the project")
        refused(await team.get(f"/v1/artifacts/{digests['a'][:10]}"), 404, "whole digest")


@pytest.mark.needs("root", "netns")
async def test_a_full_disk_is_said_and_nothing_stays(served: Served) -> None:
    place = served.settings.data_dir / "uploads"
    place.mkdir()
    await process.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", str(place)])
    try:
        data = archive(("big", bytes(1 << 20)))
        for path, kind in (("files", "application/x-tar"), ("agents", "application/gzip")):
            answer = await served.admin.post(f"/v1/{path}", content=data, headers={"content-type": kind})
            refused(answer, 507, "no space")
        assert list(place.iterdir()) == []
    finally:
        await process.run(["umount", str(place)])


async def test_what_a_killed_server_left_of_uploads_goes(served: Served) -> None:
    old = served.settings.data_dir / "uploads" / "old"
    old.mkdir(parents=True)
    (old / "tree.tar").write_bytes(b"x")
    os.utime(old, (0, 0))
    tar = {"content-type": "application/x-tar"}
    assert (await served.operator.post("/v1/files", content=archive(("a", b"x")), headers=tar)).status_code == 201
    assert list(old.parent.iterdir()) == []

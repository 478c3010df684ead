"""Agents as packages: manifests, hostile archives, references, inputs and outputs against their schemas."""

from __future__ import annotations

import gzip
import io
import re
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import agents
from swarm.agents import bundle, check
from swarm.base import manifest, versions
from swarm.base.manifest import Invalid
from swarm.channel import files as channel_files
from swarm.errors import OutputInvalid, StepError, UsageError
from swarm.model import FailureReason
from swarm.schema import parsed

GOOD = "name: mine\nversion: 1.2.3\nentry: [main.py]\n"


def make(directory: Path, manifest: str = GOOD) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "agent.yaml").write_text(manifest)
    (directory / "main.py").write_text("print(1)\n")
    return directory


# --- manifests --------------------------------------------------------------------------------------------------------


def test_everything_that_a_package_can_say(tmp_path: Path) -> None:
    package = agents.read_package(make(tmp_path, GOOD + """
inputs: {prompt: string, depth: {type: integer, default: 3}}
outputs: {text: string}
requirements: [requests==2.32.3, "uvicorn[standard]==0.30.1"]
packages: [git, nodejs=18.19.0+dfsg-6]
npm: [cowsay@1.6.0, "@scope/name@1.0.0-rc.1"]
retry: {max_attempts: 3, on: [timeout]}
examples:
  - {name: short, inputs: {prompt: hi}, outputs: {text: HI}}
  - {inputs: {prompt: ""}, fails: true}
"""))  # fmt: skip
    assert package.agent.requirements == ("requests==2.32.3", "uvicorn[standard]==0.30.1") and package.agent.needs_layer
    assert package.agent.packages == ("git", "nodejs=18.19.0+dfsg-6")
    assert package.agent.npm == ("cowsay@1.6.0", "@scope/name@1.0.0-rc.1")
    assert [e.name for e in package.examples] == ["short", "example 2"] and package.examples[1].fails
    assert package.agent.retry.on == {FailureReason.TIMEOUT}
    assert parsed(str(package.agent.inputs_schema))["required"] == ["prompt"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "requirements: [requests]",
            "line 4, column 16: requirements.0: must be a PyPI package with its exact version",
        ),
        ("requirements: ['-r evil.txt']", "requirements.0"),
        ("requirements: ['x==1 --index-url=http://evil']", "requirements.0"),
        ("requirements: ['git+https://evil/x==1']", "requirements.0"),
        ("packages: ['--allow-unauthenticated']", "packages.0"),
        ("packages: ['../evil.deb']", "packages.0: must be a Debian package such as git"),
        ("npm: [cowsay]", "npm.0: must be an npm package with its exact version, such as cowsay@1.6.0"),
        ("npm: ['cowsay@^1.6.0']", "npm.0"),
        ("npm: [cowsay@1.6]", "npm.0"),
        ("npm: [cowsay@1.x]", "npm.0"),
        ("npm: ['x@npm:y@1.0.0']", "npm.0"),
        ("npm: ['--global@1.0.0']", "npm.0"),
        ("npm: ['@../x@1.0.0']", "npm.0"),
        ("build: .\nnpm: [cowsay@1.6.0]", "can't be used with `build`: the Dockerfile installs them"),
        ("description: ''\nvcpus: 0", "line 5, column 8: vcpus: must be a whole number from 1 to 64, but is 0"),
        ("disk_mb_per_second: x", 'disk_mb_per_second: must be a number from 0.001 to 1,000,000, but is "x"'),
        ("network: lan", "network: must be 'none', 'gateway' or 'open', or a mapping, but is \"lan\""),
        ("network: {gateway: []}", "network.gateway: must be true or false, or a list that isn't empty"),
        ("network: {allow: [localhost]}", "column 19: network.allow.0: 'localhost' has one label only"),
        ("env: {1A: x}", "env.1A: must be letters, digits and underscores"),
        ("retry: 3", "retry: must be a mapping, but is 3"),
        ("inputs: {a: strin}", "line 4, column 9: inputs: unknown type 'strin'; use one of string, integer"),
        ("inputs: {a: string}\ninputs_schema: {type: object}", "the same thing"),
        ("outputs: {type: object, properties: {a: {pattern: '(?=a)'}}}", "RE2"),
        ("outputs: {type: object, properties: {a: {$ref: 'http://evil'}}}", "must be '#/…', a place in this schema"),
        ("secrets: ['A B']", "secrets.0"),
        ("memory_md: 256", "memory_md: unknown field; did you mean 'memory_mb'?"),
        ("env: {A: 1.0}", "env.A: must be text, but is the number 1.0: put it in quotes"),
        ("preload: json", 'preload: must be a list, but is "json"'),
        ("examples: [{input: {}}]", "examples.0.input"),
        ("outputs: {n: {type: integer, description: the first, or 0}}", "'or 0' has no value; put a text with a comma"),
        ("version: 2.0.0", "line 4, column 1: the key 'version' is here twice"),
    ],
)
def test_bad_manifests(tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(Invalid) as caught:
        agents.read(make(tmp_path, GOOD + more + "\n"))
    assert said in str(caught.value) and "agent.yaml" in str(caught.value)
    assert not re.search(r"\^\[|match pattern|Input|_[A-Z]|constrained|union", str(caught.value).partition("\n")[2])


def test_what_is_added_to_an_image_names_the_agents_own(tmp_path: Path) -> None:
    """By the image and the lists; not by their order, nor by the agent's files."""

    def image(more: str) -> str:
        package = agents.read_package(make(tmp_path, GOOD + more))
        assert package.base == "python:3.12" and package.agent.installs and not package.agent.needs_layer
        return str(package.agent.image)

    first = image("image: python:3.12\nnpm: [a@1.0.0, b@1.0.0]\n")
    assert re.fullmatch("agents/mine:[0-9a-f]{12}", first)
    assert image("image: python:3.12\nnpm: [b@1.0.0, a@1.0.0]\n# changed\n") == first
    assert image("image: python:3.12\npackages: [git]\n") != first
    plain = agents.read_package(make(tmp_path, GOOD + "image: python:3.12\n"))
    assert plain.base == "" and plain.agent.image == "python:3.12"


def test_preloads_with_an_image_are_of_the_image(tmp_path: Path) -> None:
    more = "image: python:3.12\nnpm: [a@1.0.0]\n"
    assert agents.read(make(tmp_path, f"{GOOD}{more}preload: [json]\n")).preload == ("json",)
    with pytest.raises(UsageError, match=r"preload: 'main' is a file of this agent; .*without an imported image"):
        agents.read(make(tmp_path, f"{GOOD}{more}preload: [main]\n"))


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(Invalid) as caught:
        agents.read(make(tmp_path, "name: Bad Name\nversion: one\nentry: []\ncolour: red\n"))
    assert [str(problem).partition(": ")[2] for problem in caught.value.problems] == [
        'name: must be lower-case letters, digits and inner hyphens, at most 63, but is "Bad Name"',
        'version: must be a version such as 1.2.3 or 1.2.3-rc1, but is "one"',
        "entry: must be a list that isn't empty",
        "colour: unknown field; docs/agents.md lists all",
    ]
    assert [problem.line for problem in caught.value.problems] == [1, 2, 3, 4]


def test_a_file_of_problems_is_bounded(tmp_path: Path) -> None:
    """Not compared with each other: 20,000 of them took minutes."""
    with pytest.raises(Invalid, match="at least 100 problems") as caught:
        agents.read(make(tmp_path, GOOD + "".join(f"k{number}: 1\n" for number in range(20_000))))
    assert len(caught.value.problems) == manifest.MAX_PROBLEMS == 100


# --- links ------------------------------------------------------------------------------------------------------------


def test_links_within_an_agent_are_installed_as_links(tmp_path: Path) -> None:
    source = make(tmp_path / "a")
    (source / "bin").mkdir()
    (source / "bin/tool").symlink_to("../main.py")
    before = bundle.bundle_digest(source)
    path = bundle.install(source, tmp_path / "agents").path
    assert (path / "bin/tool").readlink() == Path("../main.py") and (path / "bin/tool").read_text() == "print(1)\n"
    assert ("bin/tool", b"../main.py", stat.S_IFLNK | 0o777) in channel_files.read_tree(path)
    (source / "bin/tool").unlink()
    (source / "bin/tool").symlink_to("main.py")
    assert bundle.bundle_digest(source) != before


@pytest.mark.parametrize("target", ["/etc/passwd", "../../x", "../bin/../../x"])
def test_links_that_lead_out_of_an_agent_are_refused(tmp_path: Path, target: str) -> None:
    source = make(tmp_path / "a")
    (source / "bin").mkdir()
    (source / "bin/tool").symlink_to(target)
    with pytest.raises(UsageError, match="leads out of"):
        bundle.install(source, tmp_path / "agents")


# --- archives ---------------------------------------------------------------------------------------------------------


def archive(path: Path, fill: Callable[[tarfile.TarFile], None]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        fill(tar)
    return path


def member(name: str, data: bytes = b"", **fields: Any) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(data))

    return add


def both(one: Callable[[tarfile.TarFile], None], other: Callable[[tarfile.TarFile], None]) -> Callable[..., None]:
    def add(tar: tarfile.TarFile) -> None:
        one(tar)
        other(tar)

    return add


@pytest.mark.parametrize("prefix", ["", "mine-1.2.3/", "./"])
def test_a_good_archive(tmp_path: Path, prefix: str) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        member(f"{prefix}agent.yaml", GOOD.encode())(tar)
        member(f"{prefix}main.py", b"print(1)\n", mode=0o6755)(tar)
        member(f"{prefix}data/x", b"x")(tar)

    with agents.opened(archive(tmp_path / "a.tar.gz", fill)) as directory:
        agent = agents.install(directory, tmp_path / "store")
    assert sorted(p.name for p in agent.path.iterdir()) == ["agent.yaml", "data", "main.py"]
    assert (agent.path / "main.py").stat().st_mode & 0o7777 == 0o555, "no set-id bits"
    plain = make(tmp_path / "plain")
    (plain / "data").mkdir()
    (plain / "data/x").write_text("x")
    (plain / "main.py").chmod(0o755)
    assert agents.install(plain, tmp_path / "store") == agent, "the same content is the same agent"


@pytest.mark.parametrize(
    ("fill", "said"),
    [
        (member("../evil", b"x"), "is not allowed in an agent"),
        (member("a/../../evil", b"x"), "is not allowed in an agent"),
        (member("/etc/evil", b"x"), "is not allowed in an agent"),
        (member("a\\b", b"x"), "is not allowed in an agent"),
        (member("x" * 300, b"x"), "is not allowed in an agent"),
        (member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link or a special file"),
        (member("link", type=tarfile.LNKTYPE, linkname="agent.yaml"), "link or a special file"),
        (member("dev", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "link or a special file"),
        (member("fifo", type=tarfile.FIFOTYPE), "link or a special file"),
        (both(member("a", b"1"), member("./a", b"2")), "twice"),
        (both(member("a", b"1"), member("a/b", b"2")), "can't be unpacked"),
        (member("pax", b"x", pax_headers={"comment": "x" * (2 << 20)}), "too large|can't be unpacked"),
    ],
)
def test_hostile_archives(tmp_path: Path, fill: Callable[[tarfile.TarFile], None], said: str) -> None:
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(UsageError, match=said):
        bundle.unpack(archive(tmp_path / "a.tar.gz", fill), into)
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar.gz", "into"} and not Path("/etc/evil").exists()


def test_an_archive_of_headers_only(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, body = tarfile.XHDTYPE, b"10 a=bbbb\n"
    header.size = len(body)
    one = header.tobuf(tarfile.USTAR_FORMAT) + body.ljust(512, b"\0")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(one * 3000))
    (tmp_path / "into").mkdir()
    with pytest.raises(UsageError, match="too many headers"):
        bundle.unpack(tmp_path / "a.tar.gz", tmp_path / "into")


def test_an_archive_of_too_much(tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    info = tarfile.TarInfo("zeros")
    info.size = 2 << 40
    small = tmp_path / "bomb.tar.gz"
    with gzip.open(small, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.write(b"\0" * (1 << 20))
    with pytest.raises(UsageError, match="more than 256 MiB"):
        bundle.unpack(small, into)
    assert list(into.iterdir()) == []


TORN = {
    "empty": b"",
    "not gzip": b"not gzip",
    "not tar": gzip.compress(b"not tar" * 500),
    "cut": gzip.compress(b"x" * 5000)[:40],
}


@pytest.mark.parametrize("data", TORN.values(), ids=TORN)
def test_torn_archives(tmp_path: Path, data: bytes) -> None:
    file, into = tmp_path / "a.tar.gz", tmp_path / "into"
    file.write_bytes(data)
    into.mkdir()
    with pytest.raises(UsageError, match=r"can't be unpacked|is not an agent"):
        agents.read(bundle.unpack(file, into))


def test_an_archive_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone.tar.gz does not exist"), agents.opened(tmp_path / "gone.tar.gz"):
        pass


# --- references -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    id: str
    name: str
    version: str


ROWS = [
    Row(f"id-{i}", name, version)
    for i, (name, version) in enumerate(
        [("echo", "1.0.0"), ("echo", "1.10.0"), ("echo", "1.9.3"), ("echo", "2.0.0-rc.1"), ("echo", "10.0.0"),
         ("next", "1.0.0-rc.2"), ("next", "1.0.0-rc.10"), ("built", "1.0.0+b1")]
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "version"),
    [
        ("echo", "10.0.0"), ("echo@1", "1.10.0"), ("echo@1.9", "1.9.3"), ("echo@1.0.0", "1.0.0"), ("id-2", "1.9.3"),
        ("echo@2", "2.0.0-rc.1"), ("next", "1.0.0-rc.10"), ("next@1.0.0-rc.2", "1.0.0-rc.2"),
        ("built@1.0.0", "1.0.0+b1"),
        ("echo@3", None), ("nobody", None), ("echo@", "10.0.0"), ("echo@1.1", None), ("", None),
    ],
)  # fmt: skip
def test_references(reference: str, version: str | None) -> None:
    found = versions.pick(reference, ROWS)
    assert (found.version if found else None) == version


def test_versions_sort_as_semver_says() -> None:
    right = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11",
             "1.0.0-rc.1", "1.0.0", "1.0.1", "1.10.0", "2.0.0"]  # fmt: skip
    mixed = [*right[::2], *right[1::2]]
    assert sorted(mixed, key=versions.order) == right


# --- inputs and outputs -----------------------------------------------------------------------------------------------


def test_inputs_and_outputs_name_the_path(tmp_path: Path) -> None:
    agent = agents.read(
        make(tmp_path, GOOD + "inputs: {files: ['string'], n: {type: integer, default: 2}}\noutputs: {ok: boolean}\n")
    )
    assert check.inputs(agent, {"files": ["a"]}) == {"files": ["a"], "n": 2}
    with pytest.raises(StepError, match=r"mine@1\.2\.3: \$\.files\[1\]: 3 is not of type 'string'") as caught:
        check.inputs(agent, {"files": ["a", 3]})
    assert caught.value.reason is FailureReason.INPUT_INVALID and not caught.value.retryable
    check.outputs(agent, {"ok": True})
    with pytest.raises(OutputInvalid, match=r"\$\.ok: 'yes' is not of type 'boolean'"):
        check.outputs(agent, {"ok": "yes"})
    with pytest.raises(OutputInvalid, match=r"\$: \[\] is not of type 'object'"):
        check.outputs(agent, [])


@pytest.mark.parametrize(
    ("expected", "actual", "said"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, []),
        ({"a": 1}, {"b": 2}, ["$.a: is missing"]),
        ([1, {"x": [2]}], [1, {"x": [3]}], ["$[1].x[0]: is 3, not 2"]),
        ([1], [1, 2], ["$: has 2 items, not 1"]),
        (True, 1, ["$: is 1, not true"]),
        (1, 1.0, []),
        ("a", None, ['$: is null, not "a"']),
    ],
)
def test_differences(expected: Any, actual: Any, said: list[str]) -> None:
    assert check.differences(expected, actual) == said


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)


@given(json_values)
def test_nothing_differs_from_itself(value: Any) -> None:
    assert check.differences(value, value) == []

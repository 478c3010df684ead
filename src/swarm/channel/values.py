"""The values that the host sends to a guest and receives from it, with checks: a guest may lie."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from swarm.channel.frames import Frame, printable
from swarm.errors import ChannelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A guest's identity. ``seed``: fresh random bytes for the guest's kernel, or b"" for none. ``ssh_host_key``: a
    private key in OpenSSH's PEM form, or "" for no sshd. ``machine_id``: 32 hex digits."""

    generation: str
    seed: bytes
    hostname: str
    machine_id: str
    ssh_host_key: str
    authorized_keys: str
    token: bytes
    work_disk: bool = True
    sshd_ready: bool = False  # start an sshd before anyone connects: see Channel.sshd_ready


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How the guest describes itself; a hostile guest may lie."""

    boot_id: str
    generation: str | None  # None: never renewed
    crng_ready: bool
    sshd: bool  # listens on port 22
    hostname: str
    machine_id: str
    clock_ns: int  # the guest's wall clock, Unix time


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(State):
    mode: str  # 'vm' or 'process'
    python: str
    kernel: str
    preload_failed: Mapping[str, str]  # module -> why it could not be imported
    uptime_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed(State):
    """``done`` and ``skipped`` name parts: seed, clock, machine_id, hostname, work (disk mounted), ssh, interpreter.
    The `process` driver skips those that would change the host."""

    done: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a program ended. Exactly one of ``code`` and ``signal`` is set. Sizes count what it wrote, including the
    ``dropped_bytes`` beyond max_output_bytes. ``cpu_ms`` includes all descendants. ``started_ns``, ``ended_ns`` and
    ``received_ns`` (the request's arrival) are the guest's CLOCK_MONOTONIC; ``started_at`` and ``ended_at`` are the
    host's ``time.monotonic()`` when the frame arrived. ``clean``: no descendant survived. ``out``: it left files in
    /work/out."""

    code: int | None
    signal: int | None
    oom: bool
    cpu_ms: int
    max_rss_kb: int
    stdout_bytes: int
    stderr_bytes: int
    dropped_bytes: int
    received_ns: int
    started_ns: int
    ended_ns: int
    started_at: float
    ended_at: float
    clean: bool
    out: bool


class StateFields(TypedDict):
    boot_id: str
    generation: str | None
    crng_ready: bool
    sshd: bool
    hostname: str
    machine_id: str
    clock_ns: int


def state(reply: Frame) -> StateFields:
    return {
        "boot_id": printable(reply.text("boot_id")),
        "generation": reply.optional_text("generation"),
        "crng_ready": reply.flag("crng_ready"),
        "sshd": reply.flag("sshd"),
        "hostname": printable(reply.text("hostname")),
        "machine_id": printable(reply.text("machine_id")),
        "clock_ns": reply.number("clock_ns"),
    }


def final(frame: Frame) -> Frame:
    if frame.head.get("ok") is not True:
        raise ChannelError("the guest sent an unexpected frame")
    return frame


def code_and_signal(frame: Frame) -> tuple[int | None, int | None]:
    """How a program ended: exactly one of them is set."""
    code, signal = frame.optional_number("code"), frame.optional_number("signal")
    if (code is None) == (signal is None) or (code or 0) > 255 or (signal or 0) > 64:
        raise ChannelError("the guest's report of how a program ended makes no sense")
    return code, signal


def exit_of(reply: Frame, started_at: float | None) -> Exit:
    """The Exit in a run's last frame."""
    code, signal = code_and_signal(reply)
    if started_at is None:
        raise ChannelError("the guest told of the agent's end before its start")
    return Exit(
        code=code,
        signal=signal,
        oom=reply.flag("oom"),
        cpu_ms=reply.number("cpu_ms"),
        max_rss_kb=reply.number("max_rss_kb"),
        stdout_bytes=reply.number("stdout_bytes"),
        stderr_bytes=reply.number("stderr_bytes"),
        dropped_bytes=reply.number("dropped_bytes"),
        received_ns=reply.number("received_ns"),
        started_ns=reply.number("started_ns"),
        ended_ns=reply.number("ended_ns"),
        started_at=started_at,
        ended_at=time.monotonic(),
        clean=reply.flag("clean"),
        out=reply.flag("out"),
    )

"""Builds the wheel of `swarm-client` from ../src/swarm/client (PEP 517, 427).

It needs nothing but Python, and writes nothing into the checkout: it works offline, and for users who may only read it.
"""

from __future__ import annotations

import base64
import hashlib
import tomllib
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "swarm" / "client"
LICENSE = HERE.parent / "LICENSE"


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"].replace("-", "_"), project["version"]
    info = f"{name}-{version}.dist-info"
    # No swarm/__init__.py: that is swarm-engine's, and its absence makes `swarm` a namespace that both can share.
    files = {f"swarm/client/{path.name}": path.read_bytes() for path in sorted(SOURCE.iterdir()) if path.is_file()}
    metadata = {
        "Metadata-Version": "2.4",
        "Name": project["name"],
        "Version": version,
        "Summary": project["description"],
        "License-Expression": project["license"],
        "License-File": "LICENSE",
        "Requires-Python": project["requires-python"],
    }
    lines = [f"{field}: {text}\n" for field, text in metadata.items()]
    lines += [f"Requires-Dist: {one}\n" for one in project["dependencies"]]
    files[f"{info}/METADATA"] = "".join(lines).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: swarm\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/licenses/LICENSE"] = LICENSE.read_bytes()
    record = [f"{path},sha256={_digest(data)},{len(data)}\n" for path, data in files.items()]
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    wheel = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory, wheel), "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(zipfile.ZipInfo(path), data, zipfile.ZIP_DEFLATED)  # the same bytes each time
    return wheel


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()

"""`pip install ./client`: offline, for any user, from a checkout that nobody may write to, beside swarm-engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = sysconfig.get_path("purelib")  # where pip and httpx are


def run(*argv: str | Path, env: dict[str, str] | None = None, status: int = 0) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, env=os.environ | (env or {}), cwd="/", stdin=subprocess.DEVNULL
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def as_nobody(place: Path) -> list[str]:
    """What runs a Python as a user who may write nothing but ``place``, if there is one that such a user may start."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    # setpriv starts it with rights that its children don't have.
    its = "subprocess.run([sys.executable, '-c', 'import pip, httpx'], check=True)"
    probe = f"import subprocess, sys, venv, tomllib; {its}"
    for python in (sys.executable, "/usr/bin/python3"):
        asked = [*nobody, python, "-c", probe]
        if subprocess.run(asked, cwd="/", env={"PYTHONPATH": HERE}, capture_output=True).returncode == 0:
            os.chown(place, 65534, 65534)
            for directory in place.parents:
                if not directory.stat().st_mode & 0o001:
                    directory.chmod(directory.stat().st_mode | 0o011)
            return [*nobody, python]
    return [sys.executable]


@pytest.mark.slow
def test_it_is_installed_alone_and_beside_the_engine(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for name in ("client", "src") for path in (ROOT / name).rglob("*")}
    place = tmp_path / "user"
    place.mkdir()
    python = as_nobody(place) if os.geteuid() == 0 else [sys.executable]
    env = {
        "HOME": str(place),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "TMPDIR": str(place),
    }
    venv = place / "venv"
    run(*python, "-m", "venv", "--without-pip", venv, env=env)
    here = [*python[:-1], str(venv / "bin" / "python")]
    pip = [*here, "-m", "pip"]
    offline = {**env, "PYTHONPATH": HERE, "PIP_NO_INDEX": "1"}
    run(*pip, "install", "--no-deps", ROOT / "client", env=offline)
    after = {path: path.stat().st_mtime_ns for name in ("client", "src") for path in (ROOT / name).rglob("*")}
    assert {path for path in after if "__pycache__" not in path.parts} <= before.keys()

    (site,) = venv.glob("lib/python3*/site-packages")
    assert not (site / "swarm" / "__init__.py").exists() and (site / "swarm" / "client" / "py.typed").exists()
    run(*here, "-c", "import swarm.client", env=env, status=1)  # it needs httpx
    (site / "httpx.pth").write_text(HERE)
    program = (
        "import sys; from swarm.client import Swarm, Unreachable\n"
        "try: Swarm(home='/nonexistent')\n"
        "except Unreachable as error: print(error)\n"
        "print(*sorted(m for m in sys.modules if m.startswith(('swarm', 'pydantic', 'sqlalchemy'))))"
    )
    said, loaded = run(*here, "-c", program, env=env).splitlines()
    assert said.startswith("`swarm serve` is not running")
    if here[:-1]:
        (place / "data").mkdir()
        (place / "data" / "api.sock").touch(0o600)  # root's
        said, _ = run(*here, "-c", program.replace("/nonexistent", str(place)), env=env).splitlines()
        assert "is not this user's" in said and "SWARM_TOKEN" in said
        (place / "data").chmod(0o700)
        os.chown(place / "data", 0, 0)
        said, _ = run(*here, "-c", program.replace("/nonexistent", str(place)), env=env).splitlines()
        assert "is not this user's" in said and "SWARM_TOKEN" in said
    assert all(name.startswith("swarm.client") for name in loaded.split() if name != "swarm")

    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert packages["exclude"] == ["swarm.client*"]
    engine = shutil.ignore_patterns("client", "__pycache__")
    both = "import swarm, swarm.config, swarm.client; print(swarm.__version__)"
    engines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (site / "zz_engine.pth").write_text(str(ROOT / "src"))  # as an editable installation does it
    assert run(*here, "-c", both, env=env).strip() == engines
    (site / "zz_engine.pth").unlink()
    shutil.copytree(ROOT / "src" / "swarm", site / "swarm", ignore=engine, dirs_exist_ok=True)
    assert run(*here, "-c", both, env=env).strip() == engines
    assert list(site.glob("swarm_client-*.dist-info"))
    run(*pip, "uninstall", "--yes", "swarm-client", env=offline)
    run(*here, "-c", "import swarm.config", env=env)
    run(*here, "-c", "import swarm.client", env=env, status=1)


def test_both_have_one_version() -> None:
    files = ("pyproject.toml", "client/pyproject.toml")
    client, engine = [tomllib.loads((ROOT / file).read_text())["project"]["version"] for file in files]
    assert client == engine

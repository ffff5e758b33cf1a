"""What is installed, and the scripts that install it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("tools/quickstart", "tools/test", "tools/check", ".ci/run")


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*")), ids=lambda path: path.name)
def test_what_names_its_interpreter_can_be_started(path: Path) -> None:
    assert path.is_dir() or path.read_text(encoding="utf-8").startswith("#!") == os.access(path, os.X_OK)


def bash(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_and_stop_at_the_first_failure(name: str) -> None:
    path = ROOT / name
    assert path.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in path.read_text()
    assert bash(f"bash -n {name}", ROOT).returncode == 0


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("nowhere/python", "Install Python 3.10 or newer"),
        ("old", "Python 3.9.2 is too old: edgekit needs Python 3.10 or newer"),
        ("bare", "apt-get install python3-venv"),
    ],
)
def test_an_unusable_python_is_refused_with_what_to_do(python: str, words: str, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "old", "[[ $1 == -V ]] && echo Python 3.9.2; [[ $2 != *version_info* ]]")
    program(tmp_path / "bin" / "bare", "[[ $2 != *ensurepip* ]]")
    (tmp_path / "tools").mkdir()
    for name in ("_env.sh", "quickstart"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools" / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = bash("tools/quickstart", tmp_path, PYTHON=python, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (3, "")
    assert words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / ".venv").exists()


def test_an_environment_is_installed_once_for_each_pyproject(tmp_path: Path) -> None:
    """With an interpreter in .venv that only writes down what it is asked: what is run, and when it is not."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "_env.sh", tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    log = tmp_path / "log"
    program(
        tmp_path / ".venv" / "bin" / "python", f'if [[ $1 == -m ]]; then echo "$@" >>{log}; [[ ! -e {tmp_path}/offline ]]; fi'
    )

    def ensure(extras: str) -> tuple[int, int]:
        done = bash(f"set -euo pipefail; source tools/_env.sh; ensure_env {extras}", tmp_path, PYTHON=sys.executable)
        return done.returncode, len(log.read_text().splitlines())

    assert ensure("all") == (0, 1)
    assert ensure("all") == (0, 1)
    assert ensure("all,dev") == (0, 2)  # more than is there
    assert ensure("all") == (0, 2)  # less than is there
    (tmp_path / "pyproject.toml").write_text("changed")
    (tmp_path / "offline").touch()
    assert ensure("all") == (1, 3)  # a failed installation is no installation
    (tmp_path / "offline").unlink()
    assert ensure("all") == (0, 4)
    assert log.read_text().splitlines()[-1].endswith(f"-e {tmp_path}[all]")


def test_the_wheel_carries_everything_that_is_read_at_run_time(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "__pycache__", ".*_cache", "tests", "docs", "*-out")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("edgekit-*.whl")
    installed, names = tmp_path / "installed", ("toolkit", "calibration", "hw_profiles")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    wanted = {path.relative_to(source) for name in names for path in (source / name).rglob("*") if path.is_file()}
    assert not {str(path) for path in wanted if not (installed / path).exists()}
    code = "from toolkit import demo, profiles; print(demo.weights_path(), *(p.id for p in profiles.list_profiles()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=installed, capture_output=True, text=True, check=True)
    bundled = sorted(path.parent.name for path in ROOT.glob("hw_profiles/*/profile.json"))
    assert done.stdout.split() == [str(installed / "toolkit/demo/weights.safetensors"), *bundled] and len(bundled) > 2

"""The commands of the README, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("  #")[0].strip() for line in re.findall(r"^    ((?:\./tools/\w|tools/\w|edgekit ).*)$", README, re.M)]


def run(command: str, cache: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    around = os.environ | {"PATH": path, "EDGEKIT_CACHE": str(cache)}
    return subprocess.run(command, shell=True, cwd=ROOT, env=around, capture_output=True, text=True, timeout=900)


def test_the_readme_has_the_two_commands_and_they_can_be_run() -> None:
    assert COMMANDS[:2] == ["./tools/quickstart", "./tools/test"]
    assert all(os.access(ROOT / c.split()[0], os.X_OK) for c in COMMANDS if "tools/" in c.split()[0])


def test_the_files_of_the_file_map_exist() -> None:
    block = README.split("## Files")[1].split("## ")[0]
    inside = ""
    for line in block.splitlines():
        found = re.match(r"^    ( *)([\w./ ]+?)(?:\s{2,}|$)", line)
        if not found:
            continue
        for name in found.group(2).split():
            if name.endswith(("/", ".py")):
                path = Path(inside, name) if found.group(1) else Path(name)
                assert (ROOT / path).exists(), path
        if not found.group(1):
            inside = found.group(2).split()[0]


def test_the_lines_of_python_run() -> None:
    import patterns
    import torch

    block = re.search(
        r"\n((?:    (?:from toolkit|\S).*\n|\n)*?    as_module.*\n)", README[README.index("    from toolkit.graph") - 1 :]
    )
    assert block
    known = {"model": patterns.Residual(), "images": torch.zeros(2, 3, 224, 224)}
    exec(textwrap.dedent(block[1]), known)
    assert known["smaller"].macs() < known["program"].macs()


@pytest.mark.slow
@pytest.mark.timed
def test_the_commands_do_what_the_readme_says(shared_cache: Path) -> None:
    for command in COMMANDS:
        if command == "./tools/test":
            continue  # it is what runs this
        done = run(command, shared_cache)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        last = done.stdout.strip().splitlines()[-1]
        if command == "./tools/quickstart" or command.startswith("edgekit run"):
            assert last.startswith("MET  ")
        if command.startswith("tools/verify"):
            assert last == "VERIFIED"

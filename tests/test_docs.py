"""The README and every page of the documentation: their commands run as they stand there, their links lead somewhere.

A page has blocks, indented by four spaces or fenced. In a block a line that begins with `edgekit`, `tools/`, `./tools/` or
`python` is a command; one with an `ssh://` address needs a board and is not run; a comment may say `# exits with 1`. A paragraph
that ends in the name of a file and a colon has that file in the block behind it. All pages share one folder; the same command
is run once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", *(f"docs/{page.name}" for page in sorted(ROOT.glob("docs/*.md"))), "hw_profiles/README.md")
RECORDS = ("docs/results.md",)  # figures with the commands that gave them, hours long, on data that is not here
BOARD = "needs a board"


@dataclass(frozen=True)
class Command:
    """A line of a page, what it exits with, and whether it can only run with a board."""

    text: str
    code: int = 0
    board: bool = False


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """(the line before, the block) for every indented or fenced block; in lists blocks are indented by eight."""
    found: list[tuple[str, str]] = []
    before, lines, fenced = "", [], False

    def close() -> None:
        if any(lines):
            found.append((before, textwrap.dedent("\n".join(lines)).strip("\n") + "\n"))
        lines.clear()

    for line in [*text.splitlines(), "."]:
        if line.lstrip().startswith("```"):
            close()
            fenced = not fenced
        elif fenced or line.startswith("    ") or (lines and not line.strip()):
            lines.append(line)
        else:
            close()
            before = line if line.strip() else before
    return found


def files(text: str) -> dict[str, str]:
    """The files that a page shows."""
    named = ((re.search(r"`([\w.]+\.\w+)`:$", before), block) for before, block in blocks(text))
    return {match[1]: block for match, block in named if match}


def commands(text: str) -> list[Command]:
    found = []
    for line in "".join(block for _, block in blocks(text)).replace("\\\n", " ").splitlines():
        if re.match(r"(?:edgekit|python|\./tools/\w+|tools/\w+)(?: |$)", line):
            command, _, comment = line.partition("  #")
            code = re.search(r"exits with (\d)", comment)
            found.append(Command(command.strip(), int(code[1]) if code else 0, BOARD in comment or "ssh://" in command))
    return found


def run(command: str, tree: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    around = os.environ | {"PATH": path, "EDGEKIT_CACHE": str(cache)}
    return subprocess.run(command, shell=True, cwd=tree, env=around, capture_output=True, text=True, timeout=900)


# --- what a page says ------------------------------------------------------------------------------------------------------


def test_the_readme_has_the_two_commands_and_they_can_be_run() -> None:
    found = [command.text for command in commands(README)]
    assert found[:2] == ["./tools/quickstart", "./tools/test"]
    assert all(os.access(ROOT / text.split()[0], os.X_OK) for text in found if "tools/" in text.split()[0])


def test_the_readme_alone_goes_from_the_demo_to_the_report_of_an_own_network() -> None:
    """In this order: the demo, a network and images of one's own, the run on them, its report."""
    own = next(c.text for c in commands(README) if c.text.startswith("edgekit run net.py:model"))
    assert {"net.py", "example.py"} <= set(files(README))
    landmarks = ("./tools/quickstart", "from torch import nn", "    images/\n", own, "`out/report.html`")
    places = [README.index(words) for words in landmarks]
    assert places == sorted(places)
    assert "--data images" in own and "-o out" in own


def test_blocks_files_and_commands_are_found() -> None:
    page = """Text with `net.py`:

    def model():

        pass

Then

    edgekit run net.py:model \\
        --budget 1x    # exits with 1

1. In a list

        edgekit measure MODEL --on ssh://user@board    # needs a board

```sh
tools/verify out
cat out/report.json
```
"""
    assert files(page) == {"net.py": "def model():\n\n    pass\n"}
    ran, board, fenced = commands(page)
    assert (re.sub(" +", " ", ran.text), ran.code) == ("edgekit run net.py:model --budget 1x", 1)
    assert board == Command("edgekit measure MODEL --on ssh://user@board", 0, True)
    assert fenced == Command("tools/verify out")


def test_only_what_needs_a_board_is_left_out() -> None:
    """What is not run says where it goes, by an address; and all pages together have few of that."""
    found = [(page, command) for page in PAGES if page not in RECORDS for command in commands(read(page))]
    left_out = [(page, command.text) for page, command in found if command.board]
    assert [text for text in left_out if "ssh://" not in text[1]] == []
    assert 0 < len(left_out) < len(found) / 3


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(page)):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), (page, target)


def test_the_index_names_every_page() -> None:
    index = read("docs/README.md")
    assert [
        page for page in PAGES if page.startswith("docs/") and page != "docs/README.md" and f"({page[5:]})" not in index
    ] == []


def test_reasons_and_fields_are_named_as_they_are() -> None:
    """What own-model.md quotes of the report stands in the code, and files.md knows the fields of the main record."""
    from toolkit.schema import Plan, Report

    code = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("toolkit/**/*.py"))
    table = read("docs/own-model.md").split("| the report says |")[1].split("\n\n")[0]
    reasons = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert len(reasons) >= 8
    assert [reason for reason in reasons if reason.replace("of N or more", "of {min_width} or more") not in code] == []
    page = read("docs/files.md")
    patterns = [re.escape(name).replace(r"\*", r"\w+") for name in re.findall(r"`([\w*]+)`", page)]
    known = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    for record in (Report, Plan):
        assert [name for name in record.__struct_fields__ if not known.fullmatch(name)] == []


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


@pytest.mark.slow
def test_the_lines_of_python_run() -> None:
    import patterns
    import torch

    block = next(block for _, block in blocks(README) if block.startswith("from toolkit.graph"))
    known = {"model": patterns.Residual(), "images": torch.zeros(2, 3, 224, 224)}
    exec(block, known)
    assert known["smaller"].macs() < known["program"].macs()


# --- what its commands do --------------------------------------------------------------------------------------------------


MEASURES = re.compile(r"quickstart|demo-out|--precision int8")  # this machine; the others use times that are computed, or none
PREPARES = "python example.py"  # what both need


def do(folder: Path, cache: Path, measuring: bool) -> None:
    """Run the commands of all pages in a folder like a clone: those that measure this machine, or the others."""
    done = {"./tools/test", "./tools/quickstart"}  # the one is what runs this, the other made the folder of what measures
    for page in (page for page in PAGES if page not in RECORDS):
        for name, text in (files(README) | files(read(page))).items():
            (folder / name).write_text(text, encoding="utf-8")
        for command in commands(read(page)):
            if command.board or command.text in done:
                continue
            if bool(MEASURES.search(command.text)) != measuring and command.text != PREPARES:
                continue
            done.add(command.text)
            ran = run(command.text, folder, cache)
            assert ran.returncode == command.code, f"{page}: {command}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
            last = (ran.stdout.strip().splitlines() or [""])[-1]
            if command.code == 0 and re.match(r"edgekit run (?!--help)", command.text):
                assert last.startswith("MET  "), f"{page}: {command}\n{last}"
            if command.text.startswith("tools/verify"):
                assert last == "VERIFIED", f"{page}\n{ran.stdout}"


@pytest.mark.slow
@pytest.mark.timed
def test_what_the_pages_measure_here(quickstarted: Path, shared_cache: Path) -> None:
    do(quickstarted, shared_cache, measuring=True)


@pytest.mark.slow
def test_every_other_command_does_what_its_page_says(tmp_path: Path) -> None:
    for entry in ("calibration", "docs", "hw_profiles", "toolkit", "tools"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    do(tmp_path, tmp_path / "cache", measuring=False)


def test_what_does_not_measure_here_computes_its_times() -> None:
    """A command that would measure this machine beside other tests is among those that run alone."""
    for page in (page for page in PAGES if page not in RECORDS):
        for command in commands(read(page)):
            if re.match(r"edgekit (run|demo|measure|bench|sweep) (?!--help)", command.text) and not command.board:
                computed = "-p simulated-" in command.text or command.code == 2
                assert computed or MEASURES.search(command.text), (page, command)

"""The Python interface: few names, each documented and tried, and what the command itself calls."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from toolkit import api

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_there_are_at_most_twenty_names_and_each_is_documented_and_tried() -> None:
    examples = "\n".join(line for line in PAGE.splitlines() if line.startswith("    "))
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith("    "))
    assert len(api.__all__) <= 20 and len(set(api.__all__)) == len(api.__all__)
    for name in api.__all__:
        assert hasattr(api, name) and getattr(api, name).__doc__, name
        assert f"`{name}`" in text, f"docs/api.md does not say what {name} is"
        assert re.search(rf"\bapi\.{name}\b", examples), f"docs/api.md has no example of {name}"


def test_what_the_page_uses_is_public() -> None:
    assert set(re.findall(r"\bapi\.(\w+)", PAGE)) - {"md"} <= set(api.__all__)


def test_the_command_does_its_work_through_the_interface() -> None:
    """No verb reaches past it: of the packages that work, the command imports none."""
    tree = ast.parse((ROOT / "toolkit" / "cli.py").read_text(encoding="utf-8"))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "toolkit" for a in n.names}
    called = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "api"}
    working = {"run", "prune", "export", "latency", "bench", "graph"}
    assert not names & working
    assert {m for m in modules if m.split(".")[-1] in working or ".run." in m} <= {
        "toolkit.run.prepare",
        "toolkit.run.dry",
    }  # a table that is there; what would be done
    assert {"run", "sweep", "prune", "export", "bench", "measure", "compare", "load_report", "list_profiles"} <= called


@pytest.mark.slow
def test_the_examples_of_the_page_run(documented: tuple[Path, dict[str, Any]]) -> None:
    folder, names = documented
    assert names["report"].measured_ns < names["report"].dense_ns and (folder / "api-pruned" / "pruned.json").exists()


def test_every_verb_answers_in_json() -> None:
    import click

    from toolkit.cli import cli

    assert isinstance(cli, click.Group)
    without = [name for name, verb in cli.commands.items() if not any("--json" in option.opts for option in verb.params)]
    assert not without


def test_no_colour_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console
    from samples import report

    from toolkit.report import summary_text

    def printed() -> str:
        stream = io.StringIO()
        Console(file=stream, force_terminal=True, color_system="standard", width=80).print(summary_text(report()))
        return stream.getvalue()

    coloured = re.compile("\x1b\\[(?:\\d+;)*[34]\\dm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured.search(printed())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured.search(printed())

"""Before torch loads: waiting threads sleep, so that tests on a busy machine take as long as on an idle one."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # each core has its own process
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def exports() -> list[tuple[dict[str, int], Any]]:
    """Real exports of the network in widths.py: dense, two probes, and one to check with."""
    from widths import FORMS, GROUPS, export

    from toolkit.latency import choose_probe_widths

    widths = [{name: full for name, (_, full) in GROUPS.items()}, *choose_probe_widths(GROUPS, FORMS)]
    return [(each, export(each)) for each in widths]


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latency tables that whole runs share: measuring one takes a minute."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def quickstarted(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """A folder like a clone in which README's first command was run, and its budget met.

    Up to three times, because a neighbour on the machine can make a measurement invalid or a confirmation miss.
    """
    import subprocess

    folder = tmp_path_factory.mktemp("quickstarted")
    for entry in ("calibration", "docs", "hw_profiles", "toolkit", "tools"):
        (folder / entry).symlink_to(Path(__file__).parent.parent / entry)  # scripts find the real .venv through it
    around = os.environ | {"EDGEKIT_CACHE": str(shared_cache)}
    for _ in range(3):
        ran = subprocess.run("./tools/quickstart", cwd=folder, env=around, capture_output=True, text=True, timeout=900)
        assert ran.returncode in (0, 1), ran.stderr
        if ran.returncode == 0:
            break
    assert ran.stdout.splitlines()[-1].startswith("MET  "), ran.stdout + ran.stderr
    return folder


@pytest.fixture(scope="session")
def tool() -> Any:
    """tools/verify as a module."""
    import sys
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader

    spec = spec_from_loader("verify", SourceFileLoader("verify", str(Path(__file__).parent.parent / "tools" / "verify")))
    assert spec is not None and spec.loader is not None
    module = sys.modules["verify"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def strided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small trained network, as fields of a request, for whole runs on this machine; the bundled one is run as README says."""
    from networks import trained

    return trained(tmp_path_factory.mktemp("strided"))


@pytest.fixture(scope="session")
def maker(exports: list[tuple[dict[str, int], Any]]) -> Any:
    """The maker of its variants."""
    from widths import FORMS

    from toolkit.latency import solve

    return solve(exports[:-1], FORMS, exports[-1])


@pytest.fixture(scope="session")
def documented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which the examples of docs/api.md were run in their order, and the names they left."""
    import re
    import textwrap

    root, folder = Path(__file__).parent.parent, tmp_path_factory.mktemp("documented")
    (folder / "toolkit").symlink_to(root / "toolkit")
    blocks = re.findall(r"^\n((?:    .*\n|\n)+)", (root / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        for block in blocks:
            exec(compile(textwrap.dedent(block), "docs/api.md", "exec"), names)
    return folder, names

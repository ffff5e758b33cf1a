"""The definition of the layering: who may import whom, where a framework may appear, what the command may load."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom. A unit is a module or a folder of `toolkit`; it imports from units of lower rows and from itself.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("drivers", "errors"),
    ("schema",),
    ("budget", "demo", "programs", "settings", "weights"),
    ("graph", "models", "profiles"),
    ("backends",),
    ("devices",),
    ("bench", "export"),
    ("latency", "prune", "report", "train"),
    ("run",),
    ("api",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

# framework -> the units, or single modules, that may import it at all
FRAMEWORKS: dict[str, set[str]] = {
    "torch": {"demo", "programs", "weights", "graph", "models", "export", "prune", "train", "run.dry"},
    "torchvision": {"models"},
    "onnx": {"backends", "bench", "devices.ssh", "export", "latency"},
    "onnxscript": {"export"},
    "onnxsim": {"export"},
    "onnxruntime": {"backends.ort", "drivers", "export.precision"},  # its fp16 converter
    "openvino": {"backends.openvino_", "drivers"},
    "tensorrt": {"backends.tensorrt_"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "rich": {"cli", "report"},
    "click": {"cli"},
}
# and where it may be imported as the module loads; elsewhere only inside functions
AT_LOAD = {
    ("torch", "graph"),
    ("torch", "export"),
    ("torch", "prune"),
    ("torch", "train"),
    ("torch", "demo.network"),
    ("rich", "cli"),
    ("click", "cli"),
}

# What runs on a device, and the packages that the base installation and one runtime's extra bring there.
ON_DEVICE = {"drivers", "errors", "schema", "profiles", "budget", "backends", "devices", "bench"}
FOR_DEVICES = {"msgspec", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt"}

# The names under which pickled or evaluated code could run; catching pickle's error is harmless.
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

HEAVY = (
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxsim",
    "onnxruntime",
    "openvino",
    "matplotlib",
    "scipy",
    "jinja2",
    "PIL",
)


class Import(NamedTuple):
    """One imported name as seen from module `importer`; `at_load` is False inside functions and `if TYPE_CHECKING`."""

    importer: str
    line: int
    target: str
    at_load: bool


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imports_in(path: Path) -> Iterator[Import]:
    importer = module_name(path)

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, node.lineno, alias.name, at_load)
        elif isinstance(node, ast.ImportFrom):
            base = importer.split(".")[: -node.level] if node.level else []
            source = ".".join((*base, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                yield Import(importer, node.lineno, f"{source}.{alias.name}", at_load)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_load and not inside and not checking)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def unit_of(name: str) -> str:
    """`toolkit.prune.repair` -> prune, `toolkit.cli.main` -> cli; what is no module is a name of the package: __init__."""
    unit = name.split(".")[1] if "." in name else "__init__"
    return unit if (ROOT / "toolkit" / unit).is_dir() or (ROOT / "toolkit" / f"{unit}.py").is_file() else "__init__"


def test_every_module_of_the_toolkit_has_a_layer() -> None:
    units = {unit_of(module_name(path)) for path in sources("toolkit")}
    assert not units - set(LEVEL), f"give {units - set(LEVEL)} a row in LAYERS"


def test_a_module_imports_only_from_layers_below_or_its_own_folder() -> None:
    wrong = [
        f"{found.importer}:{found.line} imports {found.target}"
        for path in sources("toolkit")
        for found in imports_in(path)
        if found.target.split(".")[0] == "toolkit"
        and (importer := unit_of(found.importer)) != (imported := unit_of(found.target))
        and LEVEL.get(importer, 0) <= LEVEL.get(imported, len(LAYERS))
    ]
    assert not wrong, "\n".join(wrong)


def test_calibration_imports_neither_the_toolkit_nor_a_framework_but_for_the_quantizer() -> None:
    banned = {"toolkit", *FRAMEWORKS}
    wrong = [
        found
        for path in sources("calibration")
        for found in imports_in(path)
        if (framework := found.target.split(".")[0]) in banned
        and (found.importer != "calibration.quantize" or framework not in ("onnx", "onnxruntime") or found.at_load)
    ]
    assert not wrong


def within(module: str, places: set[str]) -> bool:
    """Whether `module` (without `toolkit.`) is one of `places` or lies in one."""
    return any(module == place or module.startswith(f"{place}.") for place in places)


@pytest.mark.slow
def test_a_framework_is_imported_only_where_it_is_named() -> None:
    wrong = []
    for path in sources("toolkit"):
        for found in imports_in(path):
            framework, module = found.target.split(".")[0], found.importer.removeprefix("toolkit.")
            if framework not in FRAMEWORKS:
                continue
            if not within(module, FRAMEWORKS[framework]):
                wrong.append(f"{found.importer}:{found.line} imports {framework}")
            elif found.at_load and not within(module, {place for name, place in AT_LOAD if name == framework}):
                wrong.append(f"{found.importer}:{found.line} imports {framework} as it loads, not inside a function")
    assert not wrong, "\n".join(wrong)


def test_a_device_needs_only_the_base_installation_and_its_runtime() -> None:
    allowed = FOR_DEVICES | set(sys.stdlib_module_names) | {"toolkit", "hw_profiles"}
    wrong = [
        f"{found.importer}:{found.line} imports {found.target}"
        for path in sources("toolkit")
        if unit_of(module_name(path)) in ON_DEVICE
        for found in imports_in(path)
        if found.target.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def calls_in(node: ast.AST) -> Iterator[ast.Call]:
    """The calls under `node`, but for those a module makes when it is run as a program."""
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "__name__ == '__main__'"):
            yield from calls_in(child)


def calls_named(*names: str) -> list[tuple[str, str]]:
    """(module, call) for each call of one of `names`, or of something of it where the name ends with a point."""
    return [
        (module_name(path), ast.unparse(call))
        for path in sources("toolkit", "calibration")
        for call in calls_in(ast.parse(path.read_text(encoding="utf-8")))
        if any(ast.unparse(call.func) == name or (name[-1] == "." and ast.unparse(call.func).startswith(name)) for name in names)
    ]


def test_only_the_command_prints_or_exits() -> None:
    found = calls_named("print", "input", "exit", "quit", "sys.exit", "os._exit")
    agent = "toolkit.devices.agent"  # a program of its own, on another machine
    assert not [
        (module, call) for module, call in found if module != agent and unit_of(module) not in ("cli", "__main__", "__init__")
    ]


@pytest.mark.slow
def test_no_file_can_bring_code_along() -> None:
    assert not calls_named("eval", "exec", *(f"{name}." for name in PICKLES))
    assert not [call for _, call in calls_named("torch.load") if "weights_only=True" not in call]
    imported = {found.target for path in sources("toolkit", "calibration") for found in imports_in(path)}
    assert {name for name in imported if name.split(".")[0] in PICKLES} <= {"pickle", "pickle.UnpicklingError"}


def test_the_outside_check_imports_nothing_of_edgekit() -> None:
    ours = {"toolkit", "calibration", "hw_profiles"}
    checks = [path for path in (ROOT / "tools").glob("verify*") if path.is_file() and "python" in path.read_text().split("\n")[0]]
    checks += [path for path in (ROOT / "tools").glob("verify*.py") if path not in checks]
    wrong = [found for path in checks for found in imports_in(path) if found.target.split(".")[0] in ours]
    assert not wrong


@pytest.mark.parametrize(
    "module", ["toolkit", "toolkit.schema", "toolkit.profiles", "toolkit.demo", "toolkit.backends", "toolkit.api", "toolkit.cli"]
)
def test_importing_the_command_loads_no_framework(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"there is no {module}")
    program = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

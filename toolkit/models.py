"""From what the user calls a model to a module in evaluation mode, with its weights and, where known, its preprocessing."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import ModelError
from toolkit.schema import Preprocess

if TYPE_CHECKING:
    import torch

_FORMS = "Give MODEL as a torchvision name, package.module:function, path/to/file.py:function, a .pt2 program, or demo."


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """`preprocess` is the model's own, None where it has none; `notes` are sentences the report should carry."""

    name: str
    module: torch.nn.Module
    preprocess: Preprocess | None = None
    notes: tuple[str, ...] = ()


def load_model(spec: str, weights: str = "", seed: int = 0) -> LoadedModel:
    """Build the module that `spec` names, on the CPU and in evaluation mode, and load `weights` into it.

    `spec` is a torchvision name, `package.module:function`, `path/to/file.py:function`, a `.pt2` program or `demo`. Nothing is
    downloaded: a torchvision model without `weights` has PyTorch's random initialisation from `seed`, and a note says so.
    The caller's random state is left as it was. Functions are the user's own code and are run; no file of weights is.

    Raises:
        ModelError: the name, file or function is missing or fails; the weights are missing, damaged, unfit or not finite.
    """
    import torch

    from toolkit.weights import check_finite, fit_weights, read_weights

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = _build(spec, seed, trained=bool(weights))
    if weights:
        fit_weights(loaded.module, read_weights(Path(weights)), loaded.name, Path(weights))
    check_finite(loaded.module, loaded.name)
    return loaded


def resolve_preprocess(requested: Preprocess | None, loaded: LoadedModel) -> Preprocess:
    """What the request says, else the model's own.

    Raises:
        ModelError: neither says anything.
    """
    preprocess = requested or loaded.preprocess
    if preprocess is None:
        raise ModelError(
            f"{loaded.name} does not say what input it takes.",
            "Give what it was trained with, as in --input 1x3x224x224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225.",
        )
    return preprocess


def _build(spec: str, seed: int, trained: bool) -> LoadedModel:
    place, colon, function = spec.rpartition(":")
    if spec == "demo":
        return _demo(trained)
    if spec.lower().endswith(".pt2"):
        return _program(Path(spec))
    if colon:
        return LoadedModel(name=function, module=_call(place, function, spec))
    if spec.endswith(".py"):
        raise ModelError(
            f"{spec} does not name a function in the file.", f"Give {spec}:FUNCTION, a function that returns the model."
        )
    if Path(spec).suffix and Path(spec).is_file():
        raise ModelError(f"{spec} is a file, but none that builds a network.", f"{_FORMS} Give weights by --weights {spec}.")
    return _torchvision(spec, seed, trained)


# --- demo, .pt2, torchvision ---------------------------------------------------------------------------------------------


def _demo(trained: bool) -> LoadedModel:
    from toolkit import demo
    from toolkit.weights import fit_weights, read_weights

    module = demo.model()
    if not trained:
        fit_weights(module, read_weights(demo.weights_path()), "demo", demo.weights_path())
    return LoadedModel(name="demo", module=module.eval(), preprocess=demo.preprocess())


def _program(path: Path) -> LoadedModel:
    from toolkit.programs import load_program

    # Exported programs have no eval(): they are in the mode they were exported in. Their guards are Python source; not run.
    return LoadedModel(name=path.stem, module=load_program(path).module(check_guards=False).cpu())


def _torchvision(name: str, seed: int, trained: bool) -> LoadedModel:
    from torchvision.models import get_model_builder, list_models

    if name not in list_models():
        raise ModelError(f"torchvision has no model {name!r}{_did_you_mean(name, list_models())}", _FORMS)
    builder = get_model_builder(name)
    # Some builders would download a trained backbone by default.
    nothing = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    module = builder(**nothing)
    preprocess, notes = _torchvision_preprocess(name)
    if not trained:
        notes = (
            f"No --weights: {name} has PyTorch's random initialisation (seed {seed}), so its accuracy means nothing.",
            *notes,
        )
    return LoadedModel(name=name, module=module.eval(), preprocess=preprocess, notes=notes)


def _torchvision_preprocess(name: str) -> tuple[Preprocess | None, tuple[str, ...]]:
    """From the metadata of the default weights, which is part of the package; None for models that are no image classifiers."""
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(name)
    transforms = weights.DEFAULT.transforms()
    if type(transforms).__name__ != "ImageClassification":
        return None, ()
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    preprocess = Preprocess(
        input=(1, 3, crop, crop), resize=resize, crop=crop, mean=tuple(transforms.mean), std=tuple(transforms.std)
    )
    method = transforms.interpolation.value
    if method == "bilinear":
        return preprocess, ()
    return preprocess, (f"torchvision resizes images for {name} by {method} interpolation, edgekit by bilinear.",)


# --- the user's own code ---------------------------------------------------------------------------------------------------


def _call(place: str, name: str, spec: str) -> torch.nn.Module:
    """The module returned by function `name` of `place`, a .py file or a dotted module name."""
    import torch

    file = Path(place) if place.endswith(".py") else None
    if file and not file.is_file():
        raise ModelError(f"{file} does not exist.", "Give MODEL as path/to/file.py:function.")
    with _importable_from(file.resolve().parent if file else Path.cwd()):
        source = _run(lambda: _import_file(file) if file else importlib.import_module(place), f"Importing {place}")
        function = getattr(source, name, None)
        if not callable(function):
            names = [key for key, value in vars(source).items() if callable(value)]
            raise ModelError(f"{place} has no function {name!r}{_did_you_mean(name, names)}", _FORMS)
        needed = _needed_arguments(function)
        if needed:
            raise ModelError(
                f"{spec} needs arguments ({', '.join(needed)}); edgekit calls it without any.",
                f"Write a function without arguments that returns {name}(...), and give that one.",
            )
        module = _run(function, spec)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"{spec} returned {type(module).__name__}, not a torch.nn.Module.", "Return the model itself from the function."
        )
    return module.cpu().eval()


def _import_file(file: Path) -> Any:
    """The file as a module; it stays registered, since PyTorch looks classes and source up by module name later."""
    path = file.resolve()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    """`folder` first on the import path, as for a script started in it."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _needed_arguments(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty and parameter.kind not in optional]


def _run(code: Callable[[], Any], what: str) -> Any:
    """The user's code, whose exceptions become a ModelError that carries their message and chains them."""
    try:
        return code()
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{what} failed with {type(error).__name__}: {str(error).rstrip('.')}.",
            "Repair it, or install what it imports, and run the same command again; EDGEKIT_DEBUG=1 before it shows the line.",
        ) from error


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f": did you mean {', '.join(near)}?" if near else "."

"""State dicts: read without executing anything, fitted to a module only where they fit whole."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import ModelError

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # put before every name by DataParallel and torch.compile
_CONVERT = (
    "Convert it to safetensors where you trust it: "
    "safetensors.torch.save_model(model, 'weights.safetensors'), with the model that the file holds."
)


def read_weights(path: Path) -> State:
    """The tensors of a .safetensors file, or of a state dict written by `torch.save`, wrapped the common ways or not.

    Raises:
        ModelError: missing, damaged, of another format, no state dict, or with pickled objects that loading would execute.
    """
    if not path.is_file():
        raise ModelError(
            f"The weights file {path} does not exist.",
            "Run it again with --weights of a .safetensors file, or of a state dict as .pt or .pth.",
        )
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix in _TORCH_SUFFIXES:
        return _state_of(_read_torch(path), path)
    raise ModelError(
        f"The weights file {path} is neither .safetensors nor a state dict ({', '.join(_TORCH_SUFFIXES)}).",
        "Convert it with safetensors.torch.save_file(model.state_dict(), 'weights.safetensors').",
    )


def fit_weights(module: torch.nn.Module, state: State, name: str, source: Path) -> None:
    """Copy `state` into `module`, where names and shapes agree in full; BatchNorm's batch counters may be missing.

    Raises:
        ModelError: names the first missing, unexpected and mis-shaped tensors, and counts them. The module is then unchanged.
    """
    own = module.state_dict()
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state) and not all(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    reshaped = [
        f"{key} is {_shape(state[key])}, the model's {_shape(tensor)}"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if missing or unexpected or reshaped:
        kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        differences = "; ".join(f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds if keys)
        raise ModelError(
            f"The weights in {source} do not fit {name}: {differences}.",
            "Give a MODEL that builds the network these weights were trained in: same variant, same number of classes.",
        )
    module.load_state_dict(state, strict=False)


def check_finite(module: torch.nn.Module, name: str) -> None:
    """No parameter and no running statistic is NaN or infinite, no other buffer NaN (masks may hold -inf).

    Raises:
        ModelError: names the first ones, and counts them.
    """
    parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
    broken = [
        key
        for key, tensor in module.state_dict().items()
        if (not tensor.isfinite().all() if key in parameters or "running_" in key else tensor.isnan().any())
    ]
    if broken:
        raise ModelError(
            f"{name} has NaN or infinite weights in {len(broken)} of its tensors: {_first(broken)}.",
            "Run it again with --weights of a checkpoint from before the training diverged.",
        )


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"The weights file {path} is damaged: {error}.", "Copy or download it again.") from error


def _read_torch(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"The weights file {path} is damaged, or holds pickled objects besides tensors, which edgekit does not execute.",
            _CONVERT,
        ) from error
    except Exception as error:  # damaged archives raise RuntimeError, EOFError, KeyError and others
        raise ModelError(f"The weights file {path} is damaged: {_line(error)}.", "Copy or download it again.") from error


def _state_of(loaded: Any, path: Path) -> State:
    import torch

    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        holds = (
            f"a dictionary with {_first([str(key) for key in loaded])}"
            if isinstance(loaded, dict)
            else f"a {type(loaded).__name__}"
        )
        raise ModelError(f"{path} holds {holds}, not a state dict.", "Save model.state_dict() and give that file.")
    return dict(loaded)


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join([*names[:count], "..."] if len(names) > count else names)


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

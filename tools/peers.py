"""The pruners that edgekit is held against in tools/bench_pruning.py, as their users run them.

  l1             every group by one ratio, channels ranked by the L1 norm of their producers' weights
  torch-pruning  the library: its dependency graph and criteria on the eager model
  onnxsim        `onnxsim.pruning` on the exported file, with its closed-form fine-tuning

A peer offers variants; a variant makes a network for a pruning ratio. What a network predicts is counted as it is ("raw"),
with BatchNorm statistics of the calibration images ("batchnorm"), with the library's own repair ("finetuned") and, where the
channels that went are channels of edgekit's graph, with edgekit's repair ("repaired").
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

import calibration
from toolkit import schema
from toolkit.errors import EdgekitError, ModelError, UsageError
from toolkit.export import save_onnx, to_onnx
from toolkit.graph import Program, apply, trace
from toolkit.graph.program import BATCH_NORMS
from toolkit.prune.engine import Engine
from toolkit.prune.pruner import State, cut
from toolkit.prune.responses import magnitude_order
from toolkit.run.evaluate import predictions
from toolkit.run.prepare import Images, Target, Traced, load_and_trace, load_images, open_target

BATCH = 64
RANKED = ("l1", "lamp", "taylor", "hessian")  # criteria also tried with one ranking over the whole network
ONNXSIM_CALIBRATION = 128  # images that its activations are taken on

Classes = np.ndarray[Any, Any]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def quiet(step: str, done: float, total: float) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """A finished run: what it was asked, what it reported, and the same network and images again."""

    folder: Path
    request: schema.RunRequest
    report: schema.Report
    target: Target
    traced: Traced
    images: Images
    evaluation: torch.Tensor

    @property
    def dense(self) -> Program:
        return self.traced.program

    @property
    def dense_path(self) -> Path:
        return self.folder / "dense.onnx"

    @property
    def calibration(self) -> torch.Tensor:
        return torch.from_numpy(self.images.calibration)

    @property
    def labels(self) -> Classes:
        labels = self.images.labels
        assert labels is not None
        return labels


def open_case(folder: Path) -> Case:
    request = schema.load_json(schema.RunRequest, folder / "request.json")
    report = schema.load_json(schema.Report, folder / "report.json")
    target = open_target(request.profile, request.threads, request.precision)
    traced = load_and_trace(request.model, request.weights, request.preprocess, request.seed)
    images = load_images(request, traced.preprocess, traced.classes, quiet)
    if images.labels is None:
        raise UsageError(f"{folder} was evaluated on images without labels.", "Take a run whose --eval-data has labels.")
    evaluation = torch.from_numpy(calibration.load_batch(images.evaluation, images.indices, images.transform))
    return Case(folder, request, report, target, traced, images, evaluation)


class Network(Protocol):
    """A pruned network: its file, its shapes (networks that agree in them take the same time), and what it predicts."""

    def save(self, path: Path) -> None: ...
    def shapes(self) -> Shapes: ...
    def classes(self) -> dict[str, Classes]: ...


Build = Callable[[float], Network]


@dataclass(frozen=True)
class Torch:
    """A network in PyTorch. `kept` has the channels of edgekit's graph that it kept, where they could be told."""

    case: Case
    program: Program
    kept: Mapping[str, Sequence[int]] | None

    def save(self, path: Path) -> None:
        save_onnx(to_onnx(self.program), path, {})

    def shapes(self) -> Shapes:
        return tuple((name, tuple(value.shape)) for name, value in self.program.module.state_dict().items())

    def classes(self) -> dict[str, Classes]:
        found = {"raw": classes_of(self.program, self.case.evaluation)}
        if any(node.target in BATCH_NORMS for node in self.program.module.graph.nodes):
            again = reestimated(self.program, self.case.calibration)
            found["batchnorm"] = classes_of(again, self.case.evaluation)
        if self.kept is not None:
            dense = self.case.dense
            done = cut(
                dense, State(dense), self.kept, self.case.images.calibration, repair_=True, seed=self.case.request.seed,
                progress=quiet,
            )  # fmt: skip
            found["repaired"] = classes_of(done.state.program, self.case.evaluation)
        return found


@dataclass(frozen=True)
class Onnx:
    """A network as a file's contents, and what its library makes of it for accuracy alone."""

    case: Case
    model: Any
    finetune: Callable[[], Any]

    def save(self, path: Path) -> None:
        save_onnx(self.model, path, {})

    def shapes(self) -> Shapes:
        return tuple((value.name, tuple(value.dims)) for value in self.model.graph.initializer)

    def classes(self) -> dict[str, Classes]:
        return {"raw": self.predicted(self.model), "finetuned": self.predicted(self.finetune())}

    def predicted(self, model: Any) -> Classes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peer.onnx"
            save_onnx(model, path, {})
            return predictions(self.case.target, path, self.case.images, "peer", quiet)


# --- l1 -------------------------------------------------------------------------------------------------------------------


def l1_variants(case: Case, round_to: int) -> Iterator[tuple[str, Build]]:
    """One ratio for all prunable groups, or for those inside the residual branches only."""
    dense, params = case.dense, Engine.of(case.dense).params
    order = {g.name: magnitude_order(dense, g.name, params, 1) for g in dense.prunable}

    def build(ratio: float, names: tuple[str, ...]) -> Network:
        kept = {}
        for name in names:
            width = len(order[name])
            left = min(width, round_to * max(1, round(width * (1 - ratio) / round_to)))
            kept[name] = sorted(order[name][width - left :])
        return Torch(case, apply(dense, kept), kept)

    every = tuple(order)
    inner = tuple(g.name for g in dense.prunable if g.kind != "residual")
    for scope, names in (("all groups", every), ("inner groups", inner)):
        if names and (names != every or scope == "all groups"):
            yield f"l1, {scope}{multiples(round_to)}", lambda ratio, names=names: build(ratio, names)


def multiples(round_to: int) -> str:
    return f", multiples of {round_to}" if round_to > 1 else ""


# --- Torch-Pruning --------------------------------------------------------------------------------------------------------


def torch_pruning_variants(case: Case, round_to: int) -> Iterator[tuple[str, Build]]:
    """The library's criteria, one ratio a layer and one ranking over the network, with and without the residual streams."""
    import torch_pruning as tp

    eager = case.traced.loaded.module
    if isinstance(eager, torch.fx.GraphModule):
        raise ModelError("Torch-Pruning needs the model's own classes, not an exported program.", "Leave torch-pruning out.")
    importance = tp.importance
    criteria: Mapping[str, Callable[[], Any]] = {
        "l1": lambda: importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: importance.GroupMagnitudeImportance(p=2),
        "lamp": lambda: importance.LAMPImportance(),
        "bn scale": lambda: importance.BNScaleImportance(),
        "taylor": lambda: importance.GroupTaylorImportance(),
        "hessian": lambda: importance.GroupHessianImportance(),
        "random": lambda: importance.RandomImportance(),
    }
    if not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in eager.modules()):
        criteria = {name: make for name, make in criteria.items() if name != "bn scale"}
    example = case.dense.example[:1]
    layers = {name: m for name, m in eager.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    outputs = [name for name, m in layers.items() if isinstance(m, torch.nn.Linear) and m.out_features == case.traced.classes]

    def written(*kinds: schema.GroupKind) -> list[str]:
        """Layers whose outputs are groups of these kinds."""
        places = [place for g in case.dense.groups if g.kind in kinds for place in g.places if place.axis == 0]
        names = dict.fromkeys(place.parameter.removesuffix(".weight") for place in places)
        return [name for name in names if name in layers]

    def build(ratio: float, criterion: str, ignored: list[str], ranked: bool) -> Network:
        model = copy.deepcopy(eager).eval()
        torch.manual_seed(case.request.seed)
        measure = criteria[criterion]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                model,
                example,
                importance=measure,
                pruning_ratio=ratio,
                global_pruning=ranked,
                max_pruning_ratio=0.95 if ranked else 1.0,
                ignored_layers=[model.get_submodule(name) for name in ignored],
                round_to=round_to if round_to > 1 else None,
            )
            if criterion == "taylor":
                gradients(model, case.calibration)
            if criterion == "hessian":
                measure._accu_grad = squared_gradients(model, case.calibration[:BATCH])
                measure._counter = dict.fromkeys(measure._accu_grad, BATCH)  # 1.6.1 divides by it
            gone = removed(case.dense, model, pruner)
        program = trace(model, example)
        return Torch(case, program, kept_channels(case.dense, gone, program))

    inner = outputs + written("residual")
    scopes = {"all groups": outputs, "inner groups": inner}
    if attention := written("heads", "head_dim"):  # a model that holds its number of heads itself cannot lose any here
        scopes["neurons"] = inner + attention
    for criterion in criteria:
        for scope, ignored in scopes.items():
            for ranked in (False, True) if criterion in RANKED else (False,):
                name = f"{criterion}, one {'ranking' if ranked else 'ratio'}, {scope}{multiples(round_to)}"
                yield name, lambda r, c=criterion, i=ignored, k=ranked: build(r, c, i, k)


def gradients(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Gradients of the cross-entropy to the model's own predictions, without labels as the run had none."""
    model.zero_grad()
    for part in images.split(BATCH):
        logits = model(part)
        torch.nn.functional.cross_entropy(logits, logits.detach().argmax(1), reduction="sum").div(len(images)).backward()


def squared_gradients(model: torch.nn.Module, images: torch.Tensor) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Sums over images of squared gradients. The library's own `accumulate_grad` keeps the last image's only (1.6.0 asks for the
    parameter's name where it stores the parameter).
    """
    found: dict[torch.nn.Parameter, torch.Tensor] = {}
    for image in images.split(1):
        gradients(model, image)
        for parameter in model.parameters():
            if parameter.grad is not None:
                found[parameter] = found.get(parameter, torch.zeros_like(parameter)) + parameter.grad.square()
    return found


def removed(dense: Program, model: torch.nn.Module, pruner: Any) -> dict[str, set[int]] | None:
    """Prune, and tell which channels of edgekit's groups go; None where one of them is no such channel."""
    modules = {module: name for name, module in model.named_modules()}
    weights = {str(node.target): node.name for node in dense.module.graph.nodes if node.op == "get_attr"}
    gone: dict[str, set[int]] | None = defaultdict(set)
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            module = dependency.target.module
            parameter = f"{modules.get(module, '')}.weight"
            out = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
            if gone is None or not out or not isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                continue
            owners = dense.channels(weights[parameter], 0) if parameter in weights else ()
            told = [owners[i] for i in indices] if owners else [None]
            if any(owner is None for owner in told):
                gone = None
                continue
            for owner in told:
                assert owner is not None
                gone[owner[0]].add(owner[1])
        group.prune()
    return None if gone is None else dict(gone)


def kept_channels(dense: Program, gone: Mapping[str, set[int]] | None, pruned: Program) -> dict[str, list[int]] | None:
    """What stays of each cut group, if cutting that way gives the network that the library made."""
    if gone is None:
        return None
    kept = {name: [i for i in range(dense.group(name).width) if i not in lost] for name, lost in gone.items() if lost}
    try:
        same = apply(dense, kept).parameter_count() == pruned.parameter_count()
    except EdgekitError:
        return None
    return kept if same else None


# --- onnxsim --------------------------------------------------------------------------------------------------------------


def onnxsim_variants(case: Case, round_to: int) -> Iterator[tuple[str, Build]]:
    """Its structured pruning by weights and by activations, local and global, each with its closed-form fine-tuning after it."""
    import onnx
    from onnxsim import finetune, pruning

    if round_to > 1:
        return
    original = onnx.load(case.dense_path)
    name = original.graph.input[0].name
    data = [{name: image[None]} for image in case.images.calibration[:ONNXSIM_CALIBRATION]]

    def build(ratio: float, wanda: bool, ranked: bool) -> Network:
        if wanda:
            pruned = pruning.apply_structured_wanda_pruning(
                copy.deepcopy(original), calibration_data=data, sparsity=ratio, global_sparsity=ranked
            )
        else:
            pruned = pruning.apply_structured_pruning(copy.deepcopy(original), sparsity=ratio, global_sparsity=ranked)
        return Onnx(case, pruned, lambda: finetune.apply_pruning_finetune(original, pruned, calibration_data=data))

    for label, wanda in (("l2", False), ("wanda", True)):
        for scope, ranked in (("one ratio", False), ("one ranking", True)):
            yield f"{label}, {scope}", lambda ratio, w=wanda, r=ranked: build(ratio, w, r)


PEERS = {"l1": l1_variants, "torch-pruning": torch_pruning_variants, "onnxsim": onnxsim_variants}


# --- BatchNorm ------------------------------------------------------------------------------------------------------------


def reestimated(program: Program, images: torch.Tensor) -> Program:
    """The program with BatchNorm statistics of these images: a forward pass in training mode with a cumulative average.

    Each batch is normalised by its own mean and variance, and the running ones become the plain average over batches, the
    variance unbiased (what `momentum=None` does in PyTorch).
    """
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def hook(node: torch.fx.Node, args: tuple[Any, ...]) -> tuple[object, ...]:
        if node.target not in BATCH_NORMS:
            return args
        x = args[0]
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        count = x.numel() // x.shape[1]
        seen[str(node.args[3].target)].append(mean)  # type: ignore[union-attr]
        seen[str(node.args[4].target)].append(variance * count / (count - 1))  # type: ignore[union-attr]
        return (*args[:3], mean, variance, *args[5:])

    engine = Engine.of(program)
    with torch.no_grad():
        for batch in images.split(program.batch or BATCH):
            engine.run(batch, hook=hook)
    module = copy.deepcopy(program.module)
    module.load_state_dict({name: torch.stack(values).mean(0) for name, values in seen.items()}, strict=False)
    return replace(program, module=module)


def classes_of(program: Program, images: torch.Tensor) -> Classes:
    with torch.no_grad():
        return torch.cat([program.module(batch).argmax(1) for batch in images.split(program.batch or BATCH)]).numpy()

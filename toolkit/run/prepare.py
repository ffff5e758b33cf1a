"""What a run starts from: model, images, traced program, device and latency model."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import calibration
from calibration import Dataset, Transform
from toolkit import backends, devices, profiles
from toolkit.backends import Backend, simulated
from toolkit.devices import Device, local
from toolkit.devices.link import parse_address
from toolkit.errors import DataError, MissingError, UsageError
from toolkit.export import RoughInt8, save_onnx, to_onnx
from toolkit.graph import Program, example_input, trace
from toolkit.latency import ModelTable, VariantMaker, adopt_table, choose_probe_widths, load_table, solve
from toolkit.models import LoadedModel, load_model, resolve_preprocess
from toolkit.prune.attention import attentions
from toolkit.prune.pruner import candidate_widths, floor_state, held_groups
from toolkit.schema import Fingerprint, Format, Groups, JointLength, Precision, Preprocess, Profile, RunRequest, TableHeader

Progress = Callable[[str, float, float], None]
EVALUATION_SHARE = 0.25
EXTRA_NETWORKS = 3
DENSE_INFERENCES, LEAST_INFERENCES, MEASURING_S = 2400, 800, (50.0, 180.0)
ALONG_DIRECTIONS = ("causal", "crespr")  # the other methods rank channels, which the size of queries and keys has none of
MIN_CALIBRATION = 4  # images; a paired interval of fewer says nothing


@dataclass(frozen=True)
class Target:
    """A profile with its device, its runtime there, and what its latencies are a property of."""

    profile: Profile
    device: Device
    backend: Backend
    fingerprint: Fingerprint
    profile_id: str  # as it was asked for: an id or a path
    here: Backend | None = None  # the runtime on this machine, where the device is another and this one has it too

    @property
    def checking(self) -> Backend:
        """The runtime that files are read back and judged in."""
        return self.here or self.backend

    @property
    def checking_threads(self) -> int:
        """Of the machine that `checking` is on: nothing is timed there."""
        return local.facts().cores if self.here else self.device.facts().cores

    @property
    def artefact_suffix(self) -> str:
        return ".xml" if self.profile.format == "openvino" else ".onnx"

    @property
    def formats(self) -> tuple[Format, ...]:
        """What is written: the ONNX file always."""
        return ("onnx", self.profile.format) if self.profile.format != "onnx" else ("onnx",)


def open_target(
    profile_id: str, threads: int = 0, precision: Precision | None = None, *, measuring: bool = False, on: str = ""
) -> Target:
    """The profile with the request's threads (0: its own) and precision (None: its own), on this machine or another.

    `measuring`: latencies are all that is wanted, also of what this version cannot make yet. `on`: ssh://[user@]host[:port].

    Raises:
        UsageError: unknown profile, more threads than cores, or a precision or batch that pruning cannot target yet.
        MissingError: its runtime is not installed.
    """
    profile = profiles.load(profile_id)
    profiles.check_measurable(profile)
    if profile.format == "tensorrt":  # engines are measured nowhere, so a device makes no difference
        profiles.check_measured(profile)
    profile = placed(profile, on)
    profiles.check_measured(profile)
    precision = precision or profile.precision
    profile = msgspec.structs.replace(profile, threads=threads or profile.threads, precision=precision)
    if precision not in offered(profile, measuring):
        message = f"--precision {precision} is nothing that this version can {'measure' if measuring else 'prune for'} with"
        raise UsageError(f"{message} {profile.runtime}.", "Run with --precision fp32; `edgekit export` writes all precisions.")
    if profile.batch != 1 and not measuring:
        message = f"Profile {profile.id} has batch {profile.batch}, which this version can only measure."
        raise UsageError(message, f"Run: edgekit measure MODEL -p {profile_id}, or use a profile with batch 1.")
    device = devices.open(profile)
    facts = device.facts()
    cores = facts.cores
    if profile.threads > cores:
        message = f"--threads {profile.threads} is more than the {cores} cores {'there' if device.remote else 'here'}."
        raise UsageError(message, f"Run it again with --threads {cores}.")
    backend = device.backend(profile.runtime)
    found = profiles.fingerprint(profile, backend.version(), (facts.cpu, facts.instruction_set))
    here = None
    if device.remote:
        with suppress(MissingError):
            here = backends.get(profile.runtime)
    return Target(profile, device, backend, found, profile_id, here)


def offered(profile: Profile, measuring: bool) -> tuple[Precision, ...]:
    """The precisions that networks can be pruned for, or only measured at, with a profile's runtime."""
    if profile.simulation is not None:
        return simulated.offered(profile.simulation)
    if profile.runtime == "openvino":
        return ("fp32", "int8", "bf16") if measuring else ("fp32", "int8")
    return ("fp32", "int8") if profile.runtime == "onnxruntime" else ("fp32",)


def placed(profile: Profile, on: str) -> Profile:
    """The profile on another machine than this.

    Raises:
        UsageError: no address, or a profile that is not of a machine's own runtime.
    """
    if on in ("", "local"):
        return profile
    address = parse_address(on)
    if profile.simulation is not None:
        raise UsageError(f"Profile {profile.id} is simulated here, and on no other device.", "Run it again without --on.")
    if profile.format == "tensorrt":
        raise UsageError(
            f"{profile.runtime} is not driven over ssh by this version.",
            f"Run: edgekit export MODEL -p {profile.id}; it writes the trtexec command that builds the engine on the device.",
        )
    if profile.status != "template" and profile.device != "local":
        raise UsageError(f"Profile {profile.id} is of the device {profile.device!r} already.", "Run it again without --on.")
    return msgspec.structs.replace(profile, device=str(address), status="ready")  # what a template describes is there now


def table_folder(target: Target) -> Path:
    """Where the target's latency table is kept. What comes with its profile is put there first.

    Raises:
        TableError: the profile's own table is of another device, or damaged.
    """
    folder = profiles.table_dir(target.fingerprint)
    if shipped := profiles.shipped_table(target.profile_id):
        adopt_table(shipped, folder, target.fingerprint)
    return folder


def measured_table(profile_id: str) -> tuple[Path, TableHeader | None, int]:
    """(folder of the profile's latency table here, its header where something was measured, rows)."""
    target = open_target(profile_id, measuring=True)
    folder = table_folder(target)
    if not (folder / "header.json").exists():
        return folder, None, 0
    header, rows = load_table(folder, target.fingerprint)
    return folder, header, len(rows)


@dataclass(frozen=True)
class Images:
    """Calibration inputs [M, C, H, W], and the data set and indices that accuracy is counted on."""

    calibration: np.ndarray[Any, Any]
    evaluation: Dataset
    evaluation_path: str
    indices: np.ndarray[Any, Any]
    transform: Transform

    @property
    def labels(self) -> np.ndarray[Any, Any] | None:
        labels = self.evaluation.labels
        return None if labels is None else np.asarray(labels)[self.indices]


def transform_of(preprocess: Preprocess) -> Transform:
    return Transform(**msgspec.structs.asdict(preprocess))


def load_images(request: RunRequest, preprocess: Preprocess, classes: int, progress: Progress) -> Images:
    """Calibration and evaluation images, apart from each other. Both are read here, so that none fails after hours of work.

    Raises:
        DataError: nothing usable there, an unreadable image, labels outside the model's classes.
    """
    try:
        names = request.classes or None
        transform = transform_of(preprocess)
        dataset = calibration.open_dataset(request.data, names)
        if request.eval_data:
            evaluation, path = calibration.open_dataset(request.eval_data, names), request.eval_data
            indices, exclude = np.arange(len(evaluation)), np.empty(0, np.int64)
        else:
            evaluation, path = dataset, request.data
            _, indices = calibration.split(dataset, EVALUATION_SHARE, request.seed)
            exclude = indices
        for each in (dataset, evaluation):
            if each.labels is not None:
                calibration.check_labels(each, classes)
        chosen = calibration.select(dataset, request.samples, request.seed, exclude)
        if len(chosen) < MIN_CALIBRATION:
            raise calibration.DataProblem(
                f"{request.data} has {len(dataset)} images, too few to calibrate and evaluate on.",
                "Run it again with --data of at least 8 images, better 512.",
            )
        inputs = calibration.augment(calibration.load_batch(dataset, chosen, transform), request.seed)
        for done, batch in enumerate(calibration.iterate(evaluation, indices, transform, 64)):
            progress("images", min(64 * done + len(batch), len(indices)), len(indices))
        return Images(inputs, evaluation, str(Path(path).resolve()), indices, transform)
    except calibration.DataProblem as problem:
        raise DataError(problem.message, problem.hint) from problem


@dataclass(frozen=True)
class Traced:
    """A model, its input, and its program."""

    loaded: LoadedModel
    preprocess: Preprocess
    program: Program

    @property
    def classes(self) -> int:
        output = next(n for n in self.program.module.graph.nodes if n.op == "output")
        sources = output.all_input_nodes
        return self.program.shapes[sources[0].name][-1] if sources else 0


def load_and_trace(model: str, weights: str, preprocess: Preprocess | None, seed: int) -> Traced:
    """Model with weights, checked, traced and grouped."""
    loaded = load_model(model, weights, seed)
    chosen = resolve_preprocess(preprocess, loaded)
    return Traced(loaded, chosen, trace(loaded.module, example_input((1, *chosen.input[1:]))))


def groups_record(program: Program) -> Groups:
    """What `groups.json` says of a program."""
    joint: dict[tuple[str, int], JointLength] = {}
    for node in program.module.graph.nodes:
        for axis, entries in enumerate(program.dims.get(node.name, ())) if node.op == "get_attr" else ():
            form = program.form(entries) if entries is not None else None
            if form and any(len(names) > 1 for names, _ in form.terms):
                joint[str(node.target), axis] = JointLength(parameter=str(node.target), axis=axis, form=form)
    shapes = {name: tuple(value.shape) for name, value in program.module.state_dict().items()}
    return Groups(groups=program.groups, dense_shapes=shapes, joint=tuple(joint.values()))


def allocatable(
    program: Program, keep: Sequence[str] = (), min_width: int = 1, method: str = "causal"
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(candidate widths by group, reason of every group left whole).

    Raises:
        UsageError: a pattern that matches nothing, or nothing is left to prune.
    """
    held = {g.name: g.reason for g in program.groups if not g.prunable} | held_groups(program)
    if method not in ALONG_DIRECTIONS:
        directed = "its channels are directions, found anew at every cut; the method goes by channels"
        held = dict.fromkeys(attentions(program), directed) | held
    held |= {g.name: "kept on request" for g in program.groups if any(fnmatch(g.name, pattern) for pattern in keep)}
    unmatched = [pattern for pattern in keep if not any(fnmatch(g.name, pattern) for g in program.groups)]
    if unmatched:
        raise UsageError(
            f"--keep {unmatched[0]} matches no channel group.",
            f"Run it again with a pattern of these groups: {', '.join(g.name for g in program.groups)}.",
        )
    widths = {g.name: candidate_widths(g.width, g.floor, min_width) for g in program.groups if g.name not in held}
    free = {name: found for name, found in widths.items() if len(found) > 1}
    held |= {name: f"no width of {min_width} or more but its own" for name in widths if name not in free}
    if not free:
        reasons = "; ".join(f"{', '.join(n for n in held if held[n] == why)}: {why}" for why in dict.fromkeys(held.values()))
        hint = "Run it again with fewer --keep or a smaller --min-width." if keep or min_width > 1 else "Choose another MODEL."
        raise UsageError(f"No channel group of this model can be pruned ({reasons}).", hint)
    return free, held


@dataclass(frozen=True)
class Networks:
    """What latency tables of a program are measured on, in fp32: whatever the precision, its exports are the same."""

    maker: VariantMaker
    dropped: Sequence[tuple[dict[str, int], Path]]


def table_networks(
    program: Program, candidates: Mapping[str, Sequence[int]], folder: Path, seed: int, progress: Progress, batch: int = 1
) -> Networks:
    """Width variants, and exports with dropped branches in the folder, which must last as long as they."""
    progress("width variants", 0, 1)
    maker = variant_maker(program, candidates, seed, progress, batch)
    dropped = dropped_networks(program, candidates, folder, seed, batch)
    progress("width variants", 1, 1)
    return Networks(maker, dropped)


def latency_table(
    target: Target,
    networks: Networks,
    candidates: Mapping[str, Sequence[int]],
    seed: int,
    dense_ns: float,
    progress: Progress,
    in_float: Sequence[str] = (),
) -> ModelTable:
    """Measure, or load from the cache, the latency table of a program's networks on this device.

    Args:
        in_float: nodes of the exported file that stay in fp32 where the target's precision is int8.
    """
    lower = lowering(target, in_float)
    maker = replace(networks.maker, finish=lower, in_float=frozenset(in_float))
    with tempfile.TemporaryDirectory() as folder:
        extra = [(widths, lower.file(path, Path(folder) / path.name) if lower else path) for widths, path in networks.dropped]
        table = ModelTable(target.profile, target.fingerprint, target.device, maker, candidates, table_folder(target), seed)
        table.measure(seconds=measuring_seconds(dense_ns), extra=extra, progress=progress)
    return table


def lowering(target: Target, in_float: Sequence[str] = ()) -> RoughInt8 | None:
    """What turns a network in fp32 into one that takes as long as at the target's precision; None where it is that already."""
    if target.profile.precision != "int8":
        return None
    return RoughInt8(target.profile.runtime, in_float)


def measuring_seconds(dense_ns: float) -> float:
    """How long to measure a network of this latency: what `DENSE_INFERENCES` take, within limits, but never less than
    `LEAST_INFERENCES`.
    """
    dense_s = dense_ns / 1e9
    return max(float(np.clip(DENSE_INFERENCES * dense_s, *MEASURING_S)), LEAST_INFERENCES * dense_s)


def variant_maker(
    program: Program, candidates: Mapping[str, Sequence[int]], seed: int, progress: Progress, batch: int = 1
) -> VariantMaker:
    """The maker of this program's width variants, solved from real exports and checked against one more."""
    free = {g.name: (1 if g.name in candidates else g.width, g.width) for g in program.groups}
    fixed = {name: full for name, (least, full) in free.items() if least >= full}
    folded = {form.fixed(fixed) for form in program.forms() | program.counts()}
    forms = sorted((form for form in folded if form.terms), key=lambda form: (form.terms, form.const))
    dense_widths = {g.name: g.width for g in program.groups}
    probes = choose_probe_widths(free, forms, seed)
    exports = [(dense_widths, to_onnx(program, batch))]
    for i, widths in enumerate(probes):
        progress("width variants", i + 1, len(probes) + 2)
        exports.append((widths, to_onnx(floor_state(program, widths).program, batch)))
    return solve(exports[:-1], forms, exports[-1])


def dropped_networks(
    program: Program,
    candidates: Mapping[str, Sequence[int]],
    folder: Path,
    seed: int,
    batch: int = 1,
) -> list[tuple[dict[str, int], Path]]:
    """Real exports with random branches dropped, which variants cannot be: they anchor what dropping saves."""
    droppable = [name for name, widths in candidates.items() if 0 in widths]
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(EXTRA_NETWORKS if droppable else 0):
        widths = {g.name: g.width for g in program.groups}
        widths |= {name: rng.choice([w for w in options if w > 0]) for name, options in candidates.items()}
        widths |= dict.fromkeys(rng.sample(droppable, max(1, len(droppable) * (i + 1) // (EXTRA_NETWORKS + 1))), 0)
        path = folder / f"dropped{i}.onnx"
        save_onnx(to_onnx(floor_state(program, widths).program, batch), path, {})
        found.append((widths, path))
    return found

"""The verb `export`: a model as it is, or an ONNX file, at a precision and in a profile's format, checked and timed."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

import calibration
from toolkit import backends, devices, profiles
from toolkit import bench as benches
from toolkit.backends import Backend, Opener, emulated, simulated, trtexec
from toolkit.devices.link import Address, parse_address
from toolkit.errors import DataError, MissingError, ModelError, UsageError
from toolkit.export import DYNAMIC, Quantizing, Source, Wanted, export_artefacts, from_file, from_program
from toolkit.export.onnx_ import OPSET
from toolkit.run.prepare import Progress, load_and_trace, placed, transform_of
from toolkit.schema import Artefact, Exported, ExportRequest, Format, Precision, Preprocess, Profile, load_json, save_json

LEAST_IMAGES = 8


@dataclass(frozen=True)
class Place:
    """Where an export is for: its profile and the runtime that writes and reads it."""

    profile: Profile
    backend: Backend
    engine_on: Address | None = None  # where the engine is to be built by trtexec

    @property
    def formats(self) -> tuple[Format, ...]:
        if self.profile.format == "onnx" or self.engine_on is not None:
            return ("onnx",)
        return ("onnx", self.profile.format)

    @property
    def runs_here(self) -> bool:
        return self.profile.format != "tensorrt" and self.profile.simulation is None


def export(request: ExportRequest, progress: Progress) -> Exported:
    """Write the files into `request.out`, all of them or none.

    Raises:
        EdgekitError: with what was wrong and what to run next.
    """
    place, out = find_place(request), Path(request.out)
    if (out / "manifest.json").exists():
        raise UsageError(f"{out} holds a finished run, whose files this would replace.", "Give -o another folder.")
    if Path(request.model).resolve().parent == out.resolve() and request.model.lower().endswith(".onnx"):
        raise UsageError(f"{out} is where {request.model} itself lies.", "Give -o another folder.")
    progress("export", 0, 1)
    source, preprocess = open_source(request, place.profile)
    progress("export", 1, 1)
    images = load_calibration(request, place.profile.precision, preprocess, source, progress)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export") as staging:
        folder = Path(staging)
        wanted = wish(request, place, images)
        samples = {"random": np.random.default_rng(0).standard_normal(source.shape, np.float32)}
        samples |= {"real": images[:1]} if len(images) else {}
        if (out / "timing.cache").exists():
            shutil.copy(out / "timing.cache", folder / "timing.cache")
        progress("files", 0, 1)
        try:
            artefacts = export_artefacts(source, folder, "model", "dense", wanted, samples, progress)
        except MissingError as error:
            raise handed_over(error, folder, out, place) from None
        made = Exported(
            request=request, profile=place.profile, artefacts=artefacts, notes=(*notes(artefacts, wanted), *to_do(out, place))
        )
        if place.profile.precision == "int8" and place.runs_here and not request.dynamic_batch:
            made = timed(made, source, wanted, folder, progress)
        forget(out)
        save_json(folder / "export.json", made)
        for name in [*(a.path for a in artefacts), *(c for a in artefacts for c, _ in a.companions), "export.json"]:
            os.replace(folder / name, out / name)
        if (folder / "timing.cache").exists():
            shutil.copy(folder / "timing.cache", out / "timing.cache")
    return made


def handed_over(error: MissingError, folder: Path, out: Path, place: Place) -> MissingError:
    """Where an engine cannot be built here, its ONNX file is delivered all the same, with the command for the device."""
    onnx_path = out / "model.onnx"
    if place.profile.format != "tensorrt" or not (folder / onnx_path.name).exists():
        return error
    os.replace(folder / onnx_path.name, onnx_path)
    command = trtexec.text(trtexec.build_engine(onnx_path, program=trtexec.PROGRAMS[place.profile.runtime]))
    return MissingError(error.message, f"{onnx_path} was written and checked. On the device, run: {command}")


def to_do(out: Path, place: Place) -> tuple[str, ...]:
    """What is left to the user where an engine is to be built on a device. Never run by edgekit; docs/targets.md says so."""
    if place.engine_on is None:
        return ()
    address, name = place.engine_on, "model.onnx"
    login = f"{address.user}@{address.host}" if address.user else address.host
    host = f"[{address.host}]" if ":" in address.host else address.host
    target = f"{address.user}@{host}" if address.user else host
    build = trtexec.text(trtexec.build_engine(Path(name), program=trtexec.PROGRAMS[place.profile.runtime]))
    copy = ["scp", *(["-P", str(address.port)] if address.port else []), str(out / name), f"{target}:{name}"]
    there = ["ssh", *(["-p", str(address.port)] if address.port else []), login, build]
    return (f"engines are built where they run, by TensorRT's own tool: {trtexec.text(copy)} && {trtexec.text(there)}",)


def forget(out: Path) -> None:
    """Remove what an earlier export left: its files beside a new record would be taken for this one's."""
    if (out / "export.json").exists():
        for each in load_json(Exported, out / "export.json").artefacts:
            for name in (each.path, *(companion for companion, _ in each.companions)):
                (out / Path(name).name).unlink(missing_ok=True)


def find_place(request: ExportRequest) -> Place:
    """The profile at the precision that was asked, and its runtime; a device is not needed to build for it."""
    profile = profiles.load(request.profile)
    precision = request.precision or profile.precision
    if profile.simulation is not None and precision not in (has := simulated.offered(profile.simulation)):
        message = f"{profile.id} has {' and '.join(has)}, not {precision}."
        raise UsageError(message, f"Run it again with --precision {has[-1]}, or with -p local-onnxruntime.")
    if request.compute_capability and profile.format != "tensorrt":
        raise UsageError("--compute-capability is of TensorRT profiles.", "Run it again with -p tensorrt-rtx, or without it.")
    if request.dynamic_batch and (profile.batch != 1 or profile.format == "tensorrt"):
        raise UsageError(
            f"Profile {profile.id} is for fixed shapes: it has batch {profile.batch} and the format {profile.format}.",
            "Run it again without --dynamic-batch.",
        )
    profile = msgspec.structs.replace(profile, precision=precision)
    if request.compute_capability:
        profile = msgspec.structs.replace(profile, compute_capability=request.compute_capability)
    if profile.format == "tensorrt" and request.on not in ("", "local"):
        return Place(profile, backends.get("onnxruntime"), parse_address(request.on))
    if profile.format == "tensorrt":
        return Place(profile, backends.get(profile.runtime))
    if request.on not in ("", "local"):
        return Place(placed(profile, request.on), backends.get(profile.runtime))
    return Place(profile, devices.open(profile).backend(profile.runtime))


def open_source(request: ExportRequest, profile: Profile) -> tuple[Source, Preprocess]:
    """The network in fp32 and how images become its input."""
    batch = DYNAMIC if request.dynamic_batch else profile.batch
    if request.model.lower().endswith(".onnx"):
        if request.weights:
            raise UsageError("An ONNX file has its weights in it.", "Run it again without --weights.")
        if request.dynamic_batch:
            raise UsageError("--dynamic-batch is for models, not for ONNX files.", "Export the file with an open batch.")
        given = request.preprocess
        if given is None and request.data:
            message = "An ONNX file does not say how its images are normalized."
            raise UsageError(message, "Give what it was trained with, as in --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225.")
        asked = given.input if given and given.input != Preprocess().input else None
        try:
            source = from_file(Path(request.model), asked, opset=request.opset)
        except ModelError:
            if asked or given is None:
                raise
            source = from_file(Path(request.model), given.input, opset=request.opset)  # 1x3x224x224, said or not
        if len(source.shape) != 4:
            return source, Preprocess()
        return source, msgspec.structs.replace(given or Preprocess(), input=source.shape)
    traced = load_and_trace(request.model, request.weights, request.preprocess, request.seed)
    return from_program(traced.program, batch=batch, opset=request.opset or OPSET), traced.preprocess


def load_calibration(
    request: ExportRequest, precision: Precision, preprocess: Preprocess, source: Source, progress: Progress
) -> np.ndarray[Any, Any]:
    """Calibration inputs [M, C, H, W]; none for a precision that needs none.

    Raises:
        UsageError: int8 without --data.
        DataError: nothing usable there.
    """
    if not request.data:
        if precision == "int8":
            raise UsageError("int8 needs calibration images.", "Run it again with --data FOLDER: some hundred images.")
        return np.empty((0, *source.shape[1:]), np.float32)
    if source.shape[0] != 1:
        message = f"Images are calibrated and compared one at a time; this network takes {source.shape[0]}."
        raise UsageError(message, "Export it with a batch of 1, or without --data.")
    progress("images", 0, 1)
    try:
        transform = transform_of(preprocess)
        dataset = calibration.open_dataset(request.data)
        chosen = calibration.select(dataset, request.samples, request.seed)
        if precision == "int8" and len(chosen) < LEAST_IMAGES:
            raise calibration.DataProblem(
                f"{request.data} has {len(chosen)} images, too few to calibrate on.", "Give at least 8."
            )
        found = calibration.load_batch(dataset, chosen, transform)
    except calibration.DataProblem as problem:
        raise DataError(problem.message, problem.hint) from problem
    progress("images", 1, 1)
    return np.asarray(found)


def wish(request: ExportRequest, place: Place, images: np.ndarray[Any, Any]) -> Wanted:
    """What `export_artefacts` is to make."""
    profile = place.profile
    images_told = {"edgekit.calibration": calibration.open_dataset(request.data).fingerprint} if request.data else {}
    quantizing = None
    if profile.precision == "int8":
        quantizing = quantizing_for(profile, place.backend, images, request.ranges, request.max_drop, request.keep_float)
    return Wanted(
        backend=place.backend,
        formats=place.formats,
        precision=profile.precision,
        threads=profile.threads,
        metadata={"edgekit.profile": profile.id, "edgekit.model": request.model, **images_told},
        quantizing=quantizing,
        compute_capability=profile.compute_capability,
    )


def quantizing_for(
    profile: Profile,
    backend: Opener,
    images: np.ndarray[Any, Any],
    ranges: Literal["auto", "minmax", "percentile", "mse"] = "auto",
    max_drop: float = 1.0,
    keep_float: tuple[str, ...] = (),
) -> Quantizing:
    """How a network becomes int8 for a profile; what cannot run here has eight bits, and is judged as an accelerator computes.

    So is what a simulated device has: its backend emulates integers, and of those no sum saturates.
    """
    here = profile.format != "tensorrt"
    return Quantizing(
        recipe=profile.runtime if here else "tensorrt",
        images=images,
        backend=backend if here else emulated,
        threads=profile.threads,
        ranges=ranges,
        max_drop=max_drop,
        keep_float=keep_float,
        weight_bits=0 if here and profile.simulation is None else 8,
    )


def timed(made: Exported, source: Source, wanted: Wanted, folder: Path, progress: Progress) -> Exported:
    """Latency beside the fp32 file, interleaved; and of the file with no layer in float, where some are."""
    fp32 = replace(wanted, precision="fp32", quantizing=None)
    export_artefacts(source, folder, "fp32", "dense", fp32, {}, progress)
    suffix = Path(made.artefacts[-1].path).suffix
    paths = [folder / f"fp32{suffix}", folder / f"model{suffix}"]
    record = made.artefacts[0].quantization
    if record is not None and wanted.quantizing is not None and len(record.kept_float) > len(wanted.quantizing.keep_float):
        whole = replace(wanted.quantizing, search=False, ranges=record.ranges, weight_bits=record.weight_bits)
        export_artefacts(source, folder, "all_int8", "dense", replace(wanted, quantizing=whole), {}, progress)
        paths.append(folder / f"all_int8{suffix}")
    found = benches.benchmark(made.profile, paths, progress=progress)
    reasons = tuple(dict.fromkeys(r for m in found.measurements for r in m.invalid_reasons))
    said = [f"the latency is not valid: {reason}" for reason in reasons]
    if found.ratios[0].ci95[0] >= 1:
        said.append(f"int8 is slower than fp32 here, in {made.profile.runtime}: ship fp32, or try another profile")
    return msgspec.structs.replace(
        made, ratios=found.ratios, fp32_ns=found.measurements[0].latency_ns, notes=(*made.notes, *said)
    )


def notes(artefacts: tuple[Artefact, ...], wanted: Wanted) -> tuple[str, ...]:
    """What a person must know of these files."""
    said = []
    for each in artefacts:
        if each.precision == "fp16" and each.executed_precision == "fp32":
            said.append(f"{each.path} holds fp16 weights; this machine has no fp16 kernels for it and ran it in fp32")
        if each.format == "tensorrt":
            said.append(f"{each.path} was built, not run: {each.executed_precision_read_from}")
        q = each.quantization
        if q is not None and each is artefacts[0]:
            if q.expected_drop > q.max_drop:
                said.append(f"no choice of layers keeps the expected drop under {q.max_drop:g}: it is {q.expected_drop:.2f}")
    return tuple(said)


__all__ = ["ExportRequest", "Exported", "export", "quantizing_for"]

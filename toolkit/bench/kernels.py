"""Where the time goes: the kernels of artefacts, tied by the nodes of their files, with what changed and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from toolkit import devices
from toolkit.backends import KernelSample
from toolkit.bench.session import Progress, labels
from toolkit.schema import KernelChange, KernelDifference, KernelProfile, Profile, ProfiledKernel

Verdict = Literal["faster", "slower", "unchanged", "gone", "new"]

RUNS = 40  # inferences a pass; each artefact has two
PASS_S = 1.5  # what a pass may take where that is fewer
CLOCK_NS = 1500.0  # profilers count whole microseconds
SAME = 0.05  # changes under this are none
SHORT_NS = 20_000.0  # in shorter kernels the launch weighs
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Weight(NamedTuple):
    """What a node of the file multiplies by."""

    name: str
    entries: int
    channels: int
    op: str


def profiles(
    profile: Profile, paths: Sequence[Path], progress: Progress = lambda step, done, total: None
) -> tuple[KernelProfile, ...]:
    """Profile artefacts in turns (A B B A), in a pass of its own: no latency is taken from it. Errors as `Backend.profile`."""
    device = devices.open(profile)
    with closing(device.rig(profile.runtime, profile.threads)) as rig:
        runs = []
        for path in paths:
            loaded = rig.load(path, profile.precision, bursts=(1, 1))
            runs.append(int(min(RUNS, max(5, PASS_S * 1e9 / max(1, int(loaded.bursts_ns[1][0]))))))
            rig.unload(loaded.handle)
    backend = device.backend(profile.runtime)
    order = (*range(len(paths)), *reversed(range(len(paths))))
    taken: list[list[tuple[KernelSample, ...]]] = [[] for _ in paths]
    for done, index in enumerate(order):
        progress("kernels", done, len(order))
        how = {"threads": profile.threads, "precision": profile.precision, "runs": runs[index]}
        taken[index].append(backend.profile(paths[index], **how))
    return tuple(
        KernelProfile(artefact=label, runs=2 * count, kernels=named(path, _joined(*passes)))
        for label, path, count, passes in zip(labels(paths), paths, runs, taken, strict=True)
    )


def difference(first: KernelProfile, other: KernelProfile) -> KernelDifference:
    """Every kernel of either side once."""
    old, new = ({kernel.name: kernel for kernel in side.kernels} for side in (first, other))
    doubt = {kernel: _doubt(kernel, side.runs) for side in (first, other) for kernel in side.kernels}
    found = []
    for name in dict.fromkeys((*old, *new)):
        a, b = old.get(name), new.get(name)
        verdict: Verdict
        if a and b:
            verdict, why = _judge(a, b, doubt[a] + doubt[b])
        elif a:
            verdict, why = "gone", _moved(a, other, "it is no longer in the file")
        else:
            assert b
            verdict, why = "new", _moved(b, first, "it was not in the first file")
        found.append(
            KernelChange(
                name=name,
                before_ns=a.latency_ns if a else None,
                after_ns=b.latency_ns if b else None,
                verdict=verdict,
                why=why,
            )
        )
    found.sort(key=lambda change: -abs((change.before_ns or 0.0) - (change.after_ns or 0.0)))
    return KernelDifference(artefact=other.artefact, changes=tuple(found))


def named(path: Path, kernels: Sequence[KernelSample]) -> tuple[ProfiledKernel, ...]:
    """Kernels with the names of their places: the weight they use, else their first node; layout changes by operator."""
    weights = _weights(path)
    found, seen = [], Counter[str]()
    for kernel in kernels:
        used = [weights[node] for node in kernel.nodes if node in weights]
        name = used[0].name if used else kernel.nodes[0] if kernel.nodes else kernel.op
        seen[name] += 1
        low, middle, high = (float(value) for value in np.quantile(kernel.samples_ns, (0.25, 0.5, 0.75)))
        found.append(
            ProfiledKernel(
                name=f"{name} #{seen[name]}" if seen[name] > 1 else name,
                op=kernel.op,
                implementation=kernel.implementation,
                nodes=kernel.nodes,
                input_shapes=kernel.input_shapes,
                output_shapes=kernel.output_shapes,
                macs=sum(weight.entries * _positions(kernel, weight.op) for weight in used),
                channels=used[0].channels if len(used) == 1 else 0,
                latency_ns=middle,
                iqr_ns=high - low,
            )
        )
    return tuple(found)


def _judge(a: ProfiledKernel, b: ProfiledKernel, doubt_ns: float) -> tuple[Verdict, str]:
    less, what = _less(a, b)
    switched = a.implementation != b.implementation and a.implementation and b.implementation
    via = f"another implementation: {a.implementation} -> {b.implementation}" if switched else ""
    work = f"{less:.2f}x the {what}" if less != 1 else ""
    gained = a.latency_ns - b.latency_ns
    if abs(gained) <= max(CLOCK_NS, SAME * a.latency_ns, doubt_ns):
        return "unchanged", f"{work}, yet {via or _obstacle(b)}" if work else via or "the same work"
    if gained < 0:
        return "slower", ", ".join(filter(None, (work, via))) or "the same work, yet slower in this network"
    ratio = b.latency_ns / a.latency_ns
    if less < 1 and ratio > (1 + less) / 2:
        return "faster", f"{work}, but {ratio:.2f}x the time: {via or _obstacle(b)}"
    return "faster", ", ".join(filter(None, (work, via))) or "the same work, yet faster in this network"


def _less(a: ProfiledKernel, b: ProfiledKernel) -> tuple[float, str]:
    """How much of its work is left, by the best that is known of it: (ratio, of what)."""
    if a.macs and b.macs:
        return b.macs / a.macs, "multiply-accumulates"
    sizes = [sum(math.prod(shape) for shape in (*each.input_shapes, *each.output_shapes)) for each in (a, b)]
    return (sizes[1] / sizes[0], "activations") if min(sizes) > 0 else (1.0, "activations")


def _obstacle(kernel: ProfiledKernel) -> str:
    """Why less work is not less time."""
    laid_out = kernel.output_shapes[0] if kernel.output_shapes else ()
    if kernel.channels and len(laid_out) > 1 and laid_out[1] > kernel.channels:
        return f"its {kernel.channels} channels are padded to {laid_out[1]}"
    if kernel.latency_ns < SHORT_NS:
        return "in so short a kernel the launch, or a block that is not full, decides"
    return "its time does not follow its work: memory, or blocks that are not full"


def _moved(kernel: ProfiledKernel, other: KernelProfile, otherwise: str) -> str:
    if not kernel.nodes:
        return f"a change of layout ({kernel.op}) on one side only"
    hosts = [host.name for host in other.kernels if set(host.nodes) & set(kernel.nodes)]
    return f"its nodes run inside {', '.join(hosts)} on the other side" if hosts else otherwise


def _doubt(kernel: ProfiledKernel, runs: int) -> float:
    """Two standard errors of the median, from the quartiles."""
    return 2 * 0.93 * kernel.iqr_ns / math.sqrt(runs)


def _positions(kernel: KernelSample, op: str) -> int:
    """Places of a kernel's activations that each cost the weight's multiply-accumulates once."""
    sides = kernel.input_shapes if op == "ConvTranspose" else kernel.output_shapes
    shape = sides[0] if sides else ()
    return math.prod(shape[:-1] if op in ("Gemm", "MatMul") else (*shape[:1], *shape[2:])) or 1


def _weights(path: Path) -> dict[str, Weight]:
    """By node of the ONNX file; for OpenVINO's own format of the one beside it, where there is one."""
    file = path if path.suffix == ".onnx" else path.with_suffix(".onnx")
    if not file.is_file():
        return {}
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    dims = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found: dict[str, Weight] = {}
    for node in graph.node:
        used = next((name for name in node.input[1:2] if len(dims.get(name, ())) >= 2), "")
        if not used or node.op_type not in _WEIGHTED:
            continue
        shape = dims[used]
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        first = node.op_type == "Conv" or turned
        channels = shape[0] if first else shape[1] * groups
        weight = Weight(used.removesuffix(".weight"), math.prod(shape), channels, node.op_type)
        found.update({name: weight for name in (node.name, *node.output) if name})
    return found


def _joined(first: Sequence[KernelSample], second: Sequence[KernelSample]) -> list[KernelSample]:
    """Both passes' samples. A kernel too short for the profiler's clock may show in one only: in the other it took nothing."""
    found, others = _placed(first), _placed(second)
    silent = {place: replace(kernel, samples_ns=np.zeros_like(kernel.samples_ns)) for place, kernel in (found | others).items()}
    return [
        replace(kernel, samples_ns=np.concatenate([(side.get(place) or kernel).samples_ns for side in (found, others)]))
        for place, kernel in silent.items()
    ]


def _placed(kernels: Sequence[KernelSample]) -> dict[tuple[tuple[object, ...], int], KernelSample]:
    """By place; several that nothing tells apart by their order."""
    seen = Counter[tuple[object, ...]]()
    found = {}
    for kernel in kernels:
        found[kernel.place, seen[kernel.place]] = kernel
        seen[kernel.place] += 1
    return found

"""The verb `bench`: artefacts timed beside each other, what their loading takes, where the difference lies, and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from toolkit import bench as benches
from toolkit.bench import gate, kernels, startup
from toolkit.errors import UsageError
from toolkit.run.prepare import Progress, open_target
from toolkit.schema import Benchmark, Statistic, load_json, save_json


def bench(
    paths: Sequence[Path],
    profile_id: str,
    progress: Progress,
    *,
    threads: int = 0,
    on: str = "",
    statistic: Statistic = "median",
    sustained_s: float = 0.0,
    with_startup: bool = True,
    with_kernels: bool = False,
    against: Path | None = None,
    fail_over: float | None = None,
    out: Path | None = None,
) -> Benchmark:
    """Time one or more artefacts in one session.

    Args:
        against: an earlier `Benchmark` as JSON; each artefact is held against it, by `fail_over` (0.05 where None).
        out: the record is kept there, anew after each step, so that a failing later one loses nothing.
        fail_over: how much slower passes, as a fraction; without `against` the first artefact is what the others are held to.

    Raises:
        EdgekitError: with what was wrong and what to run next; a gate that fails is no error but part of the answer.
    """
    target = open_target(profile_id, threads, "fp32", measuring=True, on=on)
    earlier, names = load_json(Benchmark, against) if against else None, benches.labels(paths)
    if earlier is not None:
        gate.require_comparable(target.fingerprint, names, statistic, sustained_s, earlier, str(against))
    elif fail_over is not None and len(paths) == 1:
        raise UsageError(
            "One artefact alone can be held against nothing.",
            "Give the earlier artefact first: edgekit bench old.onnx new.onnx --fail-over 5%; or --against earlier.json.",
        )

    def keep(**more: object) -> Benchmark:
        grown = msgspec.structs.replace(found, **more)
        if out:
            save_json(out, grown)
        return grown

    found = benches.benchmark(target.profile, paths, statistic=statistic, sustained_s=sustained_s, progress=progress)
    limit = 1 + (0.05 if fail_over is None else fail_over)
    found = keep()
    if earlier is not None:
        found = keep(gates=gate.against(found, earlier, str(against), limit))
    elif fail_over is not None:
        found = keep(gates=gate.beside(found, limit))
    if with_startup:
        loads = []
        for done, (name, path) in enumerate(zip(names, paths, strict=True)):
            progress("loading", done, len(paths))
            loads.append(msgspec.structs.replace(startup.startup(target.profile, path), artefact=name))
        found = keep(startup=tuple(loads))
    if with_kernels:
        first, *others = profiled = kernels.profiles(target.profile, paths, progress)
        found = keep(kernels=profiled, differences=tuple(kernels.difference(first, other) for other in others))
    return found

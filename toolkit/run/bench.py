"""The verb `bench`: artefacts timed beside each other, what their loading takes, where the difference lies, and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from toolkit import bench as benches
from toolkit.bench import gate, kernels, startup
from toolkit.errors import UsageError
from toolkit.run.prepare import Progress, open_target
from toolkit.schema import Benchmark, Statistic, load_json


def bench(
    paths: Sequence[Path],
    profile_id: str,
    progress: Progress,
    *,
    threads: int = 1,
    statistic: Statistic = "median",
    sustained_s: float = 0.0,
    with_startup: bool = True,
    with_kernels: bool = False,
    against: Path | None = None,
    fail_over: float | None = None,
) -> Benchmark:
    """Time one or more artefacts in one session.

    Args:
        against: an earlier `Benchmark` as JSON; each artefact is held against it, by `fail_over` (0.05 where None).
        fail_over: how much slower passes, as a fraction; without `against` the first artefact is what the others are held to.

    Raises:
        EdgekitError: with what was wrong and what to run next; a gate that fails is no error but part of the answer.
    """
    target = open_target(profile_id, threads, "fp32")
    earlier = load_json(Benchmark, against) if against else None
    if earlier is not None:  # what cannot be compared is told before the time is spent
        gate.require_same(target.fingerprint, earlier.fingerprint, str(against))
    elif fail_over is not None and len(paths) == 1:
        raise UsageError(
            "One artefact alone can be held against nothing.",
            "Give the earlier artefact first: edgekit bench old.onnx new.onnx --fail-over 5%; or --against earlier.json.",
        )
    found = benches.benchmark(target.profile, paths, statistic=statistic, sustained_s=sustained_s, progress=progress)
    limit = 1 + (0.05 if fail_over is None else fail_over)
    if earlier is not None:
        found = msgspec.structs.replace(found, gates=gate.against(found, earlier, str(against), limit))
    elif fail_over is not None:
        found = msgspec.structs.replace(found, gates=gate.beside(found, limit))
    if with_startup:
        loads = []
        for done, path in enumerate(paths):
            progress("loading", done, len(paths))
            loads.append(startup.startup(target.profile, path))
        found = msgspec.structs.replace(found, startup=tuple(loads))
    if with_kernels:
        first, *others = profiled = kernels.profiles(target.profile, paths, progress)
        differences = tuple(kernels.difference(first, other) for other in others)
        found = msgspec.structs.replace(found, kernels=profiled, differences=differences)
    return found

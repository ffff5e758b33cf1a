"""A realistic finished run: the records of a CIFAR-type residual network at half its latency, all derived from one seed."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from toolkit.schema import (
    CategoryCounts,
    Comparison,
    Conditions,
    GroupReport,
    HeldOut,
    Iteration,
    KernelTime,
    Measurement,
    Report,
    Response,
    TableSummary,
)

DENSE_NS, PRUNED_NS, BUDGET_NS = 16_010_000.0, 7_812_000.0, 8_005_000.0


def group(name: str, before: int, after: int, rng: random.Random, **changes: Any) -> GroupReport:
    """One group with categories, an effect interval and a response at every eighth of its width."""
    detrimental, neutral = rng.randint(0, before // 16), rng.randint(before // 4, before // 2)
    undecided = rng.randint(0, before // 4)
    counts = CategoryCounts(
        critical=before - detrimental - neutral - undecided, neutral=neutral, detrimental=detrimental, undecided=undecided
    )
    cut = before - after
    taken: dict[str, int] = {}
    for category in ("detrimental", "neutral", "undecided", "critical"):
        taken[category] = min(cut - sum(taken.values()), getattr(counts, category))
    effect = -rng.lognormvariate(-4, 1)
    half = abs(effect) * rng.uniform(0.2, 0.9)
    weight = rng.lognormvariate(-2, 1)
    responses = tuple(
        Response(
            group=name,
            width=before * step // 8,
            distortion=weight * (1 - step / 8) ** 2.5,
            agreement=max(0.1, 1 - weight * (1 - step / 8)),
            order="causal",
            repaired=True,
            round=1,
        )
        for step in range(9)
    )
    record = GroupReport(
        name=name,
        kind="conv",
        width_before=before,
        width_after=after,
        effect_mean=effect,
        effect_ci95=(effect - half, effect + half),
        categories=counts,
        removed=CategoryCounts(**taken),
        responses=responses,
    )
    return msgspec.structs.replace(record, **changes)


def measurement(role: str, centre_ns: float, rng: random.Random, **changes: Any) -> Measurement:
    """Twelve rounds of forty samples with a right tail."""
    rounds = tuple(
        tuple(int(centre_ns * (1 + rng.lognormvariate(-4.6, 0.7) - 0.01 + level)) for _ in range(40))
        for level in (rng.gauss(0, 0.003) for _ in range(12))
    )
    ordered = sorted(sample for samples in rounds for sample in samples)
    record = Measurement(
        artefact=f"{'dense' if role == 'dense' else 'model'}.onnx",
        sha256=f"{rng.getrandbits(256):064x}",
        scope="session.run, input and output in host memory",
        statistic="median",
        latency_ns=centre_ns,
        latency_ci95_ns=(0.995 * centre_ns, 1.007 * centre_ns),
        median_ns=centre_ns,
        p90_ns=float(ordered[int(0.9 * len(ordered))]),
        p95_ns=float(ordered[int(0.95 * len(ordered))]),
        p99_ns=None,
        energy_j=None,
        samples=len(ordered),
        warmup=20,
        rounds_ns=rounds,
        split_half=0.0041,
        drift=0.0062,
        conditions=Conditions(
            waiting=0.004, cpu_pressure=0.013, steal=0.0, run_queue=1.2, absent={"clock_hz": "this kernel has none"}
        ),
        executed_precision="fp32",
        fresh_process=True,
        measured_at="2026-03-14T09:26:53Z",
        valid=True,
        invalid_reasons=(),
        absent={"p99_ns": "480 samples, 662 are needed", "energy_j": "nothing counts it"},
    )
    return msgspec.structs.replace(record, **changes)


def comparison(seed: int = 0, **changes: Any) -> Comparison:
    rng = random.Random(seed)
    record = Comparison(
        dense=measurement("dense", DENSE_NS, rng),
        pruned=measurement("pruned", PRUNED_NS, rng),
        ratio=PRUNED_NS / DENSE_NS,
        ratio_ci95=(0.4835, 0.4931),
    )
    return msgspec.structs.replace(record, **changes)


def report(seed: int = 0, **changes: Any) -> Report:
    """A met, valid run; `changes` replace fields."""
    rng = random.Random(seed)
    widths = [(stage, block, 16 << (stage - 1)) for stage in (1, 2, 3) for block in range(9)]
    groups = []
    for stage, block, width in widths:
        kept = rng.choice([0, width // 4, width // 4, width // 2, width // 2, 5 * width // 8, 3 * width // 4, width])
        groups.append(group(f"layer{stage}.{block}.conv1", width, 0 if (stage, block) == (1, 4) else kept, rng))
    kernels = [
        KernelTime(
            name="conv1",
            key="Conv+Relu 3x3 s1 32x32",
            dense_ns=402_000.0,
            pruned_ns=398_000.0,
            note="width fixed by the residual sum",
        )
    ]
    for record, (stage, block, _) in zip(groups, widths, strict=True):
        ratio = record.width_after / record.width_before
        for conv in (1, 2):
            dense = rng.uniform(0.9, 1.1) * 285_000.0
            note = "branch dropped" if not ratio else "width padded to 16 by the runtime" if record.width_after % 16 else ""
            key = f"Conv+{'Relu' if conv == 1 else 'Add+Relu'} 3x3 s1 {64 >> stage}x{64 >> stage}"
            kernels.append(
                KernelTime(
                    name=f"layer{stage}.{block}.conv{conv}", key=key, dense_ns=dense, pruned_ns=dense * ratio * 0.93, note=note
                )
            )
    record = Report(
        verdict="met",
        valid=True,
        invalid_reasons=(),
        model="models.py:resnet56",
        method="causal",
        profile="local-onnxruntime",
        runtime="onnxruntime 1.31.0",
        budget="0.5x",
        budget_ns=BUDGET_NS,
        statistic="median",
        dense_ns=DENSE_NS,
        measured_ns=PRUNED_NS,
        measured_ci95_ns=(7_771_000.0, 7_868_000.0),
        predicted_ns=7_653_000.0,
        speedup=DENSE_NS / PRUNED_NS,
        speedup_ci95=(2.028, 2.068),
        accuracy_dense=0.9384,
        accuracy_pruned=0.9341,
        accuracy_change_ci95=(-0.0081, -0.0006),
        agreement=0.9652,
        evaluation_images=5000,
        calibration_images=512,
        parameters_dense=855_770,
        parameters_pruned=402_318,
        macs_dense=126_550_016,
        macs_pruned=58_123_904,
        size_dense_bytes=3_478_212,
        size_pruned_bytes=1_664_019,
        memory_dense_bytes=3_554_304.0,
        memory_pruned_bytes=1_715_520.0,
        prunable_macs_share=0.982,
        prunable_latency_share=0.931,
        floor_ns=2_310_000.0,
        optimality_gap=0.0007,
        iterations=(
            Iteration(target_ns=7_805_000.0, predicted_ns=7_801_000.0, measured_ns=8_392_000.0, ratio=0.5242, scale=1.0),
            Iteration(target_ns=7_805_000.0, predicted_ns=7_653_000.0, measured_ns=7_798_000.0, ratio=0.4871, scale=1.0757),
        ),
        table=TableSummary(
            id="3f9c1ab2d470", rows=412, coverage=0.987, held_out=HeldOut(networks=12, mape=0.0231, bias=-0.0062, spearman=0.991)
        ),
        groups=tuple(groups),
        unprunable=(("fc", "its channels are the network's output"), ("layer2.0.shortcut", "tied to the residual sum")),
        critical_removed=sum(entry.removed.critical + entry.removed.undecided for entry in groups),
        kernels=tuple(kernels),
        proof_max_relative_error=3.1e-13,
        repair="least squares kept in 25 of 26 groups; held-back distortion 0.214 to 0.037",
        wall_s={"trace": 4.2, "table": 87.6, "effects": 121.4, "responses": 148.0, "allocate": 3.1, "measure": 41.7},
        seed=0,
        environment={
            "edgekit": "0.1.0",
            "python": "3.11.9",
            "torch": "2.15.0",
            "onnxruntime": "1.31.0",
            "cpu": "x86-64, AVX-512, 2 cores",
            "os": "Linux 6.1",
        },
        command="edgekit run models.py:resnet56 --weights resnet56.safetensors --data train.npz --eval-data test.npz "
        "--input 1x3x32x32 -p local-onnxruntime --budget 0.5x -o out",
        notes=("Two turns of the closed loop were needed: the first plan measured 7.6 % over its prediction.",),
    )
    return msgspec.structs.replace(record, **changes)

"""Measurements: what the statistics promise, on simulated drift; what a session records, on real networks."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from networks import residual
from numpy.typing import NDArray

from toolkit import bench, devices, profiles
from toolkit.backends import KernelSample
from toolkit.bench import gate, kernels, session, startup, stats, timing
from toolkit.bench.reference import reference_path
from toolkit.errors import UsageError
from toolkit.schema import Benchmark, Conditions, KernelProfile, Profile, ProfiledKernel, from_json, to_json

pytestmark = pytest.mark.slow

Simulated = list[NDArray[np.int64]]
PROFILES = {
    "onnxruntime": Profile(id="local-onnxruntime", device="local", runtime="onnxruntime", format="onnx"),
    "openvino": Profile(id="local-openvino", device="local", runtime="openvino", format="openvino"),
}


def simulate(seed: int, ratio: float, rounds: int = session.ROUNDS, burst: int = 20) -> tuple[Simulated, Simulated]:
    """Two artefacts timed A B B A on a machine whose speed wanders by tens of per cent, with a right tail on every sample."""
    generator = np.random.default_rng(seed)
    visits = 4 * rounds
    speed = np.cumsum(generator.normal(0, 0.01, visits)) + 0.1 * np.sin(np.arange(visits) / visits * 4)
    result: tuple[Simulated, Simulated] = ([], [])
    for index in range(rounds):
        taken: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
        for visit, which in enumerate((0, 1, 1, 0)):
            level = 1e6 * (ratio if which else 1) * np.exp(speed[4 * index + visit])
            taken[which].append((level * (1 + generator.lognormal(-4, 1, burst))).astype(np.int64))
        for which in (0, 1):
            result[which].append(np.concatenate(taken[which]))
    return result


# --- statistics ----------------------------------------------------------------------------------------------------------


def test_interval_covers_one_for_a_model_against_itself() -> None:
    covered = 0
    for seed in range(100):
        low, high = stats.ratio_interval(*simulate(seed, 1.0), "median")
        covered += low <= 1 <= high
    assert covered >= 93


def test_a_planted_difference_is_found() -> None:
    found = 0
    for seed in range(100):
        low, high = stats.ratio_interval(*simulate(seed, 0.95), "median")
        found += high < 1 and low <= 0.96
    assert found >= 90


@pytest.mark.parametrize("rounds", [15, 24, 36, 600])
def test_an_interval_of_few_rounds_is_expanded_by_students_t(rounds: int) -> None:
    """On normal draws the expanded percentiles lie sqrt(n / (n - 1)) t deviations out."""
    from scipy import stats as science

    low, high = stats.bounds(np.random.default_rng(0).normal(size=400_000), rounds)
    blocks = rounds // stats.BLOCK
    expected = (blocks / (blocks - 1)) ** 0.5 * science.t.ppf(0.975, blocks - 1)
    assert (-low, high) == pytest.approx((expected, expected), rel=0.03)


def test_draws_are_blocks_of_neighbours_and_every_round_is_drawn_as_often() -> None:
    drawn = stats.draws(25)
    assert drawn.shape[1] == 25 and set(np.unique(drawn)) == set(range(25))
    steps = (drawn[:, 1:] - drawn[:, :-1]) % 25
    inside = [index for index in range(24) if (index + 1) % stats.BLOCK]
    assert (steps[:, inside] == 1).all()
    counts = np.bincount(drawn.ravel())
    assert counts.max() < 1.2 * counts.min()


def test_interval_narrows_with_rounds() -> None:
    def width(rounds: int) -> float:
        return float(np.mean([np.ptp(stats.ratio_interval(*simulate(seed, 0.5, rounds), "median")) for seed in range(20)]))

    assert width(96) < 0.7 * width(24)


def test_drift_that_is_linear_in_time_cancels_in_a_round() -> None:
    times = np.linspace(1, 2, 40)
    first = np.concatenate([times[:10], times[30:]])
    second = times[10:30]
    ratio = stats.ratio([(first * 1e6).astype(np.int64)], [(second * 1e6).astype(np.int64)], "median")
    assert abs(ratio - 1) < 1e-3


@pytest.mark.parametrize(("statistic", "fewest"), [("median", 11), ("p90", 64), ("p95", 130), ("p99", 662)])
def test_a_percentile_needs_its_samples(statistic: stats.Statistic, fewest: int) -> None:
    samples = np.arange(1, fewest + 1, dtype=np.int64)
    assert stats.percentile(samples[1:], statistic) is None
    assert stats.percentile(samples, statistic) == pytest.approx(np.quantile(samples, stats.QUANTILES[statistic]))


@pytest.mark.parametrize("statistic", ["median", "p90", "p95", "p99"])
def test_interval_holds_the_statistic_and_scales_with_it(statistic: stats.Statistic) -> None:
    dense, pruned = simulate(1, 0.5)
    low, high = stats.interval(dense, statistic)
    assert low <= stats.value(np.concatenate(dense), statistic) <= high
    doubled = stats.interval([2 * samples for samples in dense], statistic)
    assert doubled == pytest.approx((2 * low, 2 * high))
    bounds = stats.ratio_interval(dense, pruned, statistic)
    assert bounds[0] <= stats.ratio(dense, pruned, statistic) <= bounds[1]


def test_resampling_a_quantile_equals_drawing_the_samples() -> None:
    """The fast count over sorted samples is the plain thing: pool the drawn rounds and take their quantile."""
    rounds, _ = simulate(2, 1.0, rounds=6)
    draws = np.random.default_rng(3).integers(0, 6, (20, 6))
    for statistic in ("median", "p90"):
        plain = [np.quantile(np.concatenate([rounds[i] for i in draw]), stats.QUANTILES[statistic]) for draw in draws]
        assert stats.resampled(rounds, draws, statistic) == pytest.approx(plain, rel=2e-3)


def test_split_half_and_drift() -> None:
    steady = [np.full(10, 100, np.int64) for _ in range(12)]
    assert stats.split_half(steady) == 0 and stats.drift(steady) == 0
    alternating = [np.full(10, 100 + 20 * (index % 2), np.int64) for index in range(12)]
    assert stats.split_half(alternating) == pytest.approx(20 / 110)
    rising = [np.full(10, 100 + 10 * index, np.int64) for index in range(12)]
    assert stats.drift(rising) == pytest.approx(80 / 155)
    assert stats.split_half_ratio(alternating, steady, "median") == pytest.approx((1 - 100 / 120) / ((1 + 100 / 120) / 2))


# --- what makes a measurement invalid ------------------------------------------------------------------------------------


def objections(
    rounds: tuple[Simulated, ...],
    reference: Simulated,
    found: Conditions | None = None,
    width: float = 0.01,
    threads: int = 1,
    sustained_s: float = 0.0,
) -> tuple[str, ...]:
    """Those to the last artefact."""
    count = len(rounds)
    taken = session.Taken(rounds, reference, (None,) * count, (0,) * count, ("fp32",) * count, found or Conditions())
    request = session.Request(
        profile=msgspec.structs.replace(PROFILES["onnxruntime"], threads=threads), paths=("m",) * count, statistic="median",
        feeds_seed=0, min_samples=11, time_limit_s=60.0, sustained_s=sustained_s, retries=0,
    )  # fmt: skip
    return session.objections(taken, count - 1, request, width)


def test_a_quiet_session_is_valid_and_each_trouble_is_named() -> None:
    steady = [np.full(10, 100, np.int64) for _ in range(12)]
    alternating = [np.full(10, 100 + 20 * (index % 2), np.int64) for index in range(12)]
    rising = [np.full(10, 100 + 4 * index, np.int64) for index in range(12)]
    noisy = Conditions(cpu_pressure=0.6, steal=0.2, waiting=0.01)
    assert objections((steady, steady), steady) == ()
    assert "even and odd" in objections((steady, alternating), steady)[0]
    assert "interval" in objections((steady, steady), steady, width=0.041)[0]
    # other load counts only where it shows in the result
    assert objections((steady, steady), steady, noisy, 0.01) == ()
    assert len(objections((steady, steady), steady, noisy, 0.03)) == 2
    # ... but for what kept our own threads from running, and where the kernel does not tell that, for any pressure
    assert "waiting for a core 9%" in objections((steady, steady), steady, Conditions(waiting=0.09))[0]
    assert "60% of the time" in objections((steady, steady), steady, Conditions(cpu_pressure=0.6))[0]
    assert "between 800 and 1000 MHz" in objections((steady, steady), steady, Conditions(clock_hz=(8e8, 1e9)))[0]
    assert objections((steady, steady), steady, Conditions(clock_hz=(9.3e8, 1e9), throttled=0)) == ()
    assert "throttled 2 times" in objections((steady, steady), steady, Conditions(throttled=2))[0]
    assert objections((steady, steady), steady, Conditions(waiting=0.09), threads=4) == ()
    # a settled device may go on throttling; its clock must stand still all the same, and the advice has been taken
    assert objections((steady, steady), steady, Conditions(throttled=2), sustained_s=60) == ()
    assert "sustained" not in objections((steady, steady), steady, Conditions(clock_hz=(8e8, 1e9)), sustained_s=60)[0]
    # what is wrong with one artefact is no objection to another
    assert objections((alternating, steady), steady) == () != objections((steady, alternating), steady)
    # a ratio outlives drift that both sides share; a figure that stands alone does not
    assert objections((rising, rising), rising) == ()
    assert any("drifted" in reason for reason in objections((rising,), rising))
    assert any("drifted" in reason for reason in objections((steady, alternating), rising))


# --- bursts and rounds ---------------------------------------------------------------------------------------------------


def test_a_burst_times_every_call_without_collecting_garbage() -> None:
    states = []
    samples = timing.time_burst(lambda: states.append(gc.isenabled()), 7)
    assert len(samples) == 7 and (samples > 0).all() and states == [False] * 7 and gc.isenabled()


def test_collection_is_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        timing.time_burst(lambda: 1 // 0, 3)
    assert gc.isenabled()


def test_rounds_visit_forwards_and_backwards_each_time_after_the_reference() -> None:
    visited: list[str] = []
    calls = [lambda name=name: visited.append(name) for name in "RABC"]
    visits = [timing.Visit(call, lead, burst) for call, lead, burst in zip(calls, (1, 1, 2, 4), (1, 1, 2, 3), strict=True)]
    rounds = list(timing.interleaved(visits[0], visits[1:], 2))
    assert visited.count("C") == 2 * 2 * (4 + 3)
    assert [len(turn.samples_ns) for turn in rounds[0]] == [6, 2, 4, 6]
    assert all(turn.energy_j is None for turn in rounds[0])
    order = [name for index, name in enumerate(visited) if index == 0 or visited[index - 1] != name]
    assert "".join(order) == 2 * "RARBRCRCRBRA"  # each visit's own calls merged


def test_a_visit_leads_and_samples_for_a_while_within_bounds() -> None:
    def found(median_ns: float, at_least: int = 1) -> tuple[int, int]:
        visit = timing.visit(print, median_ns, at_least)
        return visit.lead, visit.burst

    assert found(1e9) == (0, 1) and found(1e9, 14) == (0, 14) and found(9e7) == (1, 1)
    assert found(1e6) == (25, 20) and found(7e6) == (4, 3)
    assert found(1e3) == (25000, timing.MAX_BURST)
    assert timing.glance(print, 1e6).burst == 10


# --- real networks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return residual(folder / "dense.onnx", (64, 64, 64), 64), residual(folder / "model.onnx", (16, 16, 16), 64)


@pytest.mark.timed
@pytest.mark.parametrize("runtime", sorted(PROFILES))
def test_comparison_of_real_networks(runtime: str, models: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    steps: list[str] = []

    def progress(step: str, done: float, total: float) -> None:
        steps.append(step)
        seen.append((int(done), int(total)))

    result = bench.benchmark(PROFILES[runtime], models, progress=progress, retries=0)
    (ratio,) = result.ratios
    assert ratio.artefact == models[1].name and ratio.value < 0.8 and ratio.ci95[0] <= ratio.value <= ratio.ci95[1]
    for record, path in zip(result.measurements, models, strict=True):
        samples = [sample for one in record.rounds_ns for sample in one]
        assert record.artefact == path.name and record.samples == len(samples) >= 11
        assert record.latency_ns == record.median_ns == np.median(samples)
        assert record.latency_ci95_ns[0] <= record.latency_ns <= record.latency_ci95_ns[1]
        assert len(record.rounds_ns) >= session.MIN_ROUNDS and record.warmup > 0
        assert record.executed_precision == "fp32" and not record.fresh_process
        assert record.valid == (not record.invalid_reasons)
    assert list(dict.fromkeys(steps)) == ["warm-up", "rounds"]
    done, planned = seen[-1]  # less than planned where a disturbed one took too long
    assert session.MIN_ROUNDS <= done == len(result.reference_ns) <= planned and planned >= session.ROUNDS
    assert from_json(type(result), to_json(result)) == result


@pytest.mark.timed
def test_a_fresh_process_answers_with_the_same_record(models: tuple[Path, Path]) -> None:
    found = bench.benchmark(PROFILES["onnxruntime"], models[1:], statistic="p90", fresh_process=True, retries=0)
    (record,) = found.measurements
    assert record.fresh_process and record.statistic == "p90"
    assert record.samples >= 64 and record.latency_ns == record.p90_ns >= record.median_ns


@pytest.mark.timed
def test_errors_cross_the_process(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing.onnx") as caught:
        bench.compare(PROFILES["onnxruntime"], models[0], tmp_path / "missing.onnx", fresh_process=True)
    assert caught.value.hint


@pytest.mark.timed
def test_the_time_limit_spares_the_rounds_that_are_needed(models: tuple[Path, Path]) -> None:
    record = bench.measure(PROFILES["onnxruntime"], models[0], time_limit_s=0.0, retries=0)
    assert len(record.rounds_ns) == session.MIN_ROUNDS and record.samples >= 11
    p99 = bench.measure(simulated(0), models[0], statistic="p99", time_limit_s=0.0, retries=0)
    assert p99.samples >= 662 and p99.latency_ns == p99.p99_ns


def test_an_invalid_result_is_repeated_once(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [("too noisy",), ()]
    monkeypatch.setattr(session, "objections", lambda *_: answers.pop(0))
    assert bench.measure(simulated(0), models[1]).valid and not answers
    answers += [("noise",), ("more noise",), ()]
    assert bench.measure(simulated(0), models[1]).invalid_reasons == ("more noise",)


def test_the_reference_has_the_same_bytes_everywhere(tmp_path: Path) -> None:
    import hashlib

    path = reference_path(tmp_path / "new")
    onnx.checker.check_model(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "c5457d2a69e1c58e65fbb1e941bd5afbbea5fa86bf9d4e1672cb5aec3565efab"
    path.write_bytes(b"damaged")
    assert hashlib.sha256(reference_path(tmp_path / "new").read_bytes()).hexdigest() == digest
    assert [file.name for file in path.parent.iterdir()] == ["reference.onnx"]


# --- a busy machine, loading, kernels ------------------------------------------------------------------------------------


@pytest.mark.timed
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not tell how long threads wait")
def test_a_machine_made_busy_is_not_valid_and_says_why(models: tuple[Path, Path]) -> None:
    cores = devices.open(PROFILES["onnxruntime"]).facts().cores
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * cores)]
    try:
        record = bench.measure(PROFILES["onnxruntime"], models[1], time_limit_s=3.0, retries=0)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert not record.valid and record.conditions.waiting is not None and record.conditions.waiting > 0.2
    assert any("other work on this machine kept the measured threads waiting" in reason for reason in record.invalid_reasons)


@pytest.mark.timed
@pytest.mark.parametrize("runtime", sorted(PROFILES))
def test_loading_is_measured_in_a_process_of_its_own(runtime: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    large = residual(tmp_path / "large.onnx", (512, 512), 16)
    small, big = (startup.startup(PROFILES[runtime], path) for path in (models[1], large))
    for record in (small, big):
        assert record.load_ns > 0 and record.first_inference_ns > 0 and record.reload_ns > 0
        assert (record.memory_peak_bytes is None) == ("memory_peak_bytes" in record.absent)
    if big.memory_peak_bytes is not None and small.memory_peak_bytes is not None:
        assert big.memory_peak_bytes > max(large.stat().st_size, small.memory_peak_bytes)
    with pytest.raises(UsageError, match="missing.onnx"):
        startup.startup(PROFILES[runtime], tmp_path / "missing.onnx")


@pytest.mark.timed
@pytest.mark.parametrize("runtime", sorted(PROFILES))
def test_every_node_is_in_one_kernel_of_the_profile(runtime: str, models: tuple[Path, Path]) -> None:
    dense, pruned = kernels.profiles(PROFILES[runtime], models)
    for profile, path in ((dense, models[0]), (pruned, models[1])):
        graph = onnx.load(str(path)).graph
        named = [node for kernel in profile.kernels for node in kernel.nodes]
        assert profile.artefact == path.name and len(named) == len(set(named))
        assert set(named) | {"flatten"} == {node.name for node in graph.node} | {"flatten"}
        weights = {tensor.name.removesuffix(".weight") for tensor in graph.initializer if len(tensor.dims) > 1}
        assert weights <= {kernel.name for kernel in profile.kernels}
    found = kernels.difference(dense, pruned)
    changes = {change.name: change for change in found.changes}
    assert found.artefact == models[1].name and changes["b0.conv2"].verdict == "faster"
    assert "0.06x the multiply-accumulates" in changes["b0.conv2"].why
    gained = [abs((change.before_ns or 0) - (change.after_ns or 0)) for change in found.changes]
    assert gained == sorted(gained, reverse=True)


@pytest.mark.timed
def test_multiply_accumulates_are_those_of_the_file(models: tuple[Path, Path]) -> None:
    (profile,) = kernels.profiles(PROFILES["onnxruntime"], models[:1])
    macs = {kernel.name: kernel.macs for kernel in profile.kernels}
    assert macs["b0.conv1"] == 64 * 3 * 9 * 32 * 32 and macs["depthwise"] == 64 * 9 * 8 * 8 and macs["linear"] == 640


@pytest.mark.parametrize("missing", ["first", "second"])
def test_a_kernel_too_short_to_show_in_one_pass_is_no_other_kernel(missing: str) -> None:
    def sample(name: str, latency_ns: int) -> KernelSample:
        return KernelSample(name, "Relu", (name,), (), (), (), (), np.full(5, latency_ns))

    whole, short = (sample("a", 5000), sample("b", 1000), sample("c", 7000)), (sample("a", 5000), sample("c", 7000))
    joined = kernels._joined(*((short, whole) if missing == "first" else (whole, short)))
    assert {kernel.name: float(np.mean(kernel.samples_ns)) for kernel in joined} == {"a": 5000, "b": 500, "c": 7000}


def test_kernels_that_a_session_names_anew_are_told_apart_by_what_they_read() -> None:
    def layout(name: str, tensor: str, latency_ns: int, shape: int = 8) -> KernelSample:
        return KernelSample(name, "Reorder", (), (tensor,), (tensor,), ((shape,),), ((shape,),), np.full(5, latency_ns))

    def means(first: list[KernelSample], second: list[KernelSample]) -> list[float]:
        return [float(np.mean(kernel.samples_ns)) for kernel in kernels._joined(first, second)]

    # ONNX Runtime swaps the names of two layout changes, and may swap their order.
    before = [layout("R", "a", 5000), layout("R_1", "b", 1000)]
    after = [layout("R", "b", 1000), layout("R_1", "a", 5000)]
    assert means(before, after) == [5000, 1000]
    # OpenVINO counts on from what the process compiled before; what has one shape is told apart by its order.
    before = [layout("R_7", "Split_7", 5000), layout("R_8", "Split_8", 3000), layout("R_9", "Split_9", 1000, shape=4)]
    after = [layout("R_17", "Split_17", 5000), layout("R_18", "Split_18", 3000), layout("R_19", "Split_19", 1000, shape=4)]
    assert means(before, after) == [5000, 3000, 1000]


@pytest.mark.timed
def test_a_transposed_convolution_works_at_its_inputs(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="up", strides=[2, 2])
    graph = helper.make_graph(
        [node], "up", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 10, 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 20, 20])],
        [numpy_helper.from_array(np.ones((8, 4, 2, 2), np.float32), "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(tmp_path / "m.onnx"))
    (profile,) = kernels.profiles(PROFILES["onnxruntime"], [tmp_path / "m.onnx"])
    assert sum(kernel.macs for kernel in profile.kernels) == 100 * 8 * 4 * 4


def kernel(name: str, latency_ns: float, macs: int = 1000, **changes: object) -> ProfiledKernel:
    record = ProfiledKernel(
        name=name, op="Conv", implementation="a", nodes=(name,), input_shapes=(), output_shapes=((1, 16, 8, 8),),
        macs=macs, channels=16, latency_ns=latency_ns, iqr_ns=0.0,
    )  # fmt: skip
    return msgspec.structs.replace(record, **changes)


@pytest.mark.parametrize(
    ("before", "after", "verdict", "why"),
    [
        (kernel("k", 1e5), kernel("k", 5e4, 500), "faster", "0.50x the multiply-accumulates"),
        (kernel("k", 1e5), kernel("k", 9e4, 500, channels=12), "faster", "but 0.90x the time: its 12 channels are padded to 16"),
        (kernel("k", 1e5), kernel("k", 1e5, 500, channels=12), "unchanged", "yet its 12 channels are padded to 16"),
        (kernel("k", 9e3), kernel("k", 9e3, 500), "unchanged", "yet in so short a kernel the launch"),
        (kernel("k", 1e5), kernel("k", 1e5, 500), "unchanged", "yet its time does not follow its work"),
        (kernel("k", 1e5), kernel("k", 2e5, 900, implementation="b"), "slower", "another implementation: a -> b"),
        (kernel("k", 1e5), kernel("k", 1.01e5), "unchanged", "the same work"),
        (kernel("k", 1e5, iqr_ns=4e5), kernel("k", 5e4, 500, iqr_ns=4e5), "unchanged", "multiply-accumulates"),
        (kernel("k", 1e5, 0), kernel("k", 5e4, 0, output_shapes=((1, 8, 8, 8),)), "faster", "0.50x the activations"),
        (kernel("k", 1e5), None, "gone", "its nodes run inside host"),
        (kernel("gone", 1e5), None, "gone", "no longer in the file"),
        (None, kernel("ReorderInput", 1e5, nodes=()), "new", "a change of layout (Conv) on one side only"),
    ],
)
def test_what_changed_and_why(before: ProfiledKernel | None, after: ProfiledKernel | None, verdict: str, why: str) -> None:
    host = kernel("host", 3e5, nodes=("host", "k"))
    sides = [
        KernelProfile(artefact=name, runs=80, kernels=(host, *([own] if own else [])))
        for name, own in (("first", before), ("second", after))
    ]
    name = (before or after or host).name
    change = next(change for change in kernels.difference(*sides).changes if change.name == name)
    assert change.verdict == verdict and why in change.why


# --- the gate ------------------------------------------------------------------------------------------------------------


def earlier_of(models: tuple[Path, ...], seed: int = 0, **how: object) -> Benchmark:
    return bench.benchmark(simulated(seed), models, retries=0, **how)  # type: ignore[arg-type]


def simulated(seed: int) -> Profile:
    profile = profiles.load("simulated-cpu")
    assert profile.simulation
    return msgspec.structs.replace(profile, simulation=msgspec.structs.replace(profile.simulation, seed=seed))


def test_a_gate_lets_the_same_pass_on_a_machine_that_became_slower(models: tuple[Path, Path]) -> None:
    """Both are held against the reference, so the device's own speed does not matter."""
    now, then = earlier_of(models[:1], 1), earlier_of(models[:1], 2)
    slower = msgspec.structs.replace(
        then,
        reference_ns=tuple(tuple(2 * ns for ns in one) for one in then.reference_ns),
        measurements=tuple(
            msgspec.structs.replace(each, rounds_ns=tuple(tuple(2 * ns for ns in one) for one in each.rounds_ns))
            for each in then.measurements
        ),
    )
    (plain,), (scaled,) = gate.against(now, then, "then.json", 1.05), gate.against(now, slower, "then.json", 1.05)
    assert plain.passed and plain == scaled and abs(plain.ratio - 1) < 0.02
    assert plain.ratio_ci95[0] <= plain.ratio <= plain.ratio_ci95[1]


@pytest.mark.parametrize("statistic", ["median", "p90"])
def test_a_gate_finds_what_became_slower(models: tuple[Path, Path], tmp_path: Path, statistic: str) -> None:
    import shutil

    fast = earlier_of((models[1],), statistic=statistic)
    shutil.copy(models[0], tmp_path / models[1].name)  # the file that was fast is the slow one now
    slow = earlier_of((tmp_path / models[1].name,), 5, statistic=statistic)
    (found,) = gate.against(slow, fast, "fast.json", 1.05)
    assert not found.passed and found.ratio > 1.5 and found.against == f"fast.json: {models[1].name}"
    (back,) = gate.against(fast, slow, "slow.json", 1.05)
    assert back.passed and back.ratio == pytest.approx(1 / found.ratio, rel=1e-3)
    (same,) = gate.against(fast, fast, "fast.json", 1.0)
    assert same.passed and same.ratio == 1 and "includes the limit" in same.notes[-1]


def test_a_gate_refuses_what_cannot_be_compared(models: tuple[Path, Path]) -> None:
    found = earlier_of(models)
    gpu = bench.benchmark(profiles.load("simulated-gpu"), models, retries=0)
    invalid = msgspec.structs.replace(
        found, measurements=tuple(msgspec.structs.replace(m, valid=False, invalid_reasons=("noise",)) for m in found.measurements)
    )
    renamed = msgspec.structs.replace(
        found, measurements=tuple(msgspec.structs.replace(m, artefact=f"x{i}") for i, m in enumerate(found.measurements))
    )
    for other, message in (
        (gpu, "another device: simulated-gpu"),
        (invalid, "not valid: noise"),
        (earlier_of(models, statistic="p90"), "holds the p90"),
        (earlier_of(models, sustained_s=5.0), "after 5 s of sustained load, not after 0 s"),
        (renamed, "has no dense.onnx, but x0, x1"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            gate.against(found, other, "earlier.json", 1.05)
        assert caught.value.hint


def test_a_new_runtime_is_compared_as_measured_because_its_reference_is_new_too(models: tuple[Path, Path]) -> None:
    found = earlier_of(models)
    newer = msgspec.structs.replace(
        found,
        fingerprint=msgspec.structs.replace(found.fingerprint, runtime_version="2"),
        reference_ns=tuple(tuple(3 * ns for ns in one) for one in found.reference_ns),
    )
    for judged in gate.against(newer, found, "earlier.json", 1.05):
        assert judged.passed and judged.ratio == 1 and "without the reference" in judged.notes[0]


def test_what_is_not_valid_does_not_pass(models: tuple[Path, Path]) -> None:
    found = earlier_of(models)
    worse = msgspec.structs.replace(
        found, measurements=tuple(msgspec.structs.replace(m, valid=False, invalid_reasons=("x",)) for m in found.measurements)
    )
    assert all(judged.passed for judged in gate.against(found, found, "earlier.json", 1.05))
    assert not any(judged.passed for judged in gate.against(worse, found, "earlier.json", 1.05))


def test_files_of_one_name_are_told_apart(models: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    paths = [tmp_path / "v1" / "model.onnx", tmp_path / "v2" / "model.onnx"]
    for path, model in zip(paths, models, strict=True):
        path.parent.mkdir()
        shutil.copy(model, path)
    assert bench.labels(paths) == ["v1/model.onnx", "v2/model.onnx"]
    assert bench.labels([paths[0], models[0], paths[0]]) == ["model.onnx", "dense.onnx", "model.onnx #2"]
    both = earlier_of(tuple(paths))
    swapped = gate.against(earlier_of(tuple(paths[::-1])), both, "both.json", 1.05)
    assert [judged.against for judged in swapped] == ["both.json: v2/model.onnx", "both.json: v1/model.onnx"]
    assert all(judged.passed and abs(judged.ratio - 1) < 0.02 for judged in swapped)


def test_artefacts_of_one_session_are_held_against_the_first(models: tuple[Path, Path]) -> None:
    found = earlier_of((models[1], models[0], models[1]))
    slower, same = gate.beside(found, 1.05)
    assert not slower.passed and same.passed and slower.against == models[1].name

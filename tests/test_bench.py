"""Measurements: what the statistics promise, on simulated drift; what a session records, on real networks."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
from networks import residual
from numpy.typing import NDArray

from toolkit import bench
from toolkit.bench import session, stats, timing
from toolkit.errors import UsageError
from toolkit.schema import Load, Profile, from_json, to_json

pytestmark = [pytest.mark.slow, pytest.mark.timed]

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


@pytest.mark.parametrize(("statistic", "fewest"), [("median", 11), ("p90", 64), ("p99", 662)])
def test_a_percentile_needs_its_samples(statistic: stats.Statistic, fewest: int) -> None:
    samples = np.arange(1, fewest + 1, dtype=np.int64)
    assert stats.percentile(samples[1:], statistic) is None
    assert stats.percentile(samples, statistic) == pytest.approx(np.quantile(samples, stats.QUANTILES[statistic]))


@pytest.mark.parametrize("statistic", ["median", "p90", "p99"])
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
        assert stats._resampled(rounds, draws, statistic) == pytest.approx(plain, rel=2e-3)


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
    rounds: tuple[Simulated, ...], reference: Simulated, load: Load | None = None, half_width: float = 0.01
) -> tuple[str, ...]:
    taken = session.Taken(rounds, reference, (0,) * len(rounds), ("fp32",) * len(rounds), load or Load())
    return session.objections(taken, "median", 11, (1 - half_width, 1 + half_width), 1.0)


def test_a_quiet_session_is_valid_and_each_trouble_is_named() -> None:
    steady = [np.full(10, 100, np.int64) for _ in range(12)]
    alternating = [np.full(10, 100 + 20 * (index % 2), np.int64) for index in range(12)]
    rising = [np.full(10, 100 + 4 * index, np.int64) for index in range(12)]
    busy = Load(cpu_pressure=0.6, steal=0.2)
    assert objections((steady, steady), steady) == ()
    assert "even and odd" in objections((steady, alternating), steady)[0]
    assert "interval" in objections((steady, steady), steady, half_width=0.041)[0]
    assert "rounds" in objections((steady[:5], steady[:5]), steady[:5])[0]
    assert any("samples" in reason for reason in objections(([steady[0][:1]] * 5,) * 2, steady[:5]))
    # other load counts only where it shows in the result
    assert objections((steady, steady), steady, busy, 0.01) == ()
    assert len(objections((steady, steady), steady, busy, 0.03)) == 2
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


def test_rounds_visit_forwards_and_backwards() -> None:
    visited: list[str] = []
    calls = [lambda name=name: visited.append(name) for name in "ABC"]
    rounds = list(timing.interleaved(calls, [1, 2, 3], 2))
    assert [len(samples) for samples in rounds[0]] == [2, 4, 6]
    order = [name for index, name in enumerate(visited) if index == 0 or visited[index - 1] != name]
    assert "".join(order) == "ABCBABCBA"  # equal neighbours merged: A B C C B A, A B C C B A


def test_bursts_fill_a_visit_within_bounds() -> None:
    assert timing.burst_length(1e9) == 1
    assert timing.burst_length(1e9, at_least=14) == 14
    assert timing.burst_length(1e6) == 20
    assert timing.burst_length(1e3) == timing.MAX_BURST


# --- real networks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return residual(folder / "dense.onnx", (64, 64, 64), 64), residual(folder / "model.onnx", (16, 16, 16), 64)


@pytest.mark.parametrize("runtime", sorted(PROFILES))
def test_comparison_of_real_networks(runtime: str, models: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    result = bench.compare(PROFILES[runtime], *models, progress=lambda done, total: seen.append((done, total)), retries=0)
    assert result.ratio < 0.8 and result.ratio_ci95[0] <= result.ratio <= result.ratio_ci95[1]
    for record, path in ((result.dense, models[0]), (result.pruned, models[1])):
        samples = [sample for one in record.rounds_ns for sample in one]
        assert record.artefact == path.name and record.samples == len(samples) >= 11
        assert record.latency_ns == record.median_ns == np.median(samples)
        assert len(record.rounds_ns) >= session.MIN_ROUNDS and record.warmup > 0
        assert record.executed_precision == "fp32" and not record.fresh_process
        assert record.valid == (not record.invalid_reasons)
    assert result.pruned_ci95_ns[0] <= result.pruned.latency_ns <= result.pruned_ci95_ns[1]
    assert seen[-1] == (session.ROUNDS, session.ROUNDS)
    assert from_json(type(result), to_json(result)) == result


def test_a_fresh_process_answers_with_the_same_record(models: tuple[Path, Path]) -> None:
    record = bench.measure(PROFILES["onnxruntime"], models[1], statistic="p90", fresh_process=True, retries=0)
    assert record.fresh_process and record.statistic == "p90"
    assert record.samples >= 64 and record.latency_ns == record.p90_ns >= record.median_ns


def test_errors_cross_the_process(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing.onnx") as caught:
        bench.compare(PROFILES["onnxruntime"], models[0], tmp_path / "missing.onnx", fresh_process=True)
    assert caught.value.hint


def test_a_session_cut_short_is_not_valid(models: tuple[Path, Path]) -> None:
    record = bench.measure(PROFILES["onnxruntime"], models[0], time_limit_s=0.0, retries=0)
    assert not record.valid and "rounds" in record.invalid_reasons[0]


def test_an_invalid_result_is_repeated(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    real = session.take

    def take(*args: object) -> session.Taken:
        tried.append(1)
        return real(*args[:4], 0.0 if len(tried) == 1 else 60.0, None)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "take", take)
    bench.measure(PROFILES["onnxruntime"], models[1], retries=1)
    assert len(tried) == 2


def test_the_reference_has_the_same_bytes_everywhere(tmp_path: Path) -> None:
    import hashlib

    path = bench.reference_path(tmp_path / "new")
    onnx.checker.check_model(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "c5457d2a69e1c58e65fbb1e941bd5afbbea5fa86bf9d4e1672cb5aec3565efab"
    path.write_bytes(b"damaged")
    assert hashlib.sha256(bench.reference_path(tmp_path / "new").read_bytes()).hexdigest() == digest
    assert [file.name for file in path.parent.iterdir()] == ["reference.onnx"]

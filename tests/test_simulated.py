"""The simulated device: its law, its disturbances, and what a benchmark says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from networks import residual
from onnx import TensorProto, helper, numpy_helper

from toolkit import backends, bench, devices, profiles
from toolkit.backends.simulated import plan
from toolkit.bench import session
from toolkit.errors import UsageError
from toolkit.schema import Benchmark, Burst, Drift, Heat, Law, Profile, Simulation, to_json

LAW = Law(macs_per_s=1e10, bytes_per_s=1e10, launch_ns=1000.0, inference_ns=5000.0, block_in=8, block_out=16)


def simulated(seed: int = 0, law: Law = LAW, **disturbances: Any) -> Profile:
    simulation = Simulation(law=law, seed=seed, **disturbances)
    return msgspec.structs.replace(profiles.load("simulated-cpu"), simulation=simulation)


def network(path: Path, *nodes: onnx.NodeProto, out: list[int], **weights: tuple[int, ...]) -> Path:
    """A file with one input [1, 8, 10, 10] and one output `y`."""
    graph = helper.make_graph(
        list(nodes),
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 10, 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def costs(path: Path, law: Law) -> list[tuple[str, float]]:
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph
    return [(kernel.op, kernel.cost_ns) for kernel in plan(graph, law)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return residual(folder / "dense.onnx", (64, 64, 64), 64), residual(folder / "model.onnx", (16, 16, 16), 64)


# --- the law -------------------------------------------------------------------------------------------------------------


def conv(path: Path, c_out: int, c_in: int = 8) -> Path:
    return network(path, helper.make_node("Conv", ["x", "w"], ["y"]), out=[1, c_out, 8, 8], w=(c_out, c_in, 3, 3))


def test_a_convolution_costs_its_launch_and_its_padded_work(tmp_path: Path) -> None:
    [(_, cost)] = costs(conv(tmp_path / "m.onnx", 16), LAW)
    assert cost == pytest.approx(1000 + 64 * 9 * 8 * 16 / 1e10 * 1e9)


def test_the_law_is_a_staircase(tmp_path: Path) -> None:
    cost = [costs(conv(tmp_path / "m.onnx", width), LAW)[0][1] for width in range(1, 50)]
    steps = [i + 1 for i in range(1, 49) if cost[i] != cost[i - 1]]
    assert steps == [17, 33, 49] and cost == sorted(cost)


def test_memory_bounds_what_computes_little(tmp_path: Path) -> None:
    slow = msgspec.structs.replace(LAW, bytes_per_s=1e8)
    [(_, cost)] = costs(conv(tmp_path / "m.onnx", 16), slow)
    moved = 4 * (8 * 100 + 16 * 8 * 9 + 16 * 64)
    assert cost == pytest.approx(1000 + moved / 1e8 * 1e9)


def test_a_wave_of_tiles_is_paid_whole(tmp_path: Path) -> None:
    """64 pixels in tiles of 16 and one block of channels are four tiles; eight at a time leave half the device idle."""
    waves = msgspec.structs.replace(LAW, tiles=8, tile_pixels=16)
    [(_, whole)], [(_, idle)] = costs(conv(tmp_path / "m.onnx", 32), waves), costs(conv(tmp_path / "n.onnx", 16), waves)
    assert idle == whole == pytest.approx(1000 + 64 * 9 * 8 * 32 / 1e10 * 1e9)


def test_element_wise_nodes_ride_along_and_views_are_free(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2]),
        helper.make_node("Flatten", ["c"], ["y"]),
    ]
    found = costs(network(tmp_path / "m.onnx", *nodes, out=[1, 784], w=(16, 8, 3, 3)), LAW)
    assert [op for op, _ in found] == ["Conv", "MaxPool"]
    assert found[0][1] == pytest.approx(costs(conv(tmp_path / "n.onnx", 16), LAW)[0][1])
    assert found[1][1] == pytest.approx(1000 + 4 * (16 * 64 + 784) / 1e10 * 1e9)


def test_depthwise_runs_at_its_own_rate(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=8)
    path = network(tmp_path / "m.onnx", node, out=[1, 8, 8, 8], w=(8, 1, 3, 3))
    fast, slow = (costs(path, msgspec.structs.replace(LAW, grouped_rate=rate))[0][1] - 1000 for rate in (1.0, 0.1))
    assert fast == pytest.approx(64 * 9 * 16 / 1e10 * 1e9) and slow == pytest.approx(10 * fast)


def quantized(path: Path, weight: str = "dw", kind: type = np.int8) -> Path:
    """A convolution with Q/DQ around its input, its weight and its output."""
    nodes = (
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["qx"]),
        helper.make_node("DequantizeLinear", ["qx", "scale", "zero"], ["dx"]),
        helper.make_node("DequantizeLinear", ["qw", "scale", "zero"], ["dw"]),
        helper.make_node("Conv", ["dx", weight], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("QuantizeLinear", ["b", "scale", "zero"], ["qb"]),
        helper.make_node("DequantizeLinear", ["qb", "scale", "zero"], ["y"]),
    )
    network(path, *nodes, out=[1, 16, 8, 8], w=(16, 8, 3, 3))
    model = onnx.load(str(path))
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.float32(0.1), "scale"),
            numpy_helper.from_array(kind(0), "zero"),
            numpy_helper.from_array(np.ones((16, 8, 3, 3), kind), "qw"),
        ]
    )
    model.opset_import[0].version = 21  # the first with 16-bit integers
    onnx.save(model, str(path))
    return path


INT8 = msgspec.structs.replace(LAW, int8_rate=4.0)


def test_integers_run_at_their_rate_and_move_a_byte_an_entry(tmp_path: Path) -> None:
    path = quantized(tmp_path / "m.onnx")
    (first, entering), (second, cost) = costs(path, INT8)
    work = 64 * 9 * 8 * 16
    assert (first, second) == ("QuantizeLinear", "Conv")
    assert entering == pytest.approx(1000 + (4 * 800 + 800 + 4 + 1) / 1e10 * 1e9)
    assert cost == pytest.approx(1000 + work / 4e10 * 1e9)
    (_, _), (_, bound) = costs(path, msgspec.structs.replace(INT8, bytes_per_s=1e8))
    assert bound == pytest.approx(1000 + (800 + 16 * 8 * 9 + 16 * 64 + 4 + 1) / 1e8 * 1e9)
    (_, _), (_, without) = costs(path, LAW)
    assert without == pytest.approx(1000 + work / 1e10 * 1e9)


@pytest.mark.parametrize("how", [{"weight": "w"}, {"kind": np.int16}])
def test_floats_and_wider_integers_run_at_the_rate_of_floats(how: dict[str, Any], tmp_path: Path) -> None:
    (_, _), (_, cost) = costs(quantized(tmp_path / "m.onnx", **how), INT8)
    assert cost == pytest.approx(1000 + 64 * 9 * 8 * 16 / 1e10 * 1e9)


def test_integers_are_rounded_and_their_precision_is_told(tmp_path: Path, models: tuple[Path, Path]) -> None:
    backend = devices.open(simulated(law=INT8)).backend("simulated")
    session_ = backend.open(quantized(tmp_path / "m.onnx"), threads=1, precision="int8")
    x = np.random.default_rng(0).uniform(-1, 1, (1, 8, 10, 10)).astype(np.float32)
    (y,) = session_.run({"x": x})
    windows = np.lib.stride_tricks.sliding_window_view(np.round(x / np.float32(0.1)), (3, 3), (2, 3)).sum((1, 4, 5))
    expected = np.clip(np.round(windows * 0.1), 0, 127) * 0.1
    assert y == pytest.approx(np.broadcast_to(expected[:, None], y.shape), abs=0.11)  # a sum that ends in .5 may go either way
    assert len(np.unique(np.round(y / 0.1, 3))) > 10 and np.abs(y / 0.1 - np.round(y / 0.1)).max() < 1e-4
    assert session_.executed_precision()[0] == "int8"
    assert backend.open(models[0], threads=1, precision="int8").executed_precision()[0] == "fp32"


def test_an_inference_is_the_sum_of_its_kernels(models: tuple[Path, Path]) -> None:
    device = devices.open(simulated())
    backend = device.backend("simulated")
    session_ = backend.open(models[0], threads=1, precision="fp32")
    call = session_.prepare(backends.random_feeds(session_.inputs, 0))
    before = device.clock_ns()
    call()
    took = device.clock_ns() - before
    kernels = backend.profile(models[0], threads=1, precision="fp32", runs=2)
    assert sum(kernel.samples_ns[0] for kernel in kernels) + 5000 == pytest.approx(took, rel=1e-3)
    named = [node for kernel in kernels for node in kernel.nodes]
    assert len(named) == len(set(named)) and set(named) == {node.name for node in onnx.load(str(models[0])).graph.node}


def test_values_are_those_of_a_real_runtime(models: tuple[Path, Path]) -> None:
    mine = devices.open(simulated()).backend("simulated").open(models[0], threads=1, precision="fp32")
    real = backends.get("onnxruntime").open(models[0], threads=1, precision="fp32")
    feeds = backends.random_feeds(real.inputs, 1)
    assert mine.inputs == real.inputs and mine.outputs == real.outputs
    assert np.array_equal(mine.run(feeds)[0], real.run(feeds)[0])


def test_a_shape_that_is_not_known_is_refused_with_the_tensor(tmp_path: Path) -> None:
    nodes = [helper.make_node("Strange", ["x"], ["odd"], domain="mine"), helper.make_node("Relu", ["odd"], ["y"])]
    path = network(tmp_path / "m.onnx", *nodes, out=[1, 8, 10, 10])
    model = onnx.load(str(path))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(model, str(path))
    with pytest.raises(UsageError, match="shape of odd is not known"):
        devices.open(simulated()).backend("simulated").open(path, threads=1, precision="fp32")


def test_what_it_cannot_run_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    backend = devices.open(simulated()).backend("simulated")
    (tmp_path / "broken.onnx").write_bytes(models[0].read_bytes()[:3000])
    for path, precision, message in (
        (tmp_path / "missing.onnx", "fp32", "does not exist"),
        (tmp_path / "broken.onnx", "fp32", "cannot open"),
        (models[0], "int8", "no precision"),
    ):
        for action in (backend.open, lambda p, **how: backend.profile(p, runs=1, **how)):
            with pytest.raises(UsageError, match=message):
                action(path, threads=1, precision=precision)


# --- what a benchmark says of its disturbances ---------------------------------------------------------------------------

DRIFT = {"drift": Drift(deviation=0.1, correlation_s=0.5), "noise": 0.03}


def compare(models: tuple[Path, ...], profile: Profile, **how: Any) -> Benchmark:
    return bench.benchmark(profile, models, retries=0, **how)


def test_the_same_seed_gives_the_same_record(models: tuple[Path, Path]) -> None:
    first, again, other = (to_json(compare(models, simulated(seed, **DRIFT))) for seed in (1, 1, 2))
    assert first == again != other
    fresh = to_json(compare(models, simulated(1, **DRIFT), fresh_process=True))
    assert fresh.replace('"fresh_process": true', '"fresh_process": false') == first


@pytest.mark.slow
def test_a_model_against_itself_is_one_under_autocorrelated_drift(models: tuple[Path, Path]) -> None:
    covered = drifted = 0
    for seed in range(100):
        found = compare((models[0], models[0]), simulated(seed, **DRIFT))
        low, high = found.ratios[0].ci95
        covered += low <= 1 <= high
        drifted += abs(found.measurements[0].drift) > 0.03
    assert covered >= 93 and drifted >= 50


@pytest.mark.slow
def test_a_planted_difference_of_five_percent_is_found(models: tuple[Path, Path], tmp_path: Path) -> None:
    """The second file has further nodes at its beginning, as many as take about 5 % of the first one's time."""
    model, planted = onnx.load(str(models[0])), tmp_path / "planted.onnx"
    whole = LAW.inference_ns + sum(cost for _, cost in costs(models[0], LAW))
    count = round(0.05 * whole / (LAW.launch_ns + 2 * 4 * 3 * 64 * 64 / LAW.bytes_per_s * 1e9))
    for node in model.graph.node:
        node.input[:] = [f"planted_{count - 1}" if name == "x" else name for name in node.input]
    for index in reversed(range(count)):
        source = f"planted_{index - 1}" if index else "x"
        model.graph.node.insert(0, helper.make_node("Softmax", [source], [f"planted_{index}"], name=f"planted_{index}"))
    onnx.save(model, str(planted))
    share = (LAW.inference_ns + sum(cost for _, cost in costs(planted, LAW))) / whole
    assert count > 0 and 1.045 < share < 1.055
    found = 0
    for seed in range(100):
        ratio = compare((models[0], planted), simulated(seed, **DRIFT)).ratios[0]
        found += 1 < ratio.ci95[0] and abs(ratio.value / share - 1) < 0.02
    assert found >= 90


def test_a_quiet_device_is_valid_and_each_disturbance_is_named(models: tuple[Path, Path]) -> None:
    def reasons(**disturbances: Any) -> str:
        found = compare(models, simulated(3, **disturbances)).measurements[0]
        assert found.valid == (not found.invalid_reasons)
        return "; ".join(found.invalid_reasons)

    assert reasons() == "" == reasons(noise=0.02, drift=Drift(deviation=0.03, correlation_s=2.0))
    busy = reasons(burst=Burst(share=0.5, length_s=0.1, takes=0.5))
    assert "other work on this machine kept the measured threads waiting for a core" in busy
    hot = Heat(ambient_c=40, rise_c=60, tau_s=3.0, limit_c=70, slope=0.02)
    throttling = reasons(heat=hot)
    assert "the processor throttled 1 times" in throttling and "the clock changed between" in throttling
    assert "--sustained" in throttling


def test_sustained_measures_the_settled_speed(models: tuple[Path, Path]) -> None:
    hot = Heat(ambient_c=40, rise_c=60, tau_s=3.0, limit_c=70, slope=0.02)
    profile, cool = simulated(3, heat=hot), compare(models, simulated(3)).measurements[0]
    settled = compare(models, profile, sustained_s=40.0)
    first = settled.measurements[0]
    assert first.valid, first.invalid_reasons
    # In balance the heat that the clock allows keeps the clock: t = 40 + 60 c and c = 1 - 0.02 (t - 70).
    clock = (1 - 0.02 * (40 - 70)) / (1 + 0.02 * 60)
    assert first.conditions.clock_hz == pytest.approx((clock * 1e9,) * 2, rel=0.01)
    assert first.latency_ns == pytest.approx(cool.latency_ns / clock, rel=0.01)
    assert settled.sustained_s == 40 and "after 40 s" in first.scope and first.warmup > 10 * cool.warmup


def test_invalid_is_tried_again_on_the_same_device(models: tuple[Path, Path]) -> None:
    """The burst is over by the second session: had it begun anew, the same seed would have met the same burst."""
    for seed in range(20):
        profile = simulated(seed, burst=Burst(share=0.2, length_s=4.0, takes=0.7))
        if not compare(models, profile).measurements[0].valid:
            if bench.benchmark(profile, models, retries=1).measurements[0].valid:
                return
    raise AssertionError("no session of 20 was mended by trying again")


def test_energy_follows_time_and_power(models: tuple[Path, Path]) -> None:
    found = compare(models, simulated(0, heat=Heat(power_w=4.0)))
    for measured in found.measurements:
        assert measured.energy_j == pytest.approx(4.0 * measured.latency_ns / 1e9, rel=0.01)


@pytest.mark.parametrize(("statistic", "fewest"), [("p95", 130), ("p99", 662)])
def test_a_high_percentile_takes_what_it_needs_however_long(models: tuple[Path, Path], statistic: Any, fewest: int) -> None:
    slow = msgspec.structs.replace(LAW, inference_ns=2e8)
    found = compare(models, simulated(law=slow), statistic=statistic, time_limit_s=1.0).measurements[0]
    assert found.samples >= fewest and found.valid and getattr(found, f"{statistic}_ns") == found.latency_ns


@pytest.mark.slow
def test_a_percentile_of_a_noisy_device_takes_more_rounds_until_it_is_known(models: tuple[Path, Path]) -> None:
    def taken(time_limit_s: float) -> Any:
        (found,) = compare(models[:1], simulated(1, noise=0.5), statistic="p99", time_limit_s=time_limit_s).measurements
        return found

    short, long = taken(1.0), taken(600.0)
    assert not short.valid and "the 95 % interval is" in short.invalid_reasons[0] and short.samples >= 662
    assert long.valid and long.samples > 2 * short.samples
    assert long.latency_ci95_ns[1] - long.latency_ci95_ns[0] < 0.08 * long.latency_ns


def test_a_percentile_without_its_samples_is_null_with_a_reason(models: tuple[Path, Path]) -> None:
    slow = msgspec.structs.replace(LAW, inference_ns=2e8)
    found = compare(models, simulated(law=slow)).measurements[0]
    assert found.p90_ns is None and found.p99_ns is None and found.median_ns
    assert found.absent["p90_ns"] == f"{found.samples} samples, 64 are needed"
    assert set(found.absent) == {"p90_ns", "p95_ns", "p99_ns"}


def test_any_number_of_artefacts(models: tuple[Path, Path]) -> None:
    found = compare((*models, models[0]), simulated(0, **DRIFT))
    assert [measured.artefact for measured in found.measurements] == ["dense.onnx", "model.onnx", "dense.onnx #2"]
    assert len(found.ratios) == 2 and found.ratios[0].value < 0.8
    assert found.ratios[1].ci95[0] <= 1 <= found.ratios[1].ci95[1]
    assert len(found.reference_ns) == len(found.measurements[0].rounds_ns) == session.ROUNDS

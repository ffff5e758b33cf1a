"""Latency tables: known laws are recovered, files survive damage and interruption, what was measured is used again."""

from __future__ import annotations

import itertools
import math
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from widths import GROUPS, form

from toolkit import backends, devices, profiles
from toolkit.backends import simulated
from toolkit.devices.simulated import Simulated
from toolkit.errors import TableError
from toolkit.latency import LatencyModel, ModelTable
from toolkit.latency.alignment import Alignment, Observations, probe_alignment
from toolkit.latency.fit import fit_model, judge, observe
from toolkit.latency.formula import Formula, fit_formula
from toolkit.latency.predict import KernelFit
from toolkit.latency.residual import fit_residual
from toolkit.latency.sampling import DENSE_VISITS, sample_widths
from toolkit.latency.segments import cut_out, find_segments
from toolkit.latency.sites import Site, find_sites
from toolkit.latency.table import (
    NetworkSample,
    SampleSet,
    adopt_table,
    append_partial,
    identity,
    kernel_rows,
    load_samples,
    load_table,
    locked,
    merge_table,
    read_partial,
    save_samples,
    share_table,
)
from toolkit.latency.variants import VariantMaker
from toolkit.schema import Drift, Fingerprint, HeldOut, Law, MeasuredModel, Profile

FINGERPRINT = Fingerprint(
    device="here", runtime="onnxruntime", runtime_version="1", precision="fp32", threads=1, batch=1, instruction_set="any"
)
PROFILE = Profile(id="here", device="here", runtime="onnxruntime", format="onnx")
DENSE = {name: full for name, (_, full) in GROUPS.items()}
CANDIDATES = {name: range(4, full + 1, 4) for name, full in DENSE.items()}


# --- sampling -----------------------------------------------------------------------------------------------------------------


def test_every_candidate_is_sampled_and_widths_between_them() -> None:
    candidates = {"a": range(4, 65, 4), "b": range(32, 257, 32), "c": (5,)}
    plan = sample_widths({name: list(widths) for name, widths in candidates.items()}, 64, 0)
    assert len(plan) >= 55 and sum(role == "held_out" for role, _ in plan) >= 8
    dense = [index for index, (_, widths) in enumerate(plan) if widths == {"a": 64, "b": 256, "c": 5}]
    assert len(dense) == DENSE_VISITS and (dense[0], dense[-1]) == (0, len(plan) - 1)
    assert max(np.diff(dense)) - min(np.diff(dense)) <= 1
    others = [tuple(widths.values()) for _, widths in plan if widths != plan[0][1]]
    assert len(set(others)) == len(others)
    fitted = [widths for role, widths in plan if role == "train"]
    for name, widths in candidates.items():
        assert {chosen[name] for chosen in fitted} >= set(widths)
        assert all(min(widths) <= chosen[name] <= max(widths) for _, chosen in plan)
    assert sum(chosen["a"] % 4 != 0 for chosen in fitted) >= 10 and {chosen["c"] for _, chosen in plan} == {5}


# --- formulas -------------------------------------------------------------------------------------------------------------------


def cells(alignment: Alignment, count: int, seed: int, most: int = 512) -> Any:
    rng = np.random.default_rng(seed)
    pairs = rng.integers(4, most, (count, 2))
    return np.array([(i, o, *alignment.padded(int(i), int(o))) for i, o in pairs], np.int64)


def blocks_and_bytes(at: Any, wave: float, step: int) -> tuple[Any, Any]:
    n = at[:, 3] / step
    return 20 * at[:, 2] * step * (np.ceil(n * wave) / wave if wave else n), 3000 * at[:, 0] + 2000 * at[:, 1] + 5.0 * at[
        :, 0
    ] * at[:, 1]


@pytest.mark.slow
@pytest.mark.parametrize("wave", [0.0, 1 / 4, 5 / 16, 3 / 4])
def test_a_kernel_that_waits_for_the_slower_of_two_is_recovered(wave: float) -> None:
    alignment = Alignment(8, 32)
    seen, new = cells(alignment, 70, 0), cells(alignment, 200, 1)
    law = lambda at: 5000 + np.maximum(*blocks_and_bytes(at, wave, 32))  # noqa: E731
    found = fit_formula(seen, law(seen), 32)
    error = np.abs(found.at(new) / law(new) - 1)
    assert error.mean() < 0.01 and not (found.wave and not wave)


def test_kernels_one_after_the_other_add_up() -> None:
    alignment = Alignment(16, 16)
    seen, new = cells(alignment, 60, 0), cells(alignment, 200, 1)
    law = lambda at: 5000 + sum(blocks_and_bytes(at, 0.0, 16))  # noqa: E731
    found = fit_formula(seen, law(seen), 16)
    assert found.slower is None and np.allclose(found.at(new), law(new), rtol=1e-3)


def test_the_residual_learns_what_belongs_to_one_side_and_nothing_from_nothing() -> None:
    rng = np.random.default_rng(0)
    seen, new = rng.integers(1, 9, (80, 2)) * 16, rng.integers(1, 9, (40, 2)) * 16
    side = dict(zip(range(16, 129, 16), rng.normal(0, 0.06, 8), strict=True))
    of = lambda at: np.array([side[int(out)] for out in at[:, 1]])  # noqa: E731
    found = fit_residual(seen, of(seen) + rng.normal(0, 0.005, 80))
    assert np.abs(found.at(new) - of(new)).mean() < 0.01
    quiet = fit_residual(seen, rng.normal(0, 0.01, 80))
    assert np.abs(quiet.at(new)).mean() < 0.005
    assert fit_residual(seen[:0], np.empty(0)).at(new).tolist() == [0.0] * 40


def test_widths_that_run_other_kernels_are_told_apart_by_their_cost() -> None:
    def cost(i: int, o: int) -> float:
        return (2.2 if i % 8 else 1.0) * (4000 + 12.0 * i * o) + (9000 if o % 16 else 0)

    rng = np.random.default_rng(0)
    pairs = [(int(i), int(o)) for i, o in rng.integers(8, 128, (150, 2))] + [
        (int(i) * 16, int(o) * 16) for i, o in rng.integers(1, 9, (150, 2))
    ]
    data = Observations(
        np.array([i for i, _ in pairs]), np.array([o for _, o in pairs]), np.array([cost(*pair) for pair in pairs]), ("k",) * 300
    )
    found = probe_alignment([data])
    assert found.multiple == 8 and found.multiple_out in (8, 16)
    assert len({found.regime(*pair) for pair in ((24, 32), (25, 32), (25, 33), (24, 33))}) == 4


# --- a law of our own -----------------------------------------------------------------------------------------------------------

LAW_GROUPS = {"s": 64, "t": 64, "u": 96}
LAW_SITES = tuple(
    Site(f"site{index}", key, kind, c_in, c_out, ())
    for index, (key, kind, c_in, c_out) in enumerate(
        [
            ("stem", "Conv", form(const=3), form("s")),
            ("mix", "Conv", form("s"), form("t")),
            ("mix", "Conv", form("t"), form("u")),
            ("wide", "Conv", form("u"), form("s", const=16)),
            ("head", "Gemm", form("s"), form(const=10)),
        ]
    )
)


def law(key: str, c_in: int, c_out: int) -> float:
    """A staircase: channels padded to 16, another kernel below 16 channels in."""
    if c_in == 0 or c_out == 0:
        return 0.0
    out = math.ceil(c_out / 16) * 16
    if key == "head":
        return 30_000.0 + 400 * c_in
    if c_in < 16:
        return 25_000.0 + 300 * c_in * out
    padded = math.ceil(c_in / 16) * 16
    return (40_000.0 if key == "mix" else 70_000.0) + 500 * out + 200 * padded * out


def law_latency(widths: dict[str, int]) -> float:
    return 20_000 + sum(law(site.key, site.c_in.at(widths), site.c_out.at(widths)) for site in LAW_SITES)


def law_network(widths: dict[str, int], role: str, rng: random.Random, noise: float = 0.0) -> NetworkSample:
    """Profiled while the machine has some other speed, which nothing but the network's own end-to-end latency shows."""
    slow, profiler_cost = rng.uniform(0.9, 1.15), 1500.0
    times = [law(site.key, site.c_in.at(widths), site.c_out.at(widths)) + profiler_cost for site in LAW_SITES]
    return NetworkSample(
        widths=widths,
        role=role,
        ratio=law_latency(widths) / 5e6 * (1 + rng.gauss(0, noise)),
        anchor_ns=5e6,
        reference_ns=1e6,
        spans=() if role == "extra" else tuple(((i,), t * slow * (1 + rng.gauss(0, noise)), "k") for i, t in enumerate(times)),
    )


def law_samples(noise: float = 0.0, networks: int = 60) -> SampleSet:
    rng = random.Random(0)
    plan = sample_widths({name: range(4, full + 1, 4) for name, full in LAW_GROUPS.items()}, networks, 0)
    found = tuple(law_network(widths, role, rng, noise) for role, widths in plan)
    return SampleSet(fingerprint=FINGERPRINT, seed=0, created_at="2026-01-01", networks=found)


@pytest.fixture(scope="module")
def law_model() -> LatencyModel:
    return fit_model(law_samples(), LAW_SITES)


def random_widths(seed: int, count: int = 200, step: int = 4) -> Iterator[dict[str, int]]:
    rng = random.Random(seed)
    return ({name: rng.randrange(4, full + 1, step) for name, full in LAW_GROUPS.items()} for _ in range(count))


@pytest.mark.slow
def test_a_staircase_law_is_recovered(law_model: LatencyModel) -> None:
    for widths in (*random_widths(1), *random_widths(2, step=1)):
        assert law_model.predict(widths) == pytest.approx(law_latency(widths), rel=0.1)
    assert np.mean([abs(law_model.predict(widths) / law_latency(widths) - 1) for widths in random_widths(1)]) < 0.01
    assert law_model.held_out.networks >= 8 and law_model.held_out.mape < 0.01 and law_model.held_out.spearman > 0.99


@pytest.mark.slow
def test_the_steps_of_the_law_are_probed_and_their_evidence_kept(law_model: LatencyModel) -> None:
    conv = law_model.alignments["Conv"]
    assert (conv.step_in, conv.step_out, conv.block) == (16, 16, 16)
    found = next(each for each in law_model.evidence if each.kind == "Conv")
    assert (found.step_in, found.step_out, found.block) == (16, 16, 16) and found.error < found.error_without / 3
    assert {regime.regime for regime in found.regimes} >= {"below", "blocked"} and found.regimes[0].kernels[0][0] == "k"


@pytest.mark.slow
def test_noise_of_two_percent_does_not_grow() -> None:
    model = fit_model(law_samples(noise=0.02), LAW_SITES)
    assert float(np.mean([abs(model.predict(widths) / law_latency(widths) - 1) for widths in random_widths(2)])) < 0.02


@pytest.mark.slow
def test_dropped_branches_are_learned_from_measured_ones(law_model: LatencyModel) -> None:
    site = LAW_SITES[1]
    assert law_model.site_cost(site, 0, 16) == law_model.site_cost(site, 16, 0) == 0.0
    assert law_model.site_cost(site, 16, 16) > 0
    dropped = [{"s": s, "t": 0, "u": u} for s in (16, 32, 64) for u in (16, 64, 96)]
    samples = law_samples()
    extra = [law_network(widths, "extra", random.Random(0)) for widths in dropped[::2]]
    taught = fit_model(msgspec.structs.replace(samples, networks=(*samples.networks, *extra)), LAW_SITES)
    errors = [abs(taught.predict(widths) / law_latency(widths) - 1) for widths in dropped]
    untaught = [abs(law_model.predict(widths) / law_latency(widths) - 1) for widths in dropped]
    assert max(errors) < 0.08 and np.mean(errors) < np.mean(untaught)
    whole = [abs(taught.predict(widths) / law_latency(widths) - 1) for widths in random_widths(3)]
    assert np.mean(whole) < 0.01  # and what has all its branches is predicted as before


def test_an_unknown_kernel_is_an_error(law_model: LatencyModel) -> None:
    with pytest.raises(TableError, match="edgekit measure"):
        law_model.site_cost(Site("new", "new kernel", "Conv", form("s"), form("t"), ()), 16, 16)


def test_an_unmeasured_regime_is_never_cheaper_than_the_measured_ones(law_model: LatencyModel) -> None:
    stem = LAW_SITES[0]  # only ever measured with 3 channels in
    assert law_model.site_cost(stem, 64, 64) >= law_model.site_cost(stem, 3, 64) * 0.99


def test_costs_add_up_to_the_prediction(law_model: LatencyModel) -> None:
    widths = {"s": 20, "t": 48, "u": 36}
    total = law_model.overhead_ns + sum(cost.cost(cost.c_in.at(widths), cost.c_out.at(widths)) for cost in law_model.costs())
    assert total == pytest.approx(law_model.predict(widths))


def test_bias_is_signed(law_model: LatencyModel) -> None:
    samples = law_samples()
    slower = [msgspec.structs.replace(network, ratio=network.ratio / 1.1) for network in samples.of("held_out")]
    assert judge(law_model, slower, samples).bias == pytest.approx(0.1, abs=0.02)
    assert judge(law_model, [], samples) == HeldOut(networks=0, mape=0.0, bias=0.0, spearman=0.0)


def test_candidates_move_to_the_far_edge_of_a_step(law_model: LatencyModel) -> None:
    moved = law_model.far_edges({"s": (0, 20, 40, 64), "t": (16, 36, 64), "u": (96,)}, LAW_GROUPS)
    assert moved == {"s": (0, 32, 48, 64), "t": (16, 48, 64), "u": (96,)}


# --- files ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_samples_survive_a_file_and_give_the_same_model(tmp_path: Path, law_model: LatencyModel) -> None:
    written = save_samples(tmp_path, law_samples())
    again = load_samples(tmp_path, FINGERPRINT)
    assert again == written
    assert fit_model(again, LAW_SITES).predict(LAW_GROUPS) == law_model.predict(LAW_GROUPS)


@pytest.mark.parametrize("damage", ["truncate", "edit", "remove"])
def test_damaged_samples_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    save_samples(tmp_path, law_samples())
    path = tmp_path / "samples.json"
    text = path.read_text()
    if damage == "truncate":
        path.write_text(text[: len(text) // 2])
    elif damage == "edit":
        path.write_text(text.replace('"seed": 0', '"seed": 1'))
    else:
        path.unlink()
    with pytest.raises(TableError, match=r"samples\.json.*edgekit measure"):
        load_samples(tmp_path, FINGERPRINT)


def test_another_fingerprint_is_refused_with_the_command(tmp_path: Path) -> None:
    save_samples(tmp_path, law_samples())
    other = msgspec.structs.replace(FINGERPRINT, threads=4)
    with pytest.raises(TableError, match=r"threads 1 instead of 4.*edgekit measure"):
        load_samples(tmp_path, other)


@pytest.mark.slow
def test_tables_merge_and_refuse_damage(tmp_path: Path, law_model: LatencyModel) -> None:
    samples = law_samples()
    rows = kernel_rows(observe(samples.networks, LAW_SITES, samples)[0], samples)
    brought = MeasuredModel(networks=58, coverage=1.0, held_out=law_model.held_out)
    merge_table(tmp_path, "one", samples, rows, brought, law_model.evidence)
    header, loaded = load_table(tmp_path, FINGERPRINT)
    assert [(r.key, r.c_in, r.c_out, r.n) for r in loaded] == [(r.key, r.c_in, r.c_out, r.n) for r in rows]
    assert header.models == {"one": brought} and header.alignments == law_model.evidence
    merge_table(tmp_path, "two", samples, rows, brought, ())  # a second model with the same kernels
    header, merged = load_table(tmp_path, FINGERPRINT)
    assert set(header.models) == {"one", "two"} and [row.n for row in merged] == [2 * row.n for row in rows]
    assert [row.latency_ns for row in merged] == pytest.approx([row.latency_ns for row in rows], rel=1e-3)
    (path,) = tmp_path.glob("rows-*.csv")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(TableError, match=rf"{path.name}.*header\.json"):
        load_table(tmp_path, FINGERPRINT)
    path.unlink()
    with pytest.raises(TableError, match=path.name):
        load_table(tmp_path, FINGERPRINT)
    (tmp_path / "header.json").write_text("{")
    with pytest.raises(TableError, match=r"header\.json"):
        load_table(tmp_path, FINGERPRINT)


# --- simulated devices ----------------------------------------------------------------------------------------------------------


def simulation(law: Law, drift: Drift, seed: int = 0) -> Profile:
    plain = profiles.load("simulated-cpu")
    assert plain.simulation is not None
    changed = msgspec.structs.replace(plain.simulation, law=law, drift=drift, seed=seed)
    return msgspec.structs.replace(plain, simulation=changed)


def table_of(profile: Profile, maker: VariantMaker, folder: Path, candidates: Any = CANDIDATES) -> ModelTable:
    device = devices.open(profile)
    fingerprint = profiles.fingerprint(profile, device.backend(profile.runtime).version())
    return ModelTable(profile, fingerprint, device, maker, candidates, folder)


def truth(profile: Profile, maker: VariantMaker, widths: dict[str, int], folder: Path) -> float:
    """What the law says of a network, without drift and noise."""
    assert profile.simulation is not None
    graph = simulated._graph(maker.write(widths, folder, "truth.onnx"))
    law = profile.simulation.law
    return law.inference_ns + sum(kernel.cost_ns for kernel in simulated.plan(graph, law))


LAWS = st.one_of(
    st.builds(  # a processor core: vectors
        Law, macs_per_s=st.sampled_from([5e9, 5e10]), bytes_per_s=st.sampled_from([4e9, 2e10]),
        launch_ns=st.sampled_from([300, 3000]),
        inference_ns=st.just(5000), block_in=st.sampled_from([1, 4, 8]), block_out=st.sampled_from([4, 8, 16]), tiles=st.just(0),
        tile_pixels=st.just(1), grouped_rate=st.sampled_from([0.2, 0.6]),
    ),
    st.builds(  # a graphics processor: waves of tiles
        Law, macs_per_s=st.sampled_from([2e10, 2e11]), bytes_per_s=st.sampled_from([5e9, 5e10]),
        launch_ns=st.sampled_from([1000, 5000]), inference_ns=st.just(20000), block_in=st.sampled_from([4, 8]),
        block_out=st.sampled_from([8, 16]), tiles=st.sampled_from([6, 8, 20]),
        tile_pixels=st.sampled_from([16, 64]), grouped_rate=st.just(0.1),
    ),
    st.builds(  # a neural processor: wide blocks, little bandwidth
        Law, macs_per_s=st.sampled_from([1e11, 1e12]), bytes_per_s=st.sampled_from([1e9, 8e9]), launch_ns=st.just(8000),
        inference_ns=st.just(100000), block_in=st.sampled_from([8, 16]), block_out=st.sampled_from([16, 32]), tiles=st.just(0),
        tile_pixels=st.just(1), grouped_rate=st.just(0.05),
    ),
)  # fmt: skip
DRIFTS = st.builds(Drift, deviation=st.sampled_from([0.0, 0.03, 0.1]), correlation_s=st.sampled_from([0.5, 2.0]))


KINKED = Law(  # one kernel waits for memory at some widths and for arithmetic at others
    macs_per_s=5e10, bytes_per_s=4e9, launch_ns=300, inference_ns=5000, block_in=4, block_out=4, tiles=0, tile_pixels=1,
    grouped_rate=0.2,
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking takes minutes
@given(law=LAWS, drift=DRIFTS, seed=st.integers(0, 99))
@example(law=KINKED, drift=Drift(deviation=0.1, correlation_s=0.5), seed=0)
def test_laws_are_recovered_within_one_percent_of_whole_networks(
    law: Law, drift: Drift, seed: int, maker: VariantMaker, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("law")
    profile = simulation(law, drift, seed)
    table = table_of(profile, maker, folder)
    model = table.measure(seconds=180.0)
    whole, predicted = truth(profile, maker, DENSE, folder), model.predict(DENSE)
    rng, errors = random.Random(seed), []
    for _ in range(30):
        scale = rng.uniform(0.3, 1.0)
        widths = {n: min(full, max(4, round(full * scale * math.exp(rng.gauss(0, 0.2))))) for n, full in DENSE.items()}
        errors.append(model.predict(widths) / predicted / (truth(profile, maker, widths, folder) / whole) - 1)
    assert float(np.mean(np.abs(errors))) < 0.01, [float(f"{error:.4f}") for error in errors]


@pytest.mark.slow
def test_a_plan_is_measured_once_and_its_prediction_gets_nearer(maker: VariantMaker, tmp_path: Path) -> None:
    profile = profiles.load("simulated-gpu")
    table = table_of(profile, maker, tmp_path)
    before_refining = table.measure(seconds=40.0, networks=24)
    plan = {"a": 7, "b": 30, "c": 11, "p": 13}
    steps: list[int] = []
    before = len(load_samples(table.own, table.fingerprint).networks)
    for _ in range(2):
        table.refine([(plan, None)], lambda step, done, total: steps.append(total))
    samples = load_samples(table.own, table.fingerprint)
    assert steps == [1, 1] and len(samples.networks) == before + 1  # told when it begins and when it is done
    (added,) = samples.of("plan")
    assert added.widths == plan and len(added.spans) == len(table.sites)
    assert table.model.predict(plan) == pytest.approx(samples.latency_ns(added), rel=0.02)
    again = table_of(profile, maker, tmp_path)
    again.measure(seconds=1.0, networks=24)
    assert again.model.predict(plan) == before_refining.predict(plan)  # the same table and the same calls give the same model
    again.refine([(plan, None)], lambda step, done, total: steps.append(total))
    assert steps == [1, 1] and again.model.predict(plan) == table.model.predict(plan)
    assert again.model.table_id == before_refining.table_id == table.model.table_id


def test_a_damaged_line_of_an_unfinished_measurement_is_named_and_a_cut_one_dropped(tmp_path: Path) -> None:
    networks = law_samples().networks[:3]
    for network in networks:
        append_partial(tmp_path, network)
    path = tmp_path / "samples.partial.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert read_partial(tmp_path) == list(networks[:2]) == read_partial(tmp_path)
    path.write_bytes(whole.replace(b"train", b"t", 1)[5:])
    with pytest.raises(TableError, match=r"Line 1 .*samples\.partial\.jsonl.*rm -f"):
        read_partial(tmp_path)


@pytest.mark.slow
def test_what_two_files_hold_after_a_kill_counts_once_and_only_one_process_measures(maker: VariantMaker, tmp_path: Path) -> None:
    table = table_of(profiles.load("simulated-cpu"), maker, tmp_path)
    first = table.measure(seconds=20.0, networks=16)
    samples = load_samples(table.own, table.fingerprint)
    for network in samples.networks:
        append_partial(table.own, network)
    again = table_of(profiles.load("simulated-cpu"), maker, tmp_path)
    assert again.measure(seconds=20.0, networks=16).predict(DENSE) == first.predict(DENSE)
    assert load_samples(table.own, table.fingerprint) == samples and not (table.own / "samples.partial.jsonl").exists()
    with locked(tmp_path), pytest.raises(TableError, match="Another edgekit is measuring"):
        again.measure(seconds=20.0, networks=16)


@pytest.mark.slow
def test_plans_of_a_later_session_are_on_the_scale_of_the_first_whatever_the_candidates(
    maker: VariantMaker, tmp_path: Path
) -> None:
    table_of(profiles.load("simulated-cpu"), maker, tmp_path).measure(seconds=20.0, networks=16)
    fewer = table_of(profiles.load("simulated-cpu"), maker, tmp_path, {name: (full // 4, full) for name, full in DENSE.items()})
    fewer.measure(seconds=20.0, networks=16)
    plan = {"a": 8, "b": 30, "c": 12, "p": 13}
    fewer.refine([(plan, None)])
    profile = profiles.load("simulated-cpu")
    share = truth(profile, maker, plan, tmp_path) / truth(profile, maker, DENSE, tmp_path)
    samples = load_samples(fewer.own, fewer.fingerprint)
    dense = next(network for network in samples.networks if network.widths == DENSE)
    assert fewer.measured_ns(plan) / samples.latency_ns(dense) == pytest.approx(share, rel=0.03)


@pytest.mark.slow
def test_kernels_that_another_model_brought_are_not_measured_as_often(maker: VariantMaker, tmp_path: Path) -> None:
    profile = profiles.load("simulated-cpu")
    first = table_of(profile, maker, tmp_path)
    first.measure(seconds=40.0)
    renamed = renamed_copy(maker)
    second = table_of(profile, renamed, tmp_path)
    assert second.own != first.own and {site.key for site in second.sites} == {site.key for site in first.sites}
    second.measure(seconds=40.0)
    samples = load_samples(second.own, second.fingerprint)
    assert len(samples.networks) <= 32 + DENSE_VISITS - 1 and samples.borrowed
    assert second.model.held_out.mape < 0.01
    header, rows = load_table(tmp_path, second.fingerprint)
    measured = sum(row.n for row in rows)
    assert len(header.models) == 2
    # what was borrowed is not brought back: every row counts the places of the networks that were measured, once
    assert measured == len(first.sites) * sum(len(load_samples(t.own, t.fingerprint).networks) for t in (first, second))


@pytest.mark.slow
def test_a_table_is_taken_elsewhere_and_refused_on_another_device(maker: VariantMaker, tmp_path: Path) -> None:
    profile = profiles.load("simulated-npu")
    first = table_of(profile, maker, tmp_path / "here")
    first.measure(seconds=40.0, networks=24)
    first.refine([({"a": 7, "b": 30, "c": 11, "p": 13}, None)])
    share_table(first.folder, tmp_path / "shared", first.fingerprint)
    steps: list[int] = []
    for _ in range(2):  # taking it twice is taking it once
        adopt_table(tmp_path / "shared", tmp_path / "there", first.fingerprint)
        second = table_of(profile, maker, tmp_path / "there")
        second.measure(seconds=40.0, networks=24, progress=lambda step, done, total: steps.append(done))
    assert not steps
    here, there = (load_table(folder, first.fingerprint) for folder in (first.folder, second.folder))
    assert [row.ratio for row in here[1]] == [row.ratio for row in there[1]] and here[0].models == there[0].models
    assert not load_samples(second.own, second.fingerprint).of("plan")  # what was measured for one plan stays where it was
    other = msgspec.structs.replace(first.fingerprint, device="another board")
    with pytest.raises(TableError, match=r"elsewhere: device 'simulated-npu' instead of 'another board'.*edgekit measure"):
        adopt_table(tmp_path / "shared", tmp_path / "nowhere", other)
    assert not (tmp_path / "nowhere").exists()
    (rows,) = (tmp_path / "shared").glob("rows-*.csv")
    rows.write_text(rows.read_text()[:-9])
    with pytest.raises(TableError, match=rows.name):
        adopt_table(tmp_path / "shared", tmp_path / "nowhere", first.fingerprint)


def renamed_copy(maker: VariantMaker) -> VariantMaker:
    """The same network under other node names: another model with the same kernels."""
    from dataclasses import replace

    skeleton = type(maker.skeleton)()
    skeleton.CopyFrom(maker.skeleton)
    for node in skeleton.graph.node:
        node.name = f"other_{node.name}"
    return replace(maker, skeleton=skeleton)


@pytest.mark.slow
def test_segments_are_the_whole_network_in_parts(maker: VariantMaker, tmp_path: Path) -> None:
    import onnx

    sites = find_sites(maker, "fp32")
    segments = find_segments(maker, sites)
    assert sorted(site for part in segments for site in part.sites) == list(range(len(sites))) and len(segments) >= 5
    assert all(before.target == after.source for before, after in itertools.pairwise(segments))
    widths = {"a": 5, "b": 17, "c": 40, "p": 3}
    path = maker.write(widths, tmp_path)
    whole = backends.get("onnxruntime").open(path, threads=1, precision="fp32")
    image = np.random.default_rng(0).standard_normal(whole.inputs[0].dims).astype(np.float32)
    model = onnx.shape_inference.infer_shapes(maker.make(widths), data_prop=True)
    passed = image
    for part in segments:
        session = backends.get("onnxruntime").open(cut_out(model, part, tmp_path / "part.onnx"), threads=1, precision="fp32")
        (passed,) = session.run({session.inputs[0].name: passed})  # type: ignore[assignment]
    np.testing.assert_allclose(passed, whole.run({whole.inputs[0].name: image})[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "within"), [("simulated-cpu", 0.06), ("simulated-npu", 0.02)])
def test_a_runtime_that_tells_nothing_is_measured_in_segments(
    name: str, within: float, maker: VariantMaker, tmp_path: Path
) -> None:
    plain = profiles.load(name)
    assert plain.simulation is not None
    profile = simulation(msgspec.structs.replace(plain.simulation.law, opaque=True), plain.simulation.drift)
    table = table_of(profile, maker, tmp_path)
    model = table.measure(seconds=100.0)
    samples = load_samples(table.own, table.fingerprint)
    assert {kernels for _, _, kernels in samples.networks[0].spans} == {"segment"}
    assert any(len(places) > 1 for places, *_ in samples.networks[0].spans)
    whole, predicted = truth(profile, maker, DENSE, tmp_path), model.predict(DENSE)
    rng, errors = random.Random(0), []
    for _ in range(30):
        widths = {n: rng.randint(4, full) for n, full in DENSE.items()}
        errors.append(model.predict(widths) / predicted / (truth(profile, maker, widths, tmp_path) / whole) - 1)
    assert float(np.mean(np.abs(errors))) < within  # staircases of two kernels in one segment are told apart only so well


CHILD = """
import pickle, sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}]
from toolkit import profiles
from test_tables import table_of
maker = pickle.loads(Path({maker!r}).read_bytes())
table = table_of(profiles.load("simulated-cpu"), maker, Path({folder!r}))
print("ready", flush=True)
table.measure(seconds=40.0, networks={networks}, progress=lambda *_: time.sleep(0.02))
print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_loses_nothing(maker: VariantMaker, tmp_path: Path) -> None:
    (tmp_path / "maker").write_bytes(pickle.dumps(maker))
    folder, networks, rng = tmp_path / "table", 100, random.Random(0)
    script = CHILD.format(tests=str(Path(__file__).parent), maker=str(tmp_path / "maker"), folder=str(folder), networks=networks)
    kept, killed = [0], 0
    for _ in range(20):
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.4))
        child.kill()
        killed += child.wait() == -9
        partial = [path.read_bytes().count(b"\n") for path in folder.glob("*/samples.partial.jsonl")]
        kept.append(max(partial, default=kept[-1]))
    assert killed >= 15 and kept == sorted(kept), (killed, kept)  # never fewer than before
    table = table_of(profiles.load("simulated-cpu"), maker, folder)
    table.measure(seconds=40.0, networks=networks)
    samples = load_samples(table.own, table.fingerprint)
    wanted = sample_widths(table.grid, networks, 0)
    assert len(samples.networks) == len(wanted) and set(map(identity, samples.networks)) == set(map(identity, wanted))
    header, rows = load_table(folder, table.fingerprint)
    assert [model.networks for model in header.models.values()] == [len(wanted)] and rows
    assert table.model.held_out.mape < 0.02
    assert not list(folder.glob("*/samples.partial.jsonl"))


# --- the whole, in a real runtime ---------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize("runtime", backends.RUNTIMES)
def test_measuring_resumes_and_is_reused(runtime: str, maker: VariantMaker, tmp_path: Path) -> None:
    profile = msgspec.structs.replace(PROFILE, runtime=runtime, device="local")
    steps: list[int] = []

    def stop_at_five(step: str, done: int, total: int) -> None:
        if done == 5:
            raise Stop

    def measure(progress: Any) -> LatencyModel:
        return table_of(profile, maker, tmp_path).measure(seconds=1.0, progress=progress, networks=20)

    with pytest.raises(Stop):
        measure(stop_at_five)
    first = measure(lambda step, done, total: steps.append(total))
    assert steps and set(steps) == {20 + DENSE_VISITS - 1 - 5}  # five were kept
    steps.clear()
    again = measure(lambda step, done, total: steps.append(total))
    assert not steps and again.predict(DENSE) == first.predict(DENSE)
    assert first.summary().rows > 0 and first.coverage == 1.0
    for kind in first.evidence:
        assert all(kernels for regime in kind.regimes for kernels, _ in regime.kernels)


def test_a_simulated_device_of_its_own_seed_repeats_itself() -> None:
    of = profiles.load("simulated-cpu").simulation
    assert of is not None
    assert Simulated("x", of).spend(1e6) == Simulated("x", of).spend(1e6)


@pytest.mark.parametrize(
    ("coefficients", "slower", "bound"),
    [
        ((1e6, 1.0, 1.0, 0.0, 1.0, 1.0, 0.1), None, "fixed"),
        ((1.0, 0.0, 0.0, 10.0, 0.0, 0.0, 1.0), None, "memory"),
        ((1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 10.0), None, "arithmetic"),
        ((1.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 10.0), "memory"),
        ((1.0, 0.0, 0.0, 10.0), (1.0, 0.0, 0.0, 1.0), "arithmetic"),
        ((1.0, 0.0, 0.0, 10.0), (1e9, 0.0, 0.0, 1.0), "fixed"),
    ],
)
def test_a_formula_says_what_its_time_goes_to(
    coefficients: tuple[float, ...], slower: tuple[float, ...] | None, bound: str
) -> None:
    made = Formula(np.array(coefficients), None if slower is None else np.array(slower))
    assert made.bound(np.array([(24, 40, 32, 48)])) == bound


def test_why_a_cut_bought_nothing_is_told() -> None:
    site = LAW_SITES[0]
    steps = Alignment(step_in=1, step_out=16, block=8)
    empty = fit_residual(np.empty((0, 2), np.int64), np.empty(0))

    def why(before: tuple[int, int], after: tuple[int, int], **coefficients: float) -> str:
        names = ("fixed", "in", "out", "memory", "padded_in", "padded_out", "work")
        formula = Formula(np.array([coefficients.get(name, 0.0) for name in names]), step_out=16)
        fits = {(site.key, steps.regime(*shape)): KernelFit(steps, formula, empty) for shape in (before, after)}
        return LatencyModel((site,), {site.kind: steps}, fits, 1.0).why_flat(site, before, after)

    assert why((32, 32), (32, 20), work=1.0) == "the runtime pads its channels to the same 32 in and 32 out"
    assert why((32, 32), (4, 32), work=1.0) == "at this width the runtime runs another, slower kernel"
    assert why((32, 32), (32, 16), fixed=1e6, work=1.0).startswith("most of its time is fixed")
    assert why((32, 32), (32, 16), memory=10.0, work=1.0).startswith("it waits for memory")
    assert why((32, 32), (31, 32), work=1.0) == "its blocks are hardly fewer than before"

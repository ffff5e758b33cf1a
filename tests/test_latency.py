"""Latency tables: variants equal real exports, samples survive files and damage, known laws are recovered."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit import backends, devices
from toolkit.errors import TableError
from toolkit.latency import LatencyModel, ambiguous_forms, choose_probe_widths, measure_model, solve
from toolkit.latency.predict import fit_model, judge
from toolkit.latency.sites import Site, attribute, find_sites
from toolkit.latency.table import (
    NetworkSample,
    SampleSet,
    _digest,
    kernel_rows,
    load_samples,
    load_table,
    merge_table,
    sample_widths,
)
from toolkit.latency.variants import VariantMaker
from toolkit.schema import DimForm, Fingerprint, HeldOut, Profile, save_json

pytestmark = [pytest.mark.slow, pytest.mark.timed]

GROUPS = {"a": (1, 24), "b": (1, 32), "c": (1, 40), "p": (1, 16)}
FORMS = [DimForm(const=0, terms=((name, elements),)) for name, elements in (("a", 1), ("b", 1), ("c", 1), ("c", 16), ("p", 1))]
FORMS.append(DimForm(const=16, terms=(("p", 1),)))
FINGERPRINT = Fingerprint(
    device="here", runtime="onnxruntime", runtime_version="1", precision="fp32", threads=1, batch=1, instruction_set="any"
)
PROFILE = Profile(id="here", device="here", runtime="onnxruntime", format="onnx")


def form(*names: str, const: int = 0) -> DimForm:
    return DimForm(const=const, terms=tuple((name, 1) for name in names))


def export(widths: dict[str, int]) -> Any:
    """A real export: residual blocks, a shortcut that slices and pads, a depthwise convolution, a flattening classifier."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    a, b, c, p = (widths[name] for name in GROUPS)
    before = min(p, 8)  # of the channels that the shortcut pads, as a pruned program keeps the first

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.a1, self.a2 = nn.Conv2d(16, a, 3, padding=1, bias=False), nn.Conv2d(a, 16, 3, padding=1)
            self.norm = nn.BatchNorm2d(a)
            self.b1, self.b2 = nn.Conv2d(16, b, 3, 2, 1), nn.Conv2d(b, 16 + p, 3, padding=1)
            self.expand, self.depthwise = nn.Conv2d(16 + p, c, 1), nn.Conv2d(c, c, 3, 2, 1, groups=c)
            self.linear = nn.Linear(c * 16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.stem(x))
            x = F.relu(x + self.a2(F.relu(self.norm(self.a1(x)))))
            x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, p - before)) + self.b2(F.relu(self.b1(x))))
            return self.linear(self.depthwise(self.expand(x).clamp(0, 6)).flatten(1))

    torch.manual_seed(0)
    image = torch.randn(1, 3, 16, 16)
    program = torch.onnx.export(Net().eval(), (image,), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto


@pytest.fixture(scope="module")
def exports() -> list[tuple[dict[str, int], Any]]:
    widths = [{name: full for name, (_, full) in GROUPS.items()}, *choose_probe_widths(GROUPS, FORMS)]
    return [(each, export(each)) for each in widths]


@pytest.fixture(scope="module")
def maker(exports: list[tuple[dict[str, int], Any]]) -> VariantMaker:
    return solve(exports[:-1], FORMS, exports[-1])


def feeds() -> dict[str, Any]:
    return {"x": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)}


# --- variants -----------------------------------------------------------------------------------------------------------


def test_a_check_at_other_widths_is_refused(exports: list[tuple[dict[str, int], Any]]) -> None:
    widths, model = exports[-1]
    with pytest.raises(TableError, match="disagrees with a real export"):
        solve(exports[:-1], FORMS, ({**widths, "b": widths["b"] + 1}, model))


def test_one_probe_that_tells_forms_apart_is_not_enough_when_two_fit(exports: list[tuple[dict[str, int], Any]]) -> None:
    twin = DimForm(const=0, terms=(("d", 1),))
    named = [({**widths, "d": widths["a"]}, model) for widths, model in exports]
    with pytest.raises(TableError, match="Add one more probe"):
        solve(named[:-1], [*FORMS, twin])


def test_a_dimension_without_a_form_is_refused(exports: list[tuple[dict[str, int], Any]]) -> None:
    with pytest.raises(TableError, match="no channel group explains it"):
        solve(exports[:-1], [each for each in FORMS if each.terms[0] != ("c", 16)])


def test_another_structure_is_refused(exports: list[tuple[dict[str, int], Any]]) -> None:
    import onnx

    broken = onnx.ModelProto()
    broken.CopyFrom(exports[1][1])
    del broken.graph.node[3]
    with pytest.raises(TableError, match="another structure"):
        solve([exports[0], (exports[1][0], broken)], FORMS)


def test_variants_compute_the_same_in_both_runtimes(maker: VariantMaker, tmp_path: Path) -> None:
    path = tmp_path / "inline.onnx"
    path.write_bytes(maker.make({"a": 5, "b": 20, "c": 16, "p": 9}, inline=True).SerializeToString())
    first, second = (backends.get(name).open(path, threads=1, precision="fp32").run(feeds()) for name in backends.RUNTIMES)
    np.testing.assert_allclose(first[0], second[0], rtol=1e-3, atol=1e-4 * float(np.abs(first[0]).max()))


def test_the_blob_is_shared_and_gives_finite_outputs(maker: VariantMaker, tmp_path: Path) -> None:
    sizes = set()
    for widths in ({"a": 1, "b": 1, "c": 1, "p": 1}, {"a": 24, "b": 32, "c": 40, "p": 16}, {"a": 7, "b": 31, "c": 12, "p": 10}):
        path = maker.write(widths, tmp_path)
        outputs = backends.get("onnxruntime").open(path, threads=1, precision="fp32").run(feeds())
        assert np.isfinite(outputs[0]).all() and float(np.abs(outputs[0]).max()) > 0
        sizes.add((tmp_path / "blob.bin").stat().st_size)
    assert sizes == {maker.blob_bytes}


def test_a_dropped_branch_is_no_variant(maker: VariantMaker) -> None:
    with pytest.raises(TableError, match="at least one channel"):
        maker.make({"a": 0, "b": 4, "c": 4, "p": 4})


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_probe_widths_tell_every_form_apart(full: list[int], seed: int) -> None:
    groups = {f"g{index}": (1, width) for index, width in enumerate(full)}
    forms = [form(name) for name in groups] + [form(*list(groups)[: n + 1]) for n in range(1, len(groups))]
    *probes, check = choose_probe_widths(groups, forms, seed)
    dense = {name: width for name, (_, width) in groups.items()}
    assert not ambiguous_forms(forms, [dense, *probes])
    assert all(1 <= widths[name] <= dense[name] for widths in [*probes, check] for name in groups)


# --- sites --------------------------------------------------------------------------------------------------------------


def test_sites_know_their_channels(maker: VariantMaker) -> None:
    sites = find_sites(maker, "fp32")
    pairs = [(site.kind, site.c_in, site.c_out) for site in sites]
    expected = [
        ("Conv", form(const=3), form(const=16)),
        ("Conv", form(const=16), form("a")),
        ("Conv", form("a"), form(const=16)),
        ("Pad", form(const=16), form("p", const=16)),
        ("Conv", form(const=16), form("b")),
        ("Conv", form("b"), form("p", const=16)),
        ("Conv", form("p", const=16), form("c")),
        ("DepthwiseConv", form("c"), form("c")),
        ("Gemm", DimForm(const=0, terms=(("c", 16),)), form(const=10)),
    ]
    assert sorted(map(repr, pairs)) == sorted(map(repr, expected))
    nodes = [name for site in sites for name in site.nodes]
    assert len(nodes) == len(set(nodes))


@pytest.mark.parametrize("runtime", backends.RUNTIMES)
def test_all_profiled_time_is_attributed(runtime: str, maker: VariantMaker, tmp_path: Path) -> None:
    sites = find_sites(maker, "fp32")
    for widths in ({"a": 24, "b": 32, "c": 40, "p": 16}, {"a": 6, "b": 18, "c": 9, "p": 4}):
        kernels = backends.get(runtime).profile(maker.write(widths, tmp_path), threads=1, precision="fp32", runs=4)
        times, lost = attribute(kernels, sites)
        assert lost == 0
        assert sum(time.kernels for time in times) == len(kernels)
        heavy = [time for time, site in zip(times, sites, strict=True) if site.kind == "Conv"]
        assert all(time.kernels >= 1 for time in heavy)


# --- sampling and files --------------------------------------------------------------------------------------------------


def test_every_candidate_is_sampled() -> None:
    candidates = {"a": range(4, 65, 4), "b": (8, 16), "c": (5,)}
    plan = sample_widths({name: list(widths) for name, widths in candidates.items()}, 60, 0)
    assert len(plan) == 60 and sum(role == "held_out" for role, _ in plan) >= 8
    assert plan[0][1] == {"a": 64, "b": 16, "c": 5}
    for name, widths in candidates.items():
        assert {chosen[name] for role, chosen in plan if role == "train"} == set(widths)


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
        return 3000.0 + 40 * c_in
    if c_in < 16:
        return 2500.0 + 30 * c_in * out
    padded = math.ceil(c_in / 16) * 16
    return (4000.0 if key == "mix" else 7000.0) + 50 * out + 20 * padded * out


def law_latency(widths: dict[str, int]) -> float:
    return 20_000 + sum(law(site.key, site.c_in.at(widths), site.c_out.at(widths)) for site in LAW_SITES)


def law_samples(noise: float = 0.0, networks: int = 60) -> SampleSet:
    rng = random.Random(0)
    reference, profiler_cost = 1e6, 1500.0
    found = []
    for role, widths in sample_widths({name: range(4, full + 1, 4) for name, full in LAW_GROUPS.items()}, networks, 0):
        times = [law(site.key, site.c_in.at(widths), site.c_out.at(widths)) + profiler_cost for site in LAW_SITES]
        slow = rng.uniform(0.7, 1.4)  # the machine's speed at this moment, which the reference shows
        found.append(
            NetworkSample(
                widths=widths,
                role=role,
                ratio=law_latency(widths) / reference * (1 + rng.gauss(0, noise)),
                reference_ns=reference,
                profiled_reference_ns=reference * slow,
                sites=tuple((i, t * slow * (1 + rng.gauss(0, noise)), 1) for i, t in enumerate(times)),
            )
        )
    samples = SampleSet(fingerprint=FINGERPRINT, seed=0, created_at="2026-01-01", networks=tuple(found))
    return msgspec.structs.replace(samples, digest=_digest(samples))


@pytest.fixture(scope="module")
def law_model() -> LatencyModel:
    return fit_model(law_samples(), LAW_SITES)


def test_a_staircase_law_is_recovered(law_model: LatencyModel) -> None:
    rng = random.Random(1)
    for _ in range(200):
        widths = {name: rng.randrange(4, full + 1, 4) for name, full in LAW_GROUPS.items()}
        assert law_model.predict(widths) == pytest.approx(law_latency(widths), rel=0.01)
    assert law_model.held_out.networks >= 8 and law_model.held_out.mape < 0.01 and law_model.held_out.spearman > 0.99


def test_the_steps_of_the_law_are_probed(law_model: LatencyModel) -> None:
    conv = law_model.alignments["Conv"]
    assert (conv.step_in, conv.step_out, conv.block) == (16, 16, 16)


def test_noise_of_two_percent_does_not_grow() -> None:
    model = fit_model(law_samples(noise=0.02), LAW_SITES)
    rng = random.Random(2)
    errors = []
    for _ in range(200):
        widths = {name: rng.randrange(4, full + 1, 4) for name, full in LAW_GROUPS.items()}
        errors.append(abs(model.predict(widths) / law_latency(widths) - 1))
    assert float(np.mean(errors)) < 0.02


def test_dropped_branches_cost_nothing_and_measured_ones_teach_the_overhead(law_model: LatencyModel) -> None:
    site = LAW_SITES[1]
    assert law_model.site_cost(site, 0, 16) == law_model.site_cost(site, 16, 0) == 0.0
    assert law_model.site_cost(site, 16, 16) > 0
    dropped = [{"s": s, "t": 0, "u": u} for s in (16, 32, 64) for u in (16, 64, 96)]
    samples = law_samples()
    extra = [
        NetworkSample(widths=widths, role="extra", ratio=law_latency(widths) / 1e6, reference_ns=1e6) for widths in dropped[:5]
    ]
    taught = fit_model(msgspec.structs.replace(samples, networks=(*samples.networks, *extra)), LAW_SITES)
    errors = [abs(taught.predict(widths) / law_latency(widths) - 1) for widths in dropped]
    assert max(errors) < 0.03


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
    assert law_model.rescaled(1.5).predict(widths) == pytest.approx(1.5 * law_model.predict(widths))


def test_bias_is_signed(law_model: LatencyModel) -> None:
    held = [network for network in law_samples().networks if network.role == "held_out"]
    assert judge(law_model.rescaled(1.1), held).bias == pytest.approx(0.1, abs=0.01)
    assert judge(law_model, []) == HeldOut(networks=0, mape=0.0, bias=0.0, spearman=0.0)


def test_samples_survive_a_file_and_give_the_same_model(tmp_path: Path, law_model: LatencyModel) -> None:
    save_json(tmp_path / "samples.json", law_samples())
    again = load_samples(tmp_path, FINGERPRINT)
    assert again == law_samples()
    assert fit_model(again, LAW_SITES) == law_model


@pytest.mark.parametrize("damage", ["truncate", "edit", "remove"])
def test_damaged_samples_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "samples.json"
    save_json(path, law_samples())
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
    save_json(tmp_path / "samples.json", law_samples())
    other = msgspec.structs.replace(FINGERPRINT, threads=4)
    with pytest.raises(TableError, match=r"threads 1 instead of 4.*edgekit measure"):
        load_samples(tmp_path, other)


def test_tables_merge_and_refuse_damage(tmp_path: Path) -> None:
    samples = law_samples()
    rows = kernel_rows(samples, LAW_SITES)
    merge_table(tmp_path, samples, rows)
    header, loaded = load_table(tmp_path, FINGERPRINT)
    assert loaded == rows and header.networks == 60
    merge_table(tmp_path, samples, rows)  # a second model with the same kernels
    header, merged = load_table(tmp_path, FINGERPRINT)
    assert header.networks == 120 and [row.n for row in merged] == [2 * row.n for row in rows]
    assert [row.latency_ns for row in merged] == pytest.approx([row.latency_ns for row in rows], rel=1e-3)
    path = tmp_path / "rows.csv"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(TableError, match=r"rows\.csv"):
        load_table(tmp_path, FINGERPRINT)
    path.unlink()
    with pytest.raises(TableError, match=r"rows\.csv"):
        load_table(tmp_path, FINGERPRINT)


# --- the whole, in a real runtime ------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("runtime", backends.RUNTIMES)
def test_measuring_resumes_and_is_reused(runtime: str, maker: VariantMaker, tmp_path: Path) -> None:
    fingerprint = msgspec.structs.replace(FINGERPRINT, runtime=runtime)
    profile = msgspec.structs.replace(PROFILE, runtime=runtime)
    device = devices.open(msgspec.structs.replace(profile, device="local"))
    candidates = {name: range(4, full + 1, 4) for name, (_, full) in GROUPS.items()}
    steps: list[int] = []

    def stop_at_five(step: str, done: int, total: int) -> None:
        if done == 5:
            raise Stop

    def count(step: str, done: int, total: int) -> None:
        steps.append(total)

    def measure(progress: Any) -> LatencyModel:
        return measure_model(
            profile, fingerprint, device, maker, candidates, tmp_path, seconds=1.0, seed=0, progress=progress, networks=20
        )

    with pytest.raises(Stop):
        measure(stop_at_five)
    first = measure(count)
    assert steps and set(steps) == {15}  # five of twenty were kept
    steps.clear()
    again = measure(count)
    assert not steps and again == first
    assert first.summary().rows > 0 and first.coverage == 1.0
    dense = {name: full for name, (_, full) in GROUPS.items()}
    for widths in itertools.product((4, 24), (4, 32), (4, 40), (4, 16)):
        assert 0 < first.predict(dict(zip(GROUPS, widths, strict=True))) <= first.predict(dense) * 1.5
    assert load_table(tmp_path, fingerprint)[0].networks == 20

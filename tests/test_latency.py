"""Width variants and sites: variants equal real exports, sites know their channels, all profiled time is attributed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from widths import FORMS, form

from toolkit import backends
from toolkit.backends import KernelSample
from toolkit.errors import TableError
from toolkit.export import RoughInt8
from toolkit.latency import ambiguous_forms, choose_probe_widths, solve
from toolkit.latency.sites import Site, attribute, find_sites
from toolkit.latency.variants import BLOB, VariantMaker, _matcher
from toolkit.schema import DimForm

pytestmark = pytest.mark.slow


def feeds() -> dict[str, Any]:
    return {"x": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)}


# --- variants -----------------------------------------------------------------------------------------------------------


def test_a_check_at_other_widths_is_refused(exports: list[tuple[dict[str, int], Any]]) -> None:
    widths, model = exports[-1]
    with pytest.raises(TableError, match="disagrees with a real export"):
        solve(exports[:-1], FORMS, ({**widths, "b": widths["b"] + 1}, model))


def test_one_probe_that_tells_forms_apart_is_not_enough_when_two_fit(exports: list[tuple[dict[str, int], Any]]) -> None:
    twin = DimForm(const=0, terms=((("d",), 1),))
    named = [({**widths, "d": widths["a"]}, model) for widths, model in exports]
    with pytest.raises(TableError, match="Add one more probe"):
        solve(named[:-1], [*FORMS, twin])


def test_a_dimension_without_a_form_is_refused(exports: list[tuple[dict[str, int], Any]]) -> None:
    with pytest.raises(TableError, match="no channel group explains it"):
        solve(exports[:-1], [each for each in FORMS if each.terms[0] != (("c",), 16)])


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


@given(st.lists(st.integers(3, 24), min_size=2, max_size=6), st.integers(0, 3), st.data())
@settings(max_examples=40, deadline=None)
def test_products_of_widths_are_told_apart_and_found(full: list[int], seed: int, data: st.DataObject) -> None:
    """Heads x head sizes beside their sums, and beside what each would be were the other fixed."""
    groups = {f"g{index}": (1, width) for index, width in enumerate(full)}
    sides = list(itertools.combinations(groups, 2))
    forms = [form(name) for name in groups] + [DimForm(const=0, terms=((pair, k),)) for pair in sides for k in (1, 3)]
    forms += [DimForm(const=0, terms=(((a,), groups[b][1]),)) for a, b in sides]
    forms += [DimForm(const=0, terms=(((a,), 64), ((a, b), 2))) for a, b in sides]
    fixed = data.draw(st.sets(st.sampled_from(sorted(groups)), max_size=len(groups) - 1))
    groups |= {name: (groups[name][1], groups[name][1]) for name in fixed}
    *probes, check = choose_probe_widths(groups, forms, seed)
    dense = {name: width for name, (_, width) in groups.items()}
    folded = {each.fixed({name: dense[name] for name in fixed}) for each in forms}
    assert not ambiguous_forms(list(folded), [dense, *probes])
    match = _matcher([dense, *probes], list(folded))
    for each in folded:
        assert match([each.at(widths) for widths in [dense, *probes]], "side").at(check) == each.at(check)


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
        ("Gemm", DimForm(const=0, terms=((("c",), 16),)), form(const=10)),
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
        assert sum(len(time.kernels.split()) for time in times) == len(kernels)
        assert sorted(site for time in times for site in time.sites) == list(range(len(sites)))  # each in one span
        assert all(time.kernels for time in times if any(sites[site].kind == "Conv" for site in time.sites))


@pytest.mark.parametrize("runtime", backends.RUNTIMES)
def test_all_profiled_time_of_integer_kernels_is_attributed(runtime: str, maker: VariantMaker, tmp_path: Path) -> None:
    lowered = replace(maker, finish=RoughInt8(runtime))
    sites = find_sites(lowered, "int8")
    backend = backends.get(runtime)
    for widths in ({"a": 24, "b": 32, "c": 40, "p": 16}, {"a": 6, "b": 18, "c": 9, "p": 4}):
        path = lowered.write(widths, tmp_path)
        assert not (tmp_path / BLOB).exists()
        assert "int8" in backend.open(path, threads=1, precision="int8").executed_precision()[0]
        times, lost = attribute(backend.profile(path, threads=1, precision="int8", runs=4), sites)
        assert lost == 0
        weighted = {i for i, site in enumerate(sites) if site.kind in ("Conv", "DepthwiseConv", "Gemm")}
        assert sum(len(weighted.intersection(time.sites)) for time in times) == len(weighted)
        assert max(len(weighted.intersection(time.sites)) for time in times) == 1  # no kernel swallows another's place


def test_layers_in_float_are_other_kernels_to_a_table(maker: VariantMaker) -> None:
    name = next(site.name for site in find_sites(maker, "int8") if site.kind == "Conv")
    before = {site.name: site.key for site in find_sites(maker, "int8")}
    after = {site.name: site.key for site in find_sites(replace(maker, in_float=frozenset({name})), "int8")}
    assert {site for site in before if before[site] != after[site]} == {name}
    assert after[name].endswith("fp32") and before[name].endswith("int8")


def test_rows_of_a_matrix_and_groups_of_a_convolution_tell_kernels_apart() -> None:
    import torch
    from torch import nn

    def keys(tokens: int, groups: int) -> set[str]:
        def exported(hidden: int) -> Any:
            class Net(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.mix = nn.Conv1d(8, 8, 3, padding=1, groups=groups)
                    self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 8)

                def forward(self, x: torch.Tensor) -> torch.Tensor:
                    return self.down(torch.relu(self.up(self.mix(x).transpose(1, 2))))

            program = torch.onnx.export(Net().eval(), (torch.randn(1, 8, tokens),), dynamo=True, verbose=False)
            assert program is not None
            return program.model_proto

        maker = solve([({"h": 24}, exported(24)), ({"h": 7}, exported(7))], [form("h")])
        return {site.key for site in find_sites(maker, "fp32")}

    short, long, split = keys(5, 2), keys(9, 2), keys(5, 4)
    assert len(short) == 3 and not short & long
    assert len(short & split) == 2  # the linears are the same


def test_a_size_that_one_export_leaves_to_be_inferred_is_no_difference() -> None:
    import onnx
    import onnx.reference

    def reshaped(width: int, spelt: bool) -> Any:
        nodes = [
            onnx.helper.make_node("Conv", ["x", "w"], ["z"], name="mix"),
            onnx.helper.make_node("Reshape", ["z", "shape"], ["y"], name="turn"),
        ]
        sizes = [1, 4, width if spelt else -1]
        weights = [
            onnx.numpy_helper.from_array(np.ones((width, 3, 1), np.float32), "w"),
            onnx.numpy_helper.from_array(np.array(sizes, np.int64), "shape"),
        ]
        ends = [
            onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 4]),
            onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4, width]),
        ]
        graph = onnx.helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)

    maker = solve([({"h": 12}, reshaped(12, True)), ({"h": 5}, reshaped(5, False))], [form("h")], ({"h": 7}, reshaped(7, False)))
    made = maker.make({"h": 9}, inline=True)
    (out,) = onnx.reference.ReferenceEvaluator(made).run(None, {"x": np.ones((1, 3, 4), np.float32)})
    assert out.shape == (1, 4, 9)


@pytest.mark.parametrize("where", ["made", "read"])
def test_a_layout_change_belongs_to_the_site_whose_tensor_it_is(where: str) -> None:
    """On the way out to the maker, on the way in to the reader, whatever is executed between."""

    def kernel(op: str, node: str, inputs: tuple[str, ...], output: str) -> KernelSample:
        return KernelSample(op, op, (node,) if node else (), inputs, (output,), ((1,),), ((1,),), np.full(4, 1000))

    sites = [Site(name, name, "Conv", form("a"), form("a"), (name,)) for name in ("one", "two", "three")]
    kernels = [
        kernel("Conv", "one", ("x",), "y"),
        kernel("ReorderOutput" if where == "made" else "Reorder", "", ("y",), "plain"),
        kernel("Conv", "two", ("x",), "z"),
        kernel("Conv", "three", ("plain", "z"), "out"),
    ]
    times, lost = attribute(kernels, sites)
    assert lost == 0 and [time.latency_ns for time in times] == ([2000, 1000, 1000] if where == "made" else [1000, 1000, 2000])

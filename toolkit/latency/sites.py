"""Sites: the places of a network that cost time, and which profiled kernels belong to which.

A site is a heavy node (one with weights, or one that changes the channels) with the light nodes that follow it. Runtimes
fuse, split and reorder inside a site differently at different widths; the site's total is what a width decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.backends import KernelSample
from toolkit.latency.variants import VariantMaker
from toolkit.schema import DimForm

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
GEOMETRY = ("kernel_shape", "strides", "pads", "dilations")
REGROUPING = ("Concat", "Pad", "Split")  # channels differ before and after
KERNEL_SHARE = (
    0.5  # lowest share of a kernel's times that its mean is taken of; a quantile would keep the clock's whole microseconds
)


@dataclass(frozen=True)
class Site:
    """One place of the network. `key` is equal for places that run the same kernels at equal widths."""

    name: str
    key: str
    kind: str  # operator family: what shares an alignment step
    c_in: DimForm
    c_out: DimForm
    nodes: tuple[str, ...]
    label: str = ""  # the parameter it weighs with, where it has one: what a person calls it


@dataclass(frozen=True)
class SpanTime:
    """What some sites took together in one network: one site, but for kernels that stand for several."""

    sites: tuple[int, ...]
    latency_ns: float
    kernels: str  # what was executed, as operator/implementation in alphabetical order


def find_sites(maker: VariantMaker, precision: str) -> tuple[Site, ...]:
    """Cut the dense graph into sites, in execution order.

    A light node belongs to the last site with weights that feeds it: the Add of a residual block to the block's own
    convolution, as runtimes fuse it. Light nodes before the first heavy one make a site of their own.
    """
    nodes = maker.skeleton.graph.node
    producer = {name: index for index, node in enumerate(nodes) for name in node.output}
    weights = {slot.name for slot in maker.slots}
    root: dict[int, int] = {}
    for index, node in enumerate(nodes):
        sources = [root[producer[name]] for name in node.input if name in producer]
        last = max(sources, key=lambda source: (nodes[source].op_type in WEIGHTED, source), default=index)
        root[index] = index if _is_heavy(node, weights, maker) else last
    members: dict[int, list[int]] = {}
    for index, heavy in root.items():
        members.setdefault(heavy, []).append(index)
    followers: dict[int, set[str]] = {}
    for index, node in enumerate(nodes):
        for name in node.input:
            if name in producer and root[producer[name]] != root[index]:
                followers.setdefault(root[producer[name]], set()).add(node.op_type)
    return tuple(
        _site(
            maker,
            [nodes[index] for index in indices],
            producer,
            sorted(followers.get(heavy, ())),
            _precision(maker, [nodes[index] for index in (heavy, *indices)], precision),
        )
        for heavy, indices in members.items()
    )


def _precision(maker: VariantMaker, nodes: Sequence[Any], precision: str) -> str:
    """Of a site whose first node is given first; what else of it stays in float makes it another kernel."""
    floats = [node.op_type for node in nodes if node.name in maker.in_float]
    if not floats:
        return precision
    return "fp32" if nodes[0].name in maker.in_float else f"{precision} but {'+'.join(floats)}"


def attribute(kernels: Sequence[KernelSample], sites: Sequence[Site]) -> tuple[list[SpanTime], float]:
    """Add profiled kernels up by site; also the time in ns of kernels that belong to none.

    A kernel belongs to the sites whose first nodes it stands for, else to the last whose other nodes it does. A layout change on
    the way out belongs to the site that made the tensor, one on the way in to the site that reads it. Sites that some kernel
    does together are one span.
    """
    owner = {name: index for index, site in enumerate(sites) for name in site.nodes}
    heads = {site.name: index for index, site in enumerate(sites)}
    together = list(range(len(sites)))  # the first site of each one's span
    owners: list[int | None] = []
    for kernel in kernels:
        fused = sorted({heads[name] for name in kernel.nodes if name in heads})
        rest = [owner[name] for name in kernel.nodes if name in owner]
        owners.append(fused[-1] if fused else max(rest, default=None))
        for other in fused[1:]:
            first, second = sorted((together[fused[0]], together[other]))
            together = [first if each == second else each for each in together]
    makers = {name: index for kernel, index in zip(kernels, owners, strict=True) if index is not None for name in kernel.outputs}
    times = np.zeros(len(sites))
    executed: list[list[str]] = [[] for _ in sites]
    lost = 0.0
    for position, kernel in enumerate(kernels):
        latency = undisturbed(kernel.samples_ns, KERNEL_SHARE)
        index = owners[position]
        if index is None:
            index = _layout_owner(kernels, position, owners, owner, makers)
        if index is None:
            lost += latency
        else:
            times[together[index]] += latency
            executed[together[index]].append(f"{kernel.op}/{kernel.implementation}".rstrip("/").replace(" ", "_"))
    spans = {first: tuple(i for i, each in enumerate(together) if each == first) for first in dict.fromkeys(together)}
    return [SpanTime(span, float(times[first]), " ".join(sorted(executed[first]))) for first, span in spans.items()], lost


def undisturbed(samples: Any, share: float) -> float:
    """Mean of the lowest `share` of the samples: what the work takes when nothing else runs."""
    ordered = np.sort(np.asarray(samples, float))
    return float(ordered[: max(1, math.ceil(len(ordered) * share))].mean())


def _layout_owner(
    kernels: Sequence[KernelSample], position: int, owners: Sequence[int | None], owner: dict[str, int], makers: dict[str, int]
) -> int | None:
    """Whose cut causes a layout change: on the way out that of the site that made the tensor, else of the site that reads it; by
    the tensors' names, and where a runtime does not tell them by the order executed.
    """
    kernel = kernels[position]
    before = next((index for index in reversed(owners[:position]) if index is not None), None)
    after = next((index for index in owners[position + 1 :] if index is not None), None)
    if "output" in kernel.op.lower():
        named = [owner[name] for name in (*kernel.outputs, *kernel.inputs) if name in owner]
        made = [makers[name] for name in kernel.inputs if name in makers]
        return next(iter(named + made), before)
    pairs = zip(kernels[position + 1 :], owners[position + 1 :], strict=True)
    readers = [index for other, index in pairs if index is not None and set(kernel.outputs) & set(other.inputs)]
    return next(iter(readers), after if after is not None else before)


def _is_heavy(node: Any, weights: set[str], maker: VariantMaker) -> bool:
    if node.op_type in WEIGHTED:
        return True
    if node.op_type not in REGROUPING or not node.input or node.input[0] in weights:
        return False
    before, after = (maker.channels.get(name, ()) for name in (node.input[0], node.output[0]))
    return len(before) > 1 and len(before) == len(after) and before[1] != after[1]


def _site(maker: VariantMaker, nodes: Sequence[Any], producer: dict[str, int], followers: Sequence[str], precision: str) -> Site:
    head = nodes[0]
    c_in, c_out, kind = _channels(maker, head)
    inside = {name for node in nodes for name in node.output}
    graph = maker.skeleton.graph.node
    chain = []
    for node in nodes:
        sides = sorted(graph[producer[name]].op_type for name in node.input if name in producer and name not in inside)
        chain.append(node.op_type + ("~" + "~".join(sides) if sides else ""))
    last = maker.channels.get(nodes[-1].output[0], ())
    static = [
        "+".join(chain),
        *(f"{name[0]}{'x'.join(map(str, a.ints))}" for name in GEOMETRY for a in head.attribute if a.name == name),
        kind + (f"/{grouped}" if (grouped := _per_group(maker, head)) else ""),
        f"{_around(maker, head, head.input[0])}>{_around(maker, head, head.output[0])}>{_size(last[2:])}",
        "to " + ",".join(followers),
        precision,
    ]
    names = {node.name for node in nodes if node.name} | inside
    label = next((name.removesuffix(".weight") for name in head.input if name.endswith(".weight")), head.name or head.output[0])
    return Site(head.name or head.output[0], " ".join(static), kind, c_in, c_out, tuple(sorted(names)), label)


def _channels(maker: VariantMaker, head: Any) -> tuple[DimForm, DimForm, str]:
    """(channels in, channels out, operator family) of a site's first node."""
    weight = next((slot for slot in maker.slots for name in head.input[1:2] if slot.name == name), None)
    if weight is not None and head.op_type in ("Conv", "ConvTranspose"):
        groups = next((a.i for a in head.attribute if a.name == "group"), 1)
        source = maker.channels.get(head.input[0], ())
        if groups == 1:
            first, second = weight.dims[:2]
            return (second, first, head.op_type) if head.op_type == "Conv" else (first, second, head.op_type)
        out = weight.dims[0] if head.op_type == "Conv" else _axis(maker, head.output[0], 1)
        if out == _or_zero(source, 1):
            return out, out, f"Depthwise{head.op_type}"
        return _or_zero(source, 1), out, f"Grouped{head.op_type}"
    if weight is not None and len(weight.dims) == 2:
        turned = head.op_type == "Gemm" and any(a.name == "transB" and a.i for a in head.attribute)
        first, second = weight.dims
        return (second, first, head.op_type) if turned else (first, second, head.op_type)
    axis = -1 if head.op_type == "MatMul" else 1
    return _axis(maker, head.input[0], axis), _axis(maker, head.output[0], axis), head.op_type


def _axis(maker: VariantMaker, tensor: str, axis: int) -> DimForm:
    """The dimension at `axis`; where that never changes the first one that does, as heads do in a product of activations."""
    forms = maker.channels.get(tensor, ())
    usual = _or_zero(forms, axis)
    return usual if usual.terms else next((form for form in forms if form.terms), usual)


def _or_zero(forms: Sequence[DimForm], axis: int) -> DimForm:
    return forms[axis] if len(forms) > abs(axis) else DimForm(const=1)


def _around(maker: VariantMaker, head: Any, tensor: str) -> str:
    """The dimensions of a tensor that are not channels: pixels, tokens, and rows of a matrix product."""
    forms = maker.channels.get(tensor, ())
    return _size(forms[:-1] if head.op_type in ("Gemm", "MatMul") else forms[2:])


def _per_group(maker: VariantMaker, head: Any) -> str:
    """Channels of a group where a convolution has several: as many kernels as there are widths of them."""
    groups = next((a.i for a in head.attribute if a.name == "group"), 1)
    weight = next((slot for slot in maker.slots for name in head.input[1:2] if slot.name == name), None)
    return _size(weight.dims[1:2]) if weight is not None and groups > 1 else ""


def _size(forms: Sequence[DimForm]) -> str:
    return "x".join(str(form.const) if not form.terms else "c" for form in forms) or "1"

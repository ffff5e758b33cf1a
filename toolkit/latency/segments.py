"""Segments: parts of a network between tensors that everything passes through, each a network of its own.

Where a runtime reports one opaque kernel for all of a network, its segments are timed instead. That is coarser than kernels, and
layouts at the cuts may differ from those inside; the end-to-end times of whole networks correct the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.latency.sites import Site, SpanTime
from toolkit.latency.variants import VariantMaker

OPAQUE_SHARE = 0.5  # of the profiled time in kernels that stand for several places with weights: more is no profile


@dataclass(frozen=True)
class Segment:
    """What lies between two tensors, and the sites that it is made of."""

    source: str
    target: str
    sites: tuple[int, ...]


def find_segments(maker: VariantMaker, sites: Sequence[Site]) -> tuple[Segment, ...]:
    """Cut the network wherever one tensor is all that is still needed, and never through a site."""
    graph = maker.skeleton.graph
    weights = {slot.name for slot in maker.slots}
    owner = {name: index for index, site in enumerate(sites) for name in site.nodes}
    last_use = {name: index for index, node in enumerate(graph.node) for name in node.input if name}
    last_use |= {value.name: len(graph.node) for value in graph.output}
    source = next(value.name for value in graph.input if value.name not in weights)
    ends: dict[int, int] = {}  # site -> its last node
    for index, node in enumerate(graph.node):
        ends |= {owner[name]: index for name in (node.name, *node.output) if name in owner}
    live, inside, done, found = {source}, set[int](), set[int](), list[Segment]()
    for index, node in enumerate(graph.node):
        inside |= {owner[name] for name in (node.name, *node.output) if name in owner}
        live = {name for name in (*live, *node.output) if last_use.get(name, -1) > index and name not in weights}
        if len(live) == 1 and inside - done and all(ends[site] <= index for site in inside):
            target = next(iter(live))
            found.append(Segment(source, target, tuple(sorted(inside - done))))
            source, done = target, set(inside)
    return tuple(found)


def cut_out(model: Any, segment: Segment, path: Path) -> Path:
    """Write one segment of a variant as a network of its own beside the variant's weights; all shapes of `model` inferred."""
    import onnx
    from onnx.utils import Extractor

    part = Extractor(model).extract_model([segment.source], [segment.target])
    onnx.save(part, str(path))
    return path


def opaque(times: Sequence[SpanTime], lost_ns: float) -> bool:
    """Whether most of a profile is in kernels that stand for several sites, or for none."""
    total = sum(time.latency_ns for time in times) + lost_ns
    return sum(time.latency_ns for time in times if len(time.sites) > 1) + lost_ns > OPAQUE_SHARE * total

"""From a model's variants to its latency model: measure what the table does not have, fit, judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from toolkit.devices import Device
from toolkit.errors import TableError
from toolkit.latency.predict import LatencyModel, fit_model
from toolkit.latency.sites import find_sites
from toolkit.latency.table import (
    NETWORKS,
    Progress,
    SampleSet,
    kernel_rows,
    load_samples,
    load_table,
    measure_networks,
    merge_table,
    sample_widths,
    structure_id,
)
from toolkit.latency.variants import VariantMaker
from toolkit.schema import Fingerprint, Profile

MIN_COVERAGE = 0.9


def measure_model(
    profile: Profile,
    fingerprint: Fingerprint,
    device: Device,
    maker: VariantMaker,
    candidates: Mapping[str, Sequence[int]],
    folder: Path,
    *,
    seconds: float = 40.0,
    seed: int = 0,
    progress: Progress = lambda step, done, total: None,
    extra: Sequence[tuple[dict[str, int], Path]] = (),
    networks: int = NETWORKS,
) -> LatencyModel:
    """The latency model of one program on one device, measured in about `seconds` unless `folder` has it already.

    `folder` is the fingerprint's; the model's own networks go into a subfolder named after its structure. Groups without
    candidates keep their width. `extra` are exported files with branches dropped (width 0), which variants cannot be.

    Raises:
        TableError: a file of the table is damaged or of another fingerprint; a network that computes no finite values;
            profiled kernels that cannot be tied to the network.
    """
    sites = find_sites(maker, profile.precision)
    own = folder / structure_id(sites)
    grid = {name: [width for width in candidates.get(name, ()) if width > 0] or [full] for name, full in maker.widths.items()}
    plan = sample_widths(grid, networks, seed)
    before = load_samples(own, fingerprint) if (own / "samples.json").exists() else None
    header = folder / "header.json"
    if header.exists():
        load_table(folder, fingerprint)  # damage is told before the time for a measurement is spent
    samples = measure_networks(
        profile, fingerprint, device, maker, sites, plan, extra, own, seconds=seconds, seed=seed, progress=progress
    )
    rows = kernel_rows(samples, sites)
    if before is None or not header.exists():
        merge_table(folder, samples, rows)
    model = fit_model(samples, sites)
    return replace(model, coverage=_coverage(samples), table_id=f"{fingerprint.id}-{samples.digest[:8]}", rows=len(rows))


def _coverage(samples: SampleSet) -> float:
    """Share of the profiled time of the widest network that belongs to sites; TableError where it is too little to trust."""
    widest = max((n for n in samples.networks if n.sites), key=lambda network: sum(network.widths.values()))
    known = sum(latency for _, latency, _ in widest.sites)
    coverage = known / (known + widest.lost_ns) if known else 0.0
    if coverage < MIN_COVERAGE:
        raise TableError(
            f"Only {coverage:.0%} of the profiled time can be tied to places of the network.",
            "Run `edgekit doctor` and report the model with the runtime's version.",
        )
    return coverage

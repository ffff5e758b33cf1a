"""From a model's variants to its latency model: measure what the table does not have, fit, judge; and measure more on demand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np

from toolkit.devices import Device
from toolkit.errors import LinkError, TableError
from toolkit.latency.fit import fit_model, observe
from toolkit.latency.predict import LatencyModel
from toolkit.latency.sampling import DENSE_VISITS, NETWORKS, anchor_widths, sample_widths
from toolkit.latency.sites import Site, find_sites
from toolkit.latency.table import (
    HEADER,
    SAMPLES,
    NetworkSample,
    SampleSet,
    append_partial,
    digest,
    end_partial,
    identity,
    kernel_rows,
    load_samples,
    load_table,
    locked,
    merge_table,
    now,
    read_partial,
    save_samples,
    structure_id,
)
from toolkit.latency.timer import Timer
from toolkit.latency.variants import BLOB, VariantMaker
from toolkit.schema import Fingerprint, MeasuredModel, Profile, TableRow

Progress = Callable[[str, int, int], None]
Wanted = tuple[str, dict[str, int], Path | None]  # role, widths, a file where no variant can be

MIN_COVERAGE = 0.9
BASE = ("train", "held_out", "extra")  # roles of the networks that belong to every run
AROUND_S = 10.0  # that loading and fitting a whole table take beside the measuring, on the machines at hand
FINISH_S = 1.0  # for inserting Q/DQ into one network
PLAN_S = 4.0  # for a network that is measured on demand
REUSED_SAMPLES = 40  # of a kernel, from which on another model's rows stand for profiling it
REUSED_SHARE = 0.5  # of the networks that are measured where all kernels are known


@dataclass
class ModelTable:
    """What was measured for one program on one device, and the latency model fitted to it."""

    profile: Profile
    fingerprint: Fingerprint
    device: Device
    maker: VariantMaker
    candidates: Mapping[str, Sequence[int]]
    folder: Path  # of the fingerprint; the program's own networks go into a subfolder named after its structure
    seed: int = 0
    model: LatencyModel = field(init=False)
    sites: tuple[Site, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.sites = find_sites(self.maker, self.profile.precision)
        self._timer: Timer | None = None
        self._plans: list[tuple[str, dict[str, int]]] = []  # measured on demand since `measure`

    @property
    def own(self) -> Path:
        """The folder of the program's own networks."""
        return self.folder / structure_id(self.sites)

    @property
    def grid(self) -> dict[str, list[int]]:
        """Widths that variants may have; groups without candidates keep theirs."""
        return {name: [w for w in self.candidates.get(name, ()) if w > 0] or [full] for name, full in self.maker.widths.items()}

    def known(self) -> bool:
        """Whether all of it was measured before."""
        return (self.own / SAMPLES).exists()

    def measure(
        self,
        *,
        seconds: float,
        networks: int = NETWORKS,
        extra: Sequence[tuple[dict[str, int], Path]] = (),
        progress: Progress = lambda step, done, total: None,
    ) -> LatencyModel:
        """Measure what the folder does not have yet in about `seconds`, and fit.

        `progress` is told before it begins how long it takes. Each network is written as soon as it is measured, so an
        interrupted measurement goes on where it stopped. `extra` are exported files with branches dropped (width 0), which
        variants cannot be. Fewer `networks` are measured where the table has this program's kernels from others.

        Raises:
            TableError: a file of the table is damaged or of another fingerprint; a network that computes no finite values;
                profiled kernels that cannot be tied to the network; another process measures for this table.
        """
        with locked(self.folder):
            done = load_samples(self.own, self.fingerprint) if self.known() else None
            header = load_table(self.folder, self.fingerprint)[0] if (self.folder / HEADER).exists() else None
            borrowed = done.borrowed if done else self._borrow()
            if not done and self._covered(borrowed):
                networks, seconds = round(networks * REUSED_SHARE), seconds * REUSED_SHARE
            plan = [] if done else sample_widths(self.grid, networks, self.seed)
            wanted: list[Wanted] = [(role, widths, None) for role, widths in plan]
            wanted += [("extra", dict(widths), path) for widths, path in extra]
            samples = self._complete(done, wanted, borrowed, seconds * (len(wanted) / NETWORKS if done else 1), progress)
            self._plans = []
            self.model = self._fit(samples, None)
            label = f"{self.own.name} {samples.created_at}"
            if header is None or label not in header.models:
                measured = MeasuredModel(
                    networks=len(samples.of(*BASE)), coverage=self.model.coverage, held_out=self.model.held_out
                )
                first = msgspec.structs.replace(samples, networks=tuple(samples.of(*BASE)), borrowed=())
                rows = kernel_rows(observe(first.networks, self.sites, first)[0], first)
                merge_table(self.folder, label, first, rows, measured, self.model.evidence)
        return self.model

    def refine(self, plans: Sequence[tuple[Mapping[str, int], Path | None]], progress: Progress | None = None) -> LatencyModel:
        """Measure these widths too (those with a dropped branch from an exported file), and fit again with the same steps.

        What was measured before is not measured again, but counts only from here on: the same table and the same calls give the
        same models. Call `measure` first.
        """
        wanted: list[Wanted] = [("plan", dict(widths), path) for widths, path in plans]
        known = {identity(item[:2]) for item in self._plans}
        new = [item for item in wanted if identity(item[:2]) not in known]
        if new:
            with locked(self.folder):
                samples = load_samples(self.own, self.fingerprint)
                report = progress or (lambda step, done, total: None)
                samples = self._complete(samples, new, samples.borrowed, PLAN_S * len(new), report)
            self._plans += [(role, widths) for role, widths, _ in new]
            self.model = self._fit(samples, self.model)
        return self.model

    def measured_ns(self, widths: Mapping[str, int]) -> float:
        """The latency that a plan given to `refine` was measured at, on the scale of the model's predictions."""
        wanted = identity(("plan", widths))
        return self._seen.latency_ns(next(network for network in self._seen.networks if identity(network) == wanted))

    def _complete(
        self, done: SampleSet | None, wanted: Sequence[Wanted], borrowed: tuple[TableRow, ...], seconds: float, progress: Progress
    ) -> SampleSet:
        """The samples with all that is wanted, measured where it is missing, and on disk."""
        kept = list(done.networks) if done else []
        networks = kept + [n for n in read_partial(self.own) if n not in kept]  # killed between two files, both may hold one
        missing = _missing(networks, wanted)
        if done and not missing and len(networks) == len(kept):
            end_partial(self.own)
            return done
        self.own.mkdir(parents=True, exist_ok=True)
        if missing:
            seconds *= len(missing) / max(len(wanted), 1)
            told = seconds + (0.0 if done else AROUND_S) + (FINISH_S * len(missing) if self.maker.finish else 0.0)
            step = f"measuring networks, about {math.ceil(told / 10) * 10} s"
            progress(step, 0, len(missing))
            timer, level = self._open_timer(networks)
            end = timer.now_s() + seconds
            for position, (role, widths, path) in enumerate(missing):
                allowance = max(0.0, end - timer.now_s()) / (len(missing) - position)
                before = timer.now_s()
                file = path or self.maker.write(widths, self.own)
                end += timer.now_s() - before
                try:
                    network = timer.measure(file, role, widths, allowance, variant=path is None)
                except LinkError:  # what is measured is kept; the anchor is loaded anew, and its level found again
                    self._timer, left = None, max(0.0, end - timer.now_s())
                    timer, level = self._open_timer(networks)
                    end = timer.now_s() + left
                    network = timer.measure(file, role, widths, allowance, variant=path is None)
                network = msgspec.structs.replace(network, ratio=network.ratio * level)
                networks.append(network)
                append_partial(self.own, network)
                progress(step, position + 1, len(missing))
            for leftover in (BLOB, "variant.onnx", "anchor.onnx", "segment.onnx", "reference.onnx"):
                (self.own / leftover).unlink(missing_ok=True)
        base = done or SampleSet(fingerprint=self.fingerprint, seed=self.seed, created_at=now(), networks=(), borrowed=borrowed)
        samples = save_samples(self.own, msgspec.structs.replace(base, networks=tuple(networks)))
        end_partial(self.own)
        return samples

    def _open_timer(self, known: Sequence[NetworkSample]) -> tuple[Timer, float]:
        """The timer, opened once, and what its ratios are multiplied with to be those of the first session.

        The anchor may be faster or slower each time it is loaded, as any network. So in a later session the dense network is
        timed beside it again.
        """
        if self._timer is None:
            anchor = self.maker.write(anchor_widths(self.maker.widths, self.sites), self.own, "anchor.onnx")
            self._timer = Timer(self.profile, self.device, self.own, anchor, self.maker, self.sites)
            self._level = 1.0
            before = [network.ratio for network in known if network.widths == self.maker.widths]
            if before:
                file, visit_s = self.maker.write(self.maker.widths, self.own), PLAN_S / DENSE_VISITS
                again = [
                    self._timer.measure(file, "train", self.maker.widths, visit_s, variant=False).ratio
                    for _ in range(DENSE_VISITS)
                ]
                self._level = float(np.mean(before) / np.mean(again))
        return self._timer, self._level

    def _borrow(self) -> tuple[TableRow, ...]:
        """Rows that other models measured of this program's kernels."""
        if not (self.folder / HEADER).exists():
            return ()
        keys = {site.key for site in self.sites}
        header, rows = load_table(self.folder, self.fingerprint)
        own = any(label.startswith(self.own.name) for label in header.models)
        return () if own else tuple(row for row in rows if row.key in keys)

    def _covered(self, rows: Sequence[TableRow]) -> bool:
        """Whether these rows hold enough of every kernel."""
        count = {site.key: 0 for site in self.sites}
        for row in rows:
            count[row.key] += row.n
        return min(count.values(), default=0) >= REUSED_SAMPLES

    def _fit(self, samples: SampleSet, before: LatencyModel | None) -> LatencyModel:
        """The model of the networks that belong to every run, and of the plans that this one asked for, in its order."""
        base = samples.of(*BASE)
        asked = [next(n for n in samples.networks if identity(n) == identity(plan)) for plan in self._plans]
        self._seen = seen = msgspec.structs.replace(samples, networks=(*base, *asked))
        model = fit_model(seen, self.sites, before.alignments if before else None)
        return replace(
            model,
            coverage=_coverage(seen),
            table_id=f"{self.fingerprint.id}-{digest(msgspec.structs.replace(samples, networks=tuple(base)))[:8]}",
            rows=len({(s.key, s.c_in.at(n.widths), s.c_out.at(n.widths)) for s in self.sites for n in base if n.spans}),
        )


def _missing(networks: Sequence[NetworkSample], wanted: Sequence[Wanted]) -> list[Wanted]:
    """What was not measured, or not as often as it is wanted."""
    there = Counter(identity(network) for network in networks)
    missing = []
    for item in wanted:
        there[identity(item[:2])] -= 1
        if there[identity(item[:2])] < 0:
            missing.append(item)
    return missing


def _coverage(samples: SampleSet) -> float:
    """Share of the profiled time of the widest network that belongs to sites; TableError where it is too little to trust."""
    profiled = [network for network in samples.networks if network.spans]
    if not profiled:  # all kernels are borrowed, or nothing could be tied to the network
        return 1.0 if samples.borrowed else 0.0
    widest = max(profiled, key=lambda network: sum(network.widths.values()))
    known = sum(latency for _, latency, _ in widest.spans)
    coverage = known / (known + widest.lost_ns) if known else 0.0
    if coverage < MIN_COVERAGE:
        raise TableError(
            f"Only {coverage:.0%} of the profiled time can be tied to places of the network.",
            "Run `edgekit doctor` and report the model with the runtime's version.",
        )
    return coverage

"""Timing one network beside two others that stay loaded: the anchor and the reference.

The anchor is a variant of the same model. What else runs on a machine slows down a network by how much it needs of caches and
memory, which the small reference hardly feels, but a variant of the same model feels alike: latencies are ratios to it. The
reference, the same for all models, then gives the anchor's own level over the whole session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.backends import random_feeds
from toolkit.bench.reference import reference_path
from toolkit.bench.timing import Visit, time_burst, visit
from toolkit.devices import Device
from toolkit.errors import MissingError, TableError
from toolkit.latency.segments import Segment, cut_out, find_segments, opaque
from toolkit.latency.sites import Site, SpanTime, attribute, undisturbed
from toolkit.latency.table import NetworkSample
from toolkit.latency.variants import VariantMaker
from toolkit.schema import Profile

NETWORK_SHARE = 0.5  # lowest share of a network's times that its mean is taken of: other work on the machine only adds
MIN_ROUNDS, MAX_ROUNDS = 4, 40
MIN_RUNS, MAX_RUNS = 8, 200
SURE, SURE_ROUNDS = 0.002, 8  # standard error of the ratio that is good enough, and rounds from which on it is looked at
PROFILED_SHARE = 0.25  # of a network's time that goes to the profiled pass

Times = NDArray[np.int64]


class Timer:
    """Opens the reference and the anchor, then measures one network after another."""

    def __init__(
        self, profile: Profile, device: Device, folder: Path, anchor: Path, maker: VariantMaker, sites: Sequence[Site]
    ) -> None:
        self._profile, self._backend, self.clock = profile, device.backend(profile.runtime), device.clock_ns
        self._maker, self._sites, self._folder = maker, sites, folder
        self._segments: tuple[Segment, ...] = ()  # empty while the runtime's own profile tells the places apart
        self._reference = self._visit(reference_path(folder), "fp32")
        self._anchor = self._visit(anchor, profile.precision)
        self._require_precision(anchor)

    def now_s(self) -> float:
        """The device's clock."""
        return self.clock() / 1e9

    def measure(
        self, path: Path, role: str, widths: Mapping[str, int], allowance_s: float, *, variant: bool = True
    ) -> NetworkSample:
        """Both passes over one network within about `allowance_s`; without a profile where it is no variant of the maker's."""
        end = self.now_s() + allowance_s
        own = self._visit(path, self._profile.precision)
        times, lost = self._profiled(path, widths, own, allowance_s * PROFILED_SHARE) if variant else ([], 0.0)
        taken: dict[str, list[Times]] = {"reference": [self._take(self._reference)], "anchor": [], "own": []}
        while not self._enough(taken, end):
            turns = {"own": own, "anchor": self._anchor}
            for name in turns if len(taken["own"]) % 2 == 0 else reversed(turns):
                taken[name].append(self._take(turns[name]))
        level = {name: undisturbed(np.concatenate(samples), NETWORK_SHARE) for name, samples in taken.items()}
        return NetworkSample(
            widths=dict(widths),
            role=role,
            ratio=level["own"] / level["anchor"],
            anchor_ns=level["anchor"],
            reference_ns=level["reference"],
            spans=tuple((t.sites, t.latency_ns, t.kernels) for t in times),
            lost_ns=lost,
        )

    def _enough(self, taken: Mapping[str, Sequence[Times]], end_s: float) -> bool:
        """Whether to stop: enough rounds, and no time left or a ratio that is known well."""
        rounds = len(taken["own"])
        if rounds < MIN_ROUNDS:
            return False
        pairs = zip(taken["own"], taken["anchor"], strict=True)
        ratios = np.array([np.median(own) / np.median(anchor) for own, anchor in pairs])
        error = float(np.std(ratios, ddof=1) / np.mean(ratios)) / rounds**0.5
        return self.now_s() >= end_s or rounds >= MAX_ROUNDS or (rounds >= SURE_ROUNDS and error < SURE)

    def _profiled(self, path: Path, widths: Mapping[str, int], own: Visit, seconds: float) -> tuple[list[SpanTime], float]:
        """Times by place: from the runtime's profile, or of segments where that does not tell the places apart."""
        import onnx

        if not self._segments:
            one_s = max(1, int(np.median(time_burst(own.call, 2, self.clock)))) / 1e9
            runs = int(np.clip(seconds / one_s, MIN_RUNS, MAX_RUNS))
            threads, precision = self._profile.threads, self._profile.precision
            times, lost = attribute(self._backend.profile(path, threads=threads, precision=precision, runs=runs), self._sites)
            if not opaque(times, lost):
                return times, lost
            self._segments = find_segments(self._maker, self._sites)
            if not self._segments:
                message = f"{self._profile.runtime} shows too little of where the time goes, and this network cannot be cut."
                raise TableError(message, "Report the model with the runtime's version.")
        model = onnx.shape_inference.infer_shapes(self._maker.finished(widths), data_prop=True)
        return [self._segment(part, model) for part in self._segments], 0.0

    def _segment(self, part: Segment, model: Any) -> SpanTime:
        """One segment timed as a network of its own."""
        what = self._visit(cut_out(model, part, self._folder / "segment.onnx"), self._profile.precision)
        return SpanTime(part.sites, undisturbed(self._take(what), NETWORK_SHARE), "segment")

    def _require_precision(self, path: Path) -> None:
        """MissingError where the device runs something else than the profile says."""
        wanted = self._profile.precision
        session = self._backend.open(path, threads=self._profile.threads, precision=wanted)
        executed, source = session.executed_precision()
        if wanted not in executed.split("+"):
            message = f"{self._profile.runtime} runs this model in {executed}, not in {wanted} ({source})."
            raise MissingError(message, f"This device has no {wanted}; measure with --precision {executed.split('+')[0]}.")

    def _take(self, what: Visit) -> Times:
        for _ in range(what.lead):
            what.call()
        return time_burst(what.call, what.burst, self.clock)

    def _visit(self, path: Path, precision: str) -> Visit:
        call = self._call(path, precision)
        time_burst(call, 2, self.clock)
        return visit(call, float(np.median(time_burst(call, 3, self.clock))))

    def _call(self, path: Path, precision: str) -> Callable[[], object]:
        session = self._backend.open(path, threads=self._profile.threads, precision=precision)
        feeds = random_feeds(session.inputs, 0)
        for output in session.run(feeds):
            if np.issubdtype(output.dtype, np.floating) and not np.isfinite(output).all():
                raise TableError(f"The network {path.name} computes values that are not finite.", "Check the model's weights.")
        return session.prepare(feeds)

"""Timing one network beside two others that stay loaded: the anchor and the reference.

The anchor is a variant of the same model. What else runs on a machine slows down a network by how much it needs of caches and
memory, which the small reference hardly feels, but a variant of the same model feels alike: latencies are ratios to it. The
reference, the same for all models, then gives the anchor's own level over the whole session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.bench.reference import reference_path
from toolkit.bench.timing import Visit, visit
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
        self._profile, self._rig = profile, device.rig(profile.runtime, profile.threads)
        self._maker, self._sites, self._folder = maker, sites, folder
        self._segments: tuple[Segment, ...] = ()  # empty while the runtime's own profile tells the places apart
        self._reference = self._visit(reference_path(folder), "fp32")
        self._anchor = self._visit(anchor, profile.precision)
        self._require_precision(self._anchor.what)

    def now_s(self) -> float:
        """The device's clock."""
        return self._rig.now_ns() / 1e9

    def measure(
        self, path: Path, role: str, widths: Mapping[str, int], allowance_s: float, *, variant: bool = True
    ) -> NetworkSample:
        """Both passes over one network within about `allowance_s`; without a profile where it is no variant of the maker's."""
        end = self.now_s() + allowance_s
        own = self._visit(path, self._profile.precision)
        times, lost = self._profiled(widths, own, allowance_s * PROFILED_SHARE) if variant else ([], 0.0)
        taken: dict[str, list[Times]] = {"reference": [], "anchor": [], "own": []}
        visits = {"reference": self._reference, "own": own, "anchor": self._anchor}
        order = ["reference", *(["own", "anchor", "anchor", "own"] * (MAX_ROUNDS // 2))]
        left_s = max(0.1, end - self.now_s())
        made = self._rig.timed((visits[name] for name in order), first=1, group=2, least=MIN_ROUNDS, within_s=left_s)
        ratios: list[float] = []  # of own to anchor, a round each
        for position, name in enumerate(order):
            one = next(made)
            taken[name].append(one.samples_ns)
            if position and position % 2 == 0:
                ratios.append(float(np.median(taken["own"][-1]) / np.median(taken["anchor"][-1])))
                if self._enough(ratios, one.at_ns / 1e9 >= end):
                    break
        self._rig.unload(own.what)
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

    def _enough(self, ratios: Sequence[float], late: bool) -> bool:
        """Whether to stop: enough rounds, and no time left or a ratio that is known well."""
        rounds = len(ratios)
        if rounds < MIN_ROUNDS:
            return False
        error = float(np.std(ratios, ddof=1) / np.mean(ratios)) / rounds**0.5
        return late or rounds >= MAX_ROUNDS or (rounds >= SURE_ROUNDS and error < SURE)

    def _profiled(self, widths: Mapping[str, int], own: Visit, seconds: float) -> tuple[list[SpanTime], float]:
        """Times by place: from the runtime's profile, or of segments where that does not tell the places apart."""
        import onnx

        if not self._segments:
            one_s = max(1, int(np.median(self._take(Visit(own.what, 0, 2))))) / 1e9
            runs = int(np.clip(seconds / one_s, MIN_RUNS, MAX_RUNS))
            times, lost = attribute(self._rig.profile(own.what, runs), self._sites)
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
        samples = self._take(what)
        self._rig.unload(what.what)
        return SpanTime(part.sites, undisturbed(samples, NETWORK_SHARE), "segment")

    def _require_precision(self, handle: int) -> None:
        """MissingError where the device runs something else than the profile says."""
        wanted = self._profile.precision
        executed, source = self._rig.executed_precision(handle)
        if wanted not in executed.split("+"):
            message = f"{self._profile.runtime} runs this model in {executed}, not in {wanted} ({source})."
            raise MissingError(message, f"This device has no {wanted}; measure with --precision {executed.split('+')[0]}.")

    def close(self) -> None:
        """Give the device back."""
        self._rig.close()

    def _take(self, what: Visit) -> Times:
        return next(self._rig.timed([what])).samples_ns

    def _visit(self, path: Path, precision: str) -> Visit:
        loaded = self._rig.load(path, precision, check=True, bursts=(2, 3))
        if not loaded.finite:
            raise TableError(f"The network {path.name} computes values that are not finite.", "Check the model's weights.")
        return visit(loaded.handle, float(np.median(loaded.bursts_ns[1])))

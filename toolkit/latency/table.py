"""Measuring width variants, and the table files the measurements are kept in.

Two kinds of files live in a fingerprint's folder. `rows.csv` beside `header.json`: every kernel measured on this device,
shared by all models. `<structure>/samples.json`: the networks measured for one model, which is all its latency model is
fitted from; the same file gives the same model.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolkit.backends import random_feeds
from toolkit.bench.reference import reference_path
from toolkit.bench.timing import Clock, time_burst
from toolkit.devices import Device
from toolkit.errors import TableError, UsageError
from toolkit.latency.sites import KERNEL_SHARE, Site, SiteTime, attribute, undisturbed
from toolkit.latency.variants import VariantMaker
from toolkit.schema import (
    SCHEMA,
    Fingerprint,
    Profile,
    Record,
    TableHeader,
    TableRow,
    from_json,
    rows_from_csv,
    rows_to_csv,
    to_json,
    write_text,
)

Progress = Callable[[str, int, int], None]

NETWORKS = 60
HELD_OUT = 10
BURST_NS = 8e6  # length of one uninterrupted series of inferences
NETWORK_SHARE = 0.15  # lowest share of a network's times that its mean is taken of: other work on the machine only adds
MIN_ROUNDS, MAX_ROUNDS = 3, 60
MIN_RUNS, MAX_RUNS = 5, 200
PROFILED_SHARE = 0.3  # of a network's time that goes to the profiled pass


class NetworkSample(Record, frozen=True, kw_only=True):
    """One measured network. `ratio` is its end-to-end latency over that of the reference beside it."""

    widths: dict[str, int]
    role: str  # train | held_out | extra
    ratio: float
    reference_ns: float
    profiled_reference_ns: float = 0.0
    sites: tuple[tuple[int, float, int], ...] = ()  # (site, profiled ns, kernels)
    lost_ns: float = 0.0


class SampleSet(Record, frozen=True, kw_only=True):
    """All networks measured for one model on one fingerprint."""

    schema: int = SCHEMA
    fingerprint: Fingerprint
    seed: int
    created_at: str
    networks: tuple[NetworkSample, ...]
    digest: str = ""

    @property
    def reference_ns(self) -> float:
        """The reference's latency over the whole session: what ratios are multiplied with."""
        return float(np.median([network.reference_ns for network in self.networks]))


def sample_widths(candidates: Mapping[str, Sequence[int]], networks: int, seed: int) -> list[tuple[str, dict[str, int]]]:
    """(role, widths) of the networks to measure, all widths at least 1.

    Dense and floor; a Latin hypercube, so that every candidate of every group occurs; and networks like those a plan makes,
    scaled as a whole with some jitter. Held-out ones are of the last two kinds.
    """
    rng = np.random.default_rng(seed)
    grid = {name: sorted({width for width in widths if width > 0}) for name, widths in candidates.items()}
    held = min(HELD_OUT, max(0, networks // 4))
    latin = (networks - 2 - held) * 2 // 3
    columns = {name: _stratified(widths, latin, rng) for name, widths in grid.items()}

    def scaled() -> dict[str, int]:
        scale = rng.uniform(0.3, 1.0)
        wanted = {name: widths[-1] * scale * np.exp(rng.normal(0, 0.35)) for name, widths in grid.items()}
        return {name: min(grid[name], key=lambda width: abs(width - wanted[name])) for name in grid}

    def uniform() -> dict[str, int]:
        return {name: int(rng.choice(widths)) for name, widths in grid.items()}

    plan = [("train", {name: widths[end] for name, widths in grid.items()}) for end in (-1, 0)]
    plan += [("train", {name: int(columns[name][row]) for name in grid}) for row in range(latin)]
    plan += [("train", scaled()) for _ in range(networks - 2 - held - latin)]
    plan += [("held_out", scaled() if index % 2 else uniform()) for index in range(held)]
    order = [0, *(1 + int(i) for i in rng.permutation(len(plan) - 1))]  # a drift of the machine must not look like a width
    return [plan[index] for index in order]


def _stratified(widths: Sequence[int], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    positions = (np.arange(count) * len(widths) / max(count, 1)).astype(int)
    return rng.permutation(np.asarray(widths, np.int64)[positions])


# --- measuring --------------------------------------------------------------------------------------------------------------


def measure_networks(
    profile: Profile,
    fingerprint: Fingerprint,
    device: Device,
    maker: VariantMaker,
    sites: Sequence[Site],
    plan: Sequence[tuple[str, dict[str, int]]],
    extra: Sequence[tuple[dict[str, int], Path]],
    folder: Path,
    *,
    seconds: float,
    seed: int,
    progress: Progress,
) -> SampleSet:
    """Measure what `folder` does not have yet, write `samples.json` there, and return it.

    Each network is written as soon as it is measured, so an interrupted measurement goes on where it stopped.
    """
    done = load_samples(folder, fingerprint) if (folder / "samples.json").exists() else None
    partial = folder / "samples.partial.jsonl"
    networks = list(done.networks) if done else _read_partial(partial)
    known = {_identity(network.role, network.widths) for network in networks}
    variants = plan if done is None else ()
    wanted: list[tuple[str, dict[str, int], Path | None]] = [(role, widths, None) for role, widths in variants]
    wanted += [("extra", dict(widths), path) for widths, path in extra]
    missing = [item for item in wanted if _identity(item[0], item[1]) not in known]
    if done and not missing:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    timer = _Timer(profile, device, folder)
    end = timer.now_s() + seconds * len(missing) / max(len(wanted), 1)
    for position, (role, widths, path) in enumerate(missing):
        allowance = max(0.0, end - timer.now_s()) / (len(missing) - position)
        file = path or maker.write(widths, folder)
        networks.append(timer.measure(file, role, widths, sites if path is None else (), allowance))
        with partial.open("ab") as stream:
            stream.write(msgspec.json.encode(networks[-1]) + b"\n")
        progress("measuring networks", position + 1, len(missing))
    measured = SampleSet(fingerprint=fingerprint, seed=seed, created_at=_now(), networks=tuple(networks))
    measured = msgspec.structs.replace(measured, digest=_digest(measured))
    write_text(folder / "samples.json", to_json(measured))
    for leftover in (partial, folder / "variant.onnx", folder / "blob.bin"):
        leftover.unlink(missing_ok=True)
    return measured


class _Timer:
    """Times networks beside the reference network, which stays loaded."""

    def __init__(self, profile: Profile, device: Device, folder: Path) -> None:
        self.profile, self.backend, self.clock = profile, device.backend(profile.runtime), device.clock_ns
        self.reference = self._call(reference_path(folder), "fp32")
        self.reference_burst = _burst_length(self.reference, self.clock)

    def now_s(self) -> float:
        """The device's clock."""
        return self.clock() / 1e9

    def measure(self, path: Path, role: str, widths: dict[str, int], sites: Sequence[Site], allowance: float) -> NetworkSample:
        """Both passes over one network within about `allowance` seconds."""
        end = self.now_s() + allowance
        call = self._call(path, self.profile.precision)
        length = _burst_length(call, self.clock)
        times: list[SiteTime] = []
        lost = profiled_reference = 0.0
        if sites:
            one = float(np.median(time_burst(call, 2, self.clock))) / 1e9
            runs = int(np.clip(allowance * PROFILED_SHARE / one, MIN_RUNS, MAX_RUNS))
            before = time_burst(self.reference, self.reference_burst * 2, self.clock)
            kernels = self.backend.profile(path, threads=self.profile.threads, precision=self.profile.precision, runs=runs)
            after = time_burst(self.reference, self.reference_burst * 2, self.clock)
            profiled_reference = undisturbed(np.concatenate([before, after]), KERNEL_SHARE)
            times, lost = attribute(kernels, sites)
        own: list[NDArray[np.int64]] = []
        references: list[NDArray[np.int64]] = []
        while len(own) < MIN_ROUNDS or (self.now_s() < end and len(own) < MAX_ROUNDS):
            references.append(time_burst(self.reference, self.reference_burst, self.clock))
            own.append(time_burst(call, length, self.clock))
        reference = undisturbed(np.concatenate(references), NETWORK_SHARE)
        return NetworkSample(
            widths=widths,
            role=role,
            ratio=undisturbed(np.concatenate(own), NETWORK_SHARE) / reference,
            reference_ns=reference,
            profiled_reference_ns=profiled_reference,
            sites=tuple((t.site, t.latency_ns, t.kernels) for t in times),
            lost_ns=lost,
        )

    def _call(self, path: Path, precision: str) -> Callable[[], object]:
        session = self.backend.open(path, threads=self.profile.threads, precision=precision)
        feeds = random_feeds(session.inputs, 0)
        for output in session.run(feeds):
            if np.issubdtype(output.dtype, np.floating) and not np.isfinite(output).all():
                raise TableError(f"The network {path.name} computes values that are not finite.", "Check the model's weights.")
        return session.prepare(feeds)


def _burst_length(call: Callable[[], object], clock: Clock) -> int:
    time_burst(call, 2, clock)
    return int(np.clip(BURST_NS / np.median(time_burst(call, 3, clock)), 2, 60))


# --- files ------------------------------------------------------------------------------------------------------------------


def structure_id(sites: Sequence[Site]) -> str:
    """Twelve hexadecimal digits of the network's places, their kernels, and what decides their widths."""
    text = repr([(site.name, site.key, site.c_in, site.c_out) for site in sites])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_samples(folder: Path, fingerprint: Fingerprint) -> SampleSet:
    """The measured networks of one model.

    Raises:
        TableError: missing, truncated, changed since it was written, or of another fingerprint.
    """
    path = folder / "samples.json"
    try:
        found = from_json(SampleSet, path.read_bytes(), "it")
    except (UsageError, OSError) as error:
        raise TableError(f"The latency table file {path} cannot be read: {_reason(error)}.", _repair(fingerprint, path)) from None
    if found.digest != _digest(found):
        raise TableError(f"The latency table file {path} was changed after it was written.", _repair(fingerprint, path))
    _same_fingerprint(path, found.fingerprint, fingerprint)
    return found


def kernel_rows(samples: SampleSet, sites: Sequence[Site]) -> list[TableRow]:
    """The networks' sites as table rows: one per kernel and channel pair, normalised by the reference."""
    reference = samples.reference_ns
    cells: dict[tuple[str, int, int], list[float]] = {}
    for network in samples.networks:
        for index, latency, _ in network.sites:
            site = sites[index]
            cell = site.key, site.c_in.at(network.widths), site.c_out.at(network.widths)
            cells.setdefault(cell, []).append(latency * reference / network.profiled_reference_ns)
    rows = []
    for (key, c_in, c_out), values in sorted(cells.items()):
        low, middle, high = np.percentile(values, [25, 50, 75])
        rows.append(
            TableRow(
                key=key, c_in=c_in, c_out=c_out, latency_ns=round(middle, 1), iqr_ns=round(high - low, 1), n=len(values),
                ratio=round(middle / reference, 6), measured_at=samples.created_at,
            )
        )  # fmt: skip
    return rows


def load_table(folder: Path, fingerprint: Fingerprint) -> tuple[TableHeader, list[TableRow]]:
    """A fingerprint's kernels. TableError where a file is missing, damaged, or of another fingerprint."""
    rows_path, header_path = folder / "rows.csv", folder / "header.json"
    path = header_path
    try:
        header = from_json(TableHeader, header_path.read_bytes(), "it")
        path = rows_path
        text = rows_path.read_text(encoding="utf-8")
        if hashlib.sha256(text.encode()).hexdigest() != header.rows_sha256:
            message = f"The latency table {rows_path} is not what its header {header_path.name} describes."
            raise TableError(message, _repair(fingerprint, header_path, rows_path))
        _same_fingerprint(rows_path, header.fingerprint, fingerprint)
        return header, rows_from_csv(TableRow, text, "it")
    except (UsageError, OSError, UnicodeDecodeError) as error:
        message = f"The latency table file {path} cannot be read: {_reason(error)}."
        raise TableError(message, _repair(fingerprint, header_path, rows_path)) from None


def merge_table(folder: Path, samples: SampleSet, rows: Sequence[TableRow]) -> None:
    """Add a model's rows to the fingerprint's table; a pair measured before is averaged by the number of networks."""
    kept: list[TableRow] = []
    networks, reference, created = len(samples.networks), samples.reference_ns, samples.created_at
    if (folder / "header.json").exists():
        header, kept = load_table(folder, samples.fingerprint)
        networks, reference, created = networks + header.networks, header.reference_ns, header.created_at
    merged = {(row.key, row.c_in, row.c_out): row for row in kept}
    for row in rows:
        place = row.key, row.c_in, row.c_out
        merged[place] = _average(merged.get(place), row, reference)
    text = rows_to_csv(TableRow, (merged[place] for place in sorted(merged)))
    header = TableHeader(
        fingerprint=samples.fingerprint,
        reference_ns=reference,
        created_at=created,
        rows_sha256=hashlib.sha256(text.encode()).hexdigest(),
        networks=networks,
    )
    write_text(folder / "rows.csv", text)
    write_text(folder / "header.json", to_json(header))


def _average(old: TableRow | None, new: TableRow, reference: float) -> TableRow:
    n = new.n + (old.n if old else 0)
    ratio = (new.ratio * new.n + (old.ratio * old.n if old else 0.0)) / n
    spread = max(row.iqr_ns / row.latency_ns for row in (new, old or new)) if new.latency_ns and (old or new).latency_ns else 0.0
    latency = ratio * reference
    return msgspec.structs.replace(
        new, n=n, ratio=round(ratio, 6), latency_ns=round(latency, 1), iqr_ns=round(spread * latency, 1)
    )


def _read_partial(path: Path) -> list[NetworkSample]:
    """Networks of an interrupted measurement; a line cut off by the interruption is dropped."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(msgspec.json.decode(line, type=NetworkSample))
        except (msgspec.ValidationError, msgspec.DecodeError):
            break
    path.write_bytes(b"".join(msgspec.json.encode(network) + b"\n" for network in found))
    return found


def _identity(role: str, widths: Mapping[str, int]) -> tuple[Any, ...]:
    return role, tuple(sorted(widths.items()))


def _digest(samples: SampleSet) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(samples, digest=""))).hexdigest()


def _same_fingerprint(path: Path, found: Fingerprint, wanted: Fingerprint) -> None:
    if found != wanted:
        fields: Iterable[str] = (f for f in Fingerprint.__struct_fields__ if getattr(found, f) != getattr(wanted, f))
        differing = ", ".join(f"{field} {getattr(found, field)!r} instead of {getattr(wanted, field)!r}" for field in fields)
        message = f"The latency table {path} belongs to another fingerprint: {differing}."
        raise TableError(message, _repair(wanted, *path.parent.glob("header.json"), path))


def _repair(fingerprint: Fingerprint, *paths: Path) -> str:
    """Commands after which the files are made again: from the networks measured so far where those are whole, else anew."""
    threads = f" --threads {fingerprint.threads}" if fingerprint.threads != 1 else ""
    return (
        f"Run: rm -f {shlex.join(map(str, paths))} and then the same command again, or edgekit measure MODEL"
        f" -p local-{fingerprint.runtime}{threads}"
    )


def _reason(error: Exception) -> str:
    """What happened, without the advice of whoever noticed it."""
    return (error.message if isinstance(error, UsageError) else str(error)).rstrip(".")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

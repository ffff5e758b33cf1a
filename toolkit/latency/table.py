"""The latency table: what was measured on one device, and the files it is kept in.

Two kinds of files live in a fingerprint's folder. `header.json` beside the CSV it names: every kernel measured on this device,
shared by all models. `<structure>/samples.json`: the networks measured for one model, which is all its latency model is
fitted from; the same file gives the same model.
"""

from __future__ import annotations

import fcntl
import hashlib
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toolkit.errors import TableError, UsageError
from toolkit.latency.sites import Site
from toolkit.schema import (
    SCHEMA,
    AlignmentEvidence,
    Fingerprint,
    MeasuredModel,
    Record,
    TableHeader,
    TableRow,
    from_json,
    rows_from_csv,
    rows_to_csv,
    to_json,
    write_text,
)

Entry = tuple[int, int, float, str]  # channels in, channels out, nanoseconds, kernels executed

HEADER, SAMPLES, PARTIAL = "header.json", "samples.json", "samples.partial.jsonl"


class NetworkSample(Record, frozen=True, kw_only=True):
    """One measured network. `ratio` is its end-to-end latency over that of the anchor beside it."""

    widths: dict[str, int]
    role: str  # train | held_out | extra: branches dropped | plan: an allocation's own
    ratio: float
    anchor_ns: float
    reference_ns: float
    spans: tuple[tuple[tuple[int, ...], float, str], ...] = ()  # (sites, profiled ns, kernels executed)
    lost_ns: float = 0.0


class SampleSet(Record, frozen=True, kw_only=True):
    """All networks measured for one model on one fingerprint, and rows that other models brought for its kernels."""

    schema: int = SCHEMA
    fingerprint: Fingerprint
    seed: int
    created_at: str
    networks: tuple[NetworkSample, ...]
    borrowed: tuple[TableRow, ...] = ()
    digest: str = ""

    @property
    def reference_ns(self) -> float:
        """The reference's latency over the whole session: what ratios are multiplied with."""
        return float(np.median([network.reference_ns for network in self.networks]))

    @property
    def anchor_ns(self) -> float:
        """The anchor's latency when the reference has `reference_ns`."""
        return float(np.median([network.anchor_ns / network.reference_ns for network in self.networks])) * self.reference_ns

    def latency_ns(self, network: NetworkSample) -> float:
        """A network's end-to-end latency when the reference has `reference_ns`."""
        return network.ratio * self.anchor_ns

    def of(self, *roles: str) -> list[NetworkSample]:
        """The networks of these roles."""
        return [network for network in self.networks if network.role in roles]


def structure_id(sites: Sequence[Site]) -> str:
    """Twelve hexadecimal digits of the network's places, their kernels, and what decides their widths."""
    text = repr([(site.name, site.key, site.c_in, site.c_out) for site in sites])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --- one model's networks -----------------------------------------------------------------------------------------------------


def identity(network: NetworkSample | tuple[str, Mapping[str, int]]) -> tuple[Any, ...]:
    """What tells a measured network from others: its role and its widths."""
    role, widths = (network.role, network.widths) if isinstance(network, NetworkSample) else network
    return role, tuple(sorted(widths.items()))


def save_samples(folder: Path, samples: SampleSet) -> SampleSet:
    """Write `samples.json` with its digest."""
    samples = msgspec.structs.replace(samples, digest=digest(samples))
    write_text(folder / SAMPLES, to_json(samples))
    return samples


def load_samples(folder: Path, fingerprint: Fingerprint) -> SampleSet:
    """The measured networks of one model.

    Raises:
        TableError: missing, truncated, changed since it was written, or of another fingerprint.
    """
    path = folder / SAMPLES
    try:
        found = from_json(SampleSet, path.read_bytes(), "it")
    except (UsageError, OSError) as error:
        raise TableError(f"The latency table file {path} cannot be read: {_reason(error)}.", _repair(fingerprint, path)) from None
    if found.digest != digest(found):
        raise TableError(f"The latency table file {path} was changed after it was written.", _repair(fingerprint, path))
    _same_fingerprint(path, found.fingerprint, fingerprint)
    return found


def append_partial(folder: Path, network: NetworkSample) -> None:
    """Keep a network as soon as it is measured."""
    with (folder / PARTIAL).open("ab") as stream:
        stream.write(msgspec.json.encode(network) + b"\n")


def read_partial(folder: Path) -> list[NetworkSample]:
    """Networks of an interrupted measurement; a last line that the interruption cut off is dropped.

    Raises:
        TableError: another line is damaged.
    """
    path = folder / PARTIAL
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        write_text(path, b"".join(line + b"\n" for line in lines).decode(errors="replace"))
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(msgspec.json.decode(line, type=NetworkSample))
        except msgspec.MsgspecError as error:
            raise TableError(
                f"Line {number} of the latency table file {path} is damaged: {error}.",
                f"Run: rm -f {shlex.quote(str(path))} and then the same command again; it measures these networks anew.",
            ) from None
    return found


def end_partial(folder: Path) -> None:
    """All of it is in `samples.json` now."""
    (folder / PARTIAL).unlink(missing_ok=True)


# --- all kernels of a device --------------------------------------------------------------------------------------------------


def kernel_rows(observed: Mapping[str, Sequence[Entry]], samples: SampleSet) -> list[TableRow]:
    """What was observed of each kernel key as table rows: one per channel pair."""
    rows, reference = [], samples.reference_ns
    for key, entries in sorted(observed.items()):
        cells: dict[tuple[int, int], list[tuple[float, str]]] = {}
        for c_in, c_out, latency, kernels in entries:
            cells.setdefault((c_in, c_out), []).append((latency, kernels))
        for (c_in, c_out), found in sorted(cells.items()):
            low, middle, high = np.percentile([latency for latency, _ in found], [25, 50, 75]).tolist()
            rows.append(
                TableRow(
                    key=key, c_in=c_in, c_out=c_out, latency_ns=round(middle, 1), iqr_ns=round(high - low, 1), n=len(found),
                    ratio=round(middle / reference, 6), kernels=Counter(name for _, name in found).most_common(1)[0][0],
                    measured_at=samples.created_at,
                )
            )  # fmt: skip
    return rows


def load_table(folder: Path, fingerprint: Fingerprint) -> tuple[TableHeader, list[TableRow]]:
    """A fingerprint's kernels. TableError where a file is missing, damaged, or of another fingerprint."""
    path = header_path = folder / HEADER
    rows_path = None
    try:
        header = from_json(TableHeader, header_path.read_bytes(), "it")
        _same_fingerprint(header_path, header.fingerprint, fingerprint)
        path = rows_path = folder / header.rows
        text = rows_path.read_text(encoding="utf-8")
        if hashlib.sha256(text.encode()).hexdigest() != header.rows_sha256:
            message = f"The latency table {rows_path} is not what its header {header_path.name} describes."
            raise TableError(message, _repair(fingerprint, header_path, rows_path))
        return header, rows_from_csv(TableRow, text, "it")
    except (UsageError, OSError, UnicodeDecodeError) as error:
        message = f"The latency table file {path} cannot be read: {_reason(error)}."
        raise TableError(message, _repair(fingerprint, header_path, *([rows_path] if rows_path else []))) from None


def merge_table(
    folder: Path,
    label: str,
    samples: SampleSet,
    rows: Sequence[TableRow],
    measured: MeasuredModel,
    alignments: Sequence[AlignmentEvidence],
) -> None:
    """Add a model's rows to the fingerprint's table; a pair measured before is averaged by the number of networks."""
    added = TableHeader(
        fingerprint=samples.fingerprint,
        reference_ns=samples.reference_ns,
        created_at=samples.created_at,
        rows="",
        rows_sha256="",
        models={label: measured},
        alignments=tuple(alignments),
    )
    _merge(folder, added, rows)


def share_table(folder: Path, out: Path, fingerprint: Fingerprint) -> None:
    """Copy a fingerprint's table, without what was measured of plans, to where another machine can take it from."""
    header, rows = load_table(folder, fingerprint)
    shutil.rmtree(out, ignore_errors=True)
    _merge(out, header, rows)
    for path in sorted(folder.glob(f"*/{SAMPLES}")):
        samples = load_samples(path.parent, fingerprint)
        first = tuple(network for network in samples.networks if network.role != "plan")
        save_samples(out / path.parent.name, msgspec.structs.replace(samples, networks=first))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a fingerprint's table alone. TableError: another process has it. The lock ends with its process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            message = f"Another edgekit is measuring for the latency table in {folder}."
            raise TableError(message, "Wait until it has finished, then run the same command again.") from None
        yield


def adopt_table(source: Path, folder: Path, fingerprint: Fingerprint) -> None:
    """Take what a table measured elsewhere has and this one has not.

    Raises:
        TableError: the table is damaged, or of another fingerprint.
    """
    found = from_json(TableHeader, (source / HEADER).read_bytes(), str(source / HEADER)).fingerprint
    if found != fingerprint:
        raise TableError(
            f"The table of {source.parent} was measured elsewhere: {_differing(found, fingerprint)}.",
            f"Run: {measuring_command(fingerprint)}, for a table of this device.",
        )
    header, rows = load_table(source, fingerprint)
    samples = [path.parent for path in sorted(source.glob(f"*/{SAMPLES}"))]
    new = [path for path in samples if not (folder / path.name / SAMPLES).exists()]
    if not new and _models(folder, fingerprint) >= header.models.keys():
        return
    with locked(folder):
        for path in (path for path in new if not (folder / path.name / SAMPLES).exists()):
            save_samples(folder / path.name, load_samples(path, fingerprint))
        there = load_table(folder, fingerprint)[1] if (folder / HEADER).exists() else []
        known = _models(folder, fingerprint)
        if not header.models.keys() <= known:
            places = {(row.key, row.c_in, row.c_out) for row in there} if header.models.keys() & known else set()
            _merge(folder, header, [row for row in rows if (row.key, row.c_in, row.c_out) not in places])


def _models(folder: Path, fingerprint: Fingerprint) -> set[str]:
    """The models whose kernels a table has."""
    return set(load_table(folder, fingerprint)[0].models) if (folder / HEADER).exists() else set()


def _merge(folder: Path, added: TableHeader, rows: Sequence[TableRow]) -> None:
    """Add rows to a table, which may not exist. The new rows are whole on disk before the header names them, so that there is a
    table at any moment.
    """
    kept: list[TableRow] = []
    header = added
    if (folder / HEADER).exists():
        header, kept = load_table(folder, added.fingerprint)
    merged = {(row.key, row.c_in, row.c_out): row for row in kept}
    for row in rows:
        place = row.key, row.c_in, row.c_out
        merged[place] = _average(merged.get(place), row, header.reference_ns)
    text = rows_to_csv(TableRow, (merged[place] for place in sorted(merged)))
    rows_sha256 = hashlib.sha256(text.encode()).hexdigest()
    steps = {found.kind: found for found in (*header.alignments, *added.alignments)}
    header = msgspec.structs.replace(
        header,
        rows=f"rows-{rows_sha256[:8]}.csv",
        rows_sha256=rows_sha256,
        models=header.models | added.models,
        alignments=tuple(steps.values()),
    )
    write_text(folder / header.rows, text)
    write_text(folder / HEADER, to_json(header))
    for old in folder.glob("rows-*.csv"):
        if old.name != header.rows:
            with suppress(OSError):
                old.unlink()


def _average(old: TableRow | None, new: TableRow, reference: float) -> TableRow:
    n = new.n + (old.n if old else 0)
    ratio = (new.ratio * new.n + (old.ratio * old.n if old else 0.0)) / n
    spread = max(row.iqr_ns / row.latency_ns for row in (new, old or new)) if new.latency_ns and (old or new).latency_ns else 0.0
    latency = ratio * reference
    return msgspec.structs.replace(
        new, n=n, ratio=round(ratio, 6), latency_ns=round(latency, 1), iqr_ns=round(spread * latency, 1)
    )


def digest(samples: SampleSet) -> str:
    """What tells these samples from others."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(samples, digest=""))).hexdigest()


def _same_fingerprint(path: Path, found: Fingerprint, wanted: Fingerprint) -> None:
    if found != wanted:
        message = f"The latency table {path} belongs to another fingerprint: {_differing(found, wanted)}."
        raise TableError(message, _repair(wanted, *path.parent.glob(HEADER), path))


def _differing(found: Fingerprint, wanted: Fingerprint) -> str:
    fields: Iterable[str] = (f for f in Fingerprint.__struct_fields__ if getattr(found, f) != getattr(wanted, f))
    return ", ".join(f"{field} {getattr(found, field)!r} instead of {getattr(wanted, field)!r}" for field in fields)


def _repair(fingerprint: Fingerprint, *paths: Path) -> str:
    """Commands after which the files are made again: from the networks measured so far where those are whole, else anew."""
    return f"Run: rm -f {shlex.join(map(str, paths))} and then the same command again, or {measuring_command(fingerprint)}"


def measuring_command(fingerprint: Fingerprint) -> str:
    """The command that measures a table of this fingerprint."""
    simulated = fingerprint.runtime == "simulated"
    profile = "PROFILE" if fingerprint.batch != 1 else fingerprint.device if simulated else f"local-{fingerprint.runtime}"
    threads = f" --threads {fingerprint.threads}" if fingerprint.threads != 1 else ""
    precision = f" --precision {fingerprint.precision}" if fingerprint.precision != "fp32" else ""
    return f"edgekit measure MODEL -p {profile}{threads}{precision}"


def _reason(error: Exception) -> str:
    """What happened, without the advice of whoever noticed it."""
    return (error.message if isinstance(error, UsageError) else str(error)).rstrip(".")


def now() -> str:
    """The time of day, for provenance."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

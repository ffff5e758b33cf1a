"""The latency budget as people write it, and times as they read them."""

from __future__ import annotations

import math
import re

from toolkit.errors import UsageError
from toolkit.schema import NO_BUDGET, Budget

_NANOSECONDS = {"ns": 1.0, "us": 1e3, "µs": 1e3, "μs": 1e3, "ms": 1e6, "s": 1e9}
_WRITTEN = re.compile(
    r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[+-]?(?:nan|inf))\s*(ns|us|µs|μs|ms|s|x)?", re.IGNORECASE
)
_SIZE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kKMG]?)(i?)B")
_PREFIXES = ("", "K", "M", "G")
_EXAMPLES = "Write --budget as a time like 8ms, 350us or 1.5s, as a share of the dense model's latency like 0.5x, or none."


def parse_budget(text: str) -> Budget:
    """`8ms`, `350us`, `1.5s`: a time; `0.5x`: a share, over 0 and at most 1, of the dense model's latency; `none`: no limit.

    Raises:
        UsageError: malformed, without a unit, not positive, not finite, or a share over 1.
    """
    text = text.strip()
    if text.lower() == NO_BUDGET:
        return Budget(text=NO_BUDGET, ratio=1.0)
    found = _WRITTEN.fullmatch(text)
    if not found:
        raise UsageError(f"The budget {text!r} is not a time or a share.", _EXAMPLES)
    value, unit = float(found[1]), (found[2] or "").lower()
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"The budget {text} is not a positive, finite number.", _EXAMPLES)
    if not unit:
        share = found[1] if value < 1 else "0.8"
        raise UsageError(f"The budget {text} has no unit.", f"Run it again with --budget {found[1]}ms or {share}x.")
    if unit != "x":
        return Budget(text=text, latency_ns=value * _NANOSECONDS[unit])
    if value > 1:
        raise UsageError(
            f"The budget {text} allows more time than the dense model takes; nothing needs pruning for that.", _EXAMPLES
        )
    return Budget(text=text, ratio=value)


def parse_size(text: str) -> float:
    """`512KB`, `2MB`, `1.5MiB`: bytes; decimal units, and binary ones with an i.

    Raises:
        UsageError: malformed, without a unit, or not positive.
    """
    found = _SIZE.fullmatch(text.strip())
    value = float(found[1]) if found else 0.0
    if not found or not value > 0:
        raise UsageError(f"The size {text!r} is not a positive number of bytes.", "Write --max-memory like 512KB, 2MB or 1.5MiB.")
    return value * float((1024 if found[3] else 1000) ** _PREFIXES.index(found[2].upper()))


def format_time(latency_ns: float) -> str:
    """Three significant digits and the unit that needs the fewest: `350 ns`, `12.3 us`, `7.81 ms`, `1.50 s`."""
    for unit in ("ns", "us", "ms", "s"):
        value = latency_ns / _NANOSECONDS[unit]
        if abs(value) < 999.5:
            break
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"

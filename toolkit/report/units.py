"""Numbers as text: times, counts, sizes, shares and changes, the same in the terminal and on the page; and names by reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from toolkit.schema import Conditions, FineTuned, Report

_SCALES = (("s", 1e9), ("ms", 1e6), ("us", 1e3))


def time_unit(latency_ns: float) -> tuple[str, float]:
    """Name and nanoseconds of the unit in which `latency_ns` is best read; times shown together share one."""
    return next(((name, scale) for name, scale in _SCALES if abs(latency_ns) >= scale), _SCALES[-1])


def time_digits(values: Sequence[float]) -> int:
    """Decimals for numbers shown together: 2, fewer for long ones, more (to 4) where unequal ones would look equal."""
    digits = 2 if max(map(abs, values), default=0.0) < 100 else 1
    while digits < 4 and len({f"{value:.{digits}f}" for value in values}) < len(set(values)):
        digits += 1
    return digits


def duration(latency_ns: float, like_ns: float = 0.0) -> str:
    """`7.81 ms`, `350 us`, `1.20 s`; in the unit of `like_ns` where given, for times that are read together."""
    unit, scale = time_unit(like_ns or latency_ns)
    return f"{latency_ns / scale:.{2 if abs(latency_ns) < 100 * scale else 0}f} {unit}"


def span(low_ns: float, high_ns: float) -> str:
    """`7.77 to 7.86 ms`."""
    unit, scale = time_unit(high_ns)
    digits = time_digits((low_ns / scale, high_ns / scale))
    return f"{low_ns / scale:.{digits}f} to {high_ns / scale:.{digits}f} {unit}"


def count(number: float) -> str:
    """`855.8 k`, `11.69 M`, `4.12 G`; whole below a thousand."""
    for name, scale, digits in (("G", 1e9, 2), ("M", 1e6, 2), ("k", 1e3, 1)):
        if abs(number) >= scale:
            return f"{number / scale:.{digits}f} {name}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes in decimal units: `3.42 MB`."""
    text = count(number)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def memory(report: Report) -> str:
    """What a run's memory is called: `weights + activations`, with the limit where there was one."""
    limit = f", limit {size(report.memory_limit_bytes)}" if report.memory_limit_bytes else ""
    return f"weights + activations{limit}"


def share(fraction: float, digits: int = 1) -> str:
    """`93.1 %`."""
    return f"{100 * fraction:.{digits}f} %"


def signed(value: float, digits: int = 1) -> str:
    """`-0.4`, `+1.2`; what rounds to zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def change(before: float, after: float) -> str:
    """Relative change: `-51.2 %`; empty where there was nothing."""
    return f"{signed(100 * (after - before) / before)} %" if before else ""


def factor(ratio: float) -> str:
    """`2.1x`, `1.18x`."""
    return f"{ratio:.{1 if ratio >= 2 else 2}f}x"


def small(value: float) -> str:
    """An error or an effect in two significant digits: `3.1e-13`, `-0.021`, `0`."""
    return f"{value:.2g}"


def energy(joules: float) -> str:
    """`12.4 mJ`."""
    return f"{1e3 * joules:.3g} mJ"


def seconds(value: float) -> str:
    """Wall-clock time: `0.8 s`, `42 s`, `3 min 07 s`."""
    whole = round(value)
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{value:.1f} s" if value < 10 else f"{whole} s"


def conditions(found: Conditions) -> list[tuple[str, str]]:
    """What the machine did as (name, text); `not known` where its kernel does not say."""
    clock, heat, throttled = found.clock_hz, found.temperature_c, found.throttled
    return [
        ("Threads waiting for a core", "not known" if found.waiting is None else share(found.waiting)),
        ("Processor pressure", "not known" if found.cpu_pressure is None else share(found.cpu_pressure)),
        ("Time stolen by the host", "not known" if found.steal is None else share(found.steal)),
        ("Runnable tasks", "not known" if found.run_queue is None else f"{found.run_queue:.1f}"),
        ("Clock", "not known" if clock is None else f"{clock[0] / 1e6:.0f} to {clock[1] / 1e6:.0f} MHz"),
        ("Temperature", "not known" if heat is None else f"{heat[0]:.0f} to {heat[1]:.0f} degrees C"),
        ("Throttled", "not known" if throttled is None else f"{throttled} times"),
    ]


def one_shot(tuned: FineTuned) -> tuple[str, str, str]:
    """(what, how much, and what came after) of a network before its fine-tuning."""
    after = f"{tuned.epochs} epoch{'s' if tuned.epochs > 1 else ''} {'after' if tuned.kept else 'did not help'}"
    if tuned.accuracy_one_shot is None:
        return "same top-1, one-shot", share(tuned.agreement_one_shot), after
    return "top-1, one-shot", share(tuned.accuracy_one_shot), after


def by_reason(held: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """(name, reason) pairs as the names of every reason, both in the order given."""
    found: dict[str, list[str]] = {}
    for name, reason in held:
        found.setdefault(reason, []).append(name)
    return found

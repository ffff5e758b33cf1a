from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.budget import format_time, parse_budget, parse_size
from toolkit.errors import UsageError


@pytest.mark.parametrize(
    ("text", "latency_ns"),
    [("8ms", 8e6), ("350us", 350e3), ("350 µs", 350e3), ("1.5s", 1.5e9), (" .5MS ", 5e5), ("120ns", 120.0), ("1e3us", 1e6)],
)
def test_a_time_is_read_in_its_unit(text: str, latency_ns: float) -> None:
    budget = parse_budget(text)
    assert budget.latency_ns == pytest.approx(latency_ns, rel=1e-12)
    assert budget.ratio == 0
    assert budget.text == text.strip()


@pytest.mark.parametrize(("text", "ratio"), [("0.5x", 0.5), ("1x", 1.0), (".85X", 0.85)])
def test_a_share_is_relative(text: str, ratio: float) -> None:
    budget = parse_budget(text)
    assert (budget.ratio, budget.latency_ns) == (ratio, 0)


def test_none_is_no_limit() -> None:
    assert parse_budget(" None ").unlimited
    assert not parse_budget("1x").unlimited


@pytest.mark.parametrize(("text", "advice"), [("8", "8ms or 0.8x"), ("0.5", "0.5ms or 0.5x")])
def test_a_bare_number_is_asked_for_its_unit_and_the_advice_works(text: str, advice: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert advice in caught.value.hint
    for example in advice.split(" or "):
        parse_budget(example)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ms",
        "x",
        "fast",
        "8 min",
        "8m",
        "50%",
        "0,5x",
        "1_0ms",
        "0ms",
        "-8ms",
        "nanms",
        "infs",
        "1e999ms",
        "1e-999s",
        "0x",
        "1.01x",
        "-0.5x",
    ],
)
def test_anything_else_is_refused_with_advice(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert caught.value.hint and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("latency_ns", "text"),
    [(350, "350 ns"), (12_345, "12.3 us"), (7_812_000, "7.81 ms"), (8e6, "8.00 ms"), (999_499, "999 us"), (999_500, "1.00 ms"),
     (9.996e6, "10.0 ms"), (99.96e6, "100 ms"), (1.5e9, "1.50 s"), (2e12, "2000 s")],
)  # fmt: skip
def test_a_time_is_written_with_three_digits(latency_ns: float, text: str) -> None:
    assert format_time(latency_ns) == text


@given(st.floats(1, 1e12))
def test_written_and_read_again_a_time_is_the_same_to_three_digits(latency_ns: float) -> None:
    assert parse_budget(format_time(latency_ns)).latency_ns == pytest.approx(latency_ns, rel=0.0051)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("512KB", 512e3), ("2 MB", 2e6), ("1.5MiB", 1.5 * 1024**2), ("100kB", 1e5), ("7B", 7.0), (".5GB", 5e8)],
)
def test_a_size_is_read_in_its_unit(text: str, size_bytes: float) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "2", "MB", "0KB", "-1MB", "2 megabytes", "1e3KB"])
def test_a_size_that_is_none_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="is not a positive number of bytes. Write --max-memory like 512KB"):
        parse_size(text)

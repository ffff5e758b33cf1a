"""The report: its verdict line, the terminal summary and the HTML page, also as a browser lays it out."""

from __future__ import annotations

import html as entities
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st

from toolkit.report import figures, html, summary_text, units, verdict_line
from toolkit.schema import CategoryCounts, FineTuned, FloatLayer, PrecisionChoice, Quantization, QuantizedDense, Report

pytestmark = pytest.mark.slow

WIDTHS = (400, 800, 1280, 1400)  # pixels: a phone, half a screen, a small screen, a screen
PAPER = 688  # pixels: A4 less its margins
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(2)>&amp;\"$\\frac{1}{2}$_" + "y" * 80
UNLABELLED = {"accuracy_dense": None, "accuracy_pruned": None, "accuracy_change_ci95": None}


def hostile() -> Report:
    """Missed, not valid, without labels, with more groups than a figure shows and names that are markup."""
    report = samples.report()
    groups = tuple(msgspec.structs.replace(group, name=f"{index}{HOSTILE}") for index, group in enumerate(report.groups * 5))
    return samples.report(
        verdict="missed",
        valid=False,
        invalid_reasons=(f"drift {HOSTILE}",),
        model=f"/{'folder' * 40}/{HOSTILE}.py:net",
        measured_ns=8_400_000.0,
        measured_ci95_ns=(8_350_000.0, 8_450_000.0),
        groups=groups,
        unprunable=tuple((group.name, HOSTILE) for group in groups[:20]),
        kernels=tuple(msgspec.structs.replace(kernel, name=HOSTILE, key=HOSTILE, note=HOSTILE) for kernel in report.kernels),
        repair=HOSTILE,
        environment={HOSTILE: HOSTILE},
        command=f"edgekit run {HOSTILE}",
        notes=(HOSTILE,),
        **UNLABELLED,
    )


def bare() -> Report:
    """What a method without effects leaves when nothing was tried: no groups, kernels, turns, notes or labels."""
    return samples.report(
        method="random", groups=(), unprunable=(), kernels=(), iterations=(), notes=(), wall_s={}, environment={}, **UNLABELLED
    )


def lowered() -> Report:
    """In int8, which edgekit chose itself."""
    made = Quantization(
        recipe="openvino", ranges="mse", images=256, layers=21, kept_float=(FloatLayer(layer="conv1", distortion=0.25),),
        distortion=0.0125, agreement=0.97, expected_drop=0.4, max_drop=1.0,
    )  # fmt: skip
    alone = QuantizedDense(ratio=0.395, ratio_ci95=(0.39, 0.4), accuracy=0.875, quantization=made)
    choices = (
        PrecisionChoice(precision="fp32", distortion=None, reason="The budget is under the floor."),
        PrecisionChoice(precision="int8", distortion=0.0313),
    )
    return samples.report(precision="int8", quantization=made, quantized_dense=alone, precision_choices=choices)


def tuned(**changes: object) -> Report:
    """Fine-tuned after pruning."""
    made = FineTuned(
        epochs=5, images=9000, loss="distill", held_back_before=0.08, held_back_after=0.02, kept=True, seconds=312.0,
        accuracy_one_shot=0.8125, agreement_one_shot=0.925,
    )  # fmt: skip
    return samples.report(finetuned=msgspec.structs.replace(made, **changes))


REPORTS = {
    "tuned": tuned(),
    "int8": lowered(),
    "met": samples.report(),
    "missed, not valid, no labels, hostile": hostile(),
    "bare": bare(),
}
every_report = pytest.mark.parametrize("report", list(REPORTS.values()), ids=list(REPORTS))
every_page = pytest.mark.parametrize("name", list(REPORTS))


@cache
def page_of(name: str) -> str:
    return html(REPORTS[name], samples.comparison())


class Page(HTMLParser):
    """Elements with their attributes, and the text that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements[-1:] and self.elements[-1][0] != "style":
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(page_of("met"))


# --- verdict line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "MET  7.81 ms median (predicted 7.65, budget 8.00)  2.1x  top-1 -0.4"),
        (
            {"verdict": "missed", "measured_ns": 8.4e6, "speedup": 1.906},
            "MISSED  8.40 ms median (predicted 7.65, budget 8.00)  1.91x  top-1 -0.4",
        ),
        (UNLABELLED, "MET  7.81 ms median (predicted 7.65, budget 8.00)  2.1x  agreement 96.5 %"),
        ({"budget": "none"}, "MET  7.81 ms median (predicted 7.65, no budget)  2.1x  top-1 -0.4"),
        ({"valid": False}, "MET  7.81 ms median (predicted 7.65, budget 8.00)  2.1x  top-1 -0.4  not valid"),
        ({"accuracy_pruned": 0.9384}, "MET  7.81 ms median (predicted 7.65, budget 8.00)  2.1x  top-1 0.0"),
        ({"accuracy_pruned": 0.9504}, "MET  7.81 ms median (predicted 7.65, budget 8.00)  2.1x  top-1 +1.2"),
        (
            {"measured_ns": 340_100.0, "predicted_ns": 333_000.0, "budget_ns": 350_000.0, "statistic": "p90"},
            "MET  340.1 us p90 (predicted 333.0, budget 350.0)  2.1x  top-1 -0.4",
        ),
        (
            {"verdict": "missed", "measured_ns": 8.0004e6},
            "MISSED  8.0004 ms median (predicted 7.6530, budget 8.0000)  2.1x  top-1 -0.4",
        ),
        (
            {"verdict": "missed", "measured_ns": 0.0},
            "MISSED  7.65 ms median predicted, nothing measured (budget 8.00)",
        ),
    ],
    ids=[
        "met",
        "missed",
        "no labels",
        "no budget",
        "not valid",
        "no loss",
        "gain",
        "microseconds",
        "narrowly missed",
        "nothing measured",
    ],
)
def test_verdict_line(changes: dict[str, object], line: str) -> None:
    assert verdict_line(samples.report(**{"budget_ns": 8.0e6, "speedup": 2.1} | changes)) == line


# --- units ---------------------------------------------------------------------------------------------------------------


@given(st.floats(1e3, 1e11), st.floats(1e3, 1e11))
def test_a_duration_reads_back_in_the_unit_asked_for(latency_ns: float, like_ns: float) -> None:
    number, unit = units.duration(latency_ns, like_ns).split()
    name, scale = units.time_unit(like_ns)
    assert unit == name
    assert abs(float(number) * scale - latency_ns) <= max(0.0051, 0.0051 * latency_ns / scale) * scale


def test_a_duration_alone_has_its_own_unit() -> None:
    assert [units.duration(value) for value in (7_812_345.0, 350_000.0, 1.2e9, 999.0)] == [
        "7.81 ms",
        "350 us",
        "1.20 s",
        "1.00 us",
    ]


# --- terminal ------------------------------------------------------------------------------------------------------------


def printed(report: Report, width: int = 80) -> str:
    from rich.console import Console

    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(summary_text(report))
    return capture.get()


@every_report
def test_the_summary_fits_80_columns_without_control_codes(report: Report) -> None:
    lines = printed(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line.isprintable() for line in lines)


def test_accuracy_before_fine_tuning_is_told_apart() -> None:
    text, page = printed(tuned()), Page(page_of("tuned")).text
    assert re.search(r"top-1, one-shot +81.2 % +5 epochs after", text) and "Top-1, one-shot 81.2 % 5 epochs after" in page
    unlabelled = printed(tuned(accuracy_one_shot=None, kept=False))
    assert re.search(r"same top-1, one-shot +92.5 % +5 epochs did not help", unlabelled)
    assert "one-shot" not in printed(samples.report())


def test_what_eight_bits_give_alone_and_why_they_were_taken_is_told() -> None:
    report = lowered()
    text, page = printed(report), Page(page_of("int8")).text
    alone = units.duration(0.395 * report.dense_ns, report.budget_ns)
    assert (
        re.search(rf"int8 alone, unpruned +{alone} +-60.5 %", text) and f"int8 alone, unpruned: latency {alone} −60.5 %" in page
    )
    assert "87.5 %" in text and "int8 alone, unpruned: top-1 87.5 %" in page
    assert re.search(r"distortion, int8 +0.031 +taken", text) and "Predicted distortion, int8 0.031 taken" in page
    assert "out of reach" in text and "Predicted distortion, fp32 out of reach The budget is under the floor." in page
    assert "alone" not in printed(samples.report())


def test_the_summary_truncates_nothing() -> None:
    report = samples.report()
    text = " ".join(printed(report).split())
    assert "…" not in text
    wanted = [
        report.model,
        "16.01 ms 7.81 ms -51.2 %",
        "93.8 % 93.4 % -0.4 points",
        "96.5 % 5000 images",
        "855.8 k 402.3 k -53.0 %",
        "126.55 M 58.12 M -54.1 %",
        "3.48 MB 1.66 MB -52.2 %",
        "7.77 to 7.87 ms; speedup 2.03x to 2.07x",
        "98.7 % of the dense latency covered; held-out error 2.3 % on 12 networks",
        "slices proved to 3.1e-13 relative",
        f"critical or undecided channels cut: {report.critical_removed}",
        "optimality gap 0.07 %",
        *(group.name for group in report.groups),
        *(f"left whole: {name}: {reason}" for name, reason in report.unprunable),
        *report.notes,
        report.repair,
    ]
    assert [words for words in wanted if words not in text] == []


def test_where_no_channels_were_told_apart_none_are_said_to_be_uncritical() -> None:
    report, none = samples.report(), CategoryCounts()
    groups = tuple(msgspec.structs.replace(group, categories=none, removed=none) for group in report.groups)
    for each, said in ((report, True), (samples.report(groups=groups, method="psap", critical_removed=0), False)):
        assert each.judged is said
        assert ("critical or undecided channels cut" in printed(each)) is said
        assert ("Critical or undecided channels cut" in html(each, samples.comparison())) is said


def test_the_summary_counts_the_groups_it_leaves_out() -> None:
    groups = samples.report().groups * 5
    rest = groups[40:]
    before, after = (sum(getattr(group, name) for group in rest) for name in ("width_before", "width_after"))
    text = " ".join(printed(samples.report(groups=groups)).split())
    assert f"{len(rest)} others {before} {after}" in text


def test_the_summary_says_why_a_measurement_is_not_valid() -> None:
    text = printed(samples.report(valid=False, invalid_reasons=("the machine [bold]slept[/bold]",)))
    assert "the measurement is not valid" in text
    assert "because the machine [bold]slept[/bold]" in text


# --- page ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("verdict", "Met 7.81 ms median, 2.0x as fast as the dense 16.01 ms"),
        ("margin", "Yes, with 2.4 % to spare"),
        ("budget", "Budget 8.01 ms 0.5x"),
        ("interval", "95 % interval 7.77 to 7.87 ms"),
        ("prediction", "Predicted 7.65 ms"),
        ("speedup", "Speedup 2.0x 2.03 to 2.07"),
        ("samples", "Samples 480 in 12 rounds"),
        ("process", "Fresh process yes"),
        ("held-out error", "held-out error 2.3 %"),
        ("proof", "Slice proof 3.1e−13 relative"),
        ("accuracy", "Top-1 93.4 % from 93.8 %"),
        ("accuracy interval", "−0.8 to −0.1 points"),
        ("agreement", "Same top-1 as dense 96.5 %"),
        ("evaluation", "Evaluated on 5000 images"),
        ("calibration", "Calibrated on 512 images"),
        ("critical", "Critical or undecided channels cut"),
        ("size", "Size 1.66 MB −52.2 %"),
        ("parameters", "Parameters 855.8 k 402.3 k −53.0 %"),
        ("macs", "MACs 126.55 M 58.12 M −54.1 %"),
        ("turn", "2 7.80 ms 7.65 ms 7.80 ms 0.487 1.076"),
        ("table", "Latency table 3f9c1ab2d470 412 rows"),
        ("coverage", "Coverage of the dense latency 98.7 %"),
        ("floor", "Floor 2.31 ms measured, every group at its least width"),
        ("prunable", "Prunable share of the MACs 98.2 %"),
        ("gap", "Optimality gap of the plan 0.07 %"),
        ("left whole", "fc its channels are the network's output"),
        ("dropped", "layer1.4.conv1 conv 16 → 0"),
        ("kernel", "conv1 Conv+Relu 3x3 s1 32x32 402 us 398 us width fixed by the residual sum"),
        ("load", "Time stolen by the host 0.0 %"),
        ("when", "2026-03-14 09:26 UTC"),
        ("seed", "seed 0"),
        ("time spent", "all steps 6 min 46 s"),
        ("accuracy interval in the table", "Change of top-1, 95 % interval −0.8 to −0.1 points"),
        ("where it went", "All 55 places together: 15.71 ms in the dense network, 5.96 ms in the pruned one; 54 became faster."),
        ("cuts for nothing", "Cuts that bought nothing conv1: width fixed by the residual sum"),
        ("not known", "3 not known p99 480 samples, 662 are needed Energy nothing counts it Clock this kernel has none"),
        ("command", "Repeat it edgekit run models.py:resnet56"),
        ("verify", "Verify it, without edgekit tools/verify out"),
        ("time again", "Time the files again edgekit bench out/dense.onnx out/model.onnx -p local-onnxruntime --kernels"),
    ],
)
def test_the_page_says(page: Page, what: str, words: str) -> None:
    assert words in page.text


def test_every_group_and_kernel_is_in_a_table(page: Page) -> None:
    report = samples.report()
    for group in report.groups:
        assert f"{group.name} conv {group.width_before} → {group.width_after}" in page.text
    for kernel in report.kernels:
        assert f"{kernel.name} {kernel.key}" in page.text


def test_figures_are_inline_and_named(page: Page) -> None:
    captions = {attributes.get("id") for tag, attributes in page.elements if tag == "figcaption"}
    drawn = {attributes.get("aria-labelledby") for tag, attributes in page.elements if tag == "svg"}
    assert drawn == captions == {"latency", "iterations", "widths", "responses", "effects", "kernels"}


@every_page
def test_nothing_is_loaded_and_nothing_runs(name: str) -> None:
    page = page_of(name)
    elements = Page(page).elements
    assert {tag for tag, _ in elements} & {"script", "img", "iframe", "object", "embed", "form", "base"} == set()
    for tag, attributes in elements:
        assert not [attribute for attribute in attributes if attribute.startswith("on")], tag
        for link in ("src", "srcset", "href", "xlink:href", "data", "action"):
            target = attributes.get(link)
            assert target is None or target.startswith(("#", "data:")), (tag, link, target)
    assert re.findall(r"@import|url\((?!#)", page) == []


@every_page
def test_ids_are_unique_and_references_lead_somewhere(name: str) -> None:
    page = page_of(name)
    ids = [attributes["id"] for _, attributes in Page(page).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)|xlink:href=\"#([^\"]+)\"|aria-labelledby=\"([^\"]+)\"", page)
    assert {found for each in used for found in each if found} <= set(ids)


@every_page
def test_colours_follow_the_page(name: str) -> None:
    page = page_of(name)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", svg)) == set()
    used = set(re.findall(r"var\(--([a-z]+)\)", page))
    light, dark = (set(re.findall(r"--([a-z]+):", block)) for block in re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)[:2])
    assert used - {"swatch"} <= light
    assert light - dark == {"sans", "mono"}


def test_energy_stands_beside_the_latency_where_it_was_measured() -> None:
    dense, pruned = (
        samples.measurement(role, centre, random.Random(0), energy_j=joules)
        for role, centre, joules in (("dense", 1.6e7, 0.0124), ("pruned", 7.8e6, 0.0062))
    )
    measured = Page(html(samples.report(), samples.comparison(dense=dense, pruned=pruned))).text
    assert "Energy of an inference 12.4 mJ 6.2 mJ −50.0 %" in measured
    assert "Energy of an inference" not in Page(page_of("met")).text


def test_where_every_cut_paid_the_page_says_so() -> None:
    kernels = tuple(kernel for kernel in samples.report().kernels if kernel.pruned_ns < 0.9 * kernel.dense_ns)
    text = Page(html(samples.report(kernels=kernels), samples.comparison())).text
    assert f"; {len(kernels)} became faster." in text
    assert "None: every place that became narrower became faster." in text


def test_what_eight_bits_did_is_a_sentence() -> None:
    assert "In int8: 21 layers run in integers, by mse ranges of 256 images for openvino." in Page(page_of("int8")).text
    assert "0.40 of the 1 points that were allowed. Left in float: conv1." in Page(page_of("int8")).text


def test_a_command_without_a_folder_is_shown_alone() -> None:
    text = Page(html(samples.report(command="toolkit.run(request)"), samples.comparison())).text
    assert "Repeat it toolkit.run(request)" in text and "Verify it" not in text


def test_computed_times_are_not_to_be_verified() -> None:
    text = Page(html(samples.report(runtime="simulated 1"), samples.comparison())).text
    assert "Verify it" not in text and "Time the files again" in text


def test_hostile_names_are_text() -> None:
    page = page_of("missed, not valid, no labels, hostile")
    assert HOSTILE not in page
    text = entities.unescape(page)
    assert text.count(HOSTILE) >= 100
    assert "drift " + HOSTILE in text


def test_a_missed_and_invalid_run_says_so() -> None:
    text = Page(page_of("missed, not valid, no labels, hostile")).text
    assert "Missed, not valid 8.40 ms" in text
    assert "No, over by 0.40 ms" in text
    assert "No, the measurement is not valid" in text
    assert "Why the measurement is not valid drift" in text


def test_an_interval_over_the_budget_is_named_as_the_reason() -> None:
    report = samples.report(verdict="missed", measured_ns=8.0e6, measured_ci95_ns=(7.9e6, 8.1e6))
    assert "No, the interval reaches over the budget" in Page(html(report, samples.comparison())).text


def test_without_labels_agreement_stands_for_accuracy() -> None:
    text = Page(html(samples.report(**UNLABELLED), samples.comparison())).text
    assert "96.5 % agree with dense" in text
    assert "Top-1" not in text
    assert "points" not in text


def test_a_method_without_effects_shows_none() -> None:
    groups = [
        msgspec.structs.replace(group, categories=CategoryCounts(), removed=CategoryCounts(), effect_mean=0.0)
        for group in samples.report().groups
    ]
    page = Page(html(samples.report(method="l1", groups=tuple(groups)), samples.comparison()))
    assert "The method l1 ranks channels without measuring their effect." in page.text
    assert "effects" not in {attributes.get("id") for _, attributes in page.elements}


def test_a_group_without_effects_is_not_drawn_as_one_of_no_effect() -> None:
    first, *others = samples.report().groups
    unscored = msgspec.structs.replace(first, name="blocks.0.attn.qkv:head_dim", categories=CategoryCounts())
    drawn = figures.effects([unscored, *others])
    assert others[0].name in drawn and unscored.name not in drawn
    page = html(samples.report(groups=(unscored, *others)), samples.comparison())
    row = page.split(f"<tr><th>{unscored.name}</th>")[1].split("</tr>")[0]
    assert row.count("–</td>") == 2


def test_a_figure_of_many_groups_says_how_many_it_shows() -> None:
    assert "; the first 64 of 135" in page_of("missed, not valid, no labels, hostile")
    assert "; the first" not in page_of("met")


def test_the_page_is_the_same_each_time() -> None:
    assert html(samples.report(), samples.comparison()) == page_of("met")


@given(st.sets(st.integers(0, 64), min_size=1).map(sorted))
def test_heat_map_cells_hold_their_widths(widths: list[int]) -> None:
    centres = [width / 64 for width in widths]
    edges = figures._edges(centres)
    assert len(edges) == len(centres) + 1
    assert 0 <= edges[0] and edges[-1] <= 1
    assert edges == sorted(set(edges))
    assert all(left <= centre <= right for left, centre, right in zip(edges, centres, edges[1:], strict=False))


# --- browser -------------------------------------------------------------------------------------------------------------


def missing(reason: str) -> NoReturn:
    """Skip with the reason; where CI=true there must be a browser."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def in_browser(pages: dict[str, str], folder: Path, widths: Sequence[int] = WIDTHS) -> tuple[dict[str, Any], list[str]]:
    """(what a browser made of each page, by "name width"; what the console said).

    Of each: `wider`, pixels by which it is wider than its window; `hidden`, tables that are wider than their place; `text` as it
    is shown; `figures`, the height in pixels of each by its caption's id.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        missing("no Chromium to lay the page out with")
    quoted = json.dumps(pages).replace("</", "<\\/").replace("<!--", "<\\!--")
    script = (
        f"const pages = {quoted}, widths = {list(widths)}, frames = [];"
        + """
      for (const width of widths) for (const name in pages) {
        const frame = document.createElement("iframe");
        frame.width = width; frame.height = 600; frame.srcdoc = pages[name]; frame.dataset.name = `${name} ${width}`;
        document.body.append(frame); frames.push(frame);
      }
      onload = () => {
        const found = {};
        for (const frame of frames) {
          const page = frame.contentDocument, root = page.documentElement;
          const hidden = [...page.querySelectorAll(".scroll")].filter(place => place.scrollWidth > place.clientWidth);
          found[frame.dataset.name] = {
            answers: page.querySelector(".answers")?.getBoundingClientRect().bottom ?? 0,
            wider: root.scrollWidth - frame.contentWindow.innerWidth,
            hidden: hidden.map(place => place.innerText.slice(0, 60)),
            text: page.body.innerText.split(/\\s+/).join(" "),
            figures: Object.fromEntries([...page.querySelectorAll("figure svg")].map(
              svg => [svg.getAttribute("aria-labelledby"), svg.getBoundingClientRect().height])),
          };
          frame.remove();
        }
        document.body.textContent = JSON.stringify(found);
      };
    """
    )
    file = folder / "frames.html"
    file.write_text(f'<!doctype html><meta charset="utf-8"><body><script>{script}</script>', encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        missing("Chromium did not answer within two minutes")
    shown = re.search(r"<body>(\{.*?\})</body>", done.stdout, flags=re.DOTALL)
    if shown is None and not re.search(r"<body", done.stdout):
        missing(f"Chromium does not run here: {done.stderr[-200:]}")
    assert shown, done.stdout[-500:]
    return json.loads(entities.unescape(shown[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """Every page at every width, and `met` on paper."""
    return in_browser({name: page_of(name) for name in REPORTS}, tmp_path_factory.mktemp("pages"))


def test_the_page_fits_every_window_and_the_console_is_silent(laid_out: tuple[dict[str, Any], list[str]]) -> None:
    found, console = laid_out
    assert len(found) == len(REPORTS) * len(WIDTHS)
    assert {name: page["wider"] for name, page in found.items() if page["wider"] > 0} == {}
    assert console == []


def test_no_table_has_columns_outside_its_place(laid_out: tuple[dict[str, Any], list[str]]) -> None:
    """But for names that are markup of eighty characters, whose tables scroll."""
    assert {name: page["hidden"] for name, page in laid_out[0].items() if page["hidden"] and "hostile" not in name} == {}


def test_it_fits_on_paper(tmp_path: Path) -> None:
    pages = {name: page_of(name).replace("@media print", "@media all") for name in ("met", "int8")}
    found, console = in_browser(pages, tmp_path, [PAPER])
    assert {name: (page["wider"], page["hidden"]) for name, page in found.items()} == dict.fromkeys(found, (0, []))
    assert len(found) == 2 and console == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_the_answers_and_every_figure(width: int, laid_out: tuple[dict[str, Any], list[str]]) -> None:
    page = laid_out[0][f"met {width}"]
    answers = (
        "Is it met? Yes, with 2.4 % to spare",
        "Can I trust it? Yes, it is valid",
        "What did it cost?",
        "What do I ship? model.onnx",
    )
    assert [words for words in answers if words not in page["text"]] == []
    assert set(page["figures"]) == {"latency", "iterations", "widths", "responses", "effects", "kernels"}
    assert min(page["figures"].values()) > 100  # pixels: drawn, not collapsed


def test_the_answers_are_on_the_first_screen(laid_out: tuple[dict[str, Any], list[str]]) -> None:
    """On a screen of 800 pixels all four columns end above the fold, also where the run was missed and not valid."""
    found, _ = laid_out
    assert {name: page["answers"] for name, page in found.items() if name.endswith(" 1280") and page["answers"] > 800} == {}


def test_the_browser_check_sees_overflow_and_errors(tmp_path: Path) -> None:
    broken = (
        '<!doctype html><body style="margin:0"><div style="width:1000px">x</div><svg><path d="nonsense"/></svg>'
        '<div class="scroll" style="overflow-x:auto;width:300px"><div style="width:500px">wide</div></div>'
    )
    found, console = in_browser({"broken": broken}, tmp_path)
    assert {name: page["wider"] for name, page in found.items()} == {
        "broken 400": 600,
        "broken 800": 200,
        "broken 1280": 0,
        "broken 1400": 0,
    }
    assert {name: page["hidden"] for name, page in found.items()} == {f"broken {width}": ["wide"] for width in WIDTHS}
    assert console


def test_without_a_browser_ci_fails_and_others_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"):
        in_browser({}, tmp_path)
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="no Chromium"):
        in_browser({}, tmp_path)

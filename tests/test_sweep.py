"""Several budgets: which network pruning goes on from, the knee, what is kept and refused, and runs beside each other."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from samples import report as sample_report

from toolkit import api
from toolkit import report as reports
from toolkit.budget import parse_budget
from toolkit.errors import UsageError
from toolkit.report import figures
from toolkit.run.loop import AIM, Rung, rounds_asked, rung_for
from toolkit.run.pareto import front, knee
from toolkit.run.sweep import finished, folder_of, knee_of, requests_of, restored, same
from toolkit.schema import Plan, Report, RunRequest, Sweep, SweepPoint, load_json

REQUEST = RunRequest(model="m", data="d", out="out", budget=parse_budget("0.5x"))


# --- the front and its knee ----------------------------------------------------------------------------------------------


def networks(seed: int, count: int = 9) -> list[tuple[float, float]]:
    rng = random.Random(seed)
    return [(rng.randint(1, 20) / 4, rng.randint(1, 20) / 20) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_other_point_beats(seed: int) -> None:
    points = networks(seed)
    better = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    found = front(points)
    assert {points[i] for i in found} == better and len(found) == len(better)
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


@pytest.mark.parametrize("seed", range(20))
def test_the_knee_does_not_depend_on_units_or_order(seed: int) -> None:
    points = networks(seed)
    found = knee(points)
    scaled = [(1e6 * latency, 0.3 + 0.01 * quality) for latency, quality in points]
    order = random.Random(seed).sample(range(len(points)), len(points))
    again = knee([points[i] for i in order])
    assert knee(scaled) == found
    assert (None if again is None else points[order[again]]) == (None if found is None else points[found])


def test_the_knee_is_where_accuracy_begins_to_fall() -> None:
    falling = [(1.0, 0.90), (0.8, 0.899), (0.6, 0.895), (0.4, 0.88), (0.3, 0.6), (0.2, 0.2)]
    assert knee(falling) == 3
    assert knee([(1.0, 0.9), (0.5, 0.45), (0.25, 0.225)]) is None  # a straight line has none
    assert knee([(1.0, 0.9), (0.5, 0.8)]) is None and knee([]) is None


def point(budget: str, accuracy: float, change: tuple[float, float], **changes: Any) -> SweepPoint:
    share = parse_budget(budget).ratio
    made = SweepPoint(
        budget=budget, folder=budget, verdict="met", valid=True, budget_ns=1e7 * share, measured_ns=0.97e7 * share,
        measured_ci95_ns=(0.96e7 * share, 0.98e7 * share), speedup=1 / (0.97 * share), speedup_ci95=(1 / share, 1.1 / share),
        accuracy=accuracy, accuracy_change_ci95=change, agreement=0.9, parameters=1000, size_bytes=4000,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def test_while_nothing_is_shown_to_be_lost_the_fastest_point_is_the_knee() -> None:
    loosest = sample_report(accuracy_dense=0.9)
    same_accuracy = [point("0.9x", 0.9, (-0.01, 0.01)), point("0.5x", 0.895, (-0.012, 0.002))]
    assert knee_of(same_accuracy, loosest)[0] == "0.5x"
    lost = [*same_accuracy, point("0.45x", 0.7, (-0.22, -0.18)), point("0.4x", 0.5, (-0.42, -0.38))]
    assert knee_of(lost, loosest)[0] == "0.5x"
    missed = [msgspec.structs.replace(each, verdict="missed") for each in lost]
    assert knee_of(missed, loosest) == ("", "no budget was met")


# --- going on from a looser budget ---------------------------------------------------------------------------------------


def job(budget: float, rounds: int = 0, method: str = "causal") -> Any:
    request = SimpleNamespace(rounds=rounds, method=method)
    return SimpleNamespace(
        program=SimpleNamespace(groups=()), base=1.0, budget=budget, request=request, memory_limit=lambda: None
    )


def ladder(*rungs: tuple[float, int, bool]) -> list[Rung]:
    return [Rung(SimpleNamespace(), share, rounds, (), SimpleNamespace() if scored else None) for share, rounds, scored in rungs]  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(50))
def test_a_budget_gets_as_many_rounds_as_a_run_of_its_own_and_starts_above_it(seed: int) -> None:
    rng = random.Random(seed)
    wanted = job(rng.uniform(0.1, 0.95), rng.choice([0, 0, 1, 2, 4]), rng.choice(["causal", "cswap"]))
    rungs = ladder(*((rng.uniform(0.1, 1.0), rng.randint(1, 6), rng.random() < 0.5) for _ in range(6)))
    dense = Rung(SimpleNamespace(), 1.0, 0, (), SimpleNamespace())  # type: ignore[arg-type]
    start, asked = rung_for(wanted, [dense, *rungs]), rounds_asked(wanted)
    assert start.share > AIM * wanted.budget
    assert start.rounds + max(1, asked - start.rounds) >= asked
    if wanted.request.rounds:
        assert start.rounds + max(1, asked - start.rounds) == asked


def test_what_was_scored_is_taken_where_the_step_from_it_is_short_enough() -> None:
    rungs = ladder((0.77, 2, True), (0.7, 3, False))
    assert rung_for(job(0.68), rungs) is rungs[0]  # 0.66 / 0.77 is about as long a step as a third of the way to 0.68
    assert rung_for(job(0.5), rungs) is rungs[1]  # far away: from the nearer one, scored anew
    early = ladder((0.56, 1, True), (0.52, 3, False))
    assert rung_for(job(0.5), early) is early[1]  # near, but reached in too few rounds
    assert rung_for(job(0.75), rungs).share == 0.77 and rung_for(job(0.9), rungs).rounds == 0


def test_the_budget_of_a_single_run_is_approached_as_before() -> None:
    """From the dense network alone, the shares aimed at are AIM x budget^(r / rounds)."""
    start = rung_for(job(0.5), [])
    assert (start.rounds, start.share, rounds_asked(job(0.5))) == (0, 1.0, 3)


# --- requests ----------------------------------------------------------------------------------------------------------------


def test_every_budget_has_a_folder_of_its_own() -> None:
    names = [folder_of(parse_budget(text)) for text in ("0.5x", "8ms", "350us", "350µs", "1.5S", " 2 ms")]
    assert names == ["0.5x", "8ms", "350us", "350us", "1.5s", "2ms"]
    made = requests_of(REQUEST, [parse_budget("0.9x"), parse_budget("8ms")])
    assert [(each.budget.text, each.out) for each in made] == [("0.9x", "out/0.9x"), ("8ms", "out/8ms")]


@pytest.mark.parametrize(
    ("budgets", "words"),
    [((), "needs budgets"), (("0.5x", "0.5x"), "0.5x is there twice"), (("350us", "350µs"), "twice"), (("0.5x", "none"), "none")],
)
def test_budgets_that_make_no_sweep_are_refused(budgets: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        api.sweep(REQUEST, budgets)


def test_a_sweep_is_of_one_precision() -> None:
    with pytest.raises(UsageError, match="of one precision"):
        api.sweep(msgspec.structs.replace(REQUEST, precision="auto"), ["0.5x"])


def test_a_point_is_kept_for_the_same_request_only() -> None:
    resolved = msgspec.structs.replace(REQUEST, preprocess=api.Preprocess(), data=str(Path("d").resolve()), out="elsewhere")
    assert same(REQUEST, resolved)
    for change in ({"seed": 1}, {"samples": 8}, {"budget": parse_budget("0.4x")}, {"data": "other"}, {"repair": False}):
        assert not same(msgspec.structs.replace(REQUEST, **change), resolved), change
    assert not same(msgspec.structs.replace(REQUEST, preprocess=api.Preprocess(resize=8)), resolved)


# --- what is shown -----------------------------------------------------------------------------------------------------------


def swept(*points: SweepPoint, **changes: Any) -> Sweep:
    made = Sweep(
        verdict="met", model="net <b>.py:f", method="causal", profile="p", runtime="r 1", fingerprint="f", statistic="median",
        precision="fp32", dense_ns=1e7, accuracy_dense=0.9, parameters_dense=2000, evaluation_images=100,
        points=points, knee="0.5x", knee_why="why", wall_s={"table": 1.0}, command="edgekit sweep m",
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


REFUSED = SweepPoint(budget="0.01x", folder="0.01x", verdict="refused", reason="under the floor", budget_ns=1e5)


def test_the_line_names_what_was_not_met() -> None:
    fine = [point("0.9x", 0.9, (-0.01, 0.01)), point("0.5x", 0.8, (-0.12, -0.08))]
    assert reports.sweep_line(swept(*fine)) == "MET  2 of 2 budgets  knee 0.5x"
    bad = [*fine, point("0.4x", 0.7, (-0.2, -0.1), valid=False), point("0.3x", 0.7, (-0.2, -0.1), verdict="missed"), REFUSED]
    line = reports.sweep_line(swept(*bad, verdict="missed", knee=""))
    assert line == "MISSED  2 of 5 budgets; missed: 0.3x; refused: 0.01x; not valid: 0.4x"


def test_the_curve_has_no_accuracy_above_a_hundred_and_one_label_for_one_network() -> None:
    def at(name: str, latency_ns: float, quality: float) -> figures.Network:
        return figures.Network(name, latency_ns, (latency_ns, latency_ns), quality, (quality, min(1.0, quality + 0.01)))

    drawn = figures.pareto([at("a", 2e6, 0.995), at("b", 2e6, 0.995), at("c", 3e6, 1.0)], "top-1")
    words = re.findall(r"<text[^>]*>([^<]+)</text>", drawn)
    assert "a, b" in words and "c" in words and not {"a", "b"} & set(words)
    numbers = [float(word) for word in words if re.fullmatch(r"[\d.]+", word)]
    assert 99.5 <= max(numbers) <= 100


def test_the_page_is_self_contained_and_links_the_points() -> None:
    page = reports.sweep_html(swept(point("0.9x", 0.9, (-0.01, 0.01)), point("0.5x", 0.8, (-0.12, -0.08)), REFUSED))
    assert "<svg" in page and 'href="0.5x/report.html"' in page and "under the floor" in page
    assert "net &lt;b&gt;.py:f" in page and "<b>" not in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page


# --- whole ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_points_are_whole_runs_that_are_kept_and_can_be_gone_on_from(documented: tuple[Path, dict[str, Any]]) -> None:
    folder, names = documented
    curve, own = names["curve"], names["own"]
    for each in curve.points:
        out = folder / "api-out" / each.folder
        report, plan = load_json(Report, out / "report.json"), load_json(Plan, out / "plan.json")
        assert {"model.onnx", "dense.onnx", "manifest.json", "model.pt2", "request.json"} <= {path.name for path in out.iterdir()}
        assert (report.budget, report.measured_ns, plan.rounds) == (each.budget, each.measured_ns, each.rounds)
        assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
        request = msgspec.structs.replace(own, budget=parse_budget(each.budget), out=str(out))
        at = load_json(RunRequest, out / "request.json")
        request = msgspec.structs.replace(request, data=at.data, eval_data=at.eval_data)
        assert finished(request, folder / "api-out") == each
        assert finished(msgspec.structs.replace(request, seed=1), folder / "api-out") is None
    assert curve.points[0].measured_ns > curve.points[1].measured_ns
    assert not list((folder / "api-out").glob(".*"))


@pytest.mark.slow
def test_a_finished_point_comes_back_from_its_files_as_it_was_delivered(documented: tuple[Path, dict[str, Any]]) -> None:
    import torch

    from toolkit.run.prepare import load_and_trace

    folder, names = documented
    own, out = names["own"], folder / "api-out" / "0.7x"
    program = load_and_trace(f"{folder}/{own.model}", "", own.preprocess, own.seed).program
    state = restored(program, out)
    saved = torch.export.load(str(out / "model.pt2")).module()
    images = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(state.program.module(images), saved(images), atol=1e-6)
    assert {n: len(k) for n, k in state.alive.items()} == {
        g.name: g.width_after for g in load_json(Plan, out / "plan.json").groups if g.width_after < g.width_before
    }


@pytest.mark.slow
def test_runs_that_differ_in_device_or_images_are_flagged_and_not_ranked(
    documented: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = documented[0] / "api-out"
    for name in ("a", "b", "c"):
        shutil.copytree(folder / "0.7x", tmp_path / name)
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest["fingerprint"]["device"] = "another"
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    evaluation = json.loads((tmp_path / "c" / "evaluation.json").read_text())
    evaluation["indices"] = evaluation["indices"][1:]
    (tmp_path / "c" / "evaluation.json").write_text(json.dumps(evaluation))
    found = api.compare([tmp_path / name for name in "abc"])
    assert not found.comparable and [bool(run.differs) for run in found.runs] == [False, True, True]
    assert "other device: another" in found.runs[1].differs[0] and "other evaluation images" in found.runs[2].differs[0]
    assert not found.runs[1].best and not found.runs[2].best
    assert reports.comparison_line(found).startswith("NOT COMPARABLE  3 runs; unlike the first: ")
    assert "<svg" in reports.comparison_html(found)
    swept_too = api.compare([tmp_path / "a", folder / "0.9x", folder / "0.7x"])
    assert swept_too.comparable and len(swept_too.runs) == 3
    with pytest.raises(UsageError, match="only one run"):
        api.compare([tmp_path / "a"])

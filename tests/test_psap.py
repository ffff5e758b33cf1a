"""PSAP and fine-tuning as whole runs on a simulated device."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import networks
import pytest
import resumable
from test_allocate import Place

from toolkit import run as job
from toolkit.budget import parse_budget
from toolkit.demo import data_path, eval_path
from toolkit.errors import UsageError
from toolkit.run import loop
from toolkit.run.psap import dealt, target
from toolkit.run.training import CHECKPOINTS, check_request
from toolkit.schema import DimForm, Plan, Psap, Report, RunRequest, Training, load_json
from toolkit.train import filters_of

SETTINGS = ("psap.epochs=2", "psap.steps=3", "train.images=140", "train.batch=32", "train.checkpoint_steps=1")


def quiet(step: str, done: float, total: float) -> None:
    pass


def request(out: Path, **changes: object) -> RunRequest:
    plain = job.demo_request(str(out), parse_budget("0.5x"), "simulated-cpu")
    return msgspec.structs.replace(plain, samples=48, **changes)


def command(out: Path) -> list[str]:
    """A run of a small network that was never trained: what it learns is to be itself again."""
    net = out.parent / "net.py"
    net.write_text(networks.STRIDED)
    words = [sys.executable, "-m", "toolkit", "run", f"{net}:model", "--data", str(data_path()), "--eval-data", str(eval_path())]
    words += ["--input", "1x1x32x32", "--mean", "0.31", "--std", "0.35"]
    words += ["-p", "simulated-cpu", "--budget", "0.6x", "--method", "psap", "--samples", "48", "-o", str(out)]
    return [*words, *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.mark.slow
def test_killed_in_its_recovery_and_run_again_psap_ends_with_the_same_plan_and_weights(tmp_path, shared_cache) -> None:
    environment = {**os.environ, "EDGEKIT_CACHE": str(shared_cache)}
    whole = subprocess.run(command(tmp_path / "whole"), env=environment, capture_output=True, text=True)
    assert whole.returncode == 0 and whole.stdout.splitlines()[-1].startswith("MET"), whole.stderr
    process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    begun = tmp_path / "killed" / CHECKPOINTS / "psap-recovery-1.safetensors"
    while not begun.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert begun.exists() and not (tmp_path / "killed" / "report.json").exists()
    again = subprocess.run(command(tmp_path / "killed"), env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    plans = [load_json(Plan, tmp_path / name / "plan.json") for name in ("whole", "killed")]
    assert plans[0].groups == plans[1].groups and any(g.width_after < g.width_before for g in plans[0].groups)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    report = load_json(Report, tmp_path / "killed" / "report.json")
    assert any("went on from step" in note for note in report.notes) and "psap.epochs=2" in report.command
    assert not (tmp_path / "killed" / CHECKPOINTS).exists()
    assert report.measured_ns <= report.budget_ns and report.proof_max_relative_error <= 1e-9


@pytest.mark.slow
def test_fine_tuning_keeps_the_widths_and_is_told_apart(tmp_path, shared_cache, monkeypatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(shared_cache))
    how = Training(images=140, batch=32, checkpoint_steps=2)
    report = job.run(request(tmp_path / "out", method="l1", rounds=1, repair=False, finetune=2, train=how), quiet)
    tuned = report.finetuned
    assert report.verdict == "met" and tuned is not None and (tuned.epochs, tuned.images, tuned.loss) == (2, 126, "distill")
    assert tuned.kept and tuned.held_back_after < 0.7 * tuned.held_back_before
    assert tuned.accuracy_one_shot is not None and report.accuracy_pruned is not None
    assert report.accuracy_pruned > tuned.accuracy_one_shot and report.agreement > tuned.agreement_one_shot
    assert "--finetune 2" in report.command and "train.images=140" in report.command


def test_a_network_that_fine_tuning_made_no_better_is_not_delivered(monkeypatch, tmp_path) -> None:
    module = importlib.import_module("toolkit.run.finetune")
    worse = iter((0.1, 0.2))
    monkeypatch.setattr(module, "goal", lambda *args: SimpleNamespace(judge=lambda program: next(worse)))
    trainer = SimpleNamespace(
        request=request(tmp_path, finetune=1), samples=SimpleNamespace(train=range(9)), per_epoch=3,
        train=lambda program, aim, course: ("trained", SimpleNamespace(resumed=0)),
    )  # fmt: skip
    state = SimpleNamespace(program="dense", alive={})
    outcome = loop.Outcome(SimpleNamespace(cut=SimpleNamespace(state=state)), (), (), 1, 0.0)
    found = module.finetune(SimpleNamespace(trainer=trainer, program="dense", request=trainer.request), outcome)
    assert not found.kept and found.outcome is outcome and (found.before, found.after, found.images) == (0.1, 0.2, 9)


def test_the_schedule_begins_at_dense_falls_and_ends_where_the_loop_aims() -> None:
    for base, budget in ((1.0, 0.5), (0.4, 0.3), (1.0, 0.9)):
        some = SimpleNamespace(base=base, budget=budget)
        shares = [target(some, k / 10) for k in range(11)]
        assert shares[0] == base and shares == sorted(shares, reverse=True)
        assert shares[-1] == pytest.approx(loop.AIM * budget)


@pytest.mark.parametrize("ratios", ["sparsity", "threshold", "uniform"])
def test_widths_take_the_share_that_the_schedule_has_or_there_are_none(ratios) -> None:
    program = resumable.traced()
    candidates = {"stem": (2, 4, 6, 8), "first": (0, 3, 6, 9, 12)}
    sites = [
        Place(name, DimForm(const=1), DimForm(const=0, terms=(((name,), 1),)), lambda i, o: 1000.0 * o) for name in candidates
    ]
    model = SimpleNamespace(
        costs=lambda: sites, overhead_ns=2000.0, predict=lambda w: 2000.0 + 1000.0 * sum(w[name] for name in candidates)
    )
    full = {g.name: g.width for g in program.groups}
    some = SimpleNamespace(
        request=SimpleNamespace(psap=Psap(ratios=ratios)), program=program, candidates=candidates, dense_widths=full, base=1.0,
        model=model, memory_limit=lambda: None, predicted=lambda w: model.predict(w) / model.predict(full),
    )  # fmt: skip
    filters, last = filters_of(program, list(candidates)), 1.0
    for share in (1.0, 0.9, 0.7, 0.5, 0.2):
        widths = dealt(some, filters, program.module, share)
        assert widths is not None and all(widths[name] in candidates[name] for name in candidates)
        assert share - 4 / 22 < some.predicted(widths) <= min(share, last)
        last = some.predicted(widths)
    assert dealt(some, filters, program.module, 0.1) is None  # 4 of 22 at the least


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget": parse_budget("none")}, "--budget none is none. Give one, such as --budget 0.5x"),
        ({"precision": "auto"}, "which PSAP does not predict. Run it again with --precision fp32 or int8"),
        ({"model": "resnet18", "psap": Psap(scratch=True)}, "no trained network to learn from. Add --set train.loss=labels"),
    ],
)
def test_what_psap_cannot_do_is_refused_before_anything_is_measured(changes, says, tmp_path) -> None:
    wanted = msgspec.structs.replace(request(tmp_path, method="psap"), **changes)
    with pytest.raises(UsageError, match=says):
        check_request(wanted)
    check_request(msgspec.structs.replace(wanted, method="causal"))

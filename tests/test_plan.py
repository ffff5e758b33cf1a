"""`edgekit prune --plan`: a plan as a run left it, edited, or wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from toolkit.errors import UsageError
from toolkit.graph import apply, example_input, trace
from toolkit.run import reapply
from toolkit.schema import CategoryCounts, GroupPlan, Plan, Pruned, load_json, save_json

NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.back = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.back(self.inner(x).relu())
        return self.head(x.mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net()
"""


def quiet(step: str, done: float, total: float) -> None:
    pass


def network() -> nn.Module:
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)
    return scope["net"]().eval()


PROGRAM = trace(network(), example_input((1, 3, 8, 8)))


def plan(**kept: tuple[int, ...]) -> Plan:
    """A plan that keeps these channels, and all of the groups not named."""
    groups = tuple(
        GroupPlan(
            name=g.name, kind=g.kind, width_before=g.width, width_after=len(kept.get(g.name, range(g.width))),
            kept=tuple(kept.get(g.name, range(g.width))), removed=CategoryCounts(),
        )
        for g in PROGRAM.groups
    )  # fmt: skip
    return Plan(
        model="m", method="causal", seed=0, profile="p", table="t", dense_ns=2.0, budget_ns=1.0, target_ns=1.0, predicted_ns=1.0,
        optimality_gap=0.0, rounds=1, groups=groups,
    )  # fmt: skip


def edited(group: str, **changes: object) -> Plan:
    found = plan()
    groups = tuple(msgspec.structs.replace(g, **changes) if g.name == group else g for g in found.groups)
    return msgspec.structs.replace(found, groups=groups)


def test_a_plan_that_fits_is_the_channels_of_what_gets_narrower() -> None:
    assert reapply.checked(PROGRAM, plan(inner=(0, 3), stem=(1, 2, 5)), "plan.json") == {"inner": (0, 3), "stem": (1, 2, 5)}
    assert reapply.checked(PROGRAM, plan(), "plan.json") == {}
    assert reapply.checked(PROGRAM, plan(inner=()), "plan.json") == {"inner": ()}  # a branch may go


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (edited("inner", kept=(0, 4), width_after=2), "inner: kept has 4, outside of 0 to 3"),
        (edited("inner", kept=(-1, 2), width_after=2), "inner: kept has -1, outside of 0 to 3"),
        (edited("inner", kept=(2, 0), width_after=2), "inner: kept is not in ascending order"),
        (edited("inner", kept=(1, 1), width_after=2), "inner: kept has 1 more than once"),
        (edited("inner", kept=(0, 1)), "inner: width_after is 4, kept has 2"),
        (edited("inner", width_before=8), "inner: width_before is 8, the model has 4 channels"),
        (edited("inner", name="outer"), "outer is no channel group of this model"),
        (edited("inner", name="stem"), "stem is there 2 times"),
        (edited("stem", kept=(), width_after=0), "stem: it is on the only path and cannot lose all its channels"),
        (edited("head", kept=(0,), width_after=1), "head: it cannot be pruned: the network's output"),
    ],
)
def test_every_fault_is_named_with_its_group(wrong: Plan, fault: str) -> None:
    with pytest.raises(UsageError) as caught:
        reapply.checked(PROGRAM, wrong, "plan.json")
    assert fault in caught.value.message and caught.value.message.startswith("plan.json does not fit the model: ")
    assert "stem, inner" in caught.value.hint


def test_all_faults_are_told_at_once() -> None:
    wrong = edited("inner", kept=(9,), width_after=1)
    groups = tuple(msgspec.structs.replace(g, kept=(1, 0)) if g.name == "stem" else g for g in wrong.groups)
    with pytest.raises(UsageError, match="stem: kept is not in ascending order; .*inner: kept has 9"):
        reapply.checked(PROGRAM, msgspec.structs.replace(wrong, groups=groups), "plan.json")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    save_json(tmp_path / "plan.json", plan(inner=(0, 3), stem=(1, 2, 5)))
    return tmp_path


@pytest.mark.slow
def test_without_repair_the_weights_are_those_of_the_model_that_stay(place: Path) -> None:
    from toolkit.api import Preprocess, prune

    made = prune(
        "net.py:net", "plan.json", "out", preprocess=Preprocess(input=(1, 3, 8, 8)), profile="simulated-cpu", repair=False
    )
    expected = apply(PROGRAM, {"inner": (0, 3), "stem": (1, 2, 5)}).module.state_dict()
    found = load_file(place / "out" / "weights.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert made == load_json(Pruned, place / "out" / "pruned.json") and made.proof_max_relative_error <= 1e-9
    assert (made.widths["inner"], made.widths["stem"]) == (2, 3) and not made.repaired
    assert load_json(Plan, place / "out" / "plan.json") == load_json(Plan, place / "plan.json")
    words = made.next_command.split()
    assert words[:2] == ["edgekit", "bench"] and all(Path(word).is_file() for word in words[2:4])
    with pytest.raises(UsageError, match="The repair needs calibration images"):
        prune("net.py:net", "plan.json", "other", preprocess=Preprocess(input=(1, 3, 8, 8)), profile="simulated-cpu")


@pytest.mark.slow
def test_a_plan_of_a_run_gives_its_widths_again(documented: tuple[Path, dict[str, Any]]) -> None:
    folder, names = documented
    of_run = json.loads((folder / "api-out" / "plan.json").read_text())
    assert names["made"].widths == {group["name"]: group["width_after"] for group in of_run["groups"]}
    assert names["made"].parameters_pruned == names["report"].parameters_pruned


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from toolkit.api import Preprocess, RunRequest, parse_budget
    from toolkit.report import terminal
    from toolkit.run.dry import dry_run

    monkeypatch.setenv("EDGEKIT_CACHE", str(place / "cache"))
    np.savez(place / "data.npz", images=np.zeros((40, 8, 8, 3), np.uint8), labels=np.arange(40) % 3)
    request = RunRequest(
        model="net.py:net", data="data.npz", out="out", budget=parse_budget("0.8x"), profile="simulated-cpu",
        preprocess=Preprocess(input=(1, 3, 8, 8)), keep=("stem",),
    )  # fmt: skip
    before = sorted(place.rglob("*"))
    found = dry_run(request, quiet)
    assert [path for path in sorted(place.rglob("*")) if "__pycache__" not in path.parts] == before
    assert found.groups == {"inner": (0, 1, 2, 3, 4)} and found.held["stem"] == "kept on request"
    assert (found.calibration_images, found.evaluation_images, found.rounds, found.table_known) == (30, 10, 2, False)
    assert found.table_s > 0 and found.total_s > found.table_s + found.scoring_s > 0
    assert found.budget_ns == pytest.approx(0.8 * found.dense_ns)
    text = "\n".join(terminal.dry_run(found))
    assert "inner: 4 channels, or 0, 1, 2, 3 (0: the branch goes)" in text and "nothing was written" in text

"""`edgekit prune --plan`: a plan as a run left it, edited, or wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
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
    return tmp_path


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pruned]:
    """The folder that a plan was applied in, without repair, and what came out."""
    from toolkit.api import Preprocess, prune

    folder = tmp_path_factory.mktemp("applied")
    (folder / "net.py").write_text(NETWORK)
    save_json(folder / "plan.json", plan(inner=(0, 3), stem=(1, 2, 5)))
    preprocess = Preprocess(input=(1, 3, 8, 8))
    out = folder / "out"
    return folder, prune(
        f"{folder}/net.py:net", folder / "plan.json", out, preprocess=preprocess, profile="simulated-cpu", repair=False
    )


@pytest.mark.slow
def test_without_repair_the_weights_are_those_of_the_model_that_stay(applied: tuple[Path, Pruned]) -> None:
    place, made = applied
    expected = apply(PROGRAM, {"inner": (0, 3), "stem": (1, 2, 5)}).module.state_dict()
    found = load_file(place / "out" / "weights.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert made == load_json(Pruned, place / "out" / "pruned.json") and made.proof_max_relative_error <= 1e-9
    assert (made.widths["inner"], made.widths["stem"]) == (2, 3) and not made.repaired
    assert load_json(Plan, place / "out" / "plan.json") == load_json(Plan, place / "plan.json")
    words = made.next_command.split()
    assert words[:2] == ["edgekit", "bench"] and all(Path(word).is_file() for word in words[2:4])


def test_a_repair_needs_images_and_a_finished_run_is_not_written_over(place: Path) -> None:
    from toolkit.api import prune

    save_json(place / "plan.json", plan())
    with pytest.raises(UsageError, match="The repair needs calibration images"):
        prune("net.py:net", "plan.json", "out")
    (place / "out").mkdir()
    (place / "out" / "report.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a finished run"):
        prune("net.py:net", "plan.json", "out", repair=False)


@pytest.mark.slow
def test_every_value_of_the_pruned_file_has_a_name_of_its_own_and_a_fixed_shape(applied: tuple[Path, Pruned]) -> None:
    """What Netron shows, by the strictest that onnx has to offer."""
    import onnx

    path = applied[0] / "out" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True).graph
    made = [name for node in graph.node for name in node.output if name]
    shapes = {value.name: value.type.tensor_type.shape for value in (*graph.value_info, *graph.input, *graph.output)}
    names = [node.name for node in graph.node]
    assert all(names) and len(set(names)) == len(names) and len(set(made)) == len(made)
    assert all(dim.HasField("dim_value") and dim.dim_value > 0 for name in made for dim in shapes[name].dim)


@pytest.mark.slow
def test_the_files_load_without_edgekit_and_say_the_same(applied: tuple[Path, Pruned], tmp_path: Path) -> None:
    """In a fresh process that cannot import it: plain torch, onnxruntime and OpenVINO."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    program = textwrap.dedent(
        """
        import sys
        for name in ("toolkit", "calibration", "hw_profiles"):
            sys.modules[name] = None
        import numpy as np, onnxruntime, openvino, torch
        from safetensors.torch import load_file
        module = torch.export.load("model.pt2").module()
        weights = load_file("weights.safetensors")
        state = module.state_dict()
        assert all(torch.equal(state[name], value) for name, value in weights.items()) and weights
        x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
        with torch.no_grad():
            expected = module(torch.from_numpy(x)).numpy()
        session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
        ort = session.run(None, {session.get_inputs()[0].name: x})[0]
        core = openvino.Core()
        precise = {"INFERENCE_PRECISION_HINT": "f32"}
        ir = core.compile_model(core.read_model("model.onnx"), "CPU", precise)(x)[0]
        print(max(float(np.abs(got - expected).max() / np.abs(expected).max()) for got in (ort, ir)))
        """
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=applied[0] / "out", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-4


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

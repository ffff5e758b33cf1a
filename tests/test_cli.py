"""The command as a stranger meets it: help, bad input, interruption, and one whole run of a small network."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from networks import residual
from PIL import Image

import hw_profiles
from toolkit import cli, profiles
from toolkit.devices import local
from toolkit.schema import Benchmark, Comparison, Plan, Report, from_json, load_json

VERBS = ("run", "sweep", "demo", "prune", "measure", "bench", "export", "report", "profiles", "doctor")
INPUT = ("--input", "1x3x16x16")
pytestmark = pytest.mark.slow

NETWORKS = """
import torch
from torch import nn



def tiny():
    def block(before, after):
        return nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()

    torch.manual_seed(0)
    return nn.Sequential(*block(3, 16), *block(16, 32), *block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def broken():
    network = tiny()
    network[3].weight.data[0, 0, 0, 0] = float("nan")
    return network


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = tiny()

    def forward(self, x):
        y = self.body(x)
        return y if y.sum() > 0 else -y


def branch():
    return Branch()


def failing():
    raise ValueError("no such checkpoint")


def wanting(classes):
    return tiny()
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    error: str

    @property
    def paragraph(self) -> str:
        """The error without its line breaks; it is the last thing on stderr, and only one."""
        _, found, text = f"\n{self.error}".partition("\nError: ")
        assert found and "\nError" not in text and "\n\n" not in text
        return " ".join(text.split())

    @property
    def progress(self) -> list[str]:
        """What stands before the error."""
        return f"\n{self.error}".partition("\nError: ")[0].split("\n")[1:]


Call = Callable[..., Result]


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """The command, called in this process, in the folder of the inputs."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("EDGEKIT_DEBUG", raising=False)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["edgekit", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return Result(code, found.out, found.err)

    yield run
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, weights and images, good and bad."""
    import torch
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("place")
    (root / "net.py").write_text(NETWORKS)
    scope: dict[str, object] = {}
    exec(NETWORKS, scope)
    network = scope["tiny"]()  # type: ignore[operator]
    state = network.state_dict()
    save_file(state, root / "good.safetensors")
    save_file(state | {"3.weight": torch.full_like(state["3.weight"], torch.nan)}, root / "nan.safetensors")
    save_file(state | {"11.weight": torch.zeros(10, 32), "11.bias": torch.zeros(10)}, root / "ten.safetensors")
    (root / "cut.safetensors").write_bytes((root / "good.safetensors").read_bytes()[:500])
    torch.save(torch.nn.Sequential(torch.nn.Linear(1, 1)), root / "pickle.pt")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (120, 16, 16, 3), dtype=np.uint8), np.arange(120) % 4
    np.savez(root / "good.npz", images=images, labels=labels)
    np.savez(root / "unlabelled.npz", images=images)
    np.savez(root / "labels.npz", images=images, labels=np.arange(120) % 9)
    np.savez(root / "two.npz", images=images[:2], labels=labels[:2])
    np.savez(root / "six.npz", images=np.concatenate([images, images], 3), labels=labels)
    np.savez(root / "float.npz", images=images.astype(np.float32), labels=labels)
    (root / "cut.npz").write_bytes((root / "good.npz").read_bytes()[:1000])
    for index, image in enumerate(images[:16]):
        file = root / "images" / str(index % 4) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    (root / "images" / "3" / "7.png").write_bytes(b"not an image")
    floats = json.loads((Path(hw_profiles.__file__).parent / "simulated-cpu" / "profile.json").read_text())
    floats["simulation"]["law"]["int8_rate"] = 0
    (root / "floats").mkdir()
    (root / "floats" / "profile.json").write_text(json.dumps(floats))
    for folder in ("empty", "classes/a", "classes/b"):
        (root / folder).mkdir(parents=True)
    (root / "file").write_text("")
    return root


# --- help ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_starts_with_an_example_and_fits_a_screen(call: Call, verb: str) -> None:
    found = call(*verb.split(), "--help")
    lines = found.out.splitlines()
    assert found.code == 0 and not found.error
    assert lines[0].startswith(f"  edgekit {verb}")
    assert len(lines) <= 45 and max(map(len, lines)) <= 110
    assert not any(line.endswith("...") for line in lines if not line.startswith("Usage"))


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_a_verb_is_a_command_line_it_takes(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = cli.cli.commands[verb]
    assert isinstance(command, cli.Command)
    name, given, *arguments = shlex.split(command.example)
    assert (name, given) == ("edgekit", verb)
    command.make_context(verb, arguments)


def test_the_doctor_answers_in_json(call: Call) -> None:
    found = call("doctor", "--json")
    facts = json.loads(found.out)
    assert found.code == 0 and facts["machine"]["cores"] == str(local.facts().cores)
    simulated = {"simulated-cpu", "simulated-gpu", "simulated-npu"}
    measured = "epyc-avx512-onnxruntime"
    engines = {"tensorrt", "tensorrt-rtx"}
    templates = {profile.id for profile in profiles.list_profiles() if profile.status == "template"}
    assert set(facts["profiles"]) == {"local-onnxruntime", "local-openvino", measured} | simulated | engines | templates
    assert all(facts["profiles"][name].startswith("template: nothing measured; edgekit ") for name in templates)
    assert all("builds engines" in facts["profiles"][name] or "runtime missing" in facts["profiles"][name] for name in engines)
    assert all(facts["profiles"][name] == "ready" for name in simulated)
    assert facts["profiles"][measured] == "ready" or "measured on another device: " in facts["profiles"][measured]


def test_the_version_is_told_installed_or_not(call: Call) -> None:
    found = call("--version")
    assert found.code == 0 and found.out.startswith("edgekit")


def test_without_a_verb_the_help_is_shown(call: Call) -> None:
    found = call()
    assert found.code == 2 and "Commands:" in found.error


# --- bad input ---------------------------------------------------------------------------------------------------------------

GOOD = {"model": "net.py:tiny", "--data": "good.npz", "--input": "1x3x16x16", "--budget": "0.7x", "-o": "out"}
BAD: list[tuple[str, dict[str, str], str, str]] = [  # name, what is changed, words of the reason, words of the advice
    ("missing-model-file", {"model": "nope.py:tiny"}, "nope.py does not exist", "path/to/file.py:function"),
    ("missing-function", {"model": "net.py:tony"}, "did you mean tiny", "path/to/file.py:function"),
    ("no-function", {"model": "net.py"}, "does not name a function", "net.py:FUNCTION"),
    ("weights-as-model", {"model": "good.safetensors"}, "none that builds a network", "--weights good.safetensors"),
    ("unknown-torchvision-name", {"model": "resnet181"}, "did you mean resnet18", "torchvision name"),
    ("failing-function", {"model": "net.py:failing"}, "ValueError: no such checkpoint.", "same command again"),
    ("needs-arguments", {"model": "net.py:wanting"}, "needs arguments (classes)", "function without arguments"),
    ("untraceable", {"model": "net.py:branch"}, "torch.export cannot trace", "EDGEKIT_DEBUG=1"),
    ("nan-weights", {"model": "net.py:broken"}, "NaN or infinite weights in 1 of its tensors: 3.weight", "--weights"),
    ("nan-weights-file", {"--weights": "nan.safetensors"}, "NaN or infinite weights", "--weights"),
    ("missing-weights", {"--weights": "nope.safetensors"}, "nope.safetensors does not exist", "--weights"),
    ("cut-weights", {"--weights": "cut.safetensors"}, "cut.safetensors is damaged", "again"),
    ("pickled-weights", {"--weights": "pickle.pt"}, "pickled objects", "safetensors.torch.save_model"),
    ("other-classes", {"--weights": "ten.safetensors"}, "11.weight is 10x32, the model's 4x32", "same number of classes"),
    ("input-channels", {"--input": "1x1x16x16"}, "does not run on an input of shape (1, 1, 16, 16)", "--input"),
    ("input-sizes", {"--input": "1x3x16"}, "1x3x16 is not four positive sizes", "1x3x224x224"),
    ("input-size-of-images", {"--input": "1x3x32x32"}, "is 16 x 16 (H x W) after resize and crop", "--resize and --crop"),
    ("mean-count", {"--mean": "0.5,0.5"}, "--mean has 2 values, the input 3 channels", "3 values"),
    ("mean-words", {"--mean": "a,b,c"}, "not a list of numbers", "edgekit run --help"),
    ("std-zero", {"--std": "0"}, "not positive", "standard deviation"),
    ("missing-data", {"--data": "nope"}, "nope does not exist", "--data"),
    ("empty-data", {"--data": "empty"}, "empty holds no images", "--data"),
    ("empty-classes", {"--data": "classes"}, "classes holds no images", "--data"),
    ("unreadable-image", {"--data": "images"}, "7.png cannot be read as an image", "same command again"),
    ("unreadable-evaluation", {"--eval-data": "images"}, "7.png cannot be read as an image", "same command again"),
    ("labels", {"--data": "labels.npz"}, "has label 4, outside of 0 to 3", "--classes"),
    ("image-channels", {"--data": "six.npz"}, "has 6 channels, the input 3", "--input"),
    ("image-type", {"--data": "float.npz"}, "float32 [120, 16, 16, 3], not uint8", "--data"),
    ("cut-data", {"--data": "cut.npz"}, "cut.npz cannot be read", "--data"),
    ("few-images", {"--data": "two.npz"}, "two.npz has 2 images, too few", "at least 8"),
    ("missing-classes", {"--classes": "nope"}, "classes file nope cannot be read", "one class name a line"),
    ("bare-budget", {"--budget": "8"}, "The budget 8 has no unit", "--budget 8ms or 0.8x"),
    ("large-budget", {"--budget": "2x"}, "more time than the dense model takes", "0.5x"),
    ("unknown-profile", {"-p": "nope"}, "no profile 'nope'", "edgekit profiles"),
    ("threads", {"--threads": "9999"}, "9999 is more than the", f"--threads {local.facts().cores}"),
    ("precision", {"--precision": "int8", "-p": "floats"}, "--precision int8 is nothing that", "--precision fp32"),
    ("memory-in-int8", {"--precision": "int8", "--max-memory": "1MB"}, "counts a network in fp32", "--precision fp32"),
    ("auto-without-budget", {"--precision": "auto", "--budget": "none"}, "nothing to choose a precision by", "--precision int8"),
    ("device", {"--on": "ssh://-board"}, "is no device", "ssh://user@host"),
    ("few-samples", {"--samples": "4"}, "4 is not in the range", "edgekit run --help"),
    ("keep-nothing", {"--keep": "nope"}, "--keep nope matches no channel group", "0, 3, 6"),
    ("keep-all", {"--keep": "*"}, "No channel group of this model can be pruned", "fewer --keep"),
    ("min-width", {"--min-width": "999"}, "no width of 999 or more", "smaller --min-width"),
    ("out-is-a-file", {"-o": "file"}, "file is a file", "-o edgekit-out"),
    ("out-under-a-file", {"-o": "file/sub"}, "file is a file", "-o edgekit-out"),
    ("out-unwritable", {"-o": "/proc/nope/out"}, "/proc", "folder"),
]


@pytest.mark.parametrize(("changes", "reason", "advice"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_paragraph_with_advice(call: Call, changes: dict[str, str], reason: str, advice: str) -> None:
    given = GOOD | changes
    model = given.pop("model")
    found = call("run", model, *(word for pair in given.items() for word in pair))
    assert found.code == 2 and not found.out
    assert reason in found.paragraph
    assert advice in found.paragraph.partition(reason)[2]
    assert all(re.fullmatch(r"[a-z, ]+  (stopped|\d+\.\d s)", line) for line in found.progress), found.progress


def test_bad_input_leaves_an_earlier_result_alone(call: Call, place: Path) -> None:
    report = place / "earlier" / "report.json"
    report.parent.mkdir()
    report.write_text("kept")
    call("run", "net.py:tiny", "--data", "images", *INPUT, "--budget", "0.7x", "-o", "earlier")
    assert report.read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nope",), "No such command 'nope'"),
        (("run",), "Missing argument 'MODEL'"),
        (("run", "net.py:tiny", "--data", "good.npz"), "Missing option '--budget'"),
        (("report", "nope"), "nope/report.json does not exist"),
        (("report", "file"), "file/report.json: Not a directory"),
        (("bench", "nope.onnx"), "nope.onnx does not exist"),
        (("bench", "good.npz"), "cannot open"),
        (("bench", "net.onnx", "--fail-over", "5%"), "held against nothing"),
        (("bench", "net.onnx", "--fail-over", "much"), "write it like 5%"),
        (("bench", "net.onnx", "--sustained", "long"), "write it like 60s"),
        (("bench", "net.onnx", "--against", "nope.json"), "nope.json does not exist"),
        (("bench", "dense.xml"), "dense.xml does not exist"),
        (("profiles", "nope"), "no profile 'nope'"),
        (("export", "net.py:tiny"), "does not say what input it takes"),
        (("export", "net.py:tiny", *INPUT, "-o", "file"), "file is a file"),
        (("measure", "net.py:tiny"), "does not say what input it takes"),
    ],
)
def test_wrong_usage_of_the_other_verbs(call: Call, arguments: tuple[str, ...], reason: str) -> None:
    found = call(*arguments)
    assert found.code == 2 and not found.out and reason in found.paragraph


def test_a_missing_runtime_is_exit_3_with_the_command_that_installs_it(call: Call) -> None:
    with patch.dict(sys.modules, {"onnxruntime": None}):
        found = call("run", "net.py:tiny", "--data", "good.npz", *INPUT, "--budget", "0.7x", "-o", "out")
    assert found.code == 3 and "pip install" in found.paragraph


def test_export_writes_a_checked_file(call: Call, place: Path) -> None:
    found = call("export", "net.py:tiny", *INPUT, "-o", "exported")
    assert found.code == 0 and found.out.startswith("exported/model.onnx: ")
    assert (place / "exported" / "model.onnx").is_file()


# --- processes -----------------------------------------------------------------------------------------------------------


def environment(cache: Path) -> dict[str, str]:
    source = str(Path(cli.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "EDGEKIT_CACHE": str(cache)}


def process(place: Path, cache: Path, *arguments: str) -> Result:
    command = [sys.executable, "-m", "toolkit", *arguments]
    done = subprocess.run(command, cwd=place, env=environment(cache), text=True, capture_output=True, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("moment", ["loading", "measuring"])
def test_an_interrupt_is_one_sentence_and_exit_130(place: Path, tmp_path: Path, moment: str) -> None:
    arguments = ["run", "net.py:tiny", "--data", "good.npz", *INPUT, "--budget", "0.7x", "-o", str(tmp_path / "out")]
    running = subprocess.Popen(
        [sys.executable, "-m", "toolkit", *arguments],
        cwd=place, env=environment(tmp_path / "cache"), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs start with it ignored
    )  # fmt: skip
    assert running.stderr
    before = ""
    if moment == "measuring":
        while not before.startswith("images"):
            before = running.stderr.readline()
            assert before
    else:
        time.sleep(1.0)
    os.killpg(running.pid, signal.SIGINT)
    out, error = running.communicate()
    assert running.returncode == cli.INTERRUPTED and not out
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("Interrupted. Measured tables are kept")


def test_a_reader_that_leaves_early_is_no_failure(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "toolkit", "doctor", "--json"]
    running = subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout and running.stderr
    running.stdout.close()
    assert running.stderr.read() == ""
    running.wait()


# --- a whole run -----------------------------------------------------------------------------------------------------------

FILES = (
    "report.html",
    "report.json",
    "plan.json",
    "model.onnx",
    "dense.onnx",
    "manifest.json",
    "weights.safetensors",
    "model.pt2",
)


@dataclass(frozen=True)
class Finished:
    place: Path
    cache: Path
    result: Result

    def again(self, *arguments: str, data: str = "good.npz", out: str = "again") -> Result:
        """The same model with the same table, on a simulated device: what its samples are is repeatable."""
        fixed = ["run", "net.py:tiny", *INPUT, *"-p simulated-cpu --budget 0.7x --rounds 1".split(), "--data", data, "-o", out]
        return process(self.place, self.cache, *fixed, *arguments)

    def records(self, out: str = "first") -> tuple[Report, Plan]:
        return load_json(Report, self.place / out / "report.json"), load_json(Plan, self.place / out / "plan.json")


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    job = Finished(place, tmp_path_factory.mktemp("cache"), Result(0, "", ""))
    return Finished(place, job.cache, job.again(out="first"))


@pytest.mark.slow
def test_a_whole_run_leaves_what_the_verdict_line_says(finished: Finished) -> None:
    report, plan = finished.records()
    out = finished.place / "first"
    assert {*FILES, "measurements"} <= {path.name for path in out.iterdir()}
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    last = finished.result.out.splitlines()[-1]
    assert re.fullmatch(
        r"(MET|MISSED)  [\d.]+ \w+ median \(predicted [\d.]+, budget [\d.]+\)  [\d.]+x  top-1 [+-]?[\d.]+", last
    ), last
    assert last.startswith("MET") == (report.verdict == "met")
    assert finished.result.code == (0 if report.verdict == "met" and report.valid else 1)
    assert "Traceback" not in finished.result.error
    comparison = load_json(Comparison, out / "measurements" / "comparison.json")
    assert comparison.pruned.rounds_ns and comparison.pruned.latency_ns == report.measured_ns
    assert any(group.width_after < group.width_before for group in plan.groups)
    assert report.accuracy_dense is not None and report.evaluation_images + report.calibration_images == 120


@pytest.mark.slow
def test_the_same_seed_and_table_give_the_same_plan_and_json_is_a_report(finished: Finished) -> None:
    again = finished.again("--json")
    first, plan = finished.records()
    report = from_json(Report, again.out)
    assert finished.records("again")[1].groups == plan.groups
    assert report.table == first.table
    assert report == finished.records("again")[0]
    assert re.match("(MET|MISSED)  ", again.error.splitlines()[-1])


@pytest.mark.slow
def test_without_labels_there_is_agreement_but_no_accuracy(finished: Finished) -> None:
    found = finished.again(data="unlabelled.npz", out="unlabelled")
    report, _ = finished.records("unlabelled")
    assert report.accuracy_dense is None and report.accuracy_pruned is None and 0 <= report.agreement <= 1
    assert re.search(r"agreement [\d.]+ %$", found.out.splitlines()[-1])


@pytest.mark.slow
def test_report_shows_a_finished_run_again(finished: Finished) -> None:
    page = finished.place / "first" / "report.html"
    page.unlink()
    found = process(finished.place, finished.cache, "report", "first")
    assert found.out == finished.result.out and found.code == finished.result.code and page.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["header.json", "rows-*.csv", "samples.json"])
def test_a_damaged_table_is_named_and_its_advice_repairs_it(finished: Finished, name: str) -> None:
    (path,) = finished.cache.rglob(name)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    measure = ("measure", "net.py:tiny", *INPUT, "-p", "simulated-cpu", "--json")
    refused = process(finished.place, finished.cache, *measure)
    assert refused.code == 1 and path.name in refused.paragraph
    advice = re.search(r"Run: (rm -f .+?) and then the same command again", refused.paragraph)
    assert advice
    subprocess.run(shlex.split(advice[1]), check=True)
    measured = process(finished.place, finished.cache, *measure)
    assert measured.code == 0 and json.loads(measured.out)["coverage"] > 0.9
    if name != "samples.json":
        assert path.read_bytes() == whole  # made again from the networks that were measured


def test_bench_keeps_a_figure_and_holds_later_ones_against_it(call: Call, tmp_path: Path) -> None:
    slow, fast = residual(tmp_path / "net.onnx", (64, 64), 32), residual(tmp_path / "new" / "net.onnx", (16, 16), 32)
    found = call("bench", str(fast), "-p", "simulated-cpu", "-o", str(tmp_path / "earlier.json"))
    assert found.code == 0 and found.out.splitlines()[-1] == "valid"
    record = load_json(Benchmark, tmp_path / "earlier.json")
    assert record.measurements[0].rounds_ns and record.startup[0].load_ns > 0
    against = ("--against", str(tmp_path / "earlier.json"), "-p", "simulated-cpu", "--no-startup")
    passed = call("bench", str(fast), *against)
    assert passed.code == 0 and "\nPASSED  1." in passed.out
    failed = call("bench", str(slow), *against, "--fail-over", "20%", "--json")
    gates = from_json(Benchmark, failed.out).gates
    assert failed.code == 1 and "FAILED" in failed.error and gates[0].limit == 1.2 and not gates[0].passed


@pytest.mark.timed
def test_bench_of_several_says_what_got_faster(call: Call, tmp_path: Path) -> None:
    slow, fast = residual(tmp_path / "slow.onnx", (64, 64), 32), residual(tmp_path / "fast.onnx", (32, 64), 32)
    found = call("bench", str(slow), str(fast), str(slow), "-p", "simulated-npu", "--kernels", "--fail-over", "5%")
    assert found.code == 0 and found.out.count("What got faster, what did not") == 2
    assert "b0.conv2" in found.out and "multiply-accumulates" in found.out and found.out.count("PASSED") == 2
    alone = call("bench", str(slow), "-p", "simulated-npu", "--kernels")
    assert "Kernels of slow.onnx" in alone.out

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit import profiles
from toolkit.errors import UsageError
from toolkit.schema import Fingerprint, Profile, save_json

HW_PROFILES = Path(__file__).resolve().parent.parent / "hw_profiles"

X86 = """processor\t: 0
model name\t: Example CPU @ 3.00GHz
cpu family\t: 6
model\t\t: 143
stepping\t: 8
flags\t\t: fpu sse2 avx avx2 fma avx512f avx512_vnni amx_tile amx_int8

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n"


MEASURED = "epyc-avx512-onnxruntime"


def own_profile(folder: Path, **changes: object) -> Path:
    record = msgspec.structs.replace(profiles.load("local-onnxruntime"), id="bench-board", **changes)
    save_json(folder / "profile.json", record)
    return folder


def ready() -> list[Profile]:
    return [profile for profile in profiles.list_profiles() if profile.status != "template"]


def templates() -> list[Profile]:
    return [profile for profile in profiles.list_profiles() if profile.status == "template"]


def test_the_bundled_profiles_are_named_after_their_folders() -> None:
    others = ["simulated-cpu", "simulated-gpu", "simulated-npu", "tensorrt", "tensorrt-rtx"]
    assert [profile.id for profile in ready()] == [MEASURED, "local-onnxruntime", "local-openvino", *others]
    for profile in profiles.list_profiles():
        assert profiles.load(profile.id) == profile
        assert profiles.load(str(HW_PROFILES / profile.id)) == profile
    for profile in ready():
        device = profile.id if profile.simulation else "nvidia-gpu" if profile.format == "tensorrt" else "local"
        assert profile.threads == 1 and profile.device == device


def test_a_path_is_a_folder_or_its_file(tmp_path: Path) -> None:
    folder = own_profile(tmp_path / "board", threads=4)
    assert profiles.load(str(folder)) == profiles.load(str(folder / "profile.json"))
    assert profiles.load(str(folder)).threads == 4


def test_a_known_id_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_profile(tmp_path / "local-openvino")
    monkeypatch.chdir(tmp_path)
    assert profiles.load("local-openvino").id == "local-openvino"
    assert profiles.load("./local-openvino").id == "bench-board"


@pytest.mark.parametrize(
    "name", ["", "local", "..", "nowhere/profile.json", "local-onnxruntime/../local-openvino", "__init__.py"]
)
def test_an_unknown_name_is_refused_with_the_known_ids(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        profiles.load(name)
    assert "local-onnxruntime, local-openvino" in caught.value.message
    assert "edgekit profiles" in caught.value.hint


@pytest.mark.parametrize("change", [{"id": "../up"}, {"id": "a..b"}, {"id": ""}, {"id": "A"}, {"threads": 0}, {"batch": 0}])
def test_a_profile_that_would_fail_later_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    record = msgspec.structs.replace(profiles.load("local-onnxruntime"), **change)
    save_json(tmp_path / "profile.json", record)
    with pytest.raises(UsageError, match=r"profile\.json"):
        profiles.load(str(tmp_path))


def test_a_damaged_profile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text('{"schema": 1, "id": "board"')
    with pytest.raises(UsageError, match=r"profile\.json is not a valid Profile"):
        profiles.load(str(tmp_path))


def test_every_part_of_a_fingerprint_changes_its_id() -> None:
    profile = profiles.load("local-onnxruntime")
    base = profiles.fingerprint(profile, "1.0")
    assert base == profiles.fingerprint(profile, "1.0")
    others = {
        profiles.fingerprint(profile, "1.1").id,
        *(
            profiles.fingerprint(msgspec.structs.replace(profile, **change), "1.0").id
            for change in ({"threads": 2}, {"batch": 2}, {"precision": "fp16"}, {"runtime": "openvino"})
        ),
        msgspec.structs.replace(base, device="another").id,
        msgspec.structs.replace(base, instruction_set="").id,
    }
    assert len(others) == 7 and base.id not in others


def test_what_latency_does_not_depend_on_leaves_the_fingerprint_alone() -> None:
    profile = profiles.load("local-onnxruntime")
    renamed = msgspec.structs.replace(profile, id="mine", description="mine")
    assert profiles.fingerprint(renamed, "1.0") == profiles.fingerprint(profile, "1.0")


def test_another_device_is_not_described_by_this_one() -> None:
    profile = msgspec.structs.replace(profiles.load("local-onnxruntime"), device="ssh://user@board")
    with pytest.raises(UsageError, match="ssh://user@board"):
        profiles.fingerprint(profile, "1.0")
    simulated = msgspec.structs.replace(profile, device="staircase", runtime="simulated")
    assert profiles.fingerprint(simulated, "1.0").device == "staircase"


def test_x86_is_described_by_model_numbers_and_instruction_sets() -> None:
    name, instructions = profiles.describe_cpu(X86, "", "x86_64")
    assert name == "Example CPU @ 3.00GHz (cpu family 6, model 143, stepping 8) x86_64"
    assert instructions == "avx2 fma avx512f avx512_vnni amx_tile amx_int8"


def test_arm_is_described_by_the_board_and_part_numbers() -> None:
    name, instructions = profiles.describe_cpu(ARM, "Example Board Rev 1.1\0", "aarch64")
    assert name == "Example Board Rev 1.1 (CPU implementer 0x41, CPU part 0xd42) aarch64"
    assert instructions == "asimd asimdhp asimddp"


@given(st.text())
def test_any_cpuinfo_gets_a_name(text: str) -> None:
    name, instructions = profiles.describe_cpu(text, "", "riscv64")
    assert name.endswith(" riscv64") and len(name) > len(" riscv64")
    assert set(instructions.split()) <= set(profiles.INSTRUCTION_SETS)


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
    monkeypatch.delenv("EDGEKIT_CACHE", raising=False)
    assert profiles.cache_dir() == tmp_path / ".cache" / "edgekit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert profiles.cache_dir() == tmp_path / "xdg" / "edgekit"
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "mine"))
    assert profiles.cache_dir() == tmp_path / "mine"
    assert not any(tmp_path.iterdir())


def test_tables_of_different_fingerprints_are_in_different_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    prints: list[Fingerprint] = [profiles.fingerprint(profile, "1.0") for profile in ready() if profile.format != "tensorrt"]
    folders = {profiles.table_dir(print_) for print_ in prints}
    assert len(folders) == 5
    assert all(tmp_path in folder.parents for folder in folders)


def test_profiles_are_found_wherever_the_package_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the data package at another place, as an installation makes it, is what is read."""
    shutil.copytree(HW_PROFILES, tmp_path / "hw_profiles")
    save_json(
        tmp_path / "hw_profiles" / "extra" / "profile.json", msgspec.structs.replace(profiles.load("local-openvino"), id="extra")
    )
    monkeypatch.syspath_prepend(tmp_path)
    import sys

    monkeypatch.delitem(sys.modules, "hw_profiles", raising=False)
    simulated = [f"simulated-{kind}" for kind in ("cpu", "gpu", "npu")]
    found = [profile.id for profile in ready()]
    assert found == [MEASURED, "extra", "local-onnxruntime", "local-openvino", *simulated, "tensorrt", "tensorrt-rtx"]
    assert isinstance(profiles.load("extra"), Profile)


# --- templates and inheritance -----------------------------------------------------------------------------------------


def written(folder: Path, **fields: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.json").write_text(json.dumps(fields))
    return folder


def test_there_is_a_template_for_every_board_that_is_promised() -> None:
    orin = {"jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin"}
    intel = {"intel-n100", "intel-n100-gpu", "intel-core-ultra", "intel-core-ultra-gpu", "intel-core-ultra-npu"}
    arm = {"raspberry-pi-5-onnxruntime", "raspberry-pi-5-openvino", "rk3588-onnxruntime"}
    assert {profile.id for profile in templates()} == orin | {f"{board}-jetpack7" for board in orin} | intel | arm
    for board in orin:
        six, seven = profiles.load(board), profiles.load(f"{board}-jetpack7")
        assert (six.facts["jetpack"].value, seven.facts["jetpack"].value) == ("6.2", "7.2")
        assert six.format == seven.format == "tensorrt" and six.compute_capability == "8.7"
        assert seven.facts["gpu_compute_capability"] == six.facts["gpu_compute_capability"]
    assert {profiles.load(name).openvino_device for name in intel} == {"CPU", "GPU", "NPU"}
    assert {profiles.load(name).device for name in intel | arm} == {"local"}  # to go where --on says


def test_every_fact_of_a_template_has_a_source_that_can_be_looked_up() -> None:
    for profile in templates():
        assert len(profile.facts) >= 4, profile.id
        for name, fact in profile.facts.items():
            assert "https://" in fact.source and fact.source.split("https://")[0].strip(" ,:"), (profile.id, name)


@pytest.mark.parametrize("profile", templates(), ids=lambda profile: profile.id)
def test_a_template_meets_no_budget(profile: Profile, tmp_path: Path) -> None:
    from toolkit import devices
    from toolkit.run.prepare import open_target

    for refused in (
        lambda: devices.open(profile),
        lambda: open_target(profile.id),
        lambda: open_target(profile.id, measuring=True),
    ):
        with pytest.raises(UsageError) as caught:
            refused()
        if profile.openvino_device == "CPU":
            assert "is a template" in caught.value.message and "nothing was measured" in caught.value.message
            verb = "export" if profile.format == "tensorrt" else "measure"
            assert f"edgekit {verb} MODEL -p {profile.id} --on ssh://user@board" in caught.value.hint
        else:
            assert f"OpenVINO's {profile.openvino_device}" in caught.value.message


def test_a_template_that_was_put_on_a_device_is_a_device() -> None:
    profile = profiles.load("raspberry-pi-5-onnxruntime")
    profiles.check_measured(msgspec.structs.replace(profile, device="ssh://user@board"))
    with pytest.raises(UsageError, match="is a template"):
        profiles.check_measured(profile)


def test_what_a_file_says_wins_over_what_it_extends(tmp_path: Path) -> None:
    fact = {"value": 1, "source": "https://example.org"}
    folder = written(tmp_path, id="mine", extends="jetson-orin-nano-jetpack7", threads=2, facts={"cuda": fact, "shelf": fact})
    base, mine = profiles.load("jetson-orin-nano-jetpack7"), profiles.load(str(folder))
    assert (mine.id, mine.threads, mine.extends) == ("mine", 2, "")
    assert (mine.runtime, mine.device, mine.status) == (base.runtime, base.device, base.status)
    assert mine.facts["shelf"].value == mine.facts["cuda"].value == 1
    assert {name: each for name, each in mine.facts.items() if name not in ("cuda", "shelf")} == {
        name: each for name, each in base.facts.items() if name != "cuda"
    }
    save = tmp_path / "again"
    save_json(save / "profile.json", mine)  # whole: it is the same wherever it is read
    assert profiles.load(str(save)) == mine


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"extends": "tensorrt"}, "missing required field `id`"),
        ({"id": "mine", "extends": "nowhere"}, "extends 'nowhere'; the known profiles are"),
        ({"id": "tensorrt", "extends": "jetson-orin-nano-jetpack7"}, "a circle"),
        ({"id": "mine", "extends": "mine"}, "mine extends mine, a circle"),
        ({"id": "mine", "extends": "tensorrt", "thread": 2}, "unknown field `thread`"),
        ({"id": "mine", "extends": "tensorrt", "facts": {"cores": {"value": 4}}}, "missing required field `source`"),
        ({"id": "mine", "extends": "tensorrt", "facts": {"cores": {"value": 4, "source": " "}}}, "the fact cores has no source"),
        ({"id": "mine", "extends": "tensorrt", "facts": 3}, "Expected `object`, got `int`"),
        ({"id": "mine", "extends": "local-onnxruntime", "openvino_device": "GPU"}, "openvino_device is of the runtime openvino"),
        ({"id": "mine", "extends": "local-onnxruntime", "status": "measured"}, "there is no table beside it"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said(fields: dict[str, object], words: str, tmp_path: Path) -> None:
    folder = written(tmp_path, **fields)
    with pytest.raises(UsageError, match=words):
        profiles.load(str(folder))


def test_a_measured_profile_keeps_its_table_beside_it(tmp_path: Path) -> None:
    copy = shutil.copytree(HW_PROFILES / MEASURED, tmp_path / "copy")
    assert profiles.load(str(copy)).status == "measured"
    shutil.rmtree(copy / "table")
    with pytest.raises(UsageError, match="no table beside it"):
        profiles.load(str(copy))


def test_the_json_schema_is_that_of_the_record() -> None:
    made = "python -c \"from toolkit import profiles; print(profiles.json_schema(), end='')\" > hw_profiles/profile.schema.json"
    assert (HW_PROFILES / "profile.schema.json").read_text(encoding="utf-8") == profiles.json_schema(), f"Run: {made}"
    schema = json.loads(profiles.json_schema())
    record = schema["$defs"]["Profile"]
    assert set(record["properties"]) == set(Profile.__struct_fields__)
    for file in HW_PROFILES.glob("*/profile.json"):
        fields = json.loads(file.read_text(encoding="utf-8"))
        assert set(fields) <= set(record["properties"]) and set(record["required"]) <= set(fields)
        assert any(set(each["required"]) <= set(fields) for each in record["anyOf"]), file

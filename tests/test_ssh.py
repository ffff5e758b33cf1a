"""A board over ssh: what it gives is what this machine gives; every fault ends in a right result or a clear error, and leaves
nothing behind. The board is Debian's own sshd on loopback; hostile ones are programs behind the same pipe.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from board import Board, Proxy, agents, board, free_port, needs_sshd
from networks import residual

from toolkit import backends, bench, drivers, profiles
from toolkit.bench import startup
from toolkit.devices import Visit, link, local, sensors, ssh
from toolkit.devices.link import Address, parse_address
from toolkit.devices.ssh import Ssh
from toolkit.errors import LinkError, MeasurementError, MissingError, UsageError
from toolkit.latency import ModelTable
from toolkit.latency.table import read_partial
from toolkit.latency.variants import VariantMaker

ROOT = Path(__file__).resolve().parent.parent
AGENT = (ROOT / "toolkit/drivers.py", ROOT / "toolkit/devices/agent.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    with board(tmp_path_factory.mktemp("board")) as found:
        yield found


@pytest.fixture
def proxied(place: Board) -> Iterator[Callable[..., Proxy]]:
    """Links to the board that can be made bad."""
    made: list[Proxy] = []

    def proxy(**how: Any) -> Proxy:
        made.append(Proxy(place.port, **how))
        return made[-1]

    yield proxy
    for each in made:
        each.close()


@pytest.fixture
def reach(place: Board, proxied: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ssh]]:
    """Devices at the end of ssh, through a port and with known hosts of one's choice; afterwards nothing is left on the board."""
    made: list[Ssh] = []
    monkeypatch.setattr(ssh, "KEEP_S", 30.0)

    def device(port: int = 0, known_hosts: str = "known_hosts", of: Board | None = None) -> Ssh:
        monkeypatch.setenv("EDGEKIT_SSH_CONFIG", str((of or place).config(port, known_hosts)))
        made.append(Ssh(parse_address(place.url)))
        return made[-1]

    yield device
    for each in made:
        each.close()
    assert place.leftovers() == []


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual(tmp_path_factory.mktemp("network") / "net.onnx")


def profile_of(runtime: str = "onnxruntime") -> Any:
    return profiles.load(f"local-{runtime}")


# --- addresses and commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["ssh://board", "ssh://me@board:2222", "ssh://me@10.0.0.7", "ssh://[fe80::1]:22", "ssh://a-b.c_d"]
)
def test_an_address_is_read_and_written_alike(url: str) -> None:
    assert str(parse_address(url)) == url


@pytest.mark.parametrize(
    "url",
    [
        "board", "ssh://", "ssh://-oProxyCommand=x", "ssh://-l@board", "ssh://me@-board", "ssh://a b", "ssh://a;b", "ssh://$(x)",
        "ssh://me@board:0", "ssh://me@board:70000", "ssh://me@board:22x", "ssh://board/path", "ssh://a@b@c", "ssh://a\nb",
        "ssh://me:secret@board", "http://board", "ssh://`x`", "ssh://board-", "ssh://%h",
    ],
)  # fmt: skip
def test_what_an_option_or_a_shell_could_be_made_of_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="is no device") as caught:
        parse_address(url)
    assert "\n" not in caught.value.message and "ssh://user@host" in caught.value.hint


def test_the_board_is_given_one_constant_command_and_the_host_is_never_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEKIT_SSH_CONFIG", raising=False)
    command = link.ssh_command(Address("me", "host", 2222))
    assert command[-3:] == ["--", "host", link.REMOTE] and command[-5:-3] == ["-l", "me"] and "2222" in command
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes"} <= set(command)
    assert link.ssh_command(Address("", "other", 0))[-1] == link.REMOTE and "me" not in link.REMOTE.split("'")[0]


def test_the_agent_is_standard_library_and_python_3_8() -> None:
    for path in AGENT:
        text = path.read_text()
        tree = ast.parse(text, feature_version=(3, 8))
        assert text.count("\n") < 600
        for node in tree.body:  # what is imported inside functions are the runtimes
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names) | {"toolkit"}, path
        inside = {n for node in ast.walk(tree) for n in _imported(node)} - {n for node in tree.body for n in _imported(node)}
        assert inside <= {"numpy", "onnxruntime", "openvino", *sys.stdlib_module_names}


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [str(node.module).split(".")[0]] if isinstance(node, ast.ImportFrom) else []


def test_a_graph_without_weights_keeps_its_nodes_and_the_names_and_types_of_what_went(network: Path) -> None:
    whole = onnx.load(str(network))
    bare = onnx.load_from_string(drivers.without_weights(whole.SerializeToString()))
    assert list(bare.graph.node) == list(whole.graph.node) and list(bare.graph.input) == list(whole.graph.input)
    assert [(t.name, t.data_type, list(t.dims)) for t in bare.graph.initializer] == [
        (t.name, t.data_type, list(t.dims)) for t in whole.graph.initializer
    ]
    assert all(not tensor.raw_data for tensor in bare.graph.initializer) and bare.ByteSize() < whole.ByteSize() / 4
    with pytest.raises((ValueError, IndexError)):
        drivers.without_weights(b"\x3b" * 40)


def test_sensors_are_read_alike_from_files_and_from_what_was_sent(tmp_path: Path) -> None:
    from test_devices import FILES

    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    tree, sent = sensors.Tree(tmp_path), sensors.Sent(FILES)
    assert sensors.read(tree, 7, {}) == sensors.read(sent, 7, {})
    for pattern in drivers.SENSORS:
        assert tree.glob(pattern) == sent.glob(pattern)
    assert sent.text("../../etc/passwd") == "" == sent.text("/etc/passwd")


def test_weights_are_taken_from_beside_the_artefact_and_nowhere_else(tmp_path: Path) -> None:
    network = residual(tmp_path / "net.onnx")
    model = onnx.load(str(network))
    onnx.save_model(model, str(network), save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert set(ssh.artefact_files(network)) == {"model.onnx", "weights.bin"}
    (tmp_path / "outside").write_bytes(b"secret")
    for location in ("../outside", "/etc/passwd", "..", "a/b", "-x", ".hidden", "missing.bin"):
        model = onnx.load(str(network), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        (tmp_path / "evil.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(UsageError, match="not in a file beside it"):
            ssh.artefact_files(tmp_path / "evil.onnx")


# --- the board gives what this machine gives ------------------------------------------------------------------------------------


@needs_sshd
def test_a_board_tells_what_it_is_as_this_machine_does(reach: Callable[..., Ssh]) -> None:
    device = reach()
    assert device.facts() == local.facts()
    assert device.version("onnxruntime") == backends.get("onnxruntime").version()
    processor = device.facts().cpu, device.facts().instruction_set
    assert profiles.fingerprint(profile_of(), "1", processor) == profiles.fingerprint(profile_of(), "1")
    with contextlib.closing(device.rig("onnxruntime", 1)) as rig:
        there, here = rig.read(), local.Local().read()
    assert set(there.absent) - {"energy_j"} == set(here.absent) - {"energy_j", "memory_peak_bytes"}
    assert there.all_ticks is not None and here.all_ticks is not None and abs(there.all_ticks - here.all_ticks) < 3000


@pytest.mark.slow
@needs_sshd
@pytest.mark.parametrize("runtime", backends.RUNTIMES)
def test_values_kernels_and_precision_are_those_of_this_machine(reach: Callable[..., Ssh], network: Path, runtime: str) -> None:
    device, here = reach(), backends.get(runtime)
    how: dict[str, Any] = {"threads": 1, "precision": "fp32"}
    mine, theirs = here.open(network, **how), device.backend(runtime).open(network, **how)
    feeds = backends.random_feeds(mine.inputs, 3)
    assert theirs.inputs == mine.inputs and theirs.outputs == mine.outputs
    assert all(np.array_equal(a, b) for a, b in zip(mine.run(feeds), theirs.run(feeds), strict=True))
    assert theirs.executed_precision() == mine.executed_precision()
    theirs.close()
    found, expected = (b.profile(network, runs=4, **how) for b in (device.backend(runtime), here))

    def told(kernels: Any) -> dict[Any, Any]:
        return {(k.op, k.nodes, k.inputs, k.outputs): (k.input_shapes, k.output_shapes, k.implementation) for k in kernels}

    both = told(found).keys() & told(expected).keys()  # OpenVINO does not list what was too short for its clock
    assert both and len(both) > len(expected) / 2
    assert {key: told(found)[key] for key in both} == {key: told(expected)[key] for key in both}
    assert all(len(kernel.samples_ns) == 4 for kernel in found)


@needs_sshd
@pytest.mark.slow
@pytest.mark.timed
def test_a_session_on_the_board_is_a_record_like_any_other(place: Board, monkeypatch: pytest.MonkeyPatch, network: Path) -> None:
    monkeypatch.setenv("EDGEKIT_SSH_CONFIG", str(place.config()))
    monkeypatch.setattr(ssh, "connected", lambda url: made)
    made = Ssh(parse_address(place.url))
    profile = msgspec.structs.replace(profile_of(), device=place.url)
    try:
        found = bench.benchmark(profile, (network, network), time_limit_s=1.0, retries=0, fresh_process=True)
        assert found.fingerprint == profiles.fingerprint(profile_of(), made.version("onnxruntime"))
        assert all(m.fresh_process and m.executed_precision == "fp32" and m.samples >= 12 for m in found.measurements)
        assert len(found.reference_ns) == len(found.measurements[0].rounds_ns) >= 12
        assert found.measurements[0].conditions.run_queue is not None
        assert "energy_j" in found.measurements[0].absent
        loaded = startup.startup(profile, network)
        assert 0 < loaded.first_inference_ns and loaded.load_ns > 0 and loaded.reload_ns > 0
    finally:
        made.close()
    assert place.leftovers() == []


@needs_sshd
@pytest.mark.slow
def test_what_variants_share_travels_once(
    reach: Callable[..., Ssh], maker: VariantMaker, tmp_path: Path, proxied: Callable[..., Proxy]
) -> None:
    proxy = proxied()
    device = reach(proxy.port)
    widths = dict(maker.widths)
    first, _ = maker.write(widths, tmp_path, "first.onnx"), device.live()
    with contextlib.closing(device.rig("onnxruntime", 1)) as rig:
        passed = [proxy.passed]
        for path in (first, maker.write({**widths, next(iter(widths)): 4}, tmp_path, "second.onnx"), first):
            rig.load(path, "fp32", check=True)
            passed.append(proxy.passed)
    blob = maker.blob_bytes
    once, again, known = np.diff(passed)
    assert blob < once < blob + 100_000 and again < once - blob and known < 4000


@needs_sshd
def test_visits_that_are_asked_for_are_made_in_order_and_whole_groups_at_a_time(reach: Callable[..., Ssh], network: Path) -> None:
    with contextlib.closing(reach().rig("onnxruntime", 1)) as rig:
        handles = [rig.load(network, "fp32").handle for _ in range(2)]
        visits = [Visit(handles[0], 0, 1), *(Visit(handles[i % 2], 1, 2 + i % 3, read=i == 5) for i in range(30))]
        made = list(rig.timed(iter(visits), first=1, group=2, least=1, within_s=0.001))
        assert [len(one.samples_ns) for one in made] == [visit.burst for visit in visits]
        assert all(a.at_ns < b.at_ns for a, b in zip(made, made[1:], strict=False))
        assert [one.reading is not None for one in made] == [visit.read for visit in visits]


# --- faults -----------------------------------------------------------------------------------------------------------------


@needs_sshd
def test_a_board_that_is_not_there_or_is_another_is_said_so(reach: Callable[..., Ssh]) -> None:
    for port, hosts, message in (
        (free_port(), "known_hosts", "cannot be reached: .*refused"),
        (0, "wrong_hosts", "host key"),
        (0, "no_hosts", "host key"),
    ):
        with pytest.raises(MissingError, match=message) as caught:
            reach(port, hosts).facts()
        assert caught.value.exit_code == 3 and caught.value.hint.endswith(("board", "board true"))


@needs_sshd
def test_a_board_without_python_or_runtime_names_what_it_lacks(reach: Callable[..., Ssh], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with (
        board(tmp_path / "bare", path=str(tmp_path / "empty")) as bare,
        pytest.raises(MissingError, match="has no python3") as caught,
    ):
        reach(of=bare).facts()
    assert "trtexec" in caught.value.hint
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "onnxruntime.py").write_text("raise ImportError('built for another processor')")
    with board(tmp_path / "poor", PYTHONPATH=str(plain)) as poor:
        device = reach(of=poor)
        with pytest.raises(MissingError, match="cannot be imported on ssh://board: built for another processor") as caught:
            device.version("onnxruntime")
        assert "pip install onnxruntime" in caught.value.hint
        device.close()
        assert poor.leftovers() == []


@pytest.mark.slow
@needs_sshd
def test_an_upload_that_is_cut_goes_on_where_it_was(reach: Callable[..., Ssh], proxied: Callable[..., Proxy]) -> None:
    proxy = proxied(bytes_per_s=20e6)
    device = reach(proxy.port)
    device.live()
    data = np.random.default_rng(0).bytes(8 << 20)
    proxy.cut_after = proxy.passed + (6 << 20)
    before = proxy.passed
    sha, _ = device.put(data)
    assert device.ask("has", {"sha": sha}, ssh._Has, 10).whole
    assert proxy.cut_after == 0 and proxy.passed - before < 13 << 20  # not all of it twice


@needs_sshd
@pytest.mark.slow
def test_a_link_that_is_cut_in_a_sweep_loses_no_network(
    reach: Callable[..., Ssh], maker: VariantMaker, tmp_path: Path, proxied: Callable[..., Proxy]
) -> None:
    proxy = proxied()
    device = reach(proxy.port)
    done: list[int] = []

    def progress(step: str, position: int, total: int) -> None:
        done.append(position)
        if position == 2:
            proxy.cut()
        if position == 5:
            raise KeyboardInterrupt

    facts = device.facts()
    fingerprint = profiles.fingerprint(profile_of(), device.version("onnxruntime"), (facts.cpu, facts.instruction_set))
    candidates = {name: range(4, full + 1, 4) for name, full in maker.widths.items()}
    table = ModelTable(profile_of(), fingerprint, device, maker, candidates, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        table.measure(seconds=2.0, networks=16, progress=progress)
    assert done == [0, 1, 2, 3, 4, 5]
    kept = read_partial(table.own)
    assert len(kept) == 5 and all(network.ratio > 0 and network.spans for network in kept)  # each once, those before the cut too


@pytest.mark.slow
@needs_sshd
def test_an_agent_that_is_killed_leaves_nothing_and_the_session_is_made_again(
    reach: Callable[..., Ssh], network: Path, place: Board
) -> None:
    device = reach()
    rig = device.rig("onnxruntime", 1)
    handle = rig.load(network, "fp32").handle
    threading.Timer(0.5, lambda: os.kill(agent_of(place), signal.SIGKILL)).start()
    with pytest.raises(LinkError, match="was lost"):
        for _ in rig.timed(Visit(handle, 100, 50) for _ in range(100000)):
            pass
    with pytest.raises(LinkError):
        rig.warm_up(handle)
    rig.close()
    assert device.rig("onnxruntime", 1).load(network, "fp32").handle == 1


def agent_of(place: Board) -> int:
    """The process that serves: the one whose pid is written down."""
    (folder,) = [path for path in place.tmp.iterdir() if path.is_dir()]
    return int((folder / "pid").read_text())


@pytest.mark.slow
@needs_sshd
def test_a_workstation_that_is_killed_leaves_nothing(place: Board, network: Path) -> None:
    program = f"""
        import sys, time
        from pathlib import Path
        from toolkit.devices import ssh
        ssh.KEEP_S = 1.0
        rig = ssh.connected("ssh://board").rig("onnxruntime", 1)
        rig.load(Path({str(network)!r}), "fp32")
        print("ready", flush=True)
        time.sleep(60)
    """
    environment = {**os.environ, "EDGEKIT_SSH_CONFIG": str(place.config())}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline() == b"ready\n"
    assert agents(place.tmp)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert place.leftovers() == []


@needs_sshd
def test_a_full_disk_is_said_so_and_the_board_goes_on(reach: Callable[..., Ssh], tmp_path: Path, network: Path) -> None:
    with board(tmp_path / "small") as small:
        shim = small.folder / "bin" / "python3"
        shim.write_text(shim.read_text().replace("exec", "ulimit -f 200\nexec"))  # no file larger than 100 KB
        device = reach(of=small)
        with pytest.raises(MeasurementError, match="cannot do it: OSError: File too large") as caught:
            device.put(np.random.default_rng(0).bytes(1 << 20))
        assert "free space" in caught.value.hint
        with contextlib.closing(device.rig("onnxruntime", 1)) as rig:
            assert rig.load(network, "fp32", check=True).finite
        device.close()
        assert small.leftovers() == []


FAKE = """
import os, time
__version__ = "1.0"
class SessionOptions: pass
class ExecutionMode: ORT_SEQUENTIAL = 0
class GraphOptimizationLevel: ORT_ENABLE_ALL = 0
def InferenceSession(path, options, providers):
    {does}
"""


@pytest.mark.slow
@needs_sshd
@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("time.sleep(1000)", "did not answer within 1 s and was ended"),
        ("os.kill(os.getpid(), 19)", "did not answer within 1 s and was ended"),
        ("os.abort()", "ended by signal 6"),
        ("os._exit(3)", "ended with code 3"),
        ("raise RuntimeError('bad\\nmodel \\x1b[31m')", "cannot open model.onnx: bad; model"),
    ],
)
def test_a_runtime_that_hangs_or_dies_costs_only_itself(
    reach: Callable[..., Ssh], tmp_path: Path, network: Path, monkeypatch: pytest.MonkeyPatch, does: str, message: str
) -> None:
    monkeypatch.setattr(ssh, "LOAD_S", 1.0)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "onnxruntime.py").write_text(FAKE.format(does=does))
    with board(tmp_path / "b", PYTHONPATH=str(tmp_path / "fake")) as broken:
        device = reach(of=broken)
        with pytest.raises((MeasurementError, UsageError), match=message) as caught:
            device.rig("onnxruntime", 1).load(network, "fp32")
        assert "\x1b" not in str(caught.value)
        assert device.version("onnxruntime") == "1.0"
        device.close()
        assert broken.leftovers() == []


@pytest.mark.slow
@needs_sshd
def test_a_link_that_rests_is_kept_and_one_that_was_dropped_meanwhile_is_made_again(
    reach: Callable[..., Ssh], network: Path, proxied: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PING_S", 0.1)
    proxy = proxied()
    device = reach(proxy.port)
    with contextlib.closing(device.rig("onnxruntime", 1)) as rig:
        handle, before = rig.load(network, "fp32").handle, proxy.passed
        time.sleep(1.0)
        assert proxy.passed > before and rig.warm_up(handle)[0] >= 15  # signs of life went over, and nothing else happened
    proxy.cut()
    time.sleep(0.3)
    with contextlib.closing(device.rig("onnxruntime", 1)) as rig:
        assert rig.load(network, "fp32").handle == 1


@needs_sshd
def test_one_user_measures_at_a_time(reach: Callable[..., Ssh]) -> None:
    first, second = reach(), reach()
    rig = first.rig("onnxruntime", 1)
    with pytest.raises(MissingError, match=r"Someone else measures on ssh://board: \w+, process \d+") as caught:
        second.rig("onnxruntime", 1)
    assert caught.value.exit_code == 3
    rig.close()
    second.rig("onnxruntime", 1).close()


@needs_sshd
def test_what_arrives_is_what_was_announced_and_the_agent_takes_no_path(reach: Callable[..., Ssh], network: Path) -> None:
    device = reach()
    live = device.live()
    right = ssh._digest(b"other")
    how = {"sha": right, "size": 5, "offset": 0, "sent": 5, "compressed": False}
    assert live.wait(live.post("put", how, [b"bytes"]), 10).error == "digest"
    assert not device.ask("has", {"sha": right}, ssh._Has, 10).whole
    assert live.wait(live.post("put", {**how, "compressed": True}, [b"bytes"]), 10).error == "failed"
    rig = device.rig("onnxruntime", 1)
    for sha in ("../../../etc/passwd", "x", "A" * 64, ""):
        assert live.wait(live.post("has", {"sha": sha}), 10).error == "usage"
    sha, _ = device.put(network)
    for files in ({"../evil.onnx": sha}, {"/tmp/evil.onnx": sha}, {".evil": sha}, {"model.onnx": "../x"}):
        answer = rig._answer("load", {"files": files, "main": "model.onnx", "runtime": "onnxruntime", "threads": 1,
                                      "precision": "fp32", "seed": 0, "check": False, "bursts": []}, 10)  # fmt: skip
        assert answer.error == "usage" and "not one that the agent takes" in answer.message
    for verb in ("eval", "__init__", "_open", "serve", "close", "forwarded"):
        assert live.wait(live.post(verb, {}), 10).error == "usage"
    rig.close()


@pytest.mark.slow
@needs_sshd
def test_a_slow_and_far_link_gives_the_same_answers(
    reach: Callable[..., Ssh], network: Path, proxied: Callable[..., Proxy]
) -> None:
    proxy = proxied(bytes_per_s=2.5e6, delay_s=0.025)
    device = reach(proxy.port)
    with contextlib.closing(device.rig("onnxruntime", 1)) as rig:
        loaded = rig.load(network, "fp32", check=True, bursts=(2, 3))
        started = time.monotonic()
        made = list(rig.timed([Visit(loaded.handle, 1, 3)] * 20))
        assert len(made) == 20 and time.monotonic() - started < 2.0  # not a round trip each


# --- hostile boards -----------------------------------------------------------------------------------------------------------


def hostile(body: str) -> Ssh:
    """A device whose agent is this program, after it has read what it was sent."""
    program = """
        import json, sys, time
        out, size = sys.stdout.buffer, int(sys.stdin.buffer.readline())
        sys.stdin.buffer.read(size)
        told = dict(cpuinfo="", board="", machine="m", cores=1, python="3", system="s", trtexec="")
        hello = dict(edgekit=1, token="edgekit-agent-abcdefgh", facts=told, at_ns=1)
        def say(value):
            out.write(value if isinstance(value, bytes) else json.dumps(value).encode() + b"\\n")
            out.flush()
        def requests():
            for line in sys.stdin.buffer:
                request = json.loads(line)
                if request["verb"] == "put":
                    sys.stdin.buffer.read(request["with"]["sent"])
                if request["verb"] in RESULTS or request["verb"] == "put":
                    say(dict(id=request["id"], at_ns=2, result=RESULTS.get(request["verb"], dict())))
                elif request["verb"] == "bye":
                    break
                else:
                    yield request
        LOADED = dict(handle=1, inputs=[["x", "float32", [1]]], outputs=[], finite=True, bursts=[])
        RESULTS = dict(adopt=dict(), begin=dict(worker=1), has=dict(size=0, whole=False), load=LOADED)
    """
    return Ssh(
        Address("", "hostile", 0), lambda address: [sys.executable, "-c", textwrap.dedent(program) + textwrap.dedent(body)]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("say(b'x' * (1 << 20)); time.sleep(9)", "does not answer"),
        ("say((b'x' * 1000 + b'\\n') * 1000); time.sleep(9)", "too much before"),
        ("say(b'{\"edgekit\"' + b'x' * 1000 + b'\\n')", "not one of edgekit's agent"),
        ("say({**hello, 'token': '../../etc'})", "not one of edgekit's agent"),
        ("say({**hello, 'facts': {**told, 'cores': -1}})", "not one of edgekit's agent"),
        ("say({**hello, 'facts': {**told, 'cpuinfo': 'x' * 99999}})", "not one of edgekit's agent"),
        ("say({**hello, 'edgekit': 7})", "another version"),
        ("say(hello)", "closed the connection|was lost"),
        ("say(hello); say({'id': 99}); time.sleep(9)", "was not asked"),
        ("say(hello); [say(b'[' * 100000 + b'\\n') for _ in requests()]; list(requests())", "."),
        ("sys.stderr.write('\\x1b]0;evil\\x07' * 99999); sys.exit(1)", "did not start on"),
        ("time.sleep(9)", "does not answer"),
    ],
)
def test_a_greeting_of_any_kind_ends_in_an_error(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "GREETING_S", 1.0)
    monkeypatch.setattr(link, "GOODBYE_S", 0.3)
    monkeypatch.setattr(ssh, "BEGIN_S", 1.0)
    started = time.monotonic()
    device = hostile(body)
    with pytest.raises((MissingError, MeasurementError), match=message) as caught:
        device.version("onnxruntime")
    device.close()
    assert str(caught.value).isprintable() and len(caught.value.message) < 400 and time.monotonic() - started < 8


ANSWERS = {
    "a line without end": "say(b'x' * (3 << 20))",
    "no JSON": "say(b'nonsense\\n')",
    "deep nesting": "say(b'{\"id\":%d,\"result\":' % r['id'] + b'[' * 900000 + b'\\n')",
    "another's answer": "say(dict(id=12345))",
    "the wrong type": "say(dict(id=r['id'], result=dict(made='x', median_ns=[])))",
    "nothing": "say(dict(id=r['id'], result=None))",
    "a number out of bounds": "say(dict(id=r['id'], result=dict(made=-1, median_ns=1e300)))",
    "silence": "time.sleep(9)",
    "an error with commands for the terminal": "say(dict(id=r['id'], error='failed', message='\\x1b[2J' + 'x' * 9999))",
    "an error of no kind": "say(dict(id=r['id'], error='../../etc/passwd', message='$(reboot)'))",
    "the end": "sys.exit(0)",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_of_any_kind_ends_in_an_error(what: str, network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_ANSWER", 1 << 20)
    monkeypatch.setattr(link, "MARGIN_S", 0.5)
    monkeypatch.setattr(ssh, "MARGIN_S", 0.5)
    monkeypatch.setattr(ssh, "LOAD_S", 1.0)
    monkeypatch.setattr(link, "GOODBYE_S", 0.3)
    device = hostile(f"say(hello)\nfor r in requests():\n    {ANSWERS[what]}\n")
    started = time.monotonic()
    with pytest.raises((LinkError, MeasurementError)) as caught:
        rig = device.rig("onnxruntime", 1)
        rig.warm_up(rig.load(network, "fp32").handle)
    device.close()
    assert str(caught.value).isprintable() and len(caught.value.message) < 500 and time.monotonic() - started < 8


BOMB = "__import__('base64').b64encode(__import__('zlib').compress(bytes(64 << 20))).decode()"
CLAIMS = {
    "fewer samples": ("timed", "dict(turns=[[[1], 5]], readings={})"),
    "no visits": ("timed", "dict(turns=[], readings={})"),
    "more visits": ("timed", "dict(turns=[[[1, 2], 5]] * 9, readings={})"),
    "times below zero": ("timed", "dict(turns=[[[-1, 2], 5]], readings={})"),
    "no sensors": ("timed", "dict(turns=[[[1, 2], 5]], readings={})"),
    "sensors that are none": ("timed", "dict(turns=[[[1, 2], 5]], readings={'0': {'proc/stat': 'cpu x y z 1 2 3 4 5'}})"),
    "files elsewhere": ("timed", "dict(turns=[[[1, 2], 5]], readings={'0': {'../../evil': 1}})"),
    "a bomb": ("profile", f"dict(graph={BOMB}, events={BOMB})"),
    "no packing": ("profile", "dict(graph='!', events='?')"),
    "another graph": ("profile", "dict(graph='eJwDAAAAAAE=', events='eJwDAAAAAAE=')"),
    "an odd precision": ("executed", "dict(graph='eJwDAAAAAAE=')"),
    "outputs of a type that runs code": ("run", "dict(outputs=[['object', [1], 'eJwDAAAAAAE=']])"),
    "outputs of another shape": ("run", "dict(outputs=[['float32', [5, 5], 'eJwDAAAAAAE=']])"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CLAIMS)
def test_what_cannot_be_is_not_believed(what: str, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_UNPACKED", 1 << 20)
    monkeypatch.setattr(link, "GOODBYE_S", 0.3)
    monkeypatch.chdir(tmp_path)
    verb, result = CLAIMS[what]
    device = hostile(f"say(hello)\nfor r in requests():\n    say(dict(id=r['id'], at_ns=3, result={result}))\n")
    rig = device.rig("onnxruntime", 1)
    handle = rig.load(network, "fp32").handle
    calls: dict[str, Callable[[], object]] = {
        "timed": lambda: list(rig.timed([Visit(handle, 0, 2, read=True)])),
        "profile": lambda: rig.profile(handle, 2),
        "executed": lambda: rig.executed_precision(handle),
        "run": lambda: rig.run(handle, {"x": np.zeros(1, np.float32)}),
    }
    if what == "an odd precision":  # a graph with nothing in it says nothing: the input's type stands in
        assert calls[verb]() == ("fp32", "input type of the session")
    else:
        with pytest.raises(MeasurementError, match="cannot be"):
            calls[verb]()
    device.close()
    assert list(tmp_path.iterdir()) == []


# --- targets and exports -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "profile", "code", "message"),
    [
        ("ssh://-oProxyCommand=reboot", "local-onnxruntime", 2, "is no device"),
        ("ssh://board", "simulated-cpu", 2, "simulated here"),
        ("ssh://board", "tensorrt", 2, "trtexec|only|nothing that this version"),
        ("ssh://127.0.0.1:9", "local-onnxruntime", 3, "cannot be reached"),
    ],
)
def test_a_target_says_what_is_wrong_with_a_device(
    url: str, profile: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolkit.run.prepare import open_target

    monkeypatch.setenv("EDGEKIT_SSH_CONFIG", "/dev/null")
    with pytest.raises((UsageError, MissingError), match=message) as caught:
        open_target(profile, on=url, measuring=True)
    assert caught.value.exit_code == code


def test_an_engine_for_a_device_is_left_to_its_own_tool(network: Path, tmp_path: Path) -> None:
    from toolkit.run.export import ExportRequest, export

    out = tmp_path / "out"
    request = ExportRequest(model=str(network), out=str(out), profile="tensorrt", on="ssh://me@board:2222")
    said = export(request, lambda step, done, total: None).notes[-1]
    assert "scp -P 2222" in said and "me@board:model.onnx" in said and "ssh -p 2222 me@board 'trtexec --onnx=model.onnx" in said
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "model.onnx"]


@needs_sshd
@pytest.mark.slow
@pytest.mark.timed
def test_a_run_on_a_board_is_a_run(place: Board, tmp_path: Path, shared_cache: Path, strided: dict[str, Any]) -> None:
    """With the table of runs here, where there are some; tools/bench_ssh.py --run holds its plan against theirs."""
    from toolkit.demo import data_path, eval_path

    words = ["run", strided["model"], "--weights", strided["weights"], "--input", "1x1x32x32", "--mean", "0.31", "--std", "0.35"]
    words += ["--data", str(data_path()), "--eval-data", str(eval_path()), "--budget", "0.6x", "--samples", "96"]
    words += ["--rounds", "1", "--on", place.url, "-o", str(tmp_path / "out")]
    environment = {**os.environ, "EDGEKIT_SSH_CONFIG": str(place.config()), "EDGEKIT_CACHE": str(shared_cache)}
    command = [sys.executable, "-m", "toolkit", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "--on ssh://board" in report["command"] and report["environment"]["measured on"] == "ssh://board"
    assert any("accuracy" in note and "on this machine" in note for note in report["notes"])
    assert place.leftovers() == []

"""The way to a board: the user's own `ssh`, the agent at its other end, and requests with their answers.

What a board says is not believed: answers are bounded in length and time and held against a schema, no text of theirs becomes a
path or a command, and what is shown of them is one printable line.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import subprocess
import threading
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from toolkit.errors import LinkError, MeasurementError, MissingError, UsageError

T = TypeVar("T")

CONNECT_S, GREETING_S, PING_S, MARGIN_S, GOODBYE_S = 15, 60.0, 20.0, 60.0, 5.0
STALLED_S = 90.0  # without a byte going or coming while there is something to send
MAX_ANSWER, MAX_NOISE, MAX_UNPACKED = 64 << 20, 1 << 16, 512 << 20
BLOCK = 1 << 18

_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")  # of a host or a user: no dash in front, nothing a shell reads
_ADDRESS = re.compile(r"(?:(?P<user>[^@/]*)@)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^@/:\[\]]*)(?::(?P<port>[0-9]{1,5}))?/?")

# All that a board's shell is ever given. It reads the sources by length and runs them; nothing of the user's is in it.
REMOTE = (
    "exec python3 -c '"
    'import sys,json,types;f=open(0,"rb",0,closefd=False);n=int(f.readline(20));s=b"";'
    'exec("while len(s)<n:\\n c=f.read(n-len(s))\\n s=s+c if c else sys.exit(3)\\n'
    'for k,v in json.loads(s):\\n m=sys.modules[k]=types.ModuleType(k)\\n exec(compile(v,k,\\"exec\\"),m.__dict__)");'
    "m.main()' edgekit-agent"
)


@dataclass(frozen=True)
class Address:
    """Where a board is: parts of a URL that hold nothing an option or a shell could be made of."""

    user: str
    host: str
    port: int  # 0: as the user's ssh configuration has it

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"


def parse_address(url: str) -> Address:
    """ssh://[user@]host[:port].

    Raises:
        UsageError: it is none.
    """
    found = _ADDRESS.fullmatch(url[6:]) if url.startswith("ssh://") else None
    user, host, port = (found["user"], found["host"], int(found["port"] or 0)) if found else (None, "", 0)
    inner = host.strip("[]") if host.startswith("[") else host
    right = found and (host.startswith("[") or _PART.fullmatch(host)) and (user is None or _PART.fullmatch(user))
    if not right or port > 65535 or (found and found["port"] and not port):
        raise UsageError(
            f"--on {printable(url, 80)} is no device.", "Write it like --on ssh://user@host or --on ssh://host:2222."
        )
    return Address(user or "", inner, port)


def ssh_command(address: Address) -> list[str]:
    """The user's ssh: their keys, hosts and jump hosts; never a question, never an unknown host key."""
    chosen = os.environ.get("EDGEKIT_SSH_CONFIG")
    settings = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "ConnectTimeout": CONNECT_S,
        "ServerAliveInterval": 15,
        "ServerAliveCountMax": 3,
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "ClearAllForwardings": "yes",
        "RequestTTY": "no",
        "RemoteCommand": "none",
        "EscapeChar": "none",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    port = ["-p", str(address.port)] if address.port else []
    user = ["-l", address.user] if address.user else []
    return ["ssh", *(["-F", chosen] if chosen else []), *options, *port, *user, "--", address.host, REMOTE]


def sources() -> bytes:
    """What is sent first: the agent's modules, in the order they need each other."""
    root = Path(__file__).resolve().parents[1]
    files = {"toolkit.drivers": root / "drivers.py", "toolkit.devices.agent": root / "devices" / "agent.py"}
    modules = [("toolkit", ""), ("toolkit.devices", ""), *((name, path.read_text("utf-8")) for name, path in files.items())]
    data = json.dumps(modules).encode()
    return b"%d\n" % len(data) + data


class Told(msgspec.Struct, frozen=True):
    """What a board's kernel says the board is."""

    cpuinfo: Annotated[str, msgspec.Meta(max_length=20000)]
    board: Annotated[str, msgspec.Meta(max_length=300)]
    machine: Annotated[str, msgspec.Meta(max_length=100)]
    cores: Annotated[int, msgspec.Meta(ge=1, le=65536)]
    python: Annotated[str, msgspec.Meta(max_length=100)]
    system: Annotated[str, msgspec.Meta(max_length=300)]
    trtexec: Annotated[str, msgspec.Meta(max_length=4096)]


class Greeting(msgspec.Struct, frozen=True):
    """The agent's first words."""

    edgekit: int
    token: Annotated[str, msgspec.Meta(pattern=r"^edgekit-agent-[A-Za-z0-9_]{4,32}$")]
    facts: Told
    at_ns: int


class Answer(msgspec.Struct, frozen=True):
    """To the request `id`: a result, or an error's kind with words."""

    id: int
    at_ns: int = 0
    result: msgspec.Raw = msgspec.Raw(b"{}")
    error: str = ""
    message: str = ""


class Link:
    """One running `ssh` with an agent behind it. LinkError from any call: it is of no more use."""

    def __init__(self, command: list[str], name: str) -> None:
        self.name = name
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )
        except FileNotFoundError:
            raise MissingError(f"There is no {command[0]} on this machine.", "Install it: apt install openssh-client") from None
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._said = b""  # the end of what ssh and the board wrote for people
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()
        self._buffer, self._answers, self._count, self._sent_at = b"", dict[int, Answer](), 0, time.monotonic()
        self._posted: set[int] = set()
        self.alive = True
        self.clock = 0, time.monotonic_ns()  # the board's, and this machine's at the time
        self._busy, self._over = threading.Lock(), threading.Event()
        threading.Thread(target=self._show_life, daemon=True).start()

    def greet(self) -> Greeting:
        """Send the agent and hear its first words.

        Raises:
            MissingError: no board, no login, or no Python there.
        """
        try:
            self._exchange([sources()], GREETING_S)
            noise, end = 0, time.monotonic() + GREETING_S
            while True:
                line = self._line(end)
                if line.startswith(b'{"edgekit"'):
                    break
                noise += len(line)  # what a login says before
                if noise > MAX_NOISE:
                    raise LinkError("The board says too much before its agent does.")
            greeting = self._decoded(line, Greeting)
        except LinkError as error:
            self.close()
            raise self._unreached(error) from None
        except MeasurementError:
            self.close()
            raise
        self._heard(greeting.at_ns)
        return greeting

    def post(self, verb: str, how: dict[str, Any], payload: Iterable[bytes] = (), **more: Any) -> int:
        """Send a request; the number to wait for."""
        with self._busy:
            self._count += 1
            line = json.dumps({"id": self._count, "verb": verb, "with": how, **more}).encode() + b"\n"
            self._posted.add(self._count)
            self._exchange([line], STALLED_S)
            for block in payload:
                self._exchange([block], STALLED_S)
            return self._count

    def wait(self, number: int, limit_s: float) -> Answer:
        """The answer to a request that was posted."""
        with self._busy:
            return self._wait(number, time.monotonic() + limit_s)

    def _wait(self, number: int, end: float) -> Answer:
        while number not in self._answers:
            answer = self._decoded(self._line(end), Answer)
            if answer.id not in self._posted:
                raise self._broken("It answers what it was not asked.")
            self._posted.discard(answer.id)
            self._answers[answer.id] = answer
            self._heard(answer.at_ns)
        return self._answers.pop(number)

    def now_ns(self) -> int:
        """The board's clock, from the last time it was told."""
        board, here = self.clock
        return board + time.monotonic_ns() - here

    def close(self) -> None:
        """Say goodbye and end ssh."""
        self._over.set()
        if self.alive:
            with contextlib.suppress(LinkError, MeasurementError):
                self._exchange([b'{"id":0,"verb":"bye","with":{}}\n'], GOODBYE_S)
        self.alive = False
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(1.0)
        self._process.stdout.close()

    # bytes

    def _exchange(self, blocks: list[bytes], limit_s: float) -> None:
        """Send, and take in what comes meanwhile, so that neither side waits for the other for ever."""
        for block in blocks:
            rest, end = memoryview(block), time.monotonic() + limit_s
            while rest:
                readable, writable, _ = select.select([self._out], [self._in], [], max(0.0, end - time.monotonic()))
                if not readable and not writable:
                    raise self._lost("takes no more data")
                if readable:
                    self._take_in()
                if writable:
                    try:
                        done = os.write(self._in, rest[:BLOCK])
                    except BlockingIOError:
                        continue
                    except OSError:
                        raise self._lost("closed the connection") from None
                    rest, end = rest[done:], time.monotonic() + limit_s
        self._sent_at = time.monotonic()

    def _take_in(self) -> None:
        try:
            data = os.read(self._out, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise self._lost("closed the connection")
        self._buffer += data
        if len(self._buffer) > MAX_ANSWER:
            raise self._broken("Its answer has no end.")

    def _line(self, end: float) -> bytes:
        """The next line, by the time `end`; the board hears meanwhile that this side lives."""
        searched = 0
        while (at := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            left = end - time.monotonic()
            if left <= 0:
                raise self._lost("does not answer")
            if time.monotonic() - self._sent_at > PING_S:
                self._exchange([b'{"verb":"ping"}\n'], STALLED_S)
            if select.select([self._out], [], [], min(left, PING_S))[0]:
                self._take_in()
        line, self._buffer = self._buffer[:at], self._buffer[at + 1 :]
        return line

    def _show_life(self) -> None:
        """Signs of life while this side is at work on something else: the board takes a silent link for lost."""
        while not self._over.wait(PING_S) and self.alive:
            if self._busy.acquire(blocking=False):
                with contextlib.suppress(LinkError, MeasurementError):
                    if time.monotonic() - self._sent_at > PING_S / 2:
                        self._exchange([b'{"verb":"ping"}\n'], STALLED_S)
                self._busy.release()

    def _listen(self, stream: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := stream.read(4096):
                self._said = (self._said + data)[-4096:]
        with contextlib.suppress(OSError):
            stream.close()

    def _heard(self, at_ns: int) -> None:
        if at_ns:
            self.clock = at_ns, time.monotonic_ns()

    # what went wrong

    def _decoded(self, line: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(line, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._broken(f"Its answer is not one of edgekit's agent ({printable(str(error), 80)}).") from None

    def _lost(self, why: str) -> LinkError:
        self.alive = False
        return LinkError(f"The link to {self.name} was lost: it {why}.", "Run the same command again: what was measured is kept.")

    def _broken(self, why: str) -> MeasurementError:
        self.alive = False
        return MeasurementError(f"{self.name} does not speak as it should. {why}", "Check what runs on that device.")

    def _unreached(self, error: LinkError) -> MissingError:
        """Why there was no greeting, from what ssh said."""
        code, said = self._process.returncode, self._said.decode("utf-8", "replace")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        last = printable(lines[-1]) if lines else error.message
        where = self.name.removeprefix("ssh://").partition(":")[0]
        if code == 127 or "python3: not found" in said or "python3: command not found" in said:
            return MissingError(
                f"{self.name} has no python3, which edgekit's agent needs.",
                "Install Python 3.8 or later there. Where only TensorRT is installed, `edgekit export -p tensorrt` writes the"
                " ONNX file and the trtexec command to run there.",
            )
        if "Host key verification failed" in said or "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
            hint = f"Log in once by hand, look at the key and accept it: ssh {where}"
            return MissingError(f"The host key of {self.name} is not the one that is known: {last}.", hint)
        if "Permission denied" in said:
            return MissingError(f"{self.name} does not let this user in: {last}.", f"Set up a key: ssh-copy-id {where}")
        if code == 255 or code is None or code < 0:
            return MissingError(f"{self.name} cannot be reached: {last.rstrip('.')}.", f"Try it by hand: ssh {where} true")
        return MissingError(
            f"edgekit's agent did not start on {self.name}: {last.rstrip('.')}.", f"Try it by hand: ssh {where} python3 -V"
        )


def unpacked(text: str) -> bytes:
    """Bytes as they travel in an answer. ValueError: they are none, or too many."""
    unpack = zlib.decompressobj()
    try:
        data = unpack.decompress(base64.b64decode(text, validate=True), MAX_UNPACKED)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not unpack.eof:
        raise ValueError("they are cut off, or too many")
    return data


def printable(text: str, limit: int = 200) -> str:
    """Foreign text on one line, without what a terminal would obey."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."

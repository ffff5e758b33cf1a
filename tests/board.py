"""A board for tests: Debian's own sshd on loopback, with keys and a home of its own; and links made bad on purpose."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
MISSING = next((f"there is no {name} here" for name in (SSHD, "ssh", "ssh-keygen") if not shutil.which(name)), "")
needs_sshd = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Board:
    """A running sshd. `config` is the client's; `tmp` is where the board's agent keeps its things."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    tmp: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return "ssh://board"

    def config(self, port: int = 0, known_hosts: str = "known_hosts") -> Path:
        """The client's configuration, for another port where something lies between."""
        path = self.folder / f"config-{port or self.port}-{known_hosts}"
        path.write_text(
            f"Host board\n HostName 127.0.0.1\n Port {port or self.port}\n IdentityFile {self.folder}/user_key\n"
            f" IdentitiesOnly yes\n HostKeyAlias board\n UserKnownHostsFile {self.folder}/{known_hosts}\n"
            f" GlobalKnownHostsFile /dev/null\n"
        )
        return path

    def leftovers(self, within_s: float = 10.0) -> list[str]:
        """What is left of agents on the board, files and processes, after a while at most."""
        end = time.monotonic() + within_s
        while True:
            left = [path.name for path in self.tmp.iterdir() if path.name != "edgekit-agent.lock"]
            left += [str(pid) for pid in agents(self.tmp)]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.1)


def agents(tmp: Path) -> list[int]:
    """The processes of agents whose board this is, by their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"edgekit-agent" in (entry / "cmdline").read_bytes():
                if f"TMPDIR={tmp}\0".encode() in (entry / "environ").read_bytes():
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    found += [int(entry.name)] if state != "Z" else []
        except (OSError, ValueError):
            continue
    return found


@contextmanager
def board(folder: Path, path: str | None = None, **environment: str) -> Iterator[Board]:
    """An sshd whose sessions find this Python as python3 and the environment given."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in ("host_key", "user_key", "other_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "known_hosts").write_text(f"board {(folder / 'host_key.pub').read_text()}")
    (folder / "wrong_hosts").write_text(f"board {(folder / 'other_key.pub').read_text()}")
    (folder / "no_hosts").write_text("")
    bin_, tmp = folder / "bin", folder / "tmp"
    bin_.mkdir()
    tmp.mkdir()
    (folder / "home").mkdir()
    (bin_ / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_ / "python3").chmod(0o755)
    chosen = {"PATH": path if path is not None else f"{bin_}:/usr/bin:/bin", "TMPDIR": str(tmp), "HOME": str(folder / "home")}
    chosen |= {"OMP_NUM_THREADS": "1"}
    chosen |= environment
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where Debian's sshd gives up its rights
    port = free_port()
    settings = " ".join(f'"{name}={value}"' for name, value in chosen.items())
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
        f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        f"PidFile none\nMaxStartups 50\nSetEnv {settings}\n"
    )
    log = (folder / "log").open("wb")
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()[-300:]}")
        yield Board(folder, port, process, tmp, chosen)
    finally:
        for pid in agents(tmp):
            os.kill(pid, signal.SIGKILL)
        process.terminate()
        process.wait()
        log.close()


class Proxy:
    """A link through loopback with a rate and a delay each way, which can be cut."""

    def __init__(self, target: int, bytes_per_s: float = 0.0, delay_s: float = 0.0, cut_after: int = 0) -> None:
        self._target, self._rate, self._delay = target, bytes_per_s, delay_s
        self.cut_after = cut_after  # bytes towards the board, once; 0: never
        self.passed = 0  # bytes towards the board
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs.append((near, far))
            threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        """Each block leaves when the line is free and arrives the delay later; several may be on their way."""
        queue: list[tuple[float, bytes]] = []
        free_at, closed = time.monotonic(), False
        try:
            while not closed or queue:
                now = time.monotonic()
                while queue and queue[0][0] <= now:
                    target.sendall(queue.pop(0)[1])
                wait = max(0.0, queue[0][0] - time.monotonic()) if queue else 0.5
                room = not closed and sum(len(block) for _, block in queue) < 1 << 20
                if not select.select([source] if room else [], [], [], wait)[0]:
                    continue
                data = source.recv(1 << 14)
                if not data:
                    closed = True
                    continue
                free_at = max(free_at, time.monotonic()) + (len(data) / self._rate if self._rate else 0.0)
                queue.append((free_at + self._delay, data))
                if up:
                    self.passed += len(data)
                    if self.cut_after and self.passed > self.cut_after:
                        self.cut_after = 0
                        self.cut()
        except (OSError, ValueError):
            pass
        finally:
            for sock in (source, target):
                sock.close()

    def cut(self) -> None:
        """Every connection that is open."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for sock in pair:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def close(self) -> None:
        self._server.close()
        self.cut()

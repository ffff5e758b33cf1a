"""The agent on a board: answers requests until its input ends. Standard library only, Python 3.8 or later.

Sent to a board with `toolkit.drivers` and started there. A request is a line of JSON on stdin, for `put` followed by that many
bytes; an answer is a line of JSON on stdout. The verbs are those of `SERVED` and `WORKED` and no others. Runtimes are loaded in
processes of their own, so that one that hangs or dies costs only itself. Everything lies in one private folder, which is removed
when the agent ends, however it ends; after a lost link it is kept for a short while, so that the next agent can take it over.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import select
import shutil
import signal
import socket
import stat
import tempfile
import time
import zlib
from typing import Any, Callable  # noqa: UP035  (that of collections.abc takes no arguments in 3.8)

from toolkit.drivers import SHA, TURN_LIMIT_S, Refused, Worker, shortened

PROTOCOL = 1
MAX_LINE = 1 << 20  # bytes of a request
MAX_FILE, MAX_WORKERS = 64 << 30, 8
IDLE_S = 120.0  # without a sign of life from the other side the link is taken for lost
KEEP_S = 60.0  # how long the folder then waits for the next agent
FOLDER, LOCK = "edgekit-agent-", "edgekit-agent.lock"
TOKEN = re.compile(re.escape(FOLDER) + r"[A-Za-z0-9_]{4,32}")
WORKED = ("version", "load", "unload", "warm", "timed", "read", "run", "executed", "profile", "startup")
SERVED = ("adopt", "has", "put", "begin", "end", "about", "bye")


def facts() -> dict[str, Any]:
    """What this machine is, in the words of its kernel."""

    def text(path: str, limit: int) -> str:
        try:
            with open(path, "rb") as file:
                return file.read(limit).decode("utf-8", "replace")
        except OSError:
            return ""

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpuinfo": text("/proc/cpuinfo", 65536).split("\n\n")[0][:16384],
        "board": text("/proc/device-tree/model", 256),
        "machine": platform.machine(),
        "cores": cores,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "trtexec": shutil.which("trtexec") or "",
    }


def answered(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a request gives: a result, or why there is none."""
    try:
        return {"result": call(), "at_ns": time.perf_counter_ns()}
    except Refused as refused:
        kind, message = refused.kind, refused.message
    except ImportError as error:
        kind, message = "import", shortened(error)
    except OSError as error:
        kind, message = "system", f"{type(error).__name__}: {error.strerror or shortened(error)}"
    except Exception as error:
        kind, message = "failed", f"{type(error).__name__}: {shortened(error)}"
    return {"error": kind, "message": message, "at_ns": time.perf_counter_ns()}


def die_with_parent() -> None:
    """SIGKILL when the process that made this one ends: a runtime that hangs reads no pipe."""
    import ctypes

    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        pass  # not Linux: the end of its pipe ends it


def work(folder: str, pipe: socket.socket) -> None:
    """The life of a worker: a line in, a line out."""
    worker, stream = Worker(folder), pipe.makefile("rwb")
    for line in stream:
        request = json.loads(line)
        verb, how = request.get("verb"), request.get("with", {})
        if verb in WORKED and isinstance(how, dict):
            reply = answered(lambda: getattr(worker, verb)(**how))  # noqa: B023
        else:
            reply = {"error": "usage", "message": f"The agent has no verb {verb!r}."}
        stream.write(json.dumps(reply).encode() + b"\n")
        stream.flush()


# --- the agent --------------------------------------------------------------------------------------------------------------


class Ended(BaseException):
    """The other side is gone (`kept`: the folder waits for it), or said goodbye."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.kept = kept


class Agent:
    """Serves one workstation."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.folder = tempfile.mkdtemp(prefix=FOLDER, dir=base)  # 0700
        os.mkdir(os.path.join(self.folder, "files"))
        self.buffer = b""
        self.workers: dict[int, tuple[int, socket.socket]] = {}
        self.count, self.lock, self.keep_s = 0, -1, KEEP_S
        with open(os.path.join(self.folder, "pid"), "w") as file:
            file.write(str(os.getpid()))
        self.guard = self._start_guard()

    # what comes in

    def fill(self, timeout_s: float, *others: int) -> bool:
        """Read what there is of the input; True when another descriptor has something first. Ended: it is closed, or silent."""
        ready = select.select([0, *others], [], [], timeout_s)[0]
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                raise Ended(kept=True)
            self.buffer += data
        elif not ready and not others:
            raise Ended(kept=True)
        return any(other in ready for other in others)

    def line(self) -> bytes:
        while b"\n" not in self.buffer:
            if len(self.buffer) > MAX_LINE:
                raise Ended(kept=False)
            self.fill(IDLE_S)
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def serve(self) -> None:
        """Answer until the other side is gone."""
        token = os.path.basename(self.folder)
        self.say({"edgekit": PROTOCOL, "token": token, "facts": facts(), "at_ns": time.perf_counter_ns()})
        while True:
            request = json.loads(self.line())
            verb, how = request.get("verb"), request.get("with", {})
            if verb == "ping":
                continue
            if verb in SERVED:
                reply = answered(lambda: getattr(self, verb)(**how))  # noqa: B023
            elif verb in WORKED:
                reply = self.forwarded(request)
            else:
                reply = {"error": "usage", "message": f"The agent has no verb {verb!r}."}
            self.say(dict(reply, id=request.get("id")))

    def say(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode() + b"\n"
        while data:
            if not select.select([], [1], [], IDLE_S)[1]:
                raise Ended(kept=True)
            data = data[os.write(1, data[:65536]) :]

    # what it does itself

    def adopt(self, token: str, keep_s: float) -> dict[str, Any]:
        """Take over what an agent before this one left when its link was lost, and end it where it did not notice."""
        self.keep_s = min(max(keep_s, 0.0), 600.0)
        if not token:
            return {"adopted": False}
        old = os.path.join(self.base, token)
        if not TOKEN.fullmatch(token):
            raise Refused("usage", "That is no token.")
        try:
            facts_of = os.lstat(old)
            if not stat.S_ISDIR(facts_of.st_mode) or facts_of.st_uid != os.getuid():
                return {"adopted": False}
            with open(os.path.join(old, "pid")) as file:
                pid = int(file.read(16))
            os.rename(os.path.join(old, "files"), os.path.join(self.folder, "files.old"))
        except (OSError, ValueError):
            return {"adopted": False}
        os.rmdir(os.path.join(self.folder, "files"))
        os.rename(os.path.join(self.folder, "files.old"), os.path.join(self.folder, "files"))
        end_agent(pid)
        return {"adopted": True}

    def has(self, sha: str) -> dict[str, Any]:
        """Bytes of a file that are here; all of them only where its digest is right."""
        path = self._file(sha)
        for name, whole in ((path, True), (path + ".part", False)):
            try:
                return {"size": os.stat(name).st_size, "whole": whole}
            except OSError:
                pass
        return {"size": 0, "whole": False}

    def put(self, sha: str, size: int, offset: int, sent: int, compressed: bool) -> dict[str, Any]:
        """The rest of a file follows the request; it is kept if the whole has this digest."""
        path = self._file(sha)
        failure: BaseException | None = None
        if not (isinstance(sent, int) and 0 <= sent <= MAX_FILE and isinstance(size, int) and 0 <= offset <= size <= MAX_FILE):
            raise Ended(kept=False)  # what follows cannot be told from requests
        unpack = zlib.decompressobj()
        with open(path + ".part", "r+b" if os.path.exists(path + ".part") else "w+b", buffering=0) as file:
            file.seek(offset)
            file.truncate()
            while sent:
                if not self.buffer:
                    self.fill(IDLE_S)
                piece, self.buffer = self.buffer[:sent], self.buffer[sent:]
                sent -= len(piece)
                if failure is None:
                    try:
                        data = unpack.decompress(piece, max(1, size - file.tell() + 1)) if compressed else piece
                        if file.tell() + len(data) > size:
                            raise Refused("usage", "The file is longer than was said.")
                        while data:
                            data = data[file.write(data) :]
                    except (OSError, zlib.error, Refused) as error:
                        failure = error  # what is still on its way is read and forgotten
            digest = hashlib.sha256()
            file.seek(0)
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        if failure is not None or digest.hexdigest() != sha:
            os.unlink(path + ".part")
            raise failure or Refused("digest", "What arrived is not the file that was announced.")
        os.rename(path + ".part", path)
        return {}

    def begin(self) -> dict[str, Any]:
        """A new process for a runtime; the board is then this user's until the last one ends."""
        if len(self.workers) >= MAX_WORKERS:
            raise Refused("usage", "Too many sessions are open.")
        self._take_lock()
        self.count += 1
        self.workers[self.count] = self._start_worker()
        return {"worker": self.count}

    def end(self, worker: int) -> dict[str, Any]:
        if worker in self.workers:
            pid, pipe = self.workers.pop(worker)
            pipe.close()
            kill(pid)
        if not self.workers and self.lock >= 0:
            os.close(self.lock)
            self.lock = -1
        return {}

    def about(self, runtime: str) -> dict[str, Any]:
        """A runtime's version, asked in a process that then ends."""
        self.count += 1
        self.workers[self.count] = self._start_worker()
        reply = self.forwarded({"worker": self.count, "verb": "version", "with": {"runtime": runtime}, "limit_s": 120})
        pid, pipe = self.workers.pop(self.count, (0, None))
        if pipe is not None:
            pipe.close()
            kill(pid)
        if "error" in reply:
            raise Refused(reply["error"], reply["message"])
        return dict(reply["result"])

    def bye(self) -> dict[str, Any]:
        raise Ended(kept=False)

    def forwarded(self, request: dict[str, Any]) -> dict[str, Any]:
        """A worker's answer; a worker that gives none in time is ended."""
        worker, limit_s = request.get("worker"), min(float(request.get("limit_s", 60)), TURN_LIMIT_S)
        if worker not in self.workers:
            return {"error": "gone", "message": "There is no such session on the board any more."}
        pid, pipe = self.workers[worker]
        pipe.setblocking(True)
        end, reply = time.monotonic() + limit_s, b""
        try:
            pipe.sendall(json.dumps({"verb": request["verb"], "with": request.get("with", {})}).encode() + b"\n")
            while not reply.endswith(b"\n"):
                left = end - time.monotonic()
                if left <= 0:
                    self.end(worker)
                    return {
                        "error": "hung",
                        "message": f"The runtime did not answer within {limit_s:.0f} s and was ended.",
                    }
                if len(self.buffer) > MAX_LINE:
                    raise Ended(kept=False)
                if self.fill(left, pipe.fileno()):
                    data = pipe.recv(1 << 16)
                    if not data:
                        break
                    reply += data
        except (BrokenPipeError, ConnectionResetError):
            pass
        if reply.endswith(b"\n"):
            return dict(json.loads(reply))
        self.workers.pop(worker)
        pipe.close()
        code = kill(pid)
        how = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        self.end(worker)
        return {"error": "died", "message": f"The runtime's process {how}."}

    # its processes and its folder

    def _file(self, sha: str) -> str:
        if not (isinstance(sha, str) and SHA.fullmatch(sha)):
            raise Refused("usage", "That is no digest.")
        return os.path.join(self.folder, "files", sha)

    def _take_lock(self) -> None:
        """One user measures at a time."""
        if self.lock >= 0:
            return
        path = os.path.join(self.base, LOCK)
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            found = os.open(path, flags)  # of whoever came first; a sticky folder lets others open it, but not create it
        except FileNotFoundError:
            found = os.open(path, flags | os.O_CREAT, 0o666)
            os.fchmod(found, 0o666)
        try:
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(found, 200).decode("ascii", "replace").strip()
            os.close(found)
            raise Refused("busy", holder or "someone") from None
        import getpass

        os.ftruncate(found, 0)
        os.pwrite(found, f"{getpass.getuser()}, process {os.getpid()}".encode(), 0)
        self.lock = found

    def _start_worker(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid:
            theirs.close()
            return pid, ours
        try:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            die_with_parent()
            ours.close()
            for _, pipe in self.workers.values():
                pipe.close()
            silence(0, 1)
            os.close(self.guard)
            if self.lock >= 0:
                os.close(self.lock)
            os.chdir(self.folder)
            os.environ["TMPDIR"] = tempfile.tempdir = self.folder
            work(self.folder, theirs)
        except BaseException:
            os._exit(70)
        os._exit(0)

    def _start_guard(self) -> int:
        """A process that outlives this one by as little as it may and removes the folder, also when this one is killed."""
        reading, writing = os.pipe()
        if os.fork():
            os.close(reading)
            return writing
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            os.close(writing)
            silence(0, 1, 2)
            said = b""
            while True:
                more = os.read(reading, 64)
                if not more:
                    break
                said = more
            if said != b"now":
                wait_while(self.folder, float(said or KEEP_S))
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            os._exit(0)

    def close(self, kept: bool) -> None:
        """End the workers; the folder now, or after a while by the guard."""
        for worker in list(self.workers):
            self.end(worker)
        if self.lock >= 0:
            os.close(self.lock)
        os.write(self.guard, b"%.1f" % self.keep_s if kept else b"now")
        if not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.guard)


def silence(*descriptors: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for number in descriptors:
        os.dup2(null, number)


def wait_while(folder: str, seconds: float) -> None:
    """Until the time is over, or the next agent took what is in the folder."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and os.path.isdir(os.path.join(folder, "files")):
        time.sleep(0.2)


def kill(pid: int) -> int:
    """End a child; its exit code, negative for a signal that it had got before."""
    for _ in range(20):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL


def end_agent(pid: int) -> None:
    """End an agent of this user that serves a link that is lost, and wait for its end."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"edgekit-agent" not in file.read(65536):
                return
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.05)
    except OSError:
        pass


def main() -> None:
    def stop(number: int, frame: Any) -> None:
        raise Ended(kept=False)

    os.umask(0o077)
    agent, kept = Agent(os.path.realpath(tempfile.gettempdir())), True
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, stop)
    try:
        agent.serve()
    except Ended as ended:
        kept = ended.kept
    except (BrokenPipeError, ConnectionResetError):
        pass
    except ValueError:  # a request that is no JSON: the stream cannot be trusted any more
        kept = False
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        agent.close(kept)


if __name__ == "__main__":
    main()

"""The process between the caller and the server, which leaves nothing behind.

It is run as a script by the server's own interpreter, so it imports the standard library only.
It starts ``tritonserver`` and ends it, with its models' processes and its files, when

* something arrives on its standard input or that is closed (the caller stops the server),
* its parent process is gone (the caller was killed), or
* the server has ended by itself.

Its exit status is the server's. When the supervisor itself is killed, the kernel kills the
server; the models' processes notice that within seconds, and the files are removed by the
caller or at the next start.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

RUN_VARIABLE = "TRITON_SAM_RUN"
"""Environment variable that marks the server's processes with the name of their run."""

SHARED_MEMORY = Path("/dev/shm")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CHECK_PARENT_S = 1.0


def shm_prefix(run: str) -> str:
    """How the names of the shared-memory files of ``run`` begin."""
    return f"triton-sam-{run}-"


def remove_leftovers(folder: Path) -> None:
    """Kill the processes of the run in ``folder`` and remove its files."""
    run = folder.name
    kill_processes(run)
    for file in SHARED_MEMORY.glob(shm_prefix(run) + "*"):
        file.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def kill_processes(run: str, timeout_s: float = 5.0) -> None:
    """Kill every process that is marked with ``run``, and wait until none is left."""
    deadline = time.monotonic() + timeout_s
    while pids := list(processes(run)):
        for pid in pids:
            _kill(pid)
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def processes(run: str) -> Iterator[int]:
    """The living processes that are marked with ``run``.

    The mark, unlike a process number, cannot belong to another program by now.
    """
    mark = f"{RUN_VARIABLE}={run}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # Empty for zombies, which need nobody's attention.
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if mark in environment.split(b"\0"):
            yield int(entry.name)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """Supervise a command; the arguments are FOLDER PARENT_PID GRACE_S COMMAND..."""
    folder, parent, grace_s = Path(arguments[0]), int(arguments[1]), float(arguments[2])
    wakeup = _wakeup_descriptor()
    libc = ctypes.CDLL(None, use_errno=True)
    # Processes of models whose server was killed become children of this one.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    server = _start(arguments[3:], folder.name, libc.prctl)
    with contextlib.suppress(BrokenPipeError):  # a parent that is gone is noticed below
        os.write(sys.stdout.fileno(), f"{server.pid}\n".encode())
    _wait_for_end(server.pid, parent, wakeup)
    _terminate(server.pid, grace_s)
    # The leader is not reaped yet, so its process group cannot be anybody else's.
    os.killpg(server.pid, signal.SIGKILL)
    code = server.wait()
    remove_leftovers(folder)
    return code if code >= 0 else 128 - code


def _wakeup_descriptor() -> int:
    """A descriptor that becomes readable when a signal has arrived."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def _start(command: list[str], run: str, prctl: Callable[..., int]) -> subprocess.Popen[bytes]:
    supervisor = os.getpid()

    def die_with_supervisor() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != supervisor:
            os._exit(1)

    # preexec_fn is safe here: this process has one thread.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=sys.stderr,
        env={**os.environ, RUN_VARIABLE: run},
        start_new_session=True,
        preexec_fn=die_with_supervisor,
    )


def _wait_for_end(server: int, parent: int, wakeup: int) -> None:
    """Return when the server has ended or should be ended."""
    stdin = sys.stdin.fileno()
    while os.getppid() == parent and not _has_ended(server):
        readable, _, _ = select.select([stdin, wakeup], [], [], _CHECK_PARENT_S)
        if stdin in readable:
            return
        if wakeup in readable and any(n != signal.SIGCHLD for n in os.read(wakeup, 64)):
            return


def _terminate(server: int, grace_s: float) -> None:
    """Ask the server to end; return when it has, or after ``grace_s`` seconds."""
    deadline = time.monotonic() + grace_s
    if not _has_ended(server):
        os.kill(server, signal.SIGTERM)
    while not _has_ended(server) and time.monotonic() < deadline:
        time.sleep(0.02)


def _has_ended(pid: int) -> bool:
    """Whether the child ``pid`` has ended; it is left for ``wait`` to reap."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, pid, options) is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

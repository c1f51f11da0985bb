"""One run of the server: its folder, its processes, its log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ..errors import EmbeddedServerError
from .install import Installation, locked, make_folder
from .models import Models
from .supervisor import remove_leftovers

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_BACKENDS = Path(__file__).with_name("backends")
_PACKAGE = Path(__file__).parent.parent.resolve()
_LOG_BYTES = 65536
_MARGIN_S = 10.0
# They would lead the models' interpreters to other packages than those installed for them.
_UNWANTED_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE")


class RunFolder:
    """A folder with the files that one run needs; it is locked as long as the run lives.

    ``models``: links to the models that are served. ``backends``: real copies, because Triton
    refuses links that leave its backend directory. ``lib``: libpython alone, so that no other
    library of its folder takes precedence over the server's own.
    """

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.lock_fd = lock_fd

    @classmethod
    def create(cls, home: Path) -> RunFolder:
        """A new folder under ``home``; what crashed runs left there is removed first."""
        runs = home / "runs"
        make_folder(runs)
        with locked(home / "runs.lock"):
            _sweep(runs)
            path = runs / secrets.token_hex(6)
            path.mkdir(mode=0o700)
            lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
        return cls(path, lock_fd)

    def fill(self, installation: Installation, models: Models) -> None:
        shutil.copytree(
            _BACKENDS, self.backends, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
        python_backend = self.backends / "python"
        python_backend.mkdir()
        for file in installation.python_backend:
            shutil.copy(file, python_backend)
        (python_backend / "triton_python_backend_stub").chmod(0o755)
        self.libraries.mkdir()
        soname = installation.interpreter.soname
        (self.libraries / soname).symlink_to(installation.libpython)
        self.models.mkdir()
        for name in models.names:
            (self.models / name).symlink_to(models.root / name, target_is_directory=True)

    @property
    def backends(self) -> Path:
        return self.path / "backends"

    @property
    def libraries(self) -> Path:
        return self.path / "lib"

    @property
    def models(self) -> Path:
        return self.path / "models"

    def remove(self) -> None:
        """Remove the folder, and any process and shared memory of its run."""
        self.unlock()
        remove_leftovers(self.path)

    def unlock(self) -> None:
        """Leave the lock to the processes that have inherited it."""
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1


def _sweep(runs: Path) -> None:
    """Remove what is left of runs whose lock nobody holds any more."""
    for folder in runs.iterdir():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            _remove_if_dead(folder)


def _remove_if_dead(folder: Path) -> None:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        remove_leftovers(folder)
    finally:
        os.close(descriptor)


def environment(
    installation: Installation, folder: RunFolder, threads: int | None
) -> dict[str, str]:
    """The environment of the server: it decides which Python its models run in."""
    variables = {k: v for k, v in os.environ.items() if k not in _UNWANTED_VARIABLES}
    libraries = [str(folder.libraries), str(installation.libraries)]
    inherited = os.environ.get("LD_LIBRARY_PATH")
    variables["LD_LIBRARY_PATH"] = ":".join([*libraries, *([inherited] if inherited else [])])
    variables["PATH"] = f"{installation.python.parent}:{os.environ.get('PATH', os.defpath)}"
    variables["VIRTUAL_ENV"] = str(installation.path)
    variables["PYTHONNOUSERSITE"] = "1"
    variables["TRITON_SAM_PACKAGE"] = str(_PACKAGE)
    if threads is not None:
        variables["TRITON_SAM_THREADS"] = str(threads)
    return variables


def _open_log(path: Path) -> IO[bytes]:
    try:
        return path.open("ab+")
    except OSError as error:
        raise EmbeddedServerError(
            f"The log file {path} cannot be written: {error.strerror}."
        ) from error


def _ask_to_stop(supervisor: subprocess.Popen[bytes]) -> None:
    if supervisor.stdin is None or supervisor.stdin.closed:
        return
    # A byte, not just the end of the file: a forked child may hold the pipe open as well.
    with contextlib.suppress(BrokenPipeError):
        supervisor.stdin.write(b"\n")
        supervisor.stdin.flush()
    with contextlib.suppress(BrokenPipeError):
        supervisor.stdin.close()


class Run:
    """A supervised server process.

    ``grace_s``: how long the server may take to end before it is killed.
    """

    def __init__(self, folder: RunFolder, log_file: Path | None, grace_s: float) -> None:
        self._folder = folder
        self._grace_s = grace_s
        self._log = _open_log(log_file or folder.path / "server.log")
        self._log_start = self._log.seek(0, os.SEEK_END)
        self._last_log = ""
        self._supervisor: subprocess.Popen[bytes] | None = None
        self.pid: int | None = None

    def start(self, python: Path, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Start ``command`` under a supervisor that is run by ``python``."""
        arguments = [str(self._folder.path), str(os.getpid()), str(self._grace_s)]
        supervisor = subprocess.Popen(
            [str(python), "-I", str(_SUPERVISOR), *arguments, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(variables),
            pass_fds=(self._folder.lock_fd,),
            start_new_session=True,
        )
        self._supervisor = supervisor
        self._folder.unlock()
        line = supervisor.stdout.readline() if supervisor.stdout else b""
        self.pid = int(line) if line else None

    def poll(self) -> int | None:
        """The server's exit status, 128 + n for signal n, or ``None`` while it runs."""
        return None if self._supervisor is None else self._supervisor.poll()

    def wait(self) -> int:
        """Block until the server has ended; its exit status, 128 + n for signal n."""
        if self._supervisor is None:
            return 0
        code = self._supervisor.wait()
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """End the server and remove everything of its run. Does nothing the second time."""
        if self._supervisor is not None:
            _ask_to_stop(self._supervisor)
            self._reap(self._supervisor)
        # Kept open until now: the supervisor has removed the folder.
        self._last_log = self.log()
        self._log.close()
        if self._folder.path.exists():
            self._folder.remove()

    def _reap(self, supervisor: subprocess.Popen[bytes]) -> None:
        try:
            supervisor.wait(self._grace_s + _MARGIN_S)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.wait()
        if supervisor.stdout is not None:
            supervisor.stdout.close()

    def log(self) -> str:
        """The end of the server's log, at most 64 KiB; also after the end of the run."""
        if self._log.closed:
            return self._last_log
        size = os.fstat(self._log.fileno()).st_size
        start = max(self._log_start, size - _LOG_BYTES)
        return os.pread(self._log.fileno(), _LOG_BYTES, start).decode("utf-8", "replace")

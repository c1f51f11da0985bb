"""The private environment that holds the server: where it is, how it gets there.

The environment is built under a temporary name and renamed when it is complete, so that one
that has its name is whole. A lock file keeps two first starts apart.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import InstallError
from .host import Interpreter, check_platform, choose_interpreter, installed_interpreters

_log = logging.getLogger(__name__)

SERVER_VERSION = "2.51.0"
"""Version of the Triton server inside the pinned wheel."""

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
DOWNLOAD_MB = 98
NEEDED_MB = 500
"""Free disk space asked for: the downloads and the 300 MB that they unpack to."""

# They would add packages, or send them somewhere else than into the environment.
_UNWANTED_VARIABLES = (
    "PIP_CONSTRAINT",
    "PIP_PREFIX",
    "PIP_REQUIREMENT",
    "PIP_ROOT",
    "PIP_TARGET",
    "PIP_USER",
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSTARTUP",
)


@dataclass(frozen=True)
class Installation:
    """A complete private environment. ``libpython``: the shared library of its interpreter."""

    path: Path
    interpreter: Interpreter
    libpython: Path

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def _site_packages(self) -> Path:
        major, minor = self.interpreter.version
        return self.path / "lib" / f"python{major}.{minor}" / "site-packages"

    @property
    def libraries(self) -> Path:
        """The shared libraries that the server and the stub are linked against."""
        return self._site_packages / "nvidia_pytriton.libs"

    @property
    def tritonserver(self) -> Path:
        return self._site_packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"

    @property
    def python_backend(self) -> tuple[Path, ...]:
        """The files of Triton's python backend, the stub of this Python version included."""
        root = self._site_packages / "pytriton" / "tritonserver"
        major, minor = self.interpreter.version
        return (
            root / "backends" / "python" / "libtriton_python.so",
            root / "backends" / "python" / "triton_python_backend_utils.py",
            root / "python_backend_stubs" / f"{major}.{minor}" / "triton_python_backend_stub",
        )

    @property
    def complete(self) -> bool:
        """Whether all is there: caches get cleaned, and interpreters removed."""
        files = (self.python, self.tritonserver, *self.python_backend)
        return self.libraries.is_dir() and all(file.exists() for file in files)


def default_home() -> Path:
    """``TRITON_SAM_HOME``, or ``triton-sam`` in the user's cache folder."""
    home = os.environ.get("TRITON_SAM_HOME")
    if home:
        return Path(home).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache").absolute() / "triton-sam"


def ensure_installed(
    home: str | os.PathLike[str] | None = None,
    *,
    quiet: bool = False,
    requirements: Path = REQUIREMENTS,
    needed_mb: int = NEEDED_MB,
) -> Installation:
    """The server's environment, installed first where it is not there yet.

    ``home``: the folder that holds it (:func:`default_home`). ``quiet``: no progress bar.
    ``requirements``: a pip requirements file with hashes. ``needed_mb``: free disk space to ask
    for, in MB.

    Raises :class:`UnsupportedPlatformError`, :class:`LibpythonMissingError` or
    :class:`InstallError`; a failed installation leaves nothing behind.
    """
    check_platform()
    interpreter, libpython = choose_interpreter(installed_interpreters())
    folder = default_home() if home is None else Path(home).absolute()
    path = folder / _name(interpreter, requirements)
    installation = Installation(path, interpreter, libpython)
    if installation.complete:
        return installation
    make_folder(folder)
    with locked(folder / "install.lock") as lock_fd:
        if not installation.complete:
            _install(installation, requirements, needed_mb, lock_fd, quiet)
    return installation


def _name(interpreter: Interpreter, requirements: Path) -> str:
    """A name that changes with whatever the environment is made of."""
    digest = hashlib.sha256(requirements.read_bytes())
    digest.update(str(interpreter.executable).encode())
    major, minor = interpreter.version
    return f"server-{SERVER_VERSION}-cp{major}{minor}-{digest.hexdigest()[:10]}"


def make_folder(folder: Path) -> None:
    """Create ``folder``; raises :class:`InstallError` where the user may not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InstallError(
            f"The folder {folder} cannot be created ({error.strerror}). "
            "Set TRITON_SAM_HOME to one that can be written to."
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the lock file ``path``, waiting for whoever holds it; gives its descriptor."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InstallError(
            f"{path} cannot be written ({error.strerror}). "
            "Set TRITON_SAM_HOME to a folder that can be written to."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _install(
    installation: Installation,
    requirements: Path,
    needed_mb: int,
    lock_fd: int,
    quiet: bool,
) -> None:
    home = installation.path.parent
    for leftover in home.glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(installation.path, ignore_errors=True)
    _check_space(home, needed_mb)
    show = not quiet and _is_terminal()
    _announce(installation.path, show)
    partial = Path(
        tempfile.mkdtemp(dir=home, prefix=f"{installation.path.name}-", suffix=".partial")
    )
    try:
        _build(installation, partial, requirements, lock_fd, show)
        partial.chmod(0o755)
        partial.rename(installation.path)
    except OSError as error:
        raise InstallError(
            f"The embedded server could not be installed in {home}: {error}."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not installation.complete:
        shutil.rmtree(installation.path, ignore_errors=True)
        raise InstallError(
            f"The packages in {requirements.name} do not contain the Triton server "
            f"{SERVER_VERSION} for {installation.interpreter.title}."
        )


def _check_space(home: Path, needed_mb: int) -> None:
    free_mb = shutil.disk_usage(home).free // 1_000_000
    if free_mb < needed_mb:
        raise InstallError(
            f"Installing the embedded server takes {needed_mb} MB, and {home} has {free_mb} MB "
            "free. Make room, or set TRITON_SAM_HOME to a folder on another disk."
        )


def _is_terminal() -> bool:
    """Whether pip can draw its progress on stderr: notebooks replace it by an object without fd."""
    try:
        return os.isatty(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        return False


def _announce(path: Path, show: bool) -> None:
    message = (
        f"Installing the Triton server {SERVER_VERSION} and ONNX Runtime for the CPU, "
        f"{DOWNLOAD_MB} MB to download, into {path} (once)."
    )
    if show:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
    else:
        _log.info(message)


def _build(
    installation: Installation, partial: Path, requirements: Path, lock_fd: int, show: bool
) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in _UNWANTED_VARIABLES}
    scratch = partial / "tmp"
    scratch.mkdir()
    environment["TMPDIR"] = str(scratch)
    runner = _Runner(environment, lock_fd)
    runner.run("making its environment", _venv_command(installation.interpreter, partial))
    _copy_site_configuration(partial)
    python = partial / "bin" / "python"
    runner.run("fetching its packages", _pip_command(python, requirements, show), show=show)
    runner.run("importing its packages", [str(python), "-I", "-c", "import numpy, onnxruntime"])
    shutil.rmtree(scratch, ignore_errors=True)


def _venv_command(interpreter: Interpreter, path: Path) -> list[str]:
    return [str(interpreter.executable), "-I", "-m", "venv", str(path)]


def _copy_site_configuration(path: Path) -> None:
    """Keep the pip settings of the running environment (mirrors, proxies, certificates).

    The user's and the system's settings and ``PIP_*`` variables hold in any environment.
    """
    own = Path(sys.prefix) / "pip.conf"
    if sys.prefix != sys.base_prefix and own.is_file():
        shutil.copyfile(own, path / "pip.conf")


def _pip_command(python: Path, requirements: Path, show: bool) -> list[str]:
    command = [str(python), "-m", "pip", "install", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--no-user", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "on" if show else "off"]
    return [*command, "-r", str(requirements)]


@dataclass(frozen=True)
class _Runner:
    """Runs the steps of an installation.

    The lock's descriptor goes to the children: when this process is killed, the lock is held
    until the step that still runs has ended too.
    """

    environment: dict[str, str]
    lock_fd: int

    def run(self, what: str, command: list[str], *, show: bool = False) -> None:
        """Run ``command``; its standard output goes to the terminal when ``show``."""
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if show else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=self.environment,
            pass_fds=(self.lock_fd,),
        ) as process:
            try:
                _, output = process.communicate()
            except BaseException:
                process.kill()
                raise
        _log.debug("%s", output)
        if process.returncode != 0:
            raise InstallError(
                f"Installing the embedded server failed while {what}: {_explain(output)}"
            )


def _explain(output: str) -> str:
    """The cause in pip's or Python's error output, and what to do next."""
    if "DO NOT MATCH THE HASHES" in output or "Hashes are required" in output:
        return (
            "a downloaded package is not the expected one (its SHA-256 differs). Nothing was "
            "kept. Clear pip's cache (pip cache purge) and check the package index in use."
        )
    if "No space left on device" in output or "Errno 28" in output:
        return "the disk is full. Make room, or set TRITON_SAM_HOME to a folder on another disk."
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    cause = (errors or lines or ["no message"])[-1].removeprefix("ERROR: ")
    if "Retrying" in output or "No matching distribution" in output:
        return (
            f"{cause.rstrip('.')}. Check the network, and the proxy and index in pip's "
            "configuration (pip config list), then try again."
        )
    return cause

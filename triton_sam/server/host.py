"""What this machine offers: operating system, Python interpreters, their shared libraries."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import (
    EmbeddedServerError,
    InstallError,
    LibpythonMissingError,
    UnsupportedPlatformError,
)

SUPPORTED_PYTHONS = ((3, 12), (3, 11), (3, 10))
"""Versions with a stub in the server's wheel *and* wheels of numpy < 2 and ONNX Runtime."""

MINIMUM_GLIBC = (2, 35)
_USE_CONTAINER = "Run the server in its container instead: docker compose up."

_PROBE = """
import importlib.util, json, os, platform, sys, sysconfig
print(json.dumps({
    "executable": os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
    "version": sys.version_info[:2],
    "implementation": platform.python_implementation(),
    "prefix": sys.base_prefix,
    "libdir": sysconfig.get_config_var("LIBDIR") or "",
    "has_venv": all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A CPython that could run the server's models.

    ``executable``: the interpreter itself, not a virtual environment's link to it.
    ``prefix``: where it is installed. ``libdir``: where its build put libpython.
    """

    executable: Path
    version: tuple[int, int]
    prefix: Path
    libdir: Path
    has_venv: bool

    @property
    def title(self) -> str:
        return f"Python {self.version[0]}.{self.version[1]}"

    @property
    def soname(self) -> str:
        """File name of the shared library that the server's stub is linked against."""
        return f"libpython{self.version[0]}.{self.version[1]}.so.1.0"


def check_platform(
    system: str | None = None,
    machine: str | None = None,
    libc: tuple[str, str] | None = None,
) -> None:
    """Raise :class:`UnsupportedPlatformError` where the server's binary cannot run.

    The arguments default to this machine: ``platform.system()``, ``platform.machine()`` and
    ``platform.libc_ver()``.
    """
    system = platform.system() if system is None else system
    machine = platform.machine() if machine is None else machine
    name, version = platform.libc_ver() if libc is None else libc
    if (system, machine) != ("Linux", "x86_64"):
        raise UnsupportedPlatformError(
            f"The embedded server exists for Linux x86_64 only, and this is {system} {machine}. "
            f"{_USE_CONTAINER}"
        )
    if name != "glibc" or _version(version) < MINIMUM_GLIBC:
        found = f"{name} {version}".strip() or "another C library (musl?)"
        raise UnsupportedPlatformError(
            f"The embedded server needs glibc {MINIMUM_GLIBC[0]}.{MINIMUM_GLIBC[1]} or newer "
            f"(Ubuntu 22.04, Debian 12, Fedora 36), and this machine has {found}. "
            f"{_USE_CONTAINER}"
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def probe_interpreter(executable: str | Path) -> Interpreter | None:
    """What ``executable`` is, or ``None`` when it is no working CPython."""
    try:
        done = subprocess.run(
            [str(executable), "-I", "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        facts = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    if facts["implementation"] != "CPython":
        return None
    major, minor = facts["version"]
    return Interpreter(
        executable=Path(facts["executable"]),
        version=(major, minor),
        prefix=Path(facts["prefix"]),
        libdir=Path(facts["libdir"]),
        has_venv=facts["has_venv"],
    )


def installed_interpreters() -> Iterator[Interpreter]:
    """The running interpreter, then those named ``python3.x`` on PATH, newest first."""
    names = [f"python{major}.{minor}" for major, minor in SUPPORTED_PYTHONS]
    for executable in [sys.executable, *(shutil.which(name) for name in names)]:
        interpreter = probe_interpreter(executable) if executable else None
        if interpreter is not None:
            yield interpreter


def choose_interpreter(
    interpreters: Iterable[Interpreter],
    find: Callable[[Interpreter], Path] | None = None,
) -> tuple[Interpreter, Path]:
    """The first interpreter that can run the server's models, and its libpython.

    ``find`` looks for the library; it is :func:`find_libpython` unless given. Raises what keeps
    the best candidate from being used: :class:`UnsupportedPlatformError`,
    :class:`LibpythonMissingError` or :class:`InstallError`.
    """
    find = find or find_libpython
    problem: EmbeddedServerError | None = None
    seen: list[str] = []
    for interpreter in interpreters:
        seen.append(interpreter.title)
        if interpreter.version not in SUPPORTED_PYTHONS:
            continue
        try:
            library = find(interpreter)
        except LibpythonMissingError as error:
            problem = problem or error
            continue
        if interpreter.has_venv:
            return interpreter, library
        problem = problem or _venv_missing(interpreter)
    raise problem or UnsupportedPlatformError(
        "The embedded server runs its models in Python 3.10, 3.11 or 3.12, and only "
        f"{', '.join(dict.fromkeys(seen)) or 'no Python'} was found. Install one of them so that "
        f"python3.12, python3.11 or python3.10 is on PATH. {_USE_CONTAINER}"
    )


def _venv_missing(interpreter: Interpreter) -> InstallError:
    major, minor = interpreter.version
    return InstallError(
        f"{interpreter.executable} has no venv or ensurepip module, which the embedded server's "
        f"private environment is made with. Install it "
        f"(Debian and Ubuntu: apt install python{major}.{minor}-venv)."
    )


def find_libpython(interpreter: Interpreter, folders: Sequence[str | Path] | None = None) -> Path:
    """The shared library of ``interpreter``.

    ``folders``: where to look; by default the interpreter's own and the system's. Raises
    :class:`LibpythonMissingError` when it is in none of them.
    """
    for folder in library_folders(interpreter) if folders is None else folders:
        candidate = Path(folder) / interpreter.soname
        if _is_elf64(candidate):
            return candidate.resolve()
    major, minor = interpreter.version
    raise LibpythonMissingError(
        f"{interpreter.soname}, the shared library of {interpreter.executable}, is not installed; "
        "the embedded server cannot run models without it. Install it (Debian and Ubuntu: "
        f"apt install libpython{major}.{minor}; Fedora: dnf install python{major}.{minor}-libs, "
        "or python3-libs for the system's Python), or use a Python that brings it, such as "
        "those of uv, conda and pixi. A pyenv Python needs PYTHON_CONFIGURE_OPTS=--enable-shared."
    )


def library_folders(interpreter: Interpreter) -> Iterator[Path]:
    """Folders in which libpython may lie, the interpreter's own first."""
    yield interpreter.libdir
    yield interpreter.prefix / "lib"
    yield interpreter.executable.parent.parent / "lib"
    for folder in ("x86_64-linux-gnu", "../lib64", ".", "../local/lib", "../local/lib64"):
        yield Path("/usr/lib") / folder
    yield from _ldconfig_folders(interpreter.soname)


def _ldconfig_folders(soname: str) -> Iterator[Path]:
    ldconfig = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if ldconfig is None:
        return
    try:
        listing = subprocess.run(
            [ldconfig, "-p"], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return
    for line in listing.splitlines():
        name, _, path = line.strip().partition(" => ")
        if name.split(" ")[0] == soname:
            yield Path(path).parent


def _is_elf64(path: Path) -> bool:
    """Whether ``path`` is a 64-bit ELF file: /usr/lib holds 32-bit libraries on some systems."""
    try:
        with path.open("rb") as file:
            return file.read(5) == b"\x7fELF\x02"
    except OSError:
        return False

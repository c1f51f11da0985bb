"""From the server's log to an error that says what is wrong."""

from __future__ import annotations

import re

from ..errors import EmbeddedServerError, ModelLoadError, PortInUseError

_TAIL_LINES = 25
_LOAD_FAILURES = (
    re.compile(r"\"failed to load '(?P<name>[^']+)' version \d+: (?P<cause>.*)\"$", re.MULTILINE),
    re.compile(r"\"failed to load model '(?P<name>[^']+)': (?P<cause>.*)\"$", re.MULTILINE),
    re.compile(r"\"Poll failed for model directory '(?P<name>[^']+)': (?P<cause>.*)\"$", re.M),
    re.compile(r"\"(?P<cause>[^\"\n]*\bensemble (?P<name>\S+) contains .*)\"$", re.MULTILINE),
)
_SYNTAX = re.compile(r"Error parsing text-format inference\.ModelConfig: (.*)$", re.MULTILINE)
_PORT = re.compile(r"Socket '[^']*:(\d+)' already in use")
_LIBRARY = re.compile(r"error while loading shared libraries: ([^:\s]+)")
# The kind of status and the exception's name, and where in our backend it was raised.
_WRAPPING = re.compile(
    r"^(?:Internal: |Invalid argument: |TritonModelException: )+|\n+At:\n.*", re.S
)
_TABLE = re.compile(r"^(\||\+[-+]+\+$|\s*$)")
_ROUTINE = re.compile(r"^I\d{4} |CUDA|Cuda|pinned_memory")


def load_failures(log: str) -> dict[str, str]:
    """The models that the server refused, each with the cause."""
    failures: dict[str, str] = {}
    for pattern in _LOAD_FAILURES:
        for match in pattern.finditer(log):
            cause = match["cause"].replace("\\n", "\n").replace('\\"', '"')
            failures[match["name"]] = unwrapped(cause)
    syntax = _SYNTAX.findall(log)
    if syntax:
        failures = {
            name: f"{cause}: {'; '.join(syntax)}" if "text proto" in cause else cause
            for name, cause in failures.items()
        }
    return failures


def unwrapped(cause: str) -> str:
    """``cause`` without the names of exceptions before it and the place in our backend after it."""
    return _WRAPPING.sub("", cause).strip()


def lost_port(log: str) -> int | None:
    """The port that the server found taken, if that is why it ended."""
    match = _PORT.search(log)
    return int(match[1]) if match else None


def tail(log: str, lines: int = _TAIL_LINES) -> str:
    """The last lines of ``log`` that are not routine, or of the routine if there are no others."""
    every = [line for line in log.splitlines() if not _TABLE.search(line)]
    telling = [line for line in every if not _ROUTINE.search(line)]
    return "\n".join((telling or every)[-lines:])


def explain(log: str, what: str) -> EmbeddedServerError:
    """The error for a server that has ended; ``what`` is a clause without cause: "it ended"."""
    failures = load_failures(log)
    if failures:
        causes = " ".join(f"Model {name!r}: {_sentence(cause)}" for name, cause in failures.items())
        return ModelLoadError(f"The embedded server cannot load its models. {causes}")
    port = lost_port(log)
    if port is not None:
        return port_in_use(port)
    library = _LIBRARY.search(log)
    if library:
        return EmbeddedServerError(
            f"The embedded server needs the system library {library[1]}, which is not installed. "
            "Install the package that contains it, then try again."
        )
    return EmbeddedServerError(f"{what} The end of its log:\n{tail(log) or '(empty)'}")


def port_in_use(port: int) -> PortInUseError:
    """The error for a port that another program has."""
    return PortInUseError(
        f"Port {port} is already in use. Stop the program that listens there "
        f"(`ss -ltnp sport = :{port}` names it), or choose another port; 0 takes a free one."
    )


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."

"""The embedded server: a real Triton, started and stopped by the calling process."""

from __future__ import annotations

import http.client
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import EmbeddedServerError, PortInUseError
from .control import check_key, check_mode, control_flags, restriction_flags
from .diagnosis import explain, lost_port
from .install import Installation, ensure_installed
from .models import Models, choose, find_models
from .ports import choose_ports, listening_ports, reachable, resolve
from .run import Run, RunFolder, environment
from .supervisor import shm_prefix

if TYPE_CHECKING:
    from typing_extensions import Self

_log = logging.getLogger(__name__)

_GRACE_S = 6.0
_EXIT_TIMEOUT_S = 5
_POLL_S = 0.05
_ATTEMPTS = 3
_KILLED = 128 + signal.SIGKILL


class EmbeddedServer:
    """A Triton server on this machine's processor that serves a model repository.

    >>> with EmbeddedServer("model_repository") as server:
    ...     client = SAM2TritonClient(server.url)

    ``repository``: the folder with the models; those whose files are missing are left out.
    ``models``: patterns of the names to serve, such as ``sam2_*``; all of them without one. A
    predictor (``*_predictor``) runs without its pair being served, for half of the memory.
    ``host``: the address to listen on. ``http_port``, ``grpc_port``, ``metrics_port``: 0 takes a
    free one. ``startup_timeout_s``: how long loading the models may take. ``threads``: how many
    threads one inference uses, by default one for each processor core. ``log_file``: where to
    append the server's log. ``quiet``: no progress bar while the server is installed.
    ``model_control``: ``"explicit"`` lets whoever knows ``admin_key`` load models anew
    (:func:`triton_sam.admin.reload`); with a key the administrative endpoints refuse all others.

    The first start installs the server (:func:`triton_sam.server.install.ensure_installed`).
    Ending the server, or the calling process in whatever way, leaves no process, no shared
    memory and no temporary file behind.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        models: Sequence[str] = (),
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        startup_timeout_s: float = 120.0,
        threads: int | None = None,
        log_file: str | os.PathLike[str] | None = None,
        home: str | os.PathLike[str] | None = None,
        quiet: bool = False,
        model_control: str = "none",
        admin_key: str | None = None,
    ) -> None:
        check_mode(model_control, admin_key)
        self._model_control = model_control
        self._admin_key = None if admin_key is None else check_key(admin_key)
        self._repository = Path(repository)
        self._patterns = models
        self._host = resolve(host)
        self._requested = (http_port, grpc_port, metrics_port)
        self._ports = self._requested
        self._startup_timeout_s = startup_timeout_s
        self._threads = threads
        self._log_file = None if log_file is None else Path(log_file)
        self._home = home
        self._quiet = quiet
        self._run: Run | None = None
        self._stopping = False
        self._lock = threading.RLock()  # a signal handler may call stop() during stop()

    @property
    def http_url(self) -> str:
        """Where to reach the server over HTTP, like ``127.0.0.1:8000``."""
        return self._address(0)

    @property
    def grpc_url(self) -> str:
        """Where to reach the server over gRPC, like ``127.0.0.1:8001``."""
        return self._address(1)

    @property
    def metrics_url(self) -> str:
        """The page with Prometheus metrics."""
        return f"http://{self._address(2)}/metrics"

    @property
    def url(self) -> str:
        """The address for a client of this library, like ``grpc://127.0.0.1:8001``."""
        return f"grpc://{self.grpc_url}"

    @property
    def pid(self) -> int | None:
        """Process number of the server, or ``None`` when it does not run."""
        return self._run.pid if self._run is not None and self.running else None

    @property
    def running(self) -> bool:
        return self._run is not None and self._run.poll() is None

    def log(self) -> str:
        """The end of the server's log, at most 64 KiB; also after it has ended."""
        return "" if self._run is None else self._run.log()

    def start(self) -> Self:
        """Start the server and return when every model is ready.

        Raises :class:`RepositoryError` when there is nothing to serve, and otherwise an
        :class:`EmbeddedServerError`: :class:`ModelLoadError` with the cause when a model is
        refused, :class:`PortInUseError`, :class:`InstallError`,
        :class:`UnsupportedPlatformError` or :class:`LibpythonMissingError`.
        """
        if self.running:
            return self
        self.stop()  # what is left of a server that has ended by itself
        models = choose(find_models(self._repository), self._patterns, "models")
        for name, reason in models.skipped.items():
            _log.warning("Model %s is not served: %s.", name, reason)
        installation = ensure_installed(self._home, quiet=self._quiet)
        for attempts_left in reversed(range(_ATTEMPTS)):
            self._ports = choose_ports(self._host, self._requested)
            try:
                self._launch(installation, models)
                self._await_ready(models.names)
                break
            except BaseException as error:
                self.stop()
                # Another program may take a free port before the server does: choose again.
                chosen = lost_port(self.log()) not in self._requested
                if not (isinstance(error, PortInUseError) and chosen and attempts_left):
                    raise
        _log.info("Serving %s at %s.", ", ".join(models.names), self.url)
        return self

    def stop(self) -> None:
        """End the server and remove what it used. Does nothing when it does not run."""
        with self._lock:
            self._stopping = True
            if self._run is not None:
                self._run.stop()

    def wait(self) -> int:
        """Block until the server ends; its exit status, 128 + n for signal n.

        Raises :class:`EmbeddedServerError` with the end of the log when it failed without
        :meth:`stop` having been called.
        """
        run = self._started()
        code = run.wait()
        if code != 0 and not self._stopping:
            self.stop()
            raise explain(run.log(), _unexpected_end(code))
        return code

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _started(self) -> Run:
        if self._run is None:
            raise EmbeddedServerError("The embedded server was not started: call start() first.")
        return self._run

    def _address(self, index: int) -> str:
        self._started()
        return f"{reachable(self._host)}:{self._ports[index]}"

    def _launch(self, installation: Installation, models: Models) -> None:
        folder = RunFolder.create(installation.path.parent)
        try:
            folder.fill(installation, models)
            run = Run(folder, self._log_file, _GRACE_S)
        except BaseException:
            folder.remove()
            raise
        command = server_command(installation.tritonserver, folder, self._host, self._ports)
        command += self._repository_flags(folder, models)
        self._stopping = False
        self._run = run
        run.start(installation.python, command, environment(installation, folder, self._threads))

    def _repository_flags(self, folder: RunFolder, models: Models) -> list[str]:
        # Models that are put there later can be loaded too, which a folder of links would hide.
        served = models.root if self._model_control == "explicit" else folder.models
        restrictions = restriction_flags(self._admin_key) if self._admin_key else []
        return [
            f"--model-repository={served}",
            *control_flags(self._model_control, models.names),
            *restrictions,
        ]

    def _await_ready(self, names: Sequence[str]) -> None:
        run = self._started()
        paths = ["/v2/health/ready", *(f"/v2/models/{name}/ready" for name in names)]
        deadline = time.monotonic() + self._startup_timeout_s
        while not (self._listens() and all(self._answers(path) for path in paths)):
            if run.poll() is not None:
                raise explain(run.log(), "The embedded server ended while it started.")
            if time.monotonic() > deadline:
                raise explain(
                    run.log(),
                    f"The embedded server was not ready within {self._startup_timeout_s:g} s.",
                )
            time.sleep(_POLL_S)

    def _listens(self) -> bool:
        """Whether the server has all its ports; what answers at one may be another program."""
        return listening_ports(self._started().pid).issuperset(self._ports)

    def _answers(self, path: str) -> bool:
        connection = http.client.HTTPConnection(reachable(self._host), self._ports[0], timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _unexpected_end(code: int) -> str:
    killed = " It was killed, perhaps because memory ran out." if code == _KILLED else ""
    return f"The embedded server ended unexpectedly (status {code}).{killed}"


def server_command(
    tritonserver: Path, folder: RunFolder, host: str, ports: tuple[int, int, int]
) -> list[str]:
    """The command line of the server, but for what it serves and to whom."""
    http_port, grpc_port, metrics_port = ports
    return [
        str(tritonserver),
        f"--backend-directory={folder.backends}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix(folder.path.name)}",
        "--disable-auto-complete-config",
        "--exit-on-error=true",
        f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
        "--allow-gpu-metrics=false",
        f"--http-address={host}",
        f"--http-port={http_port}",
        f"--grpc-address={host}",
        f"--grpc-port={grpc_port}",
        f"--metrics-address={host}",
        f"--metrics-port={metrics_port}",
    ]

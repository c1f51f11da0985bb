"""The embedded server: real servers, real models, tiny graphs."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import tritonclient.grpc
import tritonclient.http
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import InferenceServerClient as Grpc

import triton_sam
from triton_sam import processors
from triton_sam.errors import (
    EmbeddedServerError,
    InstallError,
    LibpythonMissingError,
    ModelLoadError,
    PortInUseError,
    RepositoryError,
    UnsupportedPlatformError,
)
from triton_sam.server import EmbeddedServer, host, install
from triton_sam.server.diagnosis import explain
from triton_sam.server.ports import choose_ports
from triton_sam.server.supervisor import RUN_VARIABLE, SHARED_MEMORY, processes, shm_prefix

AFFINE_CONFIG = """
backend: "onnxruntime"
max_batch_size: 0
input [
  { name: "x" data_type: TYPE_FP32 dims: [-1, 2] },
  { name: "shift" data_type: TYPE_FP32 dims: [-1, -1] optional: true }
]
output [
  { name: "sum" data_type: TYPE_FP32 dims: [-1, 2] },
  { name: "square" data_type: TYPE_FP32 dims: [-1, 2] }
]
instance_group [{ count: 1 }]
dynamic_batching { }
"""

SLOW_CONFIG = """
backend: "onnxruntime"
max_batch_size: 0
input [{ name: "x" data_type: TYPE_FP32 dims: [-1, 600] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [-1, 600] }]
instance_group [{ count: 1 }]
dynamic_batching { }
parameters { key: "intra_op_thread_count" value: { string_value: "1" } }
"""


def tensor(name: str, *dims: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def write_model(repository: Path, name: str, graph: onnx.GraphProto, config: str) -> Path:
    """Put a model into ``repository``; gives the path of its ONNX file."""
    file = repository / name / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, file)
    (repository / name / "config.pbtxt").write_text(config)
    return file


def write_affine(repository: Path, name: str = "affine", config: str = AFFINE_CONFIG) -> Path:
    """sum = x + shift, square = x * x; shift is 10 unless it is given."""
    ten = numpy_helper.from_array(np.full((1, 1), 10, np.float32), "shift")
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "shift"], ["sum"]),
            helper.make_node("Mul", ["x", "x"], ["square"]),
        ],
        name,
        [tensor("x", "n", 2), tensor("shift", "rows", "columns")],
        [tensor("sum", "n", 2), tensor("square", "n", 2)],
        [ten],
    )
    return write_model(repository, name, graph, config)


def write_slow(repository: Path, layers: int = 60) -> Path:
    """y = x, after enough multiplications with the identity to take some ten milliseconds."""
    identity = numpy_helper.from_array(np.eye(600, dtype=np.float32), "identity")
    names = ["x", *(f"x{i}" for i in range(1, layers)), "y"]
    nodes = [
        helper.make_node("MatMul", [before, "identity"], [after])
        for before, after in itertools.pairwise(names)
    ]
    graph = helper.make_graph(
        nodes, "slow", [tensor("x", "n", 600)], [tensor("y", "n", 600)], [identity]
    )
    return write_model(repository, "slow", graph, SLOW_CONFIG)


def grpc_input(name: str, array: np.ndarray) -> tritonclient.grpc.InferInput:
    given = tritonclient.grpc.InferInput(name, list(array.shape), "FP32")
    given.set_data_from_numpy(array)
    return given


def grpc_infer(
    client: Grpc, outputs: list[str], **inputs: np.ndarray
) -> tritonclient.grpc.InferResult:
    return client.infer(
        "affine",
        [grpc_input(name, array) for name, array in inputs.items()],
        outputs=[tritonclient.grpc.InferRequestedOutput(name) for name in outputs],
    )


def metric(server: EmbeddedServer, name: str, *labels: str) -> int:
    """The sum of a metric over the lines that have all of ``labels``."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    lines = [line for line in lines if line.startswith(name + "{")]
    return sum(int(line.split()[-1]) for line in lines if all(part in line for part in labels))


def run_of(pid: int) -> str:
    """The name of the run that the server ``pid`` belongs to."""
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
    match = re.search(rf"{RUN_VARIABLE}=(\w+)", environment)
    assert match is not None
    return match[1]


def remains(home: Path, run: str) -> list[str]:
    """Everything that is there of a run: processes, shared memory, files, supervisor."""
    found = [f"process {pid}" for pid in processes(run)]
    found += map(str, SHARED_MEMORY.glob(shm_prefix(run) + "*"))
    found += map(str, (home / "runs").glob(run))
    found += [f"supervisor {pid}" for pid in supervisors(run)]
    return found


def supervisors(run: str) -> list[int]:
    """The processes whose command line names the folder of ``run``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(argument.endswith(f"/runs/{run}".encode()) for argument in arguments):
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="session")
def home() -> Path:
    """The folder with the installed server: the user's own, so that it is installed once."""
    return install.ensure_installed(quiet=True).path.parent


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    write_affine(root)
    write_slow(root)
    return root


@pytest.fixture(scope="module")
def server(home: Path, repository: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(repository, home=home) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: EmbeddedServer) -> Iterator[Grpc]:
    with Grpc(server.grpc_url) as connected:
        yield connected


X = np.array([[1, 2], [3, 4], [-5, 0.5]], np.float32)


class TestInference:
    def test_default_of_an_optional_input_broadcasts(self, client: Grpc) -> None:
        result = grpc_infer(client, ["sum"], x=X)
        np.testing.assert_array_equal(result.as_numpy("sum"), X + 10)

    def test_a_given_optional_input_replaces_the_default_for_that_call(self, client: Grpc) -> None:
        shift = np.array([[100, -1]], np.float32)
        result = grpc_infer(client, ["sum"], x=X, shift=shift)
        np.testing.assert_array_equal(result.as_numpy("sum"), X + shift)
        np.testing.assert_array_equal(grpc_infer(client, ["sum"], x=X).as_numpy("sum"), X + 10)

    def test_only_the_requested_outputs_come(self, client: Grpc) -> None:
        result = grpc_infer(client, ["square"], x=X)
        np.testing.assert_array_equal(result.as_numpy("square"), X * X)
        assert result.as_numpy("sum") is None

    def test_http(self, server: EmbeddedServer) -> None:
        given = tritonclient.http.InferInput("x", [3, 2], "FP32")
        given.set_data_from_numpy(X)
        with tritonclient.http.InferenceServerClient(server.http_url) as http:
            result = http.infer("affine", [given])
        np.testing.assert_array_equal(result.as_numpy("sum"), X + 10)
        np.testing.assert_array_equal(result.as_numpy("square"), X * X)

    def test_zero_length_axis(self, client: Grpc) -> None:
        result = grpc_infer(client, ["sum"], x=np.zeros((0, 2), np.float32))
        assert result.as_numpy("sum").shape == (0, 2)

    def test_large_tensors_arrive_whole(self, client: Grpc) -> None:
        x = np.arange(4_000_000, dtype=np.float32).reshape(-1, 2)
        np.testing.assert_array_equal(grpc_infer(client, ["sum"], x=x).as_numpy("sum"), x + 10)

    def test_a_request_that_fails_says_why_and_the_model_goes_on(self, client: Grpc) -> None:
        with pytest.raises(tritonclient.grpc.InferenceServerException, match="3 by 7"):
            grpc_infer(client, ["sum"], x=X, shift=np.zeros((7, 2), np.float32))
        np.testing.assert_array_equal(grpc_infer(client, ["sum"], x=X).as_numpy("sum"), X + 10)

    def test_cancelled_requests_are_not_run(self, server: EmbeddedServer, client: Grpc) -> None:
        x = np.random.default_rng(0).standard_normal((400, 600), np.float32)
        given = [grpc_input("x", x)]
        np.testing.assert_array_equal(client.infer("slow", given).as_numpy("y"), x)
        before = metric(server, "nv_inference_exec_count", 'model="slow"')
        ended: list[object] = []
        calls = [
            client.async_infer("slow", given, lambda result, error: ended.append(error))
            for _ in range(40)
        ]
        for call in calls[:-1]:
            call.cancel()
        assert wait_until(lambda: len(ended) == 40, timeout_s=30)
        client.infer("slow", given)
        executed = metric(server, "nv_inference_exec_count", 'model="slow"') - before
        assert 2 <= executed <= 20


class TestLifecycle:
    def test_two_servers_at_once_on_ports_of_their_own(
        self, home: Path, server: EmbeddedServer, tmp_path: Path
    ) -> None:
        write_affine(tmp_path, "other")
        with EmbeddedServer(tmp_path, home=home) as other:
            ports = {url.split(":")[-1] for url in (server.http_url, server.grpc_url)}
            assert ports.isdisjoint({other.http_url.split(":")[-1], other.grpc_url.split(":")[-1]})
            run = run_of(other.pid or 0)
            with Grpc(other.grpc_url) as second:
                assert second.is_model_ready("other")
                assert not second.is_model_ready("affine")
            assert len(remains(home, run)) >= 4
        assert remains(home, run) == []
        assert server.running

    def test_stop_is_idempotent_and_a_stopped_server_can_start_again(
        self, home: Path, tmp_path: Path
    ) -> None:
        write_affine(tmp_path)
        embedded = EmbeddedServer(tmp_path, home=home, log_file=tmp_path / "server.log")
        embedded.stop()
        with embedded:
            first = run_of(embedded.pid or 0)
        embedded.stop()
        assert embedded.wait() == 0
        assert embedded.pid is None
        assert remains(home, first) == []
        with embedded.start():
            assert run_of(embedded.pid or 0) != first
        assert (tmp_path / "server.log").read_text().count("Started HTTPService") == 2

    def test_killed_server_is_noticed_and_cleaned_up(self, home: Path, tmp_path: Path) -> None:
        write_affine(tmp_path)
        embedded = EmbeddedServer(tmp_path, home=home).start()
        run = run_of(embedded.pid or 0)
        os.kill(embedded.pid or 0, signal.SIGKILL)
        with pytest.raises(EmbeddedServerError, match=r"status 137.*The end of its log"):
            embedded.wait()
        assert "Started HTTPService" in embedded.log()
        assert remains(home, run) == []

    def test_killed_supervisor_takes_the_server_along(self, home: Path, tmp_path: Path) -> None:
        write_affine(tmp_path)
        embedded = EmbeddedServer(tmp_path, home=home).start()
        run = run_of(embedded.pid or 0)
        (supervisor,) = supervisors(run)
        os.kill(supervisor, signal.SIGKILL)
        assert wait_until(lambda: list(processes(run)) == [])
        embedded.stop()
        assert remains(home, run) == []

    def test_killed_caller_leaves_nothing(self, home: Path, tmp_path: Path) -> None:
        write_affine(tmp_path)
        caller, run = start_caller(tmp_path, home)
        caller.kill()
        caller.wait()
        assert wait_until(lambda: remains(home, run) == []), remains(home, run)

    def test_next_start_removes_what_a_crash_left(self, home: Path, tmp_path: Path) -> None:
        write_affine(tmp_path)
        caller, run = start_caller(tmp_path, home)
        (supervisor,) = supervisors(run)
        os.kill(supervisor, signal.SIGKILL)
        caller.kill()
        caller.wait()
        leftover = SHARED_MEMORY / f"{shm_prefix(run)}leftover"
        leftover.touch()
        assert (home / "runs" / run).is_dir()
        with EmbeddedServer(tmp_path, home=home):
            assert remains(home, run) == []

    def test_before_start_there_is_no_address(self, tmp_path: Path) -> None:
        with pytest.raises(EmbeddedServerError, match="was not started"):
            _ = EmbeddedServer(tmp_path).http_url

    def test_taken_port(self, home: Path, repository: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(PortInUseError, match=f"Port {port} is already in use"):
                EmbeddedServer(repository, home=home, grpc_port=port).start()

    def test_port_lost_to_a_faster_program_is_chosen_again(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_affine(tmp_path)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            lost = taken.getsockname()[1]
            choices: list[tuple[int, int, int]] = []

            def choose(address: str, requested: tuple[int, int, int]) -> tuple[int, int, int]:
                ports = choose_ports(address, requested)
                choices.append(ports if choices else (ports[0], ports[1], lost))
                return choices[-1]

            monkeypatch.setattr("triton_sam.server.embedded.choose_ports", choose)
            with EmbeddedServer(tmp_path, home=home) as running:
                assert running.metrics_url == f"http://127.0.0.1:{choices[1][2]}/metrics"

    def test_log_file_that_cannot_be_written(self, home: Path, repository: Path) -> None:
        with pytest.raises(EmbeddedServerError, match="cannot be written"):
            EmbeddedServer(repository, home=home, log_file=repository).start()

    def test_host_without_address(self, repository: Path) -> None:
        with pytest.raises(EmbeddedServerError, match="IPv4 address"):
            EmbeddedServer(repository, host="::1")

    def test_address_of_another_machine(self, home: Path, repository: Path) -> None:
        with pytest.raises(EmbeddedServerError, match=r"cannot listen on 192\.0\.2\.1"):
            EmbeddedServer(repository, home=home, host="192.0.2.1").start()


def start_caller(repository: Path, home: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that runs a server, and the name of the run."""
    script = (
        "import sys, time; from triton_sam.server import EmbeddedServer\n"
        "server = EmbeddedServer(sys.argv[1], home=sys.argv[2]).start()\n"
        "print(server.pid, flush=True); time.sleep(60)\n"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", script, str(repository), str(home)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    with caller.stdout or pytest.fail("no pipe") as stdout:
        return caller, run_of(int(stdout.readline()))


class TestBrokenModels:
    def test_every_refused_model_is_named_with_its_cause(self, home: Path, tmp_path: Path) -> None:
        def affine(name: str, old: str, new: str) -> None:
            assert old in AFFINE_CONFIG
            write_affine(tmp_path, name, AFFINE_CONFIG.replace(old, new, 1))

        write_affine(tmp_path, "good")
        write_affine(tmp_path, "corrupt").write_bytes(b"not a graph")
        affine("wrong_name", '"square"', '"cube"')
        affine("wrong_type", "TYPE_FP32 dims: [-1, 2]", "TYPE_INT64 dims: [-1, 2]")
        affine("wrong_dim", "dims: [-1, 2] }", "dims: [-1, 3] }")
        affine("wrong_rank", "dims: [-1, 2] }", "dims: [-1, 2, 1] }")
        affine("not_optional", "optional: true", "")
        affine("too_optional", "dims: [-1, 2] }", "dims: [-1, 2] optional: true }")
        affine("no_input", '{ name: "x" data_type: TYPE_FP32 dims: [-1, 2] },', "")
        with pytest.raises(ModelLoadError) as caught:
            EmbeddedServer(tmp_path, home=home).start()
        message = str(caught.value)
        for expected in (
            "'corrupt': model.onnx cannot be loaded: [ONNXRuntimeError] : 7 : INVALID_PROTOBUF",
            "'wrong_name': the configuration has the output 'cube', and the graph has only 'sum'",
            "'wrong_type': the input 'x' is TYPE_INT64 in the configuration and tensor(float)",
            "'wrong_dim': the input 'x' has dims [-1, 3] in the configuration and [-1, 2] in",
            "'wrong_rank': the input 'x' has dims [-1, 2, 1] in the configuration and [-1, 2]",
            "'not_optional': the input 'shift' has a default in the graph and is not optional",
            "'too_optional': the input 'x' is optional in the configuration and has no default",
            "'no_input': the graph needs the input 'x', which the configuration does not have",
        ):
            assert expected in message
        assert "'good'" not in message
        assert "At:" not in message

    def test_unreadable_configuration(self, home: Path, tmp_path: Path) -> None:
        write_affine(tmp_path, "typo", AFFINE_CONFIG + "inputs [ ]")
        with pytest.raises(ModelLoadError, match=r"'typo': .*no field named \"inputs\""):
            EmbeddedServer(tmp_path, home=home).start()

    def test_models_without_files_are_left_out_and_said(
        self, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_affine(tmp_path)
        write_affine(tmp_path, "absent").unlink()
        ensemble = tmp_path / "both" / "1"
        ensemble.mkdir(parents=True)
        (ensemble.parent / "config.pbtxt").write_text(
            'platform: "ensemble"\n'
            'ensemble_scheduling { step [{ model_name: "absent" model_version: -1 }] }\n'
        )
        with (
            caplog.at_level(logging.WARNING, logger="triton_sam"),
            EmbeddedServer(tmp_path, home=home) as running,
            Grpc(running.grpc_url) as connected,
        ):
            assert [m.name for m in connected.get_model_repository_index().models] == ["affine"]
        assert "Model absent is not served: absent/1/model.onnx is missing." in caplog.text
        assert "Model both is not served: it is made of absent." in caplog.text

    def test_nothing_to_serve(self, tmp_path: Path) -> None:
        with pytest.raises(RepositoryError, match=r"no model repository at .*triton-sam export"):
            EmbeddedServer(tmp_path / "nowhere").start()
        with pytest.raises(RepositoryError, match=r"is empty.*triton-sam demo"):
            EmbeddedServer(tmp_path).start()
        write_affine(tmp_path).unlink()
        with pytest.raises(RepositoryError, match=r"affine: affine/1/model\.onnx is"):
            EmbeddedServer(tmp_path).start()

    def test_missing_system_library_is_named(self) -> None:
        log = "tritonserver: error while loading shared libraries: libz.so.1: cannot open\n"
        assert "system library libz.so.1" in str(explain(log, "It ended."))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend's module; Triton's side of it is only there inside the server."""
    utils = ModuleType("triton_python_backend_utils")
    monkeypatch.setattr(utils, "TritonModelException", ValueError, raising=False)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    monkeypatch.setenv("TRITON_SAM_PACKAGE", str(Path(triton_sam.__file__).parent))
    path = Path(host.__file__).with_name("backends") / "onnxruntime" / "model.py"
    spec = importlib.util.spec_from_file_location("backend_model", path)
    if spec is None or spec.loader is None:
        pytest.fail(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestBackend:
    def test_threads(self, backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        config = {"parameters": {"intra_op_thread_count": {"string_value": "3"}}}
        assert backend.thread_count(config, "intra_op_thread_count", 8) == 3
        assert backend.thread_count(config, "inter_op_thread_count", 8) == 8
        monkeypatch.setenv("TRITON_SAM_THREADS", "5")
        assert backend.default_threads() == 5
        config["parameters"]["intra_op_thread_count"]["string_value"] = "many"
        with pytest.raises(ValueError, match="'many', expected a whole number"):
            backend.thread_count(config, "intra_op_thread_count", 8)

    def test_it_leaves_memory_and_processors_to_others(self, backend: ModuleType) -> None:
        # As the predictor's sessions: without these two SAM 3's encoder takes 11.7 GB, not 7.4,
        # and each click keeps the processors busy for as long again.
        options = backend.options_of({}, on_cpu=True)
        assert not options.enable_mem_pattern
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
        assert options.inter_op_num_threads == 1
        assert backend.options_of({}, on_cpu=False).enable_mem_pattern

    def test_two_logical_processors_of_a_core_count_once(self, tmp_path: Path) -> None:
        for number, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
            topology = tmp_path / f"cpu{number}" / "topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(siblings + "\n")
        assert len(processors.cores(tmp_path, [0, 1, 2, 3])) == 2
        assert len(processors.cores(tmp_path, [0, 2])) == 1
        assert len(processors.cores(tmp_path, [8, 9])) == 2

    @pytest.mark.parametrize(("text", "count"), [("max 100000", 8), ("150000 100000", 2)])
    def test_processor_limit_of_a_container(self, tmp_path: Path, text: str, count: int) -> None:
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert processors.cpu_quota(tmp_path / "cpu.max", 8) == count
        assert processors.cpu_quota(tmp_path / "absent", 8) == 8

    def test_providers(self, backend: ModuleType) -> None:
        both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        cuda = ("CUDAExecutionProvider", {"device_id": 1})
        assert backend.execution_providers("GPU", "1", both) == [cuda, "CPUExecutionProvider"]
        assert backend.execution_providers("CPU", "0", both) == ["CPUExecutionProvider"]
        assert backend.execution_providers("GPU", "0", both[1:]) == ["CPUExecutionProvider"]


def interpreter(version: tuple[int, int], *, has_venv: bool = True) -> host.Interpreter:
    name = Path(f"/opt/python{version[0]}.{version[1]}")
    return host.Interpreter(name / "bin" / "python3", version, name, name / "lib", has_venv)


class TestHost:
    @pytest.mark.parametrize(
        ("machine", "found"),
        [
            (("Darwin", "arm64", ("", "")), "Darwin arm64"),
            (("Linux", "aarch64", ("glibc", "2.39")), "Linux aarch64"),
            (("Linux", "x86_64", ("", "")), "musl"),
            (("Linux", "x86_64", ("glibc", "2.31")), r"glibc 2\.31"),
        ],
    )
    def test_unsupported_platforms(
        self, machine: tuple[str, str, tuple[str, str]], found: str
    ) -> None:
        with pytest.raises(UnsupportedPlatformError, match=f"{found}.*docker compose up"):
            host.check_platform(*machine)

    def test_supported_platform(self) -> None:
        host.check_platform("Linux", "x86_64", ("glibc", "2.35"))

    def test_missing_libpython(self) -> None:
        with pytest.raises(LibpythonMissingError, match=r"libpython3\.11\.so\.1\.0.*apt install"):
            host.find_libpython(interpreter((3, 11)), [])

    def test_libpython_of_this_interpreter(self) -> None:
        found, library = host.choose_interpreter(host.installed_interpreters())
        assert library.name.startswith(f"libpython{found.version[0]}.{found.version[1]}.so")

    def test_32_bit_libraries_do_not_count(self, tmp_path: Path) -> None:
        wanted = interpreter((3, 12))
        (tmp_path / wanted.soname).write_bytes(b"\x7fELF\x01")
        with pytest.raises(LibpythonMissingError):
            host.find_libpython(wanted, [tmp_path])
        (tmp_path / wanted.soname).write_bytes(b"\x7fELF\x02")
        assert host.find_libpython(wanted, [tmp_path]) == tmp_path / wanted.soname

    def test_the_first_usable_interpreter_is_taken(self) -> None:
        def find(candidate: host.Interpreter) -> Path:
            return host.find_libpython(candidate, []) if candidate.version == (3, 12) else Path("/")

        candidates = [interpreter((3, 13)), interpreter((3, 12)), interpreter((3, 10))]
        assert host.choose_interpreter(candidates, find)[0].version == (3, 10)
        with pytest.raises(LibpythonMissingError, match=r"3\.12"):
            host.choose_interpreter(candidates[:2], find)
        with pytest.raises(UnsupportedPlatformError, match=r"only Python 3\.13 was found"):
            host.choose_interpreter(candidates[:1], find)

    def test_missing_venv_module(self) -> None:
        with pytest.raises(InstallError, match=r"apt install python3\.11-venv"):
            host.choose_interpreter([interpreter((3, 11), has_venv=False)], lambda _: Path("/"))


def write_wheel(folder: Path) -> Path:
    """A package without files, as a wheel."""
    wheel = folder / "nothing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "nothing-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: nothing\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


class TestInstall:
    def test_wrong_hash_leaves_nothing(self, tmp_path: Path) -> None:
        wheel = write_wheel(tmp_path)
        requirements = tmp_path / "requirements.txt"
        requirements.write_text(f"nothing @ {wheel.as_uri()} --hash=sha256:{'0' * 64}\n")
        with pytest.raises(InstallError, match="SHA-256 differs"):
            install.ensure_installed(tmp_path / "home", requirements=requirements, quiet=True)
        assert [path.name for path in (tmp_path / "home").iterdir()] == ["install.lock"]

    def test_unreachable_index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(name, raising=False)
        requirements = tmp_path / "requirements.txt"
        requirements.write_text(f"nothing==1.0 --hash=sha256:{'0' * 64}\n")
        with pytest.raises(InstallError, match=r"nothing==1\.0\. Check the network"):
            install.ensure_installed(tmp_path / "home", requirements=requirements, quiet=True)
        assert [path.name for path in (tmp_path / "home").iterdir()] == ["install.lock"]

    def test_low_disk_space(self, tmp_path: Path) -> None:
        with pytest.raises(InstallError, match=r"takes 1000000000 MB.*TRITON_SAM_HOME"):
            install.ensure_installed(tmp_path, needed_mb=10**9, quiet=True)
        assert [path.name for path in tmp_path.iterdir()] == ["install.lock"]

    def test_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InstallError, match="TRITON_SAM_HOME"):
            install.ensure_installed(tmp_path / "file" / "home", quiet=True)

    def test_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.delenv("TRITON_SAM_HOME", raising=False)
        assert install.default_home() == tmp_path / "triton-sam"
        monkeypatch.setenv("TRITON_SAM_HOME", str(tmp_path / "elsewhere"))
        assert install.default_home() == tmp_path / "elsewhere"

    def test_importing_the_server_imports_no_dependency(self) -> None:
        script = (
            "import json, sys, types\n"
            "package = types.ModuleType('triton_sam')  # without what its __init__ imports\n"
            "package.__path__ = [sys.argv[1]]\n"
            "sys.modules['triton_sam'] = package\n"
            "import triton_sam.server\n"
            "third_party = {'numpy', 'onnxruntime', 'torch', 'tritonclient'}\n"
            "print(json.dumps(sorted(third_party & set(sys.modules))))\n"
        )
        package = Path(host.__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", script, str(package)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == []

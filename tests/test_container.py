"""The container: compose file, Dockerfile, and its command on the embedded server's binary."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Exported
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from triton_sam import SAM2TritonClient, cli
from triton_sam.aliases import write_aliases
from triton_sam.demo import demo_photo, demo_repository
from triton_sam.errors import AdminError, RepositoryError
from triton_sam.repository import write_configs
from triton_sam.server import EmbeddedServer, install
from triton_sam.server.container import server_command
from triton_sam.server.control import ADMIN_APIS, ADMIN_HEADER
from triton_sam.server.models import find_models
from triton_sam.server.ports import choose_ports
from triton_sam.server.run import RunFolder, environment
from triton_sam.server.supervisor import RUN_VARIABLE, shm_prefix
from triton_sam.specs import FAMILIES

ROOT = Path(__file__).parent.parent
COMPOSE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
IMAGE = "nvcr.io/nvidia/tritonserver:26.10-py3"
KEY = "0123456789abcdef" * 4
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")

# Flags that came after the embedded server's version 2.51, which is container 24.10.
NEWER = {
    "--http-max-input-size": "2.59, container 25.06",
    "--allow-client-shm": "2.68, container 26.04",
}


def compose(**variables: str) -> dict[str, Any]:
    """The compose file with ``variables`` in it, and the defaults of the others."""
    text = VARIABLE.sub(lambda match: variables.get(match[1]) or match[2], COMPOSE)
    assert "$" not in text
    return dict(yaml.safe_load(text))


def service(name: str = "triton", **variables: str) -> dict[str, Any]:
    return dict(compose(**variables)["services"][name])


def flag_name(flag: str) -> str:
    return flag.partition("=")[0]


class TestCompose:
    def test_it_fits_the_schema_of_the_compose_specification(self, tmp_path: Path) -> None:
        with_defaults = tmp_path / "docker-compose.yml"
        with_defaults.write_text(yaml.safe_dump(compose()))
        check = [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.compose-spec",
        ]
        subprocess.run([*check, str(ROOT / "docker-compose.yml"), str(with_defaults)], check=True)

    def test_every_variable_is_in_the_example_with_its_default(self) -> None:
        example = (ROOT / ".env.example").read_text()
        named = dict(re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE))
        used = VARIABLE.findall(COMPOSE)
        assert dict(used) == named
        assert len(set(used)) == len(named), "a variable has two defaults"

    def test_the_image_is_the_pinned_one_unless_told_otherwise(self) -> None:
        assert service()["image"] == IMAGE
        assert f"ARG TRITON_IMAGE={IMAGE}\n" in DOCKERFILE
        assert service(TRITON_SAM_IMAGE="triton-sam")["image"] == "triton-sam"

    @pytest.mark.parametrize("name", ["triton", "triton-cpu"])
    def test_it_runs_without_privileges(self, name: str) -> None:
        found = service(name)
        assert found["user"] == "1000:1000"
        assert found["cap_drop"] == ["ALL"]
        assert found["security_opt"] == ["no-new-privileges:true"]
        assert found["volumes"][0] == "./model_repository:/models:ro"
        assert all(volume.endswith(":ro") for volume in found["volumes"])

    def test_it_listens_on_this_machine_unless_told_otherwise(self) -> None:
        assert service()["ports"] == [f"127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002)]
        open_to_all = service(TRITON_SAM_BIND="0.0.0.0", TRITON_SAM_HTTP_PORT="80")["ports"]
        assert open_to_all[:2] == ["0.0.0.0:80:8000", "0.0.0.0:8001:8001"]

    def test_a_gpu_is_reserved_but_for_the_processor(self) -> None:
        devices = service()["deploy"]["resources"]["reservations"]["devices"]
        assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
        found = service("triton-cpu")
        assert found["profiles"] == ["cpu"]
        assert "deploy" not in found
        assert found["command"] == service()["command"]

    def test_a_stop_waits_for_what_runs(self) -> None:
        flags = dict(flag.split("=", 1) for flag in service()["command"] if "=" in flag)
        assert int(flags["--exit-timeout-secs"]) < int(service()["stop_grace_period"].rstrip("s"))

    def test_model_control_is_off_and_models_are_as_written(self) -> None:
        assert "--model-control-mode=none" in service()["command"]
        explicit = service(TRITON_SAM_MODEL_CONTROL="explicit")["command"]
        assert "--model-control-mode=explicit" in explicit
        assert "--disable-auto-complete-config" in explicit

    def test_clients_share_memory_only_if_that_is_said(self) -> None:
        assert "--allow-client-shm=false" in service()["command"]
        assert service()["ipc"] == "private"
        allowed = service(TRITON_SAM_CLIENT_SHM="true", TRITON_SAM_IPC="host")
        assert "--allow-client-shm=true" in allowed["command"] and allowed["ipc"] == "host"

    def test_it_is_restarted_and_has_what_models_need(self) -> None:
        found = service()
        assert found["restart"] == "unless-stopped"
        assert found["init"] is True
        assert found["shm_size"] == "2gb"
        assert found["ulimits"] == {"memlock": -1, "stack": 64 << 20, "nofile": 1 << 16}
        # The largest request: one embedding of SAM 3, in float32, and some prompts.
        embedding = sum(math.prod(t.dims[1:]) * 4 for t in FAMILIES["sam3"].encoder.outputs)
        (limit,) = (f for f in found["command"] if flag_name(f) == "--http-max-input-size")
        assert int(limit.partition("=")[2]) > 2 * embedding > 40e6
        metrics = [f for f in found["command"] if flag_name(f) == "--metrics-config"]
        assert "--metrics-config=histogram_latencies=true" in metrics

    def test_the_log_is_rotated(self) -> None:
        assert service()["logging"]["options"] == {"max-size": "10m", "max-file": "5"}

    def test_secrets_come_as_a_file_and_what_is_mounted_is_there(self) -> None:
        secret = compose(TRITON_SAM_ADMIN_KEY_FILE="./admin.key")["secrets"]["admin_key"]
        assert secret == {"file": "./admin.key"}
        assert compose()["secrets"]["admin_key"] == {"file": os.devnull}
        assert service()["environment"]["TRITON_SAM_ADMIN_KEY_FILE"] == "/run/secrets/admin_key"
        for volume in service()["volumes"]:
            assert (ROOT / volume.split(":")[0]).exists()


class TestDockerfile:
    def test_the_linter_has_nothing_to_say(self) -> None:
        hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
        subprocess.run([str(hadolint), str(ROOT / "Dockerfile")], check=True)

    def test_it_copies_what_compose_mounts_and_the_context_has_it(self) -> None:
        ignore = (ROOT / ".dockerignore").read_text().splitlines()
        copied = dict(re.findall(r"^COPY (\S+) (\S+)$", DOCKERFILE, re.MULTILINE))
        for volume in service()["volumes"][1:]:
            source, target, _ = volume.removeprefix("./").split(":")
            assert f"!{Path(source).parts[0]}" in ignore
            assert target == copied[source].rstrip("/") + (
                f"/{Path(source).name}" if copied[source].endswith("/") else ""
            )

    def test_its_backends_are_those_that_the_image_does_not_have(self, tmp_path: Path) -> None:
        """The loop of the RUN instruction, in folders of the test's."""
        match = re.search(r"^RUN (for (?:.*\\\n)+.*)$", DOCKERFILE, re.MULTILINE)
        assert match is not None
        source, target = tmp_path / "backends", tmp_path / "opt"
        for name in ("onnxruntime", "another"):
            (source / name).mkdir(parents=True)
            (source / name / "model.py").touch()
        target.mkdir()
        script = match[1].replace("\\\n", "")
        script = script.replace("/opt/triton-sam/triton_sam/server/backends", str(source))
        script = script.replace("/opt/tritonserver/backends", str(target))
        subprocess.run(["sh", "-euc", script], check=True)
        assert [str(path.relative_to(target)) for path in target.rglob("*.py")] == [
            "another/model.py"
        ]


class TestCommand:
    def command(self, *flags: str, **variables: str) -> list[str]:
        return server_command([f"--model-repository={demo_repository()}", *flags], variables)

    def test_without_a_key_nobody_knows_it(self) -> None:
        first, second = (
            [flag for flag in self.command() if "restricted" in flag] for _ in range(2)
        )
        assert first != second
        for flag in first:
            assert re.fullmatch(rf"\S+={','.join(ADMIN_APIS)}:{ADMIN_HEADER}=[0-9a-f]{{64}}", flag)

    def test_shared_memory_takes_no_key_where_clients_may_use_it(self) -> None:
        flags = [f for f in self.command("--allow-client-shm=true") if "restricted" in f]
        assert len(flags) == 2
        assert all("shared-memory" not in f and "model-repository,model-config" in f for f in flags)

    def test_none_serves_links_to_what_is_whole(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = Path(shutil.copytree(demo_repository(), tmp_path / "models"))
        (root / "sam2_encoder" / "1" / "model.onnx").unlink()
        command = server_command([f"--model-repository={root}", "--log-info=true"], {})
        (served,) = (Path(f.partition("=")[2]) for f in command if "model-repository=" in f)
        assert [path.name for path in served.iterdir()] == ["sam2_decoder"]
        assert (served / "sam2_decoder").resolve() == root / "sam2_decoder"
        assert command[-1] == "--log-info=true"
        assert "sam2_encoder is not served" in capsys.readouterr().err

    def test_explicit_serves_the_repository_and_names_what_is_whole(self) -> None:
        command = self.command("--model-control-mode=explicit", TRITON_SAM_ADMIN_KEY=KEY)
        assert f"--model-repository={demo_repository()}" in command
        assert [flag for flag in command if "load-model" in flag] == [
            "--load-model=sam2_decoder",
            "--load-model=sam2_encoder",
            "--load-model=sam2_predictor",
        ]
        assert command.count("--model-control-mode=explicit") == 1

    def test_explicit_without_a_key(self) -> None:
        with pytest.raises(AdminError, match="needs a key"):
            self.command("--model-control-mode=explicit", TRITON_SAM_ADMIN_KEY_FILE=os.devnull)

    def test_some_models_only(self) -> None:
        explicit = {"TRITON_SAM_ADMIN_KEY": KEY, "TRITON_SAM_MODELS": "sam9_*, *_encoder"}
        command = self.command("--model-control-mode=explicit", **explicit)
        assert [f for f in command if "load-model" in f] == ["--load-model=sam2_encoder"]
        with pytest.raises(RepositoryError, match="fits none of sam2_decoder, sam2_encoder"):
            self.command(TRITON_SAM_MODELS="sam9_*")

    def test_an_alias_brings_its_encoder(self, tmp_path: Path) -> None:
        root = Path(shutil.copytree(demo_repository(), tmp_path / "models"))
        write_aliases(root)
        command = server_command(
            [f"--model-repository={root}"], {"TRITON_SAM_MODELS": "*_large_encoder"}
        )
        (served,) = (Path(f.partition("=")[2]) for f in command if "model-repository=" in f)
        names = ["sam2.1_large_encoder", "sam2_encoder"]
        assert sorted(path.name for path in served.iterdir()) == names

    def test_an_alias_without_its_encoder_is_left_out(self, tmp_path: Path) -> None:
        root = Path(shutil.copytree(demo_repository(), tmp_path / "models"))
        write_aliases(root)
        shutil.rmtree(root / "sam2_encoder")
        found = find_models(root)
        assert found.names == ("sam2_decoder", "sam2_preprocess")
        assert found.skipped == {
            "sam2.1_large_encoder": "it is made of sam2_encoder",
            "sam2_encoder_jpeg": "it is made of sam2_encoder",
            "sam2_predictor": "it runs sam2_encoder",
        }

    def test_predictors_are_left_out_where_python_lacks_their_packages(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("triton_sam.server.container.find_spec", lambda name: None)
        explicit = {"TRITON_SAM_ADMIN_KEY": KEY}
        command = self.command("--model-control-mode=explicit", **explicit)
        assert [f.partition("=")[2] for f in command if "load-model" in f] == [
            "sam2_decoder",
            "sam2_encoder",
        ]
        said = capsys.readouterr().err
        assert "sam2_predictor is not served: this image has no numpy, onnxruntime, PIL" in said

    def test_other_instances_than_configured_are_pointed_out(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.command(TRITON_SAM_INSTANCES="1")
        assert capsys.readouterr().err == ""
        self.command(TRITON_SAM_INSTANCES="2")
        assert "triton-sam configure --instances 2" in capsys.readouterr().err


@dataclass
class Container:
    """The container's command as a process of this machine."""

    process: subprocess.Popen[bytes]
    ports: tuple[int, int, int]
    log: Path

    def get(self, path: str, port: int = 0, key: str | None = None) -> tuple[int, str]:
        headers = {} if key is None else {ADMIN_HEADER: key}
        url = f"http://127.0.0.1:{self.ports[port]}/{path}"
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers=headers), timeout=10
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""


@contextmanager
def container(
    command: list[str], mounts: dict[str, Path], variables: dict[str, str], folder: Path
) -> Iterator[Container]:
    """Run ``command`` as the image would, with our server in place of the image's.

    ``mounts``: what lies where in the container. What only this machine needs is added: where
    the backends are, and free ports. ``-S`` takes everything but the standard library away.
    """
    installation = install.ensure_installed(quiet=True)
    run = RunFolder.create(installation.path.parent)
    run.fill(installation, find_models(demo_repository()))
    inside = folder / "container"
    for target, source in mounts.items():
        (inside / target).parent.mkdir(parents=True, exist_ok=True)
        (inside / target).symlink_to(source)
    ports = choose_ports("127.0.0.1", (0, 0, 0))
    flags = [flag.replace("=/models", f"={inside}/models") for flag in command[1:]]
    flags += [
        f"--backend-directory={run.backends}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix(run.path.name)}",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        *(f"--{n}-port={p}" for n, p in zip(("http", "grpc", "metrics"), ports, strict=True)),
    ]
    environ = environment(installation, run, None) | {RUN_VARIABLE: run.path.name}
    environ["PATH"] = f"{installation.tritonserver.parent}:{environ['PATH']}"
    environ["TMPDIR"] = str(folder)
    for name, value in variables.items():
        environ[name] = re.sub(r"^/(?=opt|run)", f"{inside}/", value)
    log = folder / "log"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-S", *flags],
                env=environ,
                cwd=folder,
                stdout=output,
                stderr=output,
            )
        yield Container(process, ports, log)
        process.kill()
        process.wait()
    finally:
        run.remove()


def wait_for(condition: Callable[[], bool], what: Container, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert what.process.poll() is None, what.log.read_text()
        assert time.monotonic() < deadline, what.log.read_text()
        time.sleep(0.1)


def known_flags() -> set[str]:
    """Those that the embedded server's help names."""
    installation = install.ensure_installed(quiet=True)
    shown = subprocess.run(
        [str(installation.tritonserver), "--help"],
        env={**os.environ, "LD_LIBRARY_PATH": str(installation.libraries)},
        capture_output=True,
        text=True,
        check=False,
    )
    return set(re.findall(r"^  (--[\w-]+)", shown.stdout + shown.stderr, re.MULTILINE))


def dockerfile_command() -> list[str]:
    match = re.search(r"^CMD \[(.*?)\]$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert match is not None
    return [word.strip(' "') for word in match[1].replace("\\\n", "").split(",")]


class TestOnTheEmbeddedServer:
    @pytest.mark.parametrize("command", [service()["command"], dockerfile_command()])
    def test_it_knows_every_flag_but_the_newer_ones(self, command: list[str]) -> None:
        known = known_flags()
        assert "--model-repository" in known
        used = {flag_name(word) for word in command if word.startswith("--")}
        assert used - known <= set(NEWER)
        assert known.isdisjoint(NEWER)

    def test_the_command_of_compose_serves_and_stops_in_time(self, tmp_path: Path) -> None:
        """With everything that compose mounts and sets, and a repository that is half empty."""
        variables = {"TRITON_SAM_MODEL_CONTROL": "explicit", "TRITON_SAM_ADMIN_KEY_FILE": "key"}
        found = service(**variables)
        key = tmp_path / "admin.key"
        key.write_text(KEY + "\n")
        models = Path(shutil.copytree(demo_repository(), tmp_path / "model_repository"))
        shutil.copytree(models / "sam2_encoder", models / "sam2_other")
        (models / "sam2_other" / "1" / "model.onnx").unlink()
        mounts = {v.split(":")[1][1:]: ROOT / v.split(":")[0] for v in found["volumes"][1:]}
        mounts |= {"models": models, "run/secrets/admin_key": key}
        command = [word for word in found["command"] if flag_name(word) not in NEWER]
        environ = {name: str(value or "") for name, value in found["environment"].items()}
        (health,) = re.findall(
            r"http://localhost:8000/(\S+)", shlex.join(found["healthcheck"]["test"])
        )
        with container(command, mounts, environ, tmp_path) as running:
            wait_for(lambda: running.get(health)[0] == 200, running)
            with SAM2TritonClient(f"http://127.0.0.1:{running.ports[0]}") as client:
                client.set_image(demo_photo())
                assert client.segment([[300, 168]], [1]).area[0, 0] > 5000
            assert running.get("v2/models/sam2_decoder/config")[0] == 403
            status, text = running.get("v2/models/sam2_decoder/config", key=KEY)
            assert (status, '"sam2_decoder"' in text) == (200, True)
            metrics = running.get("metrics", port=2)[1]
            median = (
                r'nv_inference_request_summary_us\{model="sam2_decoder",.*quantile="0.5"\} (\d+)'
            )
            assert 1000 < int(re.findall(median, metrics)[0]) < 10_000_000
            assert "sam2_other is not served" in running.log.read_text()
            running.process.send_signal(signal.SIGTERM)
            running.process.wait(40)
            assert running.process.returncode == 0

    def test_a_wrong_setting_ends_it_with_one_line(self, tmp_path: Path) -> None:
        found = service(TRITON_SAM_MODEL_CONTROL="explicit")
        mounts = {v.split(":")[1][1:]: ROOT / v.split(":")[0] for v in found["volumes"][1:]}
        mounts |= {"models": demo_repository(), "run/secrets/admin_key": Path(os.devnull)}
        environ = {name: str(value or "") for name, value in found["environment"].items()}
        with container(found["command"], mounts, environ, tmp_path) as ended:
            assert ended.process.wait(30) == 1
            (line,) = ended.log.read_text().splitlines()
            assert line.startswith("triton-sam: Explicit model control needs a key")


class TestInstances:
    def test_the_number_is_written_and_kept(self, tmp_path: Path) -> None:
        sam2 = [FAMILIES["sam2"]]
        first = write_configs(tmp_path, sam2, instances=3)[0]
        assert "instance_group [ { count: 3 } ]" in first.read_text()
        write_configs(tmp_path, sam2)
        config = text_format.Parse(first.read_text(), model_config_pb2.ModelConfig())
        assert [group.count for group in config.instance_group] == [3]

    def test_two_instances_are_loaded(
        self, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = Path(shutil.copytree(exported.repository, tmp_path / "models"))
        assert cli.main(["configure", "--repository", str(root), "--instances", "2"]) == 0
        config = root / "sam2_decoder" / "config.pbtxt"
        assert "instance_group [ { count: 2 } ]" in config.read_text()
        assert cli.main(["check", "--repository", str(root)]) == 0
        with EmbeddedServer(root) as running:
            assert running.log().count("TRITONBACKEND_ModelInstanceInitialize: sam2_decoder") == 2
        with pytest.raises(SystemExit):
            cli.main(["configure", "--repository", str(root), "--instances", "0"])
        assert "1 to 64" in capsys.readouterr().err

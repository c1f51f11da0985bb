"""What the project's own files say is true: tasks, the README's code, the versions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli
import yaml

from triton_sam import cli
from triton_sam.demo import demo_photo, demo_repository
from triton_sam.server import EmbeddedServer
from triton_sam.specs import FAMILIES

ROOT = Path(__file__).parent.parent
MANIFEST = tomli.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()


def _pixi_tasks() -> dict[str, dict[str, str]]:
    pixi: dict[str, Any] = MANIFEST["tool"]["pixi"]
    tasks: dict[str, dict[str, str]] = dict(pixi["tasks"])
    for feature in pixi["feature"].values():
        tasks |= feature.get("tasks", {})
    return tasks


@pytest.mark.parametrize("name", _pixi_tasks())
def test_a_pixi_task_is_a_command_that_exists(name: str) -> None:
    task = _pixi_tasks()[name]
    assert task["description"]
    for command in task["cmd"].split(" && "):
        words = command.split()
        if words[0] == "triton-sam":
            with pytest.raises(SystemExit) as ended:
                cli.main([words[1], "--help"])
            assert ended.value.code == 0
        else:
            module = words[2] if words[:2] == ["python", "-m"] else words[0]
            subprocess.run([sys.executable, "-m", module, "--version"], check=True)


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_a_script_answers_help(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True
    )
    assert script.name in done.stdout


def _python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_code_in_the_readme_runs(tmp_path: Path) -> None:
    demo_photo().save(tmp_path / "photo.jpg")
    (tmp_path / "model_repository").symlink_to(demo_repository())
    with EmbeddedServer(demo_repository()) as server:
        for block in _python_blocks():
            code = block.replace("localhost:8000", server.http_url)
            subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "out.png").is_file()


def test_commands_in_the_readme_parse() -> None:
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    commands = re.findall(r"^triton-sam (.*?)(?:\s+#.*)?$", shell, flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        cli.build_parser().parse_args(command.split())


def test_the_readme_names_the_checkpoints_of_the_table() -> None:
    for variant in FAMILIES["sam2"].variants.values():
        if variant.sha256 is not None:
            pattern = rf"`{variant.name}` \| (\d+) MB \| `(\w+)…(\w+)`"
            found = re.search(pattern, README)
            assert found is not None, variant.name
            assert variant.nbytes is not None
            assert int(found[1]) == round(variant.nbytes / 1e6)
            assert variant.sha256.startswith(found[2]) and variant.sha256.endswith(found[3])


def test_constraints_pin_every_dependency() -> None:
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    normal = {name.lower().replace("_", "-") for name in pinned}
    project = MANIFEST["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[\[>=<]", entry)[0].lower() for group in groups for entry in group}
    assert names - {"triton-sam"} <= normal


def test_docker_compose_serves_the_repository_read_only() -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["triton"]
    assert service["volumes"] == ["./model_repository:/models:ro"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "--disable-auto-complete-config" in service["command"]

"""What the project's own files say is true: tasks, the README's code, the versions."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure_exports
import pytest
import tomli

from triton_sam import cli
from triton_sam.demo import demo_photo, demo_repository
from triton_sam.downloads import readable
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


PROMISED = """
setup-all setup-sam1 setup-sam2 setup setup-sam3
download-sam1-h download-sam1-l download-sam1-b
download-tiny download-small download-base download-large download-sam3-onnx
export-sam1 export-sam2 export-onnx export-sam3 test-sam1 test-sam2 test-sam3
test-speculative benchmark-sam1 benchmark-sam2 benchmark-sam3
demo serve test check hf-login
"""


def test_every_promised_task_is_there() -> None:
    assert set(PROMISED.split()) <= set(_pixi_tasks())


@pytest.mark.parametrize("name", _pixi_tasks())
def test_a_pixi_task_is_a_command_that_exists(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = _pixi_tasks()[name]
    assert task["description"]
    for command in task["cmd"].split(" && "):
        words = shlex.split(command)
        if words[0] == "triton-sam":
            args = cli.build_parser().parse_args(words[1:])
            if "variant" in args and args.variant:
                assert args.variant in FAMILIES[args.model].variants
            with pytest.raises(SystemExit) as ended:
                cli.main([words[1], "--help"])
            assert ended.value.code == 0
            assert f"triton-sam {words[1]}" in capsys.readouterr().out
        elif words[0] == "python":
            subprocess.run([sys.executable, *words[1:3], "--version"], check=True)
        else:
            # With --help, `ruff check` and `hf auth login` do nothing either.
            program = Path(sys.executable).with_name(words[0])
            flags = [word for word in words[1:] if word != "."]
            subprocess.run([program, *flags, "--help"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_a_script_answers_help(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True
    )
    assert script.name in done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_a_shell_script_answers_help(script: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(script), "--help"], capture_output=True, text=True, check=True, env=environment
    )
    assert "--variant" in done.stdout
    assert done.stderr == ""


def _table_of_tasks() -> dict[str, tuple[str, str]]:
    """Command and size by task, as the README says."""
    section = README.partition("## Every task")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| `(.*?)` \| .* \| (.*?) ?\| .*?\|$", section, re.MULTILINE)
    return {
        task: (command, size)
        for tasks, command, size in rows
        for task in re.findall(r"`(.*?)`", tasks)
    }


def test_the_readme_lists_every_task_with_its_command() -> None:
    listed, tasks = _table_of_tasks(), _pixi_tasks()
    assert set(listed) == set(tasks)
    for name, (command, _) in listed.items():
        assert command == tasks[name]["cmd"] or command == f"make {name}"


def test_the_readme_tells_the_size_of_each_checkpoint() -> None:
    for command, size in _table_of_tasks().values():
        words = command.split()
        if words[1] == "download" and "--variant" in words:
            args = cli.build_parser().parse_args(words[1:])
            nbytes = FAMILIES[args.model].variant(args.variant).nbytes
            assert nbytes is not None
            assert size == readable(nbytes)


def test_scripts_in_the_readme_exist() -> None:
    named = set(re.findall(r"scripts/[\w.]+\.(?:py|sh)", README))
    assert named >= {"scripts/download_sam2.sh", "scripts/download_sam3_onnx.py"}
    assert all(os.access(ROOT / script, os.X_OK) for script in named)


def _python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_code_in_the_readme_runs(tmp_path: Path) -> None:
    for name in ("photo.jpg", "other.jpg"):
        demo_photo().save(tmp_path / name)
    (tmp_path / "model_repository").symlink_to(demo_repository())
    with EmbeddedServer(demo_repository()) as server:
        for block in _python_blocks():
            code = block.replace("localhost:8000", server.http_url)
            code = code.replace("localhost:8001", server.grpc_url)
            subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "out.png").is_file()


def test_commands_in_the_readme_parse() -> None:
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    commands = re.findall(r"^triton-sam (.*?)(?:\s+#.*)?$", shell, flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        cli.build_parser().parse_args(command.split())


def test_the_readme_names_the_checkpoints_of_the_table() -> None:
    for variant in (v for spec in FAMILIES.values() for v in spec.variants.values()):
        if variant.sha256 is not None:
            pattern = rf"`{variant.name}` \| (\d+) MB \| `(\w+)…(\w+)`"
            found = re.search(pattern, README)
            assert found is not None, variant.name
            assert variant.nbytes is not None
            assert int(found[1]) == round(variant.nbytes / 1e6)
            assert variant.sha256.startswith(found[2]) and variant.sha256.endswith(found[3])


def test_the_table_of_exports_is_the_measured_one() -> None:
    rows = measure_exports.read(ROOT / "docs")
    assert measure_exports.table(rows) in (ROOT / "docs/export.md").read_text()


def test_constraints_pin_every_dependency() -> None:
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    normal = {name.lower().replace("_", "-") for name in pinned}
    project = MANIFEST["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {
        re.split(r"[\[>=<]", entry)[0].lower().replace("_", "-")
        for group in groups
        for entry in group
    }
    assert names - {"triton-sam"} <= normal

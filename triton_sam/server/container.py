"""What the container runs: ``python3 -m triton_sam.server.container FLAGS...``.

``FLAGS`` are tritonserver's, with one ``--model-repository``. They are completed as the embedded
server completes its own, and this process becomes tritonserver:

* Models whose files are missing are left out. A repository usually holds the configuration of
  more models than were exported, and Triton does not start when one cannot be loaded.
* The administrative endpoints take a key. Without one nobody knows it. Shared memory is among them
  unless clients are allowed to use it.
* In explicit mode the repository itself is served, so that models can be loaded that were put
  there later; otherwise a folder with links to those that are served.

``TRITON_SAM_MODELS`` limits what is served to some names or patterns, with commas between them.

The standard library is enough: the container's Python has none of our dependencies.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from ..errors import SamError
from .control import check_mode, control_flags, read_key, restriction_flags
from .models import Models, choose, find_models, is_predictor

PREDICTOR_PACKAGES = ("numpy", "onnxruntime", "PIL", "pycocotools")

_REPOSITORY = "--model-repository="
# Where the image has the whole package; beside the part that this module is of.
_PACKAGE = Path(__file__).parent.parent.parent / "package"
_MODE = "--model-control-mode="
_CLIENT_SHM = "--allow-client-shm=true"
_COUNT = re.compile(r"\bcount\s*:\s*(\d+)")


def main(arguments: Sequence[str]) -> int:
    """Become tritonserver; returns only when that cannot be."""
    try:
        command = server_command(arguments, os.environ)
    except SamError as error:
        _say(str(error))
        return 1
    # It led to this module, and would lead the models' interpreters here too.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables.setdefault("TRITON_SAM_PACKAGE", str(_PACKAGE))
    try:
        os.execvpe(command[0], command, variables)
    except OSError as error:
        _say(f"{command[0]} cannot be run: {error.strerror}.")
        return 127


def server_command(arguments: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """The command line of tritonserver for ``arguments``; makes the folder that it serves."""
    repository = Path(_value(arguments, _REPOSITORY, "/models"))
    mode = _value(arguments, _MODE, "none")
    key = read_key(variables=variables)
    check_mode(mode, key)
    found = _runnable(find_models(repository))
    patterns = variables.get("TRITON_SAM_MODELS", "").split(",")
    wanted = [pattern.strip() for pattern in patterns if pattern.strip()]
    models = choose(found, wanted, "TRITON_SAM_MODELS")
    for name, reason in models.skipped.items():
        _say(f"{name} is not served: {reason}.")
    for name in models.names:
        _check_instances(models.root / name, variables.get("TRITON_SAM_INSTANCES", ""))
    others = [flag for flag in arguments if not flag.startswith((_REPOSITORY, _MODE))]
    return [
        "tritonserver",
        _REPOSITORY + str(models.root if mode == "explicit" else _links(models)),
        *control_flags(mode, models.names),
        *restriction_flags(key or secrets.token_hex(32), _CLIENT_SHM in arguments),
        *others,
    ]


def _value(arguments: Sequence[str], flag: str, default: str) -> str:
    values = [argument[len(flag) :] for argument in arguments if argument.startswith(flag)]
    return values[-1] if values else default


def _runnable(models: Models) -> Models:
    """``models`` without the predictors, where Python lacks what they are made of."""
    lacking = [name for name in PREDICTOR_PACKAGES if find_spec(name) is None]
    skipped = dict(models.skipped)
    for name in models.names:
        config = (models.root / name / "config.pbtxt").read_text("utf-8", "replace")
        if lacking and is_predictor(config):
            skipped[name] = (
                f"this image has no {', '.join(lacking)} for Python; one that is built from the "
                "Dockerfile has"
            )
    return Models(models.root, tuple(n for n in models.names if n not in skipped), skipped)


def _check_instances(model: Path, wanted: str) -> None:
    config = (model / "config.pbtxt").read_text("utf-8", "replace")
    found = _COUNT.search(config)
    if wanted and found and found[1] != wanted and not is_predictor(config):
        _say(
            f"{model.name} has {found[1]} instances in its config.pbtxt, and TRITON_SAM_INSTANCES "
            f"is {wanted}. Run `triton-sam configure --instances {wanted}` and start again."
        )


def _links(models: Models) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="triton-sam-models-"))
    for name in models.names:
        (folder / name).symlink_to(models.root / name, target_is_directory=True)
    return folder


def _say(message: str) -> None:
    print(f"triton-sam: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

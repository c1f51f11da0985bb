"""Alias models: ensembles that serve an encoder under the name and tensors of older clients.

::

    model_repository/
      sam2.1_large_encoder/config.pbtxt    an ensemble over sam2_large_encoder
      sam2_encoder_jpeg/config.pbtxt       an ensemble over the two below
      sam2_preprocess/1/model.py           image file -> the encoder's input, in the python backend
      sam2_preprocess/1/triton_sam_part/   the modules of this package that it needs
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from .files import write_atomically
from .repository import HEADER, Problem, read_manifest, render_tensors
from .specs import FAMILIES, Family, Tensor
from .specs.aliases import ALIASES, Alias

_log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
_MODEL = Path(__file__).with_name("server") / "preprocess.py"

# A name of its own: the package itself may be on the path.
_PART = "triton_sam_part"

# What the image model imports of this package; they need numpy and Pillow only.
_MODULES = ("errors.py", "images.py", "resize.py", "specs")

_ENCODED = Tensor("encoded_image", (1,), "string")


def write_aliases(root: Path) -> list[Path]:
    """Write the alias models whose encoders are in ``root``; the folders are returned."""
    written = []
    for alias, family in _possible(root):
        for path, content in _files(alias, family).items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(root / path, content)
        (root / alias.name / "1").mkdir(exist_ok=True)
        (root / alias.name / "1" / ".gitkeep").touch()
        written.append(root / alias.name)
    return written


def check_aliases(root: Path) -> Iterator[Problem]:
    """What is stale in the alias models that are in ``root``."""
    for alias in ALIASES:
        if not (root / alias.name).is_dir():
            continue
        family = _source(root, alias)
        if family is None:
            yield Problem(
                alias.name, f"the encoder of {alias.family} that it stands for is missing."
            )
            continue
        for path, content in _files(alias, family).items():
            if not (root / path).is_file() or (root / path).read_bytes() != content:
                yield Problem(
                    path.parts[0],
                    f"{Path(*path.parts[1:])} is stale; run `triton-sam configure --aliases`.",
                )


def _possible(root: Path) -> Iterator[tuple[Alias, Family]]:
    for alias in ALIASES:
        family = _source(root, alias)
        if family is not None:
            yield alias, family


def _source(root: Path, alias: Alias) -> Family | None:
    """The family, with its models' names, whose encoder the alias stands for."""
    default = FAMILIES[alias.family]
    for family in (default.named(alias.variant), default):
        name = family.encoder.name
        if (root / name / "1" / family.encoder.file).exists():
            installed = (read_manifest(root, name) or {}).get("variant")
            if alias.variant and installed != alias.variant:
                _log.warning(
                    "%s is served by %s, which is the variant %s and not %s.",
                    *(alias.name, name, installed or "of an unknown name", alias.variant),
                )
            return family
    return None


def _files(alias: Alias, family: Family) -> dict[Path, bytes]:
    """The files of an alias, by path in the repository."""
    files = {Path(alias.name, "config.pbtxt"): _render_alias(alias, family).encode()}
    if alias.jpeg:
        files |= _preprocess_files(FAMILIES[alias.family])
    return files


def _render_alias(alias: Alias, family: Family) -> str:
    encoder = family.encoder
    (pixels,) = encoder.inputs
    outputs = tuple(
        Tensor(name, encoder.output(source).dims) for name, source in alias.outputs.items()
    )
    steps = [_step(encoder.name, {pixels.name: pixels.name}, _swapped(alias))]
    if alias.jpeg:
        steps.insert(
            0,
            _step(
                _preprocess_name(family), {_ENCODED.name: _ENCODED.name}, {pixels.name: pixels.name}
            ),
        )
    return (
        HEADER
        + f'name: "{alias.name}"\n'
        + 'platform: "ensemble"\n'
        + "max_batch_size: 0\n"
        + render_tensors("input", (_ENCODED if alias.jpeg else pixels,))
        + render_tensors("output", outputs)
        + "ensemble_scheduling {\n  step [\n"
        + ",\n".join(steps)
        + "\n  ]\n}\n"
    )


def _swapped(alias: Alias) -> dict[str, str]:
    return {source: name for name, source in alias.outputs.items()}


def _step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    maps = [f'      input_map {{ key: "{k}" value: "{v}" }}\n' for k, v in inputs.items()]
    maps += [f'      output_map {{ key: "{k}" value: "{v}" }}\n' for k, v in outputs.items()]
    return f'    {{\n      model_name: "{model}"\n      model_version: -1\n{"".join(maps)}    }}'


def _preprocess_name(family: Family) -> str:
    return f"{family.name}_preprocess"


def _preprocess_files(family: Family) -> dict[Path, bytes]:
    """The model that turns an image file into the encoder's input."""
    (pixels,) = family.encoder.inputs
    name = _preprocess_name(family)
    config = (
        HEADER
        + f'name: "{name}"\n'
        + 'backend: "python"\n'
        + "max_batch_size: 0\n"
        + render_tensors("input", (_ENCODED,))
        + render_tensors("output", (pixels,))
        + f'parameters {{ key: "family" value: {{ string_value: "{family.name}" }} }}\n'
        + "instance_group [ { count: 1 kind: KIND_CPU } ]\n"
        + "dynamic_batching { }\n"
    )
    version = Path(name, "1")
    files = {Path(name, "config.pbtxt"): config.encode(), version / "model.py": _MODEL.read_bytes()}
    files[version / _PART / "__init__.py"] = b""
    for module in _MODULES:
        for path in sorted((_PACKAGE / module).glob("*.py")) or [_PACKAGE / module]:
            files[version / _PART / path.relative_to(_PACKAGE)] = path.read_bytes()
    return files

"""What is measured where nobody has a checkpoint: a small model with random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..demo import demo_repository
from ..errors import MissingExtraError
from ..repository import read_manifest
from ..specs import Family

VARIANT = "small stand-in"


@dataclass(frozen=True)
class StandIn:
    """A repository with a pair of a family.

    ``checkpoint``: what the pair was exported from, where it is there. ``note``: what is to be
    said beside every figure.
    """

    repository: Path
    checkpoint: Path | None = None
    note: str | None = None


def has_pair(root: Path, family: Family) -> bool:
    """Whether both models of ``family`` are installed in ``root``."""
    return all(read_manifest(root, model.name) is not None for model in family.models)


@contextmanager
def stand_in(family: Family) -> Iterator[StandIn]:
    """The demo model, or of a family that has none a small pair in a folder that is deleted.

    Raises :class:`MissingExtraError` where the latter needs the extra ``export``.
    """
    demo = demo_repository()
    if has_pair(demo, family):
        yield StandIn(demo)
        return
    with tempfile.TemporaryDirectory(prefix="triton-sam-stand-in-") as folder:
        yield _export(family, Path(folder))


def _export(family: Family, folder: Path) -> StandIn:
    """The small configuration that the exporter has of ``family``, with random weights."""
    try:
        from ..export.checkpoints import make_checkpoint
        from ..export.pipeline import export
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            f"There is no demo model of {family.title}, and to make one needs {exc.name}: "
            "pip install 'triton-sam[export]'"
        ) from exc
    cfg = f"{family.name}_small.yaml"
    checkpoint = make_checkpoint(family, cfg, folder / "checkpoint")
    repository = folder / "model_repository"
    export(family, VARIANT, checkpoint, repository, model_cfg=cfg, default=True)
    note = (
        f"Not {family.title} itself: a small stand-in with random weights ({cfg}), since there is "
        "no exported pair. Its times are its own, its masks mean nothing; they show that "
        "everything works, and what the way to the decoder costs."
    )
    return StandIn(repository, checkpoint, note)

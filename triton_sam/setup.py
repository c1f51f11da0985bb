"""From nothing to a model repository that serves a family; what is right already is left alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from . import repository
from .downloads import RemoteFile, Store, checkpoint_files, published_files, sha256_of
from .errors import InvalidInputError, MissingExtraError, RepositoryError
from .specs import Family
from .specs.predictor import predictor_model

Road = Literal["checkpoint", "onnx"]


@dataclass(frozen=True)
class Step:
    """Something that was done, or (``skipped``) found to be right already."""

    name: str
    detail: str
    seconds: float
    skipped: bool


def export_checkpoint(
    family: Family, variant: str, checkpoint: Path, root: Path, default: bool, precision: str
) -> None:
    """Export ``checkpoint`` into the model repository ``root``."""
    exporter = _import("triton_sam.export.pipeline")
    exporter.export(family, variant, checkpoint, root, default=default, precision=precision)


def install_published(family: Family, folder: Path, root: Path, precision: str) -> None:
    """Install the published pair in ``folder`` into the model repository ``root``."""
    installer = _import("triton_sam.published")
    installer.install(family, folder, root, precision)


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            f"Setting up needs {exc.name}: pip install 'triton-sam[export]'"
        ) from exc


@dataclass(frozen=True)
class Setup:
    """One family on its way into a model repository.

    ``variant``: of the checkpoint; ``None`` is the default. ``road``: ``checkpoint`` exports it,
    ``onnx`` takes the pair that others have exported. ``default``: install the variant as the
    family's default, under its names. ``precision``: of the export, ``fp32`` or ``fp16``, or a
    name that the pair is published under. ``export`` and ``install``: how the models get into
    ``root``.
    """

    family: Family
    root: Path
    checkpoints: Path
    variant: str | None = None
    road: Road = "checkpoint"
    default: bool = False
    precision: str = "fp32"
    store: Store = field(default_factory=Store)
    export: Callable[[Family, str, Path, Path, bool, str], None] = export_checkpoint
    install: Callable[[Family, Path, Path, str], None] = install_published

    def run(self) -> Iterator[Step]:
        """Do what is to be done, and yield each step when it is finished.

        Raises a :class:`SamError`: what could not be downloaded, exported or verified.
        """
        if self.export is export_checkpoint and self.road == "checkpoint":
            _import("torch")  # said before gigabytes are downloaded
        started = time.monotonic()
        files = self._files()
        fetched = self.store.ensure(files)
        names = ", ".join(file.target.name for file in files)
        yield _step("download", names, started, skipped=not fetched)
        yield self._configure()
        started = time.monotonic()
        exported = not self._is_installed(files)
        if exported:
            self._install(files)
        title = "export" if self.road == "checkpoint" else "install"
        models = ", ".join(model.name for model in self._served.models)
        yield _step(title, models, started, skipped=not exported)
        started = time.monotonic()
        # Where nothing was exported, the same check has just decided that nothing had to be.
        problems = repository.check(self.root, [self._served]) if exported else []
        if problems:
            raise RepositoryError(f"{len(problems)} problems in {self.root}. {problems[0]}")
        yield _step("verify", "as the table and the manifests say", started, skipped=not exported)

    @property
    def _served(self) -> Family:
        """The family with the models' names in the repository."""
        own_names = self.road == "checkpoint" and not self.default
        return self.family.named(self.variant) if own_names else self.family

    @property
    def _checkpoint(self) -> Path:
        return self.checkpoints / self.family.variant(self.variant).file

    def _files(self) -> list[RemoteFile]:
        if self.road == "checkpoint":
            return checkpoint_files(
                self.family, self.variant, self.checkpoints, self.store.patience
            )
        if self.family.published is None:
            raise InvalidInputError(
                f"Nobody publishes {self.family.title} in ONNX that this project knows of; set it "
                "up from its checkpoint."
            )
        return published_files(
            self.family.published,
            self.precision,
            self.checkpoints,
            offline=self.store.offline,
            refresh=self.store.force,
            patience=self.store.patience,
        )

    def _configure(self) -> Step:
        started = time.monotonic()
        models = (*self._served.models, predictor_model(self._served))
        before = [_read(self.root / model.name / "config.pbtxt") for model in models]
        written = repository.write_configs(self.root, [self._served])
        same = before == [_read(path) for path in written]
        return _step("configure", "config.pbtxt", started, skipped=same)

    def _is_installed(self, files: Sequence[RemoteFile]) -> bool:
        """Whether the models come from these very files, in this precision, and are whole."""
        sources = [sha256_of(file.target) for file in files]
        manifests = [repository.read_manifest(self.root, m.name) for m in self._served.models]
        if self.road == "checkpoint":
            described = repository.describe_checkpoint(self._checkpoint, sha256_of)
            sources = [described["sha256"]]
            if any(m and m.get("precision", "fp32") != self.precision for m in manifests):
                return False
        return (
            not self.store.force
            and all(any(_names(m, source) for m in manifests) for source in sources)
            and not repository.check(self.root, [self._served])
        )

    def _install(self, files: Sequence[RemoteFile]) -> None:
        if self.road == "onnx":
            self.install(self.family, files[0].target.parent, self.root, self.precision)
            return
        variant = self.family.variant(self.variant).name
        self.export(self.family, variant, self._checkpoint, self.root, self.default, self.precision)


def _step(name: str, detail: str, started: float, skipped: bool) -> Step:
    return Step(name, detail, time.monotonic() - started, skipped)


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _names(content: Any, digest: str) -> bool:
    """Whether ``digest`` is a value anywhere in a manifest."""
    if isinstance(content, dict):
        return any(_names(value, digest) for value in content.values())
    return bool(content == digest)

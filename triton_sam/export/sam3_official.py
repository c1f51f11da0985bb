"""SAM 3's official tracker: its checkpoints, and its predictor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..errors import CheckpointError, InvalidInputError
from . import configs
from .parity import Arrays, Predictor
from .torch_compat import prepare_torchvision

Array: TypeAlias = NDArray[Any]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def build_model(model_cfg: str, checkpoint: Path | None) -> nn.Module:
    """The official SAM 3 tracker (``transformers.Sam3TrackerModel``) in evaluation mode.

    ``checkpoint``: a folder as ``save_pretrained`` writes it, with ``config.json`` and
    ``model.safetensors``, which says itself what it is a checkpoint of; ``facebook/sam3``'s holds
    the detector's weights too, which are not read. Without one ``model_cfg`` is built with random
    weights: a YAML file of the keys of ``Sam3TrackerConfig``, or ``facebook/sam3`` for the
    configuration that transformers has built in. Nothing is downloaded.

    Raises :class:`CheckpointError` when the checkpoint cannot be read or is of another model.
    """
    if checkpoint is None:
        model = _transformers().Sam3TrackerModel(_find_config(model_cfg))
    else:
        _check_folder(checkpoint)
        model = _load(checkpoint)
    return cast(nn.Module, model.eval())


def _transformers() -> Any:
    """The package; it is imported late because it takes seconds, and needs torchvision first."""
    prepare_torchvision()
    import transformers

    return transformers


def _find_config(model_cfg: str) -> Any:
    config = _transformers().Sam3TrackerConfig
    if model_cfg == "facebook/sam3":
        return config()
    path = configs.find(model_cfg)
    if path is None:
        raise InvalidInputError(
            f"Model configuration {model_cfg!r} is neither a YAML file nor 'facebook/sam3'."
        )
    from omegaconf import OmegaConf

    return config(**cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(path))))


def _check_folder(checkpoint: Path) -> None:
    if checkpoint.is_file():
        raise CheckpointError(
            f"{checkpoint} is a file; a SAM 3 checkpoint is a folder with {_CONFIG} and {_WEIGHTS}."
        )
    missing = [name for name in (_CONFIG, _WEIGHTS) if not (checkpoint / name).is_file()]
    if missing:
        raise CheckpointError(
            f"No SAM 3 checkpoint at {checkpoint}: {' and '.join(missing)} is missing; download "
            f"facebook/sam3 into that folder."
        )


def _load(checkpoint: Path) -> Any:
    from safetensors import SafetensorError

    try:
        with _quiet_transformers():
            model, report = _transformers().Sam3TrackerModel.from_pretrained(
                checkpoint,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as exc:
        detail = " ".join(str(exc).split())[:300]
        raise CheckpointError(
            f"{checkpoint} is damaged or is no SAM 3 checkpoint; download it again. {detail}"
        ) from exc
    _check_report(checkpoint, report)
    return model


def _check_report(checkpoint: Path, report: Any) -> None:
    """What is missing would stay random: then it is another model."""
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise CheckpointError(
            f"{checkpoint} is not a SAM 3 tracker's checkpoint: {len(missing)} of its weights are "
            f"missing or of another shape, the first {missing[0]}."
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars, and no report of weights that were not read: a detector's are expected."""
    messages = _transformers().logging
    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()


def save_checkpoint(model: nn.Module, path: Path) -> None:
    """Write ``model`` into the folder ``path`` in the official format."""
    with _quiet_transformers():
        cast(Any, model).save_pretrained(path)


def predictor(model: nn.Module) -> Predictor:
    """The official model and its processor behind the interface of Meta's predictors."""
    return _Predictor(model)


class _Predictor:
    """One image and its prompts, which the official model calls a point batch."""

    def __init__(self, model: Any) -> None:
        package = _transformers()
        self._model = model
        self._processor = package.Sam3TrackerProcessor(package.Sam3ImageProcessor())
        self._embeddings: list[Tensor] = []
        self._sizes: list[list[int]] = []

    def set_image(self, image: Image.Image) -> None:
        inputs = self._processor(images=image, return_tensors="pt")
        self._sizes = inputs["original_sizes"].tolist()
        pixels = inputs["pixel_values"].to(self._model.device)
        self._embeddings = self._model.get_image_embeddings(pixels)

    def predict(self, **prompt: Any) -> tuple[Array, Array, Array]:
        mask = prompt.get("mask_input")
        if mask is None or mask.ndim == 3 or len(mask) == 1:
            return self._predict(**prompt)
        # A mask belongs to an image officially, so prompts with a mask each go one by one.
        parts: list[Arrays] = [
            {name: value if isinstance(value, bool) else value[i] for name, value in prompt.items()}
            for i in range(len(mask))
        ]
        answers = [self._predict(**part) for part in parts]
        masks, scores, logits = (np.concatenate(each) for each in zip(*answers, strict=True))
        return masks, scores, logits

    @torch.no_grad()
    def _predict(
        self,
        point_coords: Array | None = None,
        point_labels: Array | None = None,
        box: Array | None = None,
        mask_input: Array | None = None,
        multimask_output: bool = True,
    ) -> tuple[Array, Array, Array]:
        inputs = {}
        if point_coords is not None or box is not None:
            inputs = self._processor(
                input_points=_nested(point_coords, 2),
                input_labels=_nested(point_labels, 1),
                input_boxes=_nested(box, 1),
                original_sizes=self._sizes,
                return_tensors="pt",
            )
            del inputs["original_sizes"]
        if mask_input is not None:
            side = mask_input.shape[-1]
            inputs["input_masks"] = torch.from_numpy(mask_input.reshape(1, 1, side, side))
        device = self._model.device
        found = self._model(
            image_embeddings=list(self._embeddings),
            multimask_output=multimask_output,
            **{name: value.to(device) for name, value in inputs.items()},
        )
        # (1, B, M, ...): one image.
        masks = self._processor.post_process_masks(found.pred_masks.cpu(), self._sizes)[0]
        return masks.numpy(), found.iou_scores[0].cpu().numpy(), found.pred_masks[0].cpu().numpy()


def _nested(values: Array | None, axes: int) -> Any:
    """One prompt of so many ``axes``, or B of them, as the processor takes them: 1xBx..."""
    if values is None:
        return None
    array = np.asarray(values)
    return array.reshape(1, -1, *array.shape[array.ndim - axes :]).tolist()

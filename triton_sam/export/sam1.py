"""SAM 1: the official model, and the two modules that are traced from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor, nn

from ..errors import CheckpointError, InvalidInputError
from ..specs import Family, ImageSpec
from . import configs, weights
from .decoder import PromptDecoder, examples, with_padding_point
from .encoder import NormalisingEncoder
from .torch_compat import prepare_torchvision

PACKAGES: tuple[str, ...] = ("segment-anything",)

_KEYS = ("embed_dim", "depth", "num_heads", "global_attn_indexes")


def build_model(model_cfg: str, checkpoint: Path | None) -> nn.Module:
    """The official SAM 1 model (``segment_anything.modeling.Sam``) in evaluation mode.

    ``model_cfg``: ``vit_h``, ``vit_l`` or ``vit_b``, or a YAML file of the image encoder's
    ``embed_dim``, ``depth``, ``num_heads`` and ``global_attn_indexes``. ``checkpoint``: official
    format, a state_dict; ``None`` leaves the random initialisation.

    Raises :class:`CheckpointError` when the checkpoint cannot be read or is of another model.
    """
    prepare_torchvision()
    from segment_anything import sam_model_registry

    if model_cfg in sam_model_registry:
        model = cast(nn.Module, sam_model_registry[model_cfg](checkpoint=None))
    else:
        model = _build_own(_find_config(model_cfg))
    if checkpoint is not None:
        weights.load(model, read_state_dict(checkpoint), checkpoint, model_cfg)
    return model.eval()


def _find_config(model_cfg: str) -> Path:
    path = configs.find(model_cfg)
    if path is None:
        raise InvalidInputError(
            f"Model configuration {model_cfg!r} is neither vit_h, vit_l or vit_b nor a YAML file "
            f"of {', '.join(_KEYS)}."
        )
    return path


def _build_own(path: Path) -> nn.Module:
    from omegaconf import OmegaConf
    from segment_anything.build_sam import _build_sam

    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(config, dict) or sorted(config) != sorted(_KEYS):
        raise InvalidInputError(f"{path} must have exactly the keys {', '.join(_KEYS)}.")
    return cast(nn.Module, _build_sam(**{f"encoder_{key}": config[key] for key in _KEYS}))


def read_state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of an official SAM 1 checkpoint, which is a state_dict.

    Only tensors are unpickled. Raises :class:`CheckpointError` for anything else.
    """
    content = weights.read(checkpoint)
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"{checkpoint} is not a SAM 1 checkpoint: expected a state_dict, tensors by name."
        )
    return cast("dict[str, Tensor]", content)


def save_checkpoint(model: nn.Module, path: Path) -> None:
    """Write the weights of ``model`` as Meta's checkpoints hold them."""
    torch.save(model.state_dict(), path)


def modules(model: nn.Module, family: Family) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """What is traced: for each model of ``family`` the module and example inputs."""
    size = family.image.size
    return {
        family.encoder.name: (Encoder(model, family.image), (torch.rand(1, 3, size, size),)),
        family.decoder.name: (Decoder(model), examples(family)),
    }


class Encoder(NormalisingEncoder):
    """Image (B, 3, S, S), RGB in [0, 1] and padded with the mean, to its embedding.

    Returns (B, 256, S/16, S/16), as ``SamPredictor.set_image`` keeps it.
    """

    def __init__(self, model: Any, image: ImageSpec) -> None:
        super().__init__(image)
        self.image_encoder = model.image_encoder

    def forward(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.image_encoder(self.normalise(image)))


class Decoder(PromptDecoder):
    """Prompts and an embedding to mask logits, as ``SamPredictor.predict_torch``.

    N prompts of P points each, a box's corners among them as labels 2 and 3; the embedding has a
    leading axis of N, or of 1 where all prompts are about one image. ``multimask_output`` is 0
    or 1, ``has_mask_input`` 0 or 1 for each prompt or for all of them.

    Returns logits (N, M, 256, 256) and scores (N, M); M is 3 with ``multimask_output`` and else 1.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.prompt_encoder, model.mask_decoder)

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        multimask_output: Tensor,
    ) -> tuple[Tensor, Tensor]:
        dense = self.embed_mask(mask_input, has_mask_input, point_coords)
        masks, scores = self.mask_decoder.predict_masks(
            # The official decoder repeats one image's embedding for each prompt and adds the
            # mask's. Added before, it may as well be one for each prompt.
            image_embeddings=torch.zeros_like(image_embeddings[:1]),
            image_pe=self.places(),
            sparse_prompt_embeddings=self.embed_prompts(point_coords, point_labels),
            dense_prompt_embeddings=image_embeddings + dense,
        )
        return self.answer(masks, scores, multimask_output)

    def answer(self, masks: Tensor, scores: Tensor, multimask: Tensor) -> tuple[Tensor, Tensor]:
        """Of four masks the first, or with ``multimask`` the last three."""
        return self.choose(masks, scores, multimask)

    def embed_prompts(self, coords: Tensor, labels: Tensor) -> Tensor:
        """Points (N, P, 2), labelled (N, P), as N x P x C or N x (P + 1) x C."""
        # The official prompt encoder appends a padding point to points, but not beside a box.
        has_box = ((labels > 1.5).to(coords.dtype).sum() > 0.5).to(torch.int64)
        coords, labels = with_padding_point(coords, labels)
        end = coords.shape[1] - has_box
        return self.embed_points(coords[:, :end], labels[:, :end])


def predictor(model: nn.Module) -> Predictor:
    """Meta's ``SamPredictor`` on ``model``, with the interface of ``SAM2ImagePredictor``."""
    return Predictor(model)


class Predictor:
    """Meta's ``SamPredictor`` with images of Pillow's and prompts in batches."""

    def __init__(self, model: nn.Module) -> None:
        from segment_anything import SamPredictor

        self._official = SamPredictor(model)

    def set_image(self, image: Image.Image) -> None:
        """Encode an 8-bit RGB image."""
        self._official.set_image(np.asarray(image))

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Masks BxMxHxW, scores BxM and logits BxMx256x256, of ``predict_torch``."""
        points = labels = boxes = masks = None
        if point_coords is not None:
            points = self._framed(np.asarray(point_coords))
            points = points.reshape(-1, *points.shape[-2:])
            labels = self._tensor(point_labels).reshape(points.shape[:2])
        if box is not None:
            boxes = self._framed(np.asarray(box).reshape(-1, 2, 2)).reshape(-1, 4)
        if mask_input is not None:
            masks = self._tensor(mask_input)
            masks = masks.reshape(-1, 1, *masks.shape[-2:])
        answer = self._official.predict_torch(points, labels, boxes, masks, multimask_output)
        found, scores, logits = (tensor.cpu().numpy() for tensor in answer)
        return found, scores, logits

    def _framed(self, coords: NDArray[Any]) -> Tensor:
        official = self._official
        return self._tensor(official.transform.apply_coords(coords, official.original_size))

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=torch.float, device=self._official.device)

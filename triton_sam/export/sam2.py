"""SAM 2.1: the official model, and the two modules that are traced from it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InvalidInputError
from ..specs import Family, ImageSpec
from .torch_compat import prepare_torchvision

_OUR_CONFIGS = Path(__file__).with_name("configs")

# What sam2.build_sam.build_sam2 sets when it builds a model for images: fall back to the best of
# masks 1-3 where mask 0 is unstable.
_DYNAMIC_MULTIMASK = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}


def build_model(model_cfg: str, checkpoint: Path | None, device: str = "cpu") -> nn.Module:
    """The official SAM 2 model (``sam2.modeling.sam2_base.SAM2Base``) in evaluation mode.

    ``model_cfg``: a file, one of our configurations by name, or one of the sam2 package's, such
    as ``configs/sam2.1/sam2.1_hiera_t.yaml``. ``checkpoint``: official format,
    ``{"model": state_dict}``; ``None`` leaves the random initialisation.

    Raises :class:`CheckpointError` when the checkpoint cannot be read or is of another model.
    """
    prepare_torchvision()
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(_find_config(model_cfg))
    extra = {"model": {"sam_mask_decoder_extra_args": _DYNAMIC_MULTIMASK}}
    config = OmegaConf.merge(config, extra)
    OmegaConf.resolve(config)
    model = cast(nn.Module, instantiate(config.model, _recursive_=True))
    if checkpoint is not None:
        _load_weights(model, checkpoint, model_cfg)
    return model.to(device).eval()


def _find_config(model_cfg: str) -> Path:
    import sam2

    package = Path(sam2.__file__).parent
    for candidate in (Path(model_cfg), _OUR_CONFIGS / model_cfg, package / model_cfg):
        if candidate.is_file():
            return candidate
    known = sorted(path.name for path in (package / "configs/sam2.1").glob("*.yaml"))
    raise InvalidInputError(
        f"Model configuration {model_cfg!r} is neither a file nor one of the sam2 package's "
        f"(configs/sam2.1/…: {', '.join(known)})."
    )


def _load_weights(model: nn.Module, checkpoint: Path, model_cfg: str) -> None:
    state = read_state_dict(checkpoint)
    try:
        model.load_state_dict(state)
    except RuntimeError as exc:
        detail = " ".join(str(exc).split())[:300]
        raise CheckpointError(
            f"{checkpoint} does not belong to {model_cfg}; choose the variant that it was made "
            f"for. {detail}"
        ) from exc


def read_state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of an official SAM 2 checkpoint, ``{"model": state_dict}``.

    Only tensors are unpickled. Raises :class:`CheckpointError` for anything else.
    """
    if not checkpoint.is_file():
        raise CheckpointError(f"No checkpoint at {checkpoint}; download it first.")
    try:
        content: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as exc:
        raise CheckpointError(
            f"{checkpoint} is damaged or is not a PyTorch checkpoint; download it again."
        ) from exc
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(
            f'{checkpoint} is not a SAM 2 checkpoint: expected {{"model": state_dict}}.'
        )
    return cast("dict[str, Tensor]", content["model"])


def predictor(model: nn.Module) -> Any:
    """Meta's ``SAM2ImagePredictor`` on ``model``."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    return SAM2ImagePredictor(model)


def modules(model: nn.Module, family: Family) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """What is traced: for each model of ``family`` the module and example inputs."""
    size = family.image.size
    # Two prompts of three points: an axis of length one would be traced as a broadcast.
    shapes = {
        "image_embeddings": (2, 256, 64, 64),
        "point_coords": (2, 3, 2),
        "point_labels": (2, 3),
        "mask_input": (2, 1, 256, 256),
        "has_mask_input": (2,),
        "multimask_output": (1,),
        "high_res_feats_0": (2, 32, 256, 256),
        "high_res_feats_1": (2, 64, 128, 128),
    }
    examples = tuple(torch.ones(shapes[tensor.name]) for tensor in family.decoder.inputs)
    return {
        family.encoder.name: (Encoder(model, family.image), (torch.rand(1, 3, size, size),)),
        family.decoder.name: (Decoder(model), examples),
    }


class Encoder(nn.Module):
    """Image (B, 3, S, S), RGB in [0, 1], to what the decoder needs of it.

    Returns the image embedding (B, 256, S/16, S/16) and the high-resolution features
    (B, 32, S/4, S/4) and (B, 64, S/8, S/8), as ``SAM2ImagePredictor.set_image`` keeps them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, image: ImageSpec) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(image.mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(image.std).reshape(1, 3, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.model.forward_image((image - self.mean) / self.std)["backbone_fpn"]
        embedding = features[-1]
        if self.model.directly_add_no_mem_embed:
            embedding = embedding + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return embedding, features[0], features[1]


class Decoder(nn.Module):
    """Prompts and an embedding to mask logits, as ``SAM2ImagePredictor._predict``.

    N prompts of P points each; the embedding and its features have a leading axis of N, or of 1
    where all prompts are about one image. ``multimask_output`` is 0 or 1, ``has_mask_input`` 0
    or 1 for each prompt or for all of them.

    Returns logits (N, M, 256, 256), not clamped, scores (N, M) and object score logits (N, 1);
    M is 3 with ``multimask_output`` and else 1.
    """

    prompt_encoder: Any
    mask_decoder: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.prompt_encoder = model.sam_prompt_encoder
        self.mask_decoder = model.sam_mask_decoder

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        multimask_output: Tensor,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        masks, scores, _, object_score_logits = self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            # Computed in the graph: ONNX Runtime folds it at load, and the file is 4 MB smaller.
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=self._embed_points(point_coords, point_labels),
            dense_prompt_embeddings=self._embed_mask(mask_input, has_mask_input, point_coords),
            repeat_image=False,
            high_res_features=[high_res_feats_0, high_res_feats_1],
        )
        masks, scores = self._choose(masks, scores, multimask_output)
        return masks, scores, object_score_logits

    def _embed_points(self, coords: Tensor, labels: Tensor) -> Tensor:
        # The official predictor appends a padding point wherever there are points at all.
        coords = torch.cat([coords, torch.zeros_like(coords[:, :1])], dim=1)
        labels = torch.cat([labels, -torch.ones_like(labels[:, :1])], dim=1)
        size = self.prompt_encoder.input_image_size[0]
        embedding = self.prompt_encoder.pe_layer._pe_encoding((coords + 0.5) / size)
        labels = labels.unsqueeze(-1)
        is_point = (labels != -1).to(embedding.dtype)
        embedding = embedding * is_point + self.prompt_encoder.not_a_point_embed.weight * (
            1 - is_point
        )
        for label, learned in enumerate(self.prompt_encoder.point_embeddings):
            embedding = embedding + learned.weight * (labels == label).to(embedding.dtype)
        return cast(Tensor, embedding)

    def _embed_mask(self, mask: Tensor, has_mask: Tensor, coords: Tensor) -> Tensor:
        # One row a prompt, whatever the length of the two masks' leading axis.
        per_prompt = torch.zeros_like(coords[:, :1, :1]).sum(dim=1, keepdim=True)
        has_mask = has_mask.reshape(-1, 1, 1, 1) + per_prompt.unsqueeze(-1)
        no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        embedding = has_mask * self.prompt_encoder.mask_downscaling(mask)
        return cast(Tensor, embedding + (1 - has_mask) * no_mask)

    def _choose(self, masks: Tensor, scores: Tensor, multimask: Tensor) -> tuple[Tensor, Tensor]:
        """Mask 0, or the best of 1-3 where it is unstable; with ``multimask`` masks 1-3."""
        single, single_score = self.mask_decoder._dynamic_multimask_via_stability(masks, scores)
        flag = (multimask.reshape(()) > 0.5).to(torch.int64)
        index = torch.arange(4, device=masks.device)[flag : 1 + 3 * flag]
        return (
            torch.cat([single, masks[:, 1:]], dim=1).index_select(1, index),
            torch.cat([single_score, scores[:, 1:]], dim=1).index_select(1, index),
        )

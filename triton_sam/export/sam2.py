"""SAM 2.1: the official model, and the two modules that are traced from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, InvalidInputError
from ..specs import Family, ImageSpec
from . import configs, weights
from .decoder import PromptDecoder, examples, with_padding_point
from .encoder import NormalisingEncoder
from .split import Parts
from .torch_compat import prepare_torchvision

PACKAGES: tuple[str, ...] = ("sam2",)

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
        weights.load(model, read_state_dict(checkpoint), checkpoint, model_cfg)
    return model.to(device).eval()


def _find_config(model_cfg: str) -> Path:
    import sam2

    package = Path(sam2.__file__).parent
    path = configs.find(model_cfg, package)
    if path is not None:
        return path
    known = sorted(path.name for path in (package / "configs/sam2.1").glob("*.yaml"))
    raise InvalidInputError(
        f"Model configuration {model_cfg!r} is neither a file nor one of the sam2 package's "
        f"(configs/sam2.1/…: {', '.join(known)})."
    )


def read_state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of an official SAM 2 checkpoint, ``{"model": state_dict}``.

    Only tensors are unpickled. Raises :class:`CheckpointError` for anything else.
    """
    content = weights.read(checkpoint)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(
            f'{checkpoint} is not a SAM 2 checkpoint: expected {{"model": state_dict}}.'
        )
    return cast("dict[str, Tensor]", content["model"])


def save_checkpoint(model: nn.Module, path: Path) -> None:
    """Write the weights of ``model`` as Meta's checkpoints hold them."""
    torch.save({"model": model.state_dict()}, path)


def predictor(model: nn.Module) -> Any:
    """Meta's ``SAM2ImagePredictor`` on ``model``."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    return SAM2ImagePredictor(model)


def modules(model: nn.Module, family: Family) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """What is traced: for each model of ``family`` the module and example inputs."""
    size = family.image.size
    return {
        family.encoder.name: (Encoder(model, family.image), (torch.rand(1, 3, size, size),)),
        family.decoder.name: (Decoder(model), examples(family)),
    }


class Encoder(NormalisingEncoder):
    """Image (B, 3, S, S), RGB in [0, 1], to what the decoder needs of it.

    Returns the image embedding (B, 256, S/16, S/16) and the high-resolution features
    (B, 32, S/4, S/4) and (B, 64, S/8, S/8), as ``SAM2ImagePredictor.set_image`` keeps them.
    """

    stretch_rows: Tensor
    stretch_columns: Tensor

    def __init__(self, model: Any, image: ImageSpec) -> None:
        super().__init__(image)
        self.model = model
        trunk = model.image_encoder.trunk
        rows, columns = trunk.pos_embed.shape[-2:]
        side = image.size // trunk.patch_embed.proj.stride[0]
        self.windows = [side // length for length in trunk.pos_embed_window.shape[-2:]]
        self.register_buffer("stretch_rows", _bicubic(rows, side))
        self.register_buffer("stretch_columns", _bicubic(columns, side).T.contiguous())

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        trunk = self.model.image_encoder.trunk
        trunk._get_pos_embed = lambda _: self.positions()
        try:
            features = self.model.forward_image(self.normalise(image))["backbone_fpn"]
        finally:
            del trunk._get_pos_embed  # the official predictor has the same model
        embedding = features[-1]
        if self.model.directly_add_no_mem_embed:
            embedding = embedding + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return embedding, features[0], features[1]

    def positions(self) -> Tensor:
        """The position of each patch (1, S/4, S/4, C), as ``Hiera._get_pos_embed``.

        The official code resizes it for each image, by the shape of its features, which ONNX
        Runtime repeats too: a fifth of tiny's time on a processor. As products of weights it is
        worked out when the file is loaded.
        """
        trunk = self.model.image_encoder.trunk
        whole: Tensor = self.stretch_rows @ trunk.pos_embed @ self.stretch_columns
        window: Tensor = trunk.pos_embed_window.repeat(1, 1, *self.windows)
        return (whole + window).permute(0, 2, 3, 1)


def _bicubic(source: int, target: int) -> Tensor:
    """The weights (target, source) with which PyTorch resizes an axis by bicubic interpolation."""
    unit = torch.eye(source).reshape(1, source, source, 1)
    return F.interpolate(unit, size=(target, 1), mode="bicubic")[0, :, :, 0].T.contiguous()


class Decoder(PromptDecoder):
    """Prompts and an embedding to mask logits, as ``SAM2ImagePredictor._predict``.

    N prompts of P points each; the embedding and its features have a leading axis of N, or of 1
    where all prompts are about one image. ``multimask_output`` is 0 or 1, ``has_mask_input`` 0
    or 1 for each prompt or for all of them.

    Returns logits (N, M, 256, 256), not clamped, scores (N, M) and object score logits (N, 1);
    M is 3 with ``multimask_output`` and else 1.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.sam_prompt_encoder, model.sam_mask_decoder)

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
            image_pe=self.places(),
            sparse_prompt_embeddings=self.embed_prompts(point_coords, point_labels),
            dense_prompt_embeddings=self.embed_mask(mask_input, has_mask_input, point_coords),
            repeat_image=False,
            high_res_features=[high_res_feats_0, high_res_feats_1],
        )
        return *self.answer(masks, scores, multimask_output), object_score_logits

    def embed_prompts(self, coords: Tensor, labels: Tensor) -> Tensor:
        """Points (N, P, 2), labelled (N, P), as N x (P + 1) x C."""
        # The official predictor appends a padding point wherever there are points at all.
        return self.embed_points(*with_padding_point(coords, labels))

    def answer(self, masks: Tensor, scores: Tensor, multimask: Tensor) -> tuple[Tensor, Tensor]:
        """Of four masks the last three, or the first, or the best of those if that is unstable."""
        single, single_score = self.mask_decoder._dynamic_multimask_via_stability(masks, scores)
        masks = torch.cat([single, masks[:, 1:]], dim=1)
        scores = torch.cat([single_score, scores[:, 1:]], dim=1)
        return self.choose(masks, scores, multimask)

    def parts(self) -> Parts:
        """The mask decoder's modules, for :mod:`.split`."""
        decoder = self.mask_decoder
        return replace(
            super().parts(),
            tokens=(decoder.obj_score_token, decoder.iou_token, decoder.mask_tokens),
            quality_token=1,
            presence=decoder.pred_obj_score_head,
        )

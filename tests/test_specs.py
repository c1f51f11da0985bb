"""The table is consistent with itself and with the checkpoints that it names."""

from __future__ import annotations

import re

import numpy as np
import pytest

from triton_sam.errors import InvalidInputError
from triton_sam.masks import THRESHOLD
from triton_sam.specs import FAMILIES, Family, family

families = pytest.mark.parametrize("entry", FAMILIES.values(), ids=FAMILIES.keys())


@families
def test_names_are_unique_and_prompts_are_decoder_inputs(entry: Family) -> None:
    for model in entry.models:
        names = [tensor.name for tensor in model.inputs]
        assert len(set(names)) == len(names)
    layout = entry.prompts
    inputs = {tensor.name for tensor in entry.decoder.inputs}
    assert {layout.points, layout.labels, layout.mask, layout.has_mask, layout.multimask} <= inputs
    assert layout.boxes is None or layout.boxes in inputs
    assert {entry.masks, entry.scores} <= {tensor.name for tensor in entry.decoder.outputs}


@families
def test_the_decoder_takes_every_output_of_the_encoder(entry: Family) -> None:
    for output in entry.encoder.outputs:
        taken = entry.decoder.input(output.name)
        assert all(axis in (-1, own) for axis, own in zip(taken.dims, output.dims, strict=True))


@families
def test_a_default_fits_the_dims_of_its_input(entry: Family) -> None:
    for tensor in entry.decoder.inputs:
        if tensor.default is not None:
            shape, _ = tensor.default
            assert all(axis in (-1, n) for axis, n in zip(tensor.dims, shape, strict=True))


@families
def test_every_download_has_a_size_and_a_hash(entry: Family) -> None:
    assert entry.default_variant in entry.variants
    for name, variant in entry.variants.items():
        assert variant.name == name
        if variant.url is not None:
            assert variant.url.endswith("/" + variant.file)
            assert variant.nbytes is not None and variant.nbytes > 10**8
            assert variant.sha256 is not None and re.fullmatch("[0-9a-f]{64}", variant.sha256)


def test_variants_have_models_of_their_own() -> None:
    sam2 = family("sam2")
    assert sam2.named() is sam2 and sam2.named("tiny") is sam2
    large = sam2.named("large")
    assert [model.name for model in large.models] == ["sam2_large_encoder", "sam2_large_decoder"]
    assert large.encoder.outputs == sam2.encoder.outputs
    with pytest.raises(InvalidInputError, match="no variant 'huge'"):
        sam2.named("huge")


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(
        InvalidInputError, match="Unknown model type 'sam9'; choose one of: sam1, sam2, sam3"
    ):
        family("sam9")
    with pytest.raises(InvalidInputError, match="no variant 'huge'; choose one of: tiny, small"):
        family("sam2").variant("huge")


def test_the_preprocessing_constants_are_the_official_ones() -> None:
    from triton_sam.export.torch_compat import prepare_torchvision

    prepare_torchvision()
    from sam2.utils.transforms import SAM2Transforms
    from segment_anything import sam_model_registry
    from transformers import Sam3ImageProcessor

    image = family("sam2").image
    official = SAM2Transforms(resolution=image.size, mask_threshold=0.0)
    assert (list(image.mean), list(image.std)) == (official.mean, official.std)

    image = family("sam1").image
    sam1 = sam_model_registry["vit_b"]()
    np.testing.assert_allclose(sam1.pixel_mean.flatten(), 255 * np.array(image.mean), rtol=1e-6)
    np.testing.assert_allclose(sam1.pixel_std.flatten(), 255 * np.array(image.std), rtol=1e-6)
    assert sam1.image_encoder.img_size == image.size
    assert sam1.mask_threshold == THRESHOLD

    image = family("sam3").image
    processor = Sam3ImageProcessor()
    assert image.mean == tuple(processor.image_mean)
    assert image.std == tuple(processor.image_std)
    assert processor.size["height"] == processor.size["width"] == image.size

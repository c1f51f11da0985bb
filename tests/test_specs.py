"""The table is consistent with itself and with the checkpoints that it names."""

from __future__ import annotations

import re

import pytest

from triton_sam.errors import InvalidInputError
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


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match="Unknown model type 'sam9'; choose one of: sam2"):
        family("sam9")
    with pytest.raises(InvalidInputError, match="no variant 'huge'; choose one of: tiny, small"):
        family("sam2").variant("huge")


def test_the_preprocessing_constants_are_the_official_ones() -> None:
    from triton_sam.export.torch_compat import prepare_torchvision

    prepare_torchvision()
    from sam2.utils.transforms import SAM2Transforms

    image = family("sam2").image
    official = SAM2Transforms(resolution=image.size, mask_threshold=0.0)
    assert (list(image.mean), list(image.std)) == (official.mean, official.std)

"""The model behind ``sam2_encoder_jpeg``: an image file's bytes to the encoder's input.

It runs in Triton's python backend, which lets it import what lies beside it in the model
repository: ``triton_sam_part``, the modules of triton_sam that prepare images for the client too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..errors import ImageError
    from ..images import load_image, preprocess
    from ..specs import FAMILIES

    # Not installed where this file is type-checked.
    pb_utils: Any
else:
    import triton_python_backend_utils as pb_utils
    from triton_sam_part.errors import ImageError
    from triton_sam_part.images import load_image, preprocess
    from triton_sam_part.specs import FAMILIES


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read which family's images to make."""
        config = json.loads(args["model_config"])
        self._family = FAMILIES[config["parameters"]["family"]["string_value"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request on its own."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        (encoded,) = request.inputs()
        try:
            image = load_image(bytes(encoded.as_numpy().reshape(-1)[0]))
        except ImageError as exc:
            error = pb_utils.TritonError(str(exc), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        pixels = preprocess(image, self._family.image)
        name = self._family.encoder.inputs[0].name
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, pixels)])

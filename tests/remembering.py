"""The official predictor, asked once for each picture and prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


class Remembering:
    """Answers of an official predictor, kept: several clients are compared with the same ones."""

    def __init__(self, predictor: Any) -> None:
        self._predictor = predictor
        self._answers: dict[Any, Any] = {}
        self._image = b""
        self._set = b""
        self._picture: Any = None

    def set_image(self, image: Image.Image) -> None:
        self._image, self._picture = image.tobytes(), image

    def predict(self, **prompt: Any) -> Any:
        given = {name: np.asarray(value).tobytes() for name, value in prompt.items()}
        key = (self._image, *sorted(given.items()))
        if key not in self._answers:
            if self._set != self._image:
                self._predictor.set_image(self._picture)
                self._set = self._image
            self._answers[key] = self._predictor.predict(**prompt)
        return self._answers[key]

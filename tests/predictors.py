"""A predictor without Triton: a fake or real engine behind the real service and the real client."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from fakes import FakeTransport, answer
from numpy.typing import NDArray

from triton_sam.export import parity
from triton_sam.export.parity import submit as ask
from triton_sam.predictor.messages import Arrays
from triton_sam.predictor.service import Predictor
from triton_sam.predictor.settings import Settings
from triton_sam.protocol import Call
from triton_sam.specs import Family

__all__ = ["FakeEngine", "PredictorTransport", "ask", "predictor_of"]


class FakeEngine:
    """The encoder and decoder of ``fakes.answer``; counts, and waits where it is told to."""

    def __init__(self, family: Family) -> None:
        self.family = family
        served = FakeTransport(family, lambda call: {}).models
        self.encoder_served = served[family.encoder.name]
        self.decoder_served = served[family.decoder.name]
        self.kept = family.encoder.outputs
        self.encoded = 0
        self.decoded: list[Call] = []
        self.may_encode, self.may_decode = threading.Event(), threading.Event()
        self.may_encode.set()
        self.may_decode.set()

    def make_way(self) -> None:
        pass

    def encode(self, call: Call) -> Mapping[str, Any]:
        assert self.may_encode.wait(10)
        self.encoded += 1
        return answer(self.family, call)

    def decode(self, call: Call) -> Mapping[str, NDArray[Any]]:
        assert self.may_decode.wait(10)
        self.decoded.append(call)
        arrays = dict(answer(self.family, call))
        # What the encoder said of the image is in the scores: no other image gives the same.
        said = call.inputs[self.family.encoder.outputs[0].name].reshape(-1)[0]
        arrays[self.family.scores] = arrays[self.family.scores] + said
        return arrays

    def hold(self, array: NDArray[Any]) -> Any:
        return array

    def close(self) -> None:
        pass


class PredictorTransport(parity.PredictorTransport):
    """Moves the calls of a client to a predictor in this process, which stays open."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(predictor)
        self.calls: list[Call] = []

    def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        self.calls.append(call)
        return super().infer(call, timeout_s)

    def close(self) -> None:
        pass


def predictor_of(family: Family, **settings: Any) -> tuple[Predictor, FakeEngine]:
    engine = FakeEngine(family)
    return Predictor(engine, Settings(**settings)), engine

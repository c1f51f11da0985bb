"""A predictor without Triton: a fake or real engine behind the real service and the real client."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from fakes import FakeTransport, answer
from numpy.typing import NDArray

from triton_sam.errors import InferenceError, ModelNotReadyError
from triton_sam.predictor.messages import Arrays, PredictorError, Request
from triton_sam.predictor.service import Predictor
from triton_sam.predictor.settings import Settings
from triton_sam.protocol import Call, Served
from triton_sam.specs import Family
from triton_sam.specs.predictor import predictor_model


class FakeEngine:
    """The encoder and decoder of ``fakes.answer``; counts, and waits where it is told to."""

    def __init__(self, family: Family) -> None:
        self.family = family
        served = FakeTransport(family, lambda call: {}).models
        self.encoder_served = served[family.encoder.name]
        self.decoder_served = served[family.decoder.name]
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

    def close(self) -> None:
        pass


def ask(predictor: Predictor, outputs: Sequence[str], **inputs: Any) -> Future[Arrays]:
    """Submit a request; its future gives the outputs or raises the error."""
    future: Future[Arrays] = Future()

    def reply(given: Arrays | PredictorError) -> None:
        if isinstance(given, PredictorError):
            future.set_exception(given)
        else:
            future.set_result(given)

    cancelled = inputs.pop("cancelled", lambda: False)
    predictor.submit(Request(inputs, frozenset(outputs), reply, cancelled))
    return future


class PredictorTransport:
    """Moves the calls of a client to a predictor in this process."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.model = predictor_model(predictor.family)
        self.calls: list[Call] = []

    def infer(self, call: Call, timeout_s: float | None = None) -> Arrays:
        self.calls.append(call)
        try:
            return ask(self.predictor, call.outputs, **call.inputs).result(10)
        except PredictorError as exc:
            raise InferenceError(f"said: {exc}", str(exc), exc.kind == "invalid") from exc

    def served(self, model: str, timeout_s: float | None = None) -> Served:
        if model != self.model.name:
            raise ModelNotReadyError(f"There is no {model!r}.")
        return Served(
            frozenset(t.name for t in self.model.inputs),
            frozenset(t.name for t in self.model.outputs),
        )

    def check_ready(self, models: Sequence[str], timeout_s: float | None = None) -> None:
        if list(models) != [self.model.name]:
            raise ModelNotReadyError(f"There is no {models!r}.")

    def close(self) -> None:
        pass


def predictor_of(family: Family, **settings: Any) -> tuple[Predictor, FakeEngine]:
    engine = FakeEngine(family)
    return Predictor(engine, Settings(**settings)), engine

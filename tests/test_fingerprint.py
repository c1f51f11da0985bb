"""The name of a served checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from triton_sam.demo import demo_repository
from triton_sam.fingerprint import probe_calls, read_fingerprint
from triton_sam.protocol import Arrays, Served
from triton_sam.server import EmbeddedServer
from triton_sam.specs import FAMILIES, Family
from triton_sam.transport import open_transport

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


@pytest.fixture(scope="module")
def demo_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(demo_repository()) as running:
        yield running


def fingerprint(url: str) -> str:
    family = FAMILIES["sam2"]
    transport = open_transport(url)
    try:
        served = transport.served(family.decoder.name)
        answers = [transport.infer(call) for call in probe_calls(family, served)]
    finally:
        transport.close()
    return read_fingerprint(family, answers, served)


def test_it_tells_checkpoints_apart_and_is_the_same_each_time(
    server: EmbeddedServer, demo_server: EmbeddedServer
) -> None:
    random, demo = fingerprint(server.http_url), fingerprint(demo_server.http_url)
    assert random != demo
    assert fingerprint(f"grpc://{server.grpc_url}") == random
    assert fingerprint(f"grpc://{demo_server.grpc_url}") == demo
    assert len(demo) == 16


def declared(family: Family) -> Served:
    model = family.decoder
    return Served(
        frozenset(tensor.name for tensor in model.inputs),
        frozenset(tensor.name for tensor in model.outputs),
    )


def answer(family: Family, level: float, score: float) -> Arrays:
    shape = [1, 3, family.prompts.mask_size, family.prompts.mask_size]
    if family.prompts.group_axis:
        shape.insert(1, 1)
    logits = np.full(shape, level, np.float32)
    return {family.masks: logits, family.scores: np.full(shape[:-2], score, np.float32)}


@families
def test_the_question_is_one_call_with_what_the_decoder_needs(family: Family) -> None:
    (call,) = probe_calls(family, declared(family))
    needed = {tensor.name for tensor in family.decoder.inputs if not tensor.optional}
    assert needed <= set(call.inputs)
    assert sum(array.nbytes for array in call.inputs.values()) < 24e6
    for name, array in call.inputs.items():
        assert len(array.shape) == len(family.decoder.input(name).dims)


@families
def test_rounding_leaves_noise_out(family: Family) -> None:
    served = declared(family)
    first = read_fingerprint(family, [answer(family, 3.2, 0.911)], served)
    assert read_fingerprint(family, [answer(family, 3.2001, 0.9109)], served) == first
    assert read_fingerprint(family, [answer(family, 5.2, 0.911)], served) != first
    assert read_fingerprint(family, [answer(family, 3.2, 0.94)], served) != first
    zero = read_fingerprint(family, [answer(family, 0.001, 0.5)], served)
    assert read_fingerprint(family, [answer(family, -0.001, 0.5)], served) == zero

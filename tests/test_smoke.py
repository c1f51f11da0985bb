"""The smoke test passes a model that works, and tells one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triton_sam import SAM2TritonClient, Segmentation, cli, smoke, smoke_speculative
from triton_sam.demo import demo_photo, demo_repository
from triton_sam.server import EmbeddedServer


@pytest.fixture(scope="module")
def demo_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(demo_repository()) as server:
        yield server


@pytest.fixture(scope="module")
def answers(demo_server: EmbeddedServer) -> smoke.Answers:
    with SAM2TritonClient(demo_server.url) as client:
        return smoke.ask(client)


def test_the_demo_model_passes(
    demo_server: EmbeddedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "overlay.png"
    assert cli.main(["smoke", "sam2", "--url", demo_server.url, "-o", str(picture)]) == 0
    with Image.open(picture) as overlay:
        assert overlay.size == demo_photo().size
        assert not np.array_equal(np.asarray(overlay), np.asarray(demo_photo()))
    said = capsys.readouterr().out
    assert said.count(" ok  ") == 13
    assert "the same call gives the same answer: bit for bit" in said
    assert f"look at {picture}" in said


def test_random_weights_pass_what_any_weights_can(
    server: EmbeddedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["smoke", "sam2", "--url", server.url, "-o", str(tmp_path / "overlay.png")]
    assert cli.main([*command, "--any-weights"]) == 0
    assert "not required" in capsys.readouterr().out
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("triton-sam: ") and said.count("\n") == 1
    assert "checks failed. The first: the " in said


def test_sessions_are_looked_at(
    demo_server: EmbeddedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["smoke", "speculative", "--url", demo_server.url]) == 0
    said = capsys.readouterr().out
    assert said.count(" ok  ") == 5
    assert "hovering ends with the last position's mask" in said


def test_a_wrong_latest_result_fails(
    demo_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def first(tasks: Any, *_: object) -> Any:
        return await tasks[0]

    monkeypatch.setattr(smoke_speculative, "wait_for_latest_result", first)
    assert cli.main(["smoke", "speculative", "--url", demo_server.url]) == 1
    assert "1 of 5 checks failed. The first: the latest result" in capsys.readouterr().err


def _failed(answers: smoke.Answers) -> list[str]:
    return [check.name for check in smoke.examine(answers) if not check.passed]


def _spoiled(answer: Segmentation, value: float) -> Segmentation:
    logits = answer.logits.copy()
    logits[..., 0, 0] = value
    return replace(answer, logits=logits)


def test_each_fault_is_told(answers: smoke.Answers) -> None:
    assert _failed(answers) == []
    nan = replace(answers, elsewhere=_spoiled(answers.elsewhere, np.nan))
    assert _failed(nan)[0] == "logits and scores are finite"
    assert _failed(replace(answers, again=_spoiled(answers.again, 3.0))) == [
        "the same call gives the same answer"
    ]
    assert _failed(replace(answers, three=answers.click)) == ["multimask_output gives 3 masks"]
    assert _failed(replace(answers, refined=answers.click)) == ["mask_input changes the mask"]
    assert _failed(replace(answers, elsewhere=answers.click)) == [
        "another click changes the mask",
        "the other click's mask holds the point",
    ]
    assert _failed(replace(answers, box=answers.elsewhere)) == [
        "the box finds what the click finds"
    ]


@pytest.mark.parametrize("filled", [False, True])
def test_an_empty_mask_and_a_full_one_are_told(filled: bool, answers: smoke.Answers) -> None:
    masks = np.full_like(answers.click.masks, filled)
    failed = _failed(replace(answers, click=replace(answers.click, masks=masks)))
    assert "the click's mask is an object" in failed
    assert ("the click's mask holds the point" in failed) is not filled


def test_scores_out_of_range_need_trained_weights(answers: smoke.Answers) -> None:
    wild = replace(answers, click=replace(answers.click, scores=answers.click.scores + 7))
    (check,) = [check for check in smoke.examine(wild) if not check.passed]
    assert check.name == "scores are from 0 to 1" and check.needs_weights
    assert check.found.endswith(f"to {wild.click.scores.max():.2f}")


def test_a_model_without_mask_prompts(answers: smoke.Answers) -> None:
    without = replace(answers, refined=None)
    assert _failed(without) == []
    assert not any("refine" in check.name for check in smoke.examine(without))


def test_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["smoke", "sam2", "--url", "localhost:1"]) == 1
    assert "No Triton server at localhost:1" in capsys.readouterr().err

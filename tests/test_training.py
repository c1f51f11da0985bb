"""The training program computes what the official model does, resumes, and repeats itself."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_model import evaluate, fastpath, losses, network, sampling
from demo_model.scenes import make_scene

from triton_sam.export import sam2
from triton_sam.specs import FAMILIES

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, str(ROOT / "scripts/train_demo_model.py")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "scenes"
    command = ["scenes", str(folder), "--shards", "2", "--count", "6", "--size", "128"]
    subprocess.run([*PROGRAM, *command], check=True)
    return folder


def _train(folder: Path, scenes: Path, steps: int, *more: str) -> dict[str, torch.Tensor]:
    command = ["train", str(folder), "--scenes", str(scenes), "--stage", "s", "--size", "128"]
    command += ["--steps", str(steps), "--images", "2", "--prompts", "2", "--workers", "1"]
    subprocess.run([*PROGRAM, *command, *more], check=True)
    return sam2.read_state_dict(folder / "model.pt")


def test_the_same_seed_gives_the_same_model(scenes: Path, tmp_path: Path) -> None:
    first = _train(tmp_path / "first", scenes, 2)
    second = _train(tmp_path / "second", scenes, 2)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(torch.equal(value, value.bfloat16().float()) for value in first.values())
    # The official format, loaded strictly by the official builder.
    sam2.build_model("sam2.1_demo.yaml", tmp_path / "first" / "model.pt")


def test_a_second_run_goes_on(scenes: Path, tmp_path: Path) -> None:
    before = _train(tmp_path, scenes, 1)
    after = _train(tmp_path, scenes, 3)
    name = "sam_mask_decoder.mask_tokens.weight"
    assert not torch.equal(before[name], after[name])
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == 3


def test_a_run_starts_from_given_weights(scenes: Path, tmp_path: Path) -> None:
    config = ROOT / "triton_sam/export/configs/sam2.1_demo.yaml"
    shipped = sam2.read_state_dict(evaluate.shipped_checkpoint(config, tmp_path))
    trained = [name for name in shipped if name.startswith(network.IMAGE_PATH)]
    still = ("--rate", "0", "--last-rate", "0")
    taken = _train(tmp_path / "taken", scenes, 1, "--start", "shipped", *still)
    assert all(torch.equal(taken[name], shipped[name]) for name in trained)
    again = _train(tmp_path / "again", scenes, 1, "--start", str(tmp_path / "taken/model.pt"))
    name = "sam_mask_decoder.mask_tokens.weight"
    assert 0 < (again[name] - shipped[name]).abs().max() < 0.01


class _Everything:
    """A predictor for which every pixel belongs to the object."""

    def set_image(self, image: Any) -> None:
        self.shape = image.shape[:2]

    def predict(self, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
        return np.ones((1, *self.shape)), np.ones(1), np.ones((1, 32, 32))


def test_held_out_figures_are_of_the_scenes_asked_for() -> None:
    figures = evaluate.held_out(_Everything(), range(60, 62), size=128)
    shares = []
    for index in (60, 61):
        rng = np.random.default_rng([evaluate.HELD_OUT_SEED, index])
        labels = make_scene(rng, 128).labels
        objects = rng.permutation(sampling.visible_objects(labels))[:6]
        shares += [float((labels == label).mean()) for label in objects]
    assert len(shares) > 2
    assert figures.values["one click"] == pytest.approx(shares)
    assert figures.values["box"] == pytest.approx(shares)


def test_the_summary_says_how_sure_a_mean_is() -> None:
    figures = evaluate.Figures({"box": [0.5, 0.7, 0.9, 0.9]})
    assert figures.summary()["box"] == {
        "objects": 4,
        "mean": 0.75,
        "error": 0.0957,  # √((0.25² + 0.05² + 0.15² + 0.15²) / 3) / √4
        "median": 0.8,
        "at_least_0.75": 0.5,
        "lowest": 0.5,
    }


def test_the_photographed_coins_are_where_they_are() -> None:
    coins = evaluate.coins()
    assert len(coins) == 24
    assert np.sum(coins, axis=0).max() == 1
    for x, y in evaluate.PHOTOGRAPHS["coins"][0:8]:
        assert sum(coin[int(y), int(x)] for coin in coins) == 1
    figures = evaluate.ask_for_coins(_Everything()).values
    assert figures["coins, box"] == pytest.approx([coin.mean() for coin in coins])


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_fast_passes_are_the_official_ones(with_mask: bool) -> None:
    torch.manual_seed(0)
    model = sam2.build_model("sam2.1_demo.yaml", None)
    network.initialise(model, 1)
    network.set_size(model, 256)
    images = torch.rand(2, 3, 256, 256)
    points, labels = torch.rand(4, 3, 2) * 256, torch.tensor([[1, 0, -1], [2, 3, 1]]).repeat(2, 1)
    mask = torch.randn(4, 1, 64, 64) if with_mask else None
    with torch.no_grad():
        own = network.encode(model, network.normalise(images))
        spec = dataclasses.replace(FAMILIES["sam2"].image, size=256)
        embedding, fine, middle = sam2.Encoder(model, spec)(images)
        answer = fastpath.decode(model, own, points, labels, mask)
        prompt: Any = model.sam_prompt_encoder
        decoder: Any = model.sam_mask_decoder
        sparse, dense = prompt(points=(points, labels), boxes=None, masks=mask)
        masks, scores, _, present = decoder.predict_masks(
            image_embeddings=embedding.repeat_interleave(2, 0),
            image_pe=prompt.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=[fine.repeat_interleave(2, 0), middle.repeat_interleave(2, 0)],
        )
    pairs = [(own.embedding, embedding), (own.fine, fine), (own.middle, middle)]
    pairs += [(answer.masks, masks), (answer.ious, scores), (answer.present, present)]
    for ours, official in pairs:
        assert ours.shape == official.shape
        assert (ours - official).abs().max() <= 1e-5 * official.abs().max()


def test_plain_products_are_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 16, 24).bfloat16() for _ in range(3))
    official = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (network.attend(q, k, v) - official).abs().max() < 0.02


def test_clicks_land_inside_and_half_of_them_at_the_deepest_place() -> None:
    torch.manual_seed(0)
    target = torch.zeros(200, 32, 32)
    target[:, 4:9, 10:15] = 1.0
    points, labels = sampling.click(target)
    cells = ((points[:, 0] + 0.5) / 4).floor()
    inside = (cells >= torch.tensor([10, 4])) & (cells < torch.tensor([15, 9]))
    assert inside.all() and bool((labels == 1).all())
    deep = (cells == torch.tensor([12, 6])).all(1).float().mean()
    assert 0.4 < deep < 0.75


def test_corrections_go_to_the_largest_error() -> None:
    torch.manual_seed(0)
    target = torch.zeros(2, 32, 32)
    target[:, 4:20, 4:20] = 1.0
    missed, agreed = target * 2 - 1, target * 2 - 1
    missed[:, 4:20, 12:20] = -1.0
    points, labels = sampling.corrective_click(torch.stack([missed[0], agreed[1]]), target)
    assert labels.tolist() == [[1.0], [1.0]]
    assert points[0, 0, 0] >= 12 * 4 - 0.5
    assert ((points >= 4 * 4 - 0.5) & (points <= 20 * 4)).all()


def test_where_a_box_was_the_prompt_what_is_outside_of_it_weighs_more() -> None:
    target = torch.zeros(2, 6, 8)
    target[0, 1:5, 2:7] = 1
    target[0, 2:4, 3:6] = 0  # a ring: its hole is within the box
    target[1, 5, 0] = 0.3  # soft, in a corner
    weight = losses.box_weight(target)
    wanted = torch.full((2, 6, 8), losses.OUTSIDE)
    wanted[0, 1:5, 2:7] = 1
    wanted[1, 5, 0] = 1
    torch.testing.assert_close(weight, wanted)

    right = torch.where(target > 0.5, 9.0, -9.0)[:1]
    within, outside = right.clone(), right.clone()
    within[0, 2, 3] = outside[0, 0, 0] = 9
    plain = [losses.mask_loss(each, target[:1]) for each in (within, outside)]
    torch.testing.assert_close(*plain)
    costs = [losses.mask_loss(each, target[:1], weight[:1]) for each in (within, outside)]
    torch.testing.assert_close(costs[0], plain[0], rtol=1e-2, atol=0)
    one = 9 / 48 / (target[0].mean() + 0.005).sqrt()
    torch.testing.assert_close(
        costs[1] - costs[0], one[None] * (losses.OUTSIDE - 1), rtol=1e-2, atol=0
    )

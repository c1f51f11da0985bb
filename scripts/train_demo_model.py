"""Train the demo model: the SAM 2.1 architecture, small, on synthetic scenes, on a CPU.

The demo model lets this toolkit be tried and tested end to end without downloading anybody's
weights.  It knows clear shapes on textured grounds; it is no replacement for Meta's models.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import torch
from demo_model import network, store
from demo_model.training import Stage, Trainer
from torch import distributed
from torch.multiprocessing.spawn import spawn

from triton_sam.export.sam2 import read_state_dict

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "triton_sam" / "export" / "configs" / "sam2.1_demo.yaml"

RECIPE = """
a full training, as docs/demo-model.md describes it:

  1. draw 6000 scenes of 512 px (6 GB, about 6 minutes on one core):
       %(prog)s scenes work/scenes --shards 24
  2. learn to find prompts at 128 px, then go up in resolution; each command takes up the
     weights the one before left in work/run, and an interrupted command goes on when repeated:
       %(prog)s train work/run --scenes work/scenes --stage s128 --size 128 --steps 1000 \\
           --images 6 --corrections 0 --boxes 0.2 --bfloat16
       %(prog)s train work/run --scenes work/scenes --stage s256 --size 256 --steps 3500 \\
           --images 4 --prompts 4 --last-rate 4e-4 --corrections 0.2 --boxes 0.35 --bfloat16
       %(prog)s train work/run --scenes work/scenes --stage s512 --size 512 --steps 500 \\
           --images 2 --prompts 4 --rate 5e-4 --last-rate 3e-4 --corrections 0.25 --bfloat16
       %(prog)s train work/run --scenes work/scenes --stage s1024 --size 1024 --steps 200 \\
           --images 1 --prompts 4 --rate 3e-4 --last-rate 1e-5 --mean-decay 0.95 --bfloat16
  3. measure work/run/model.pt with the official predictor at 1024 px, and look at it:
       %(prog)s evaluate work/run/model.pt --json work/figures.json --pictures work/pictures
       %(prog)s plot work/run/curve.csv curve.png
  4. export it and put it into the package:
       triton-sam export sam2 --variant demo --default --checkpoint work/run/model.pt \\
           --output work/models
       python scripts/pack_demo_model.py --repository work/models

to train the model that ships further, begin a run with its weights, on scenes drawn at the size
that is served (4 MB each), and choose between checkpoints by scenes that no figure is of:
       %(prog)s scenes work/large --shards 24 --count 50 --size 1024 --seed 2
       %(prog)s train work/further --scenes work/large --start shipped --stage further \\
           --size 1024 --steps 2000 --images 1 --prompts 8 --rate 3e-4 --last-rate 1e-5 \\
           --boxes 0.72 --corrections 0.12 --seed-weight 0.5 --mean-decay 0.99 --slow-share 1 \\
           --bfloat16
       %(prog)s evaluate work/further/model.pt --first 60 --held-out 25
A step of the second command takes two cores 2.4 to 4 s (bfloat16, amx).  The last six stages of the
model that ships were such runs; they brought these means on scenes 0 to 59:

       stage             steps    rate        boxes    one click    box    two corrections
       10, the first to ship                               0.819  0.832              0.874
       11                1,690    3e-4          0.5        0.848  0.869              0.905
       12                2,150    4e-4    0.6, 0.75        0.847  0.883              0.909
       13                3,000  3.5e-4    0.6, 0.72        0.853  0.892              0.908
       14                  420  1.5e-4         0.85        0.854  0.894              0.914
       15                1,946    3e-4         0.72          not measured
       16                  580  1.2e-4         0.76        0.872  0.906              0.918

In stages 13 to 15 only 0.3 of the trays were trained on, and clicks came to spill into look-alikes;
in the last one 0.7 were, and they did so less.  What the trays did alone was not measured.
From stage 14 on errors outside of a box that was the prompt weigh more.
340 steps at 512 px, the rate still high, made one click worse at 1024 px.
"""


def main() -> None:
    """Run the command given on the command line."""
    args = parser().parse_args()
    args.run(args)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=RECIPE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_scenes(commands)
    add_train(commands)
    add_evaluate(commands)
    add_plot(commands)
    return top


def command(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    """A sub-command whose help shows defaults."""
    form = argparse.ArgumentDefaultsHelpFormatter
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, formatter_class=form
    )
    return made


def add_scenes(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """The command that draws scenes to disk."""
    a = command(commands, "scenes", "Draw synthetic scenes to disk, shard by shard.")
    a.set_defaults(run=lambda v: store.fill(v.folder, v.shards, v.count, v.size, v.seed))
    a.add_argument("folder", type=Path, help="where the shards go; shards already there stay")
    a.add_argument(
        "--shards",
        type=int,
        default=24,
        help="how many files of scenes; the first is kept for watching progress, so at least 2",
    )
    a.add_argument("--count", type=int, default=250, help="scenes per shard")
    a.add_argument("--size", type=int, default=512, help="side of a scene in pixels")
    a.add_argument("--seed", type=int, default=1, help="same seed, same scenes")


def add_train(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """The command that trains one stage."""
    a = command(
        commands,
        "train",
        "Train one stage, from the weights FOLDER holds if any. "
        "Writes last.pt (to resume), model.pt (to use) and curve.csv there.",
    )
    a.set_defaults(run=train)
    a.add_argument("folder", type=Path, help="the run: checkpoints and curve")
    a.add_argument("--scenes", type=Path, required=True, help="folder drawn by `scenes`")
    a.add_argument("--config", type=Path, default=CONFIG, help="model configuration")
    a.add_argument(
        "--start",
        metavar="CHECKPOINT",
        help="for a new run: weights to start from, a model.pt or `shipped` for the model that "
        "comes with the package, instead of random ones",
    )
    a.add_argument(
        "--stage",
        required=True,
        help="name of the stage; repeating a name resumes "
        "it, a new name starts a new stage from the present weights",
    )
    a.add_argument("--size", type=int, default=256, help="image side in pixels: 128, 256, …")
    a.add_argument("--steps", type=int, required=True, help="optimiser steps of this stage")
    a.add_argument("--images", type=int, default=3, help="images per step and worker")
    a.add_argument("--prompts", type=int, default=6, help="objects asked for per image")
    a.add_argument("--rate", type=float, default=1e-3, help="learning rate after the warm-up")
    a.add_argument("--last-rate", type=float, default=4e-4, help="learning rate at the end")
    a.add_argument("--warmup", type=int, default=20, help="steps over which the rate rises")
    a.add_argument(
        "--boxes",
        type=float,
        default=0.3,
        help="share of boxes among the prompts; the rest are single clicks",
    )
    a.add_argument(
        "--corrections",
        type=float,
        default=0.1,
        help="probability of a further "
        "round with a corrective click and the previous mask, up to two rounds",
    )
    a.add_argument("--seed-weight", type=float, default=1.0, help="weight of the dense loss")
    a.add_argument(
        "--bfloat16",
        action="store_true",
        help="decoder products in bfloat16 (faster on processors with avx512_bf16 or amx)",
    )
    a.add_argument("--seed", type=int, default=0, help="start values, examples and prompts")
    a.add_argument(
        "--mean-decay",
        type=float,
        default=0.997,
        help="what each step leaves of the running mean of the weights, which is what is "
        "published; a short last stage wants less, say 0.98",
    )
    a.add_argument(
        "--slow-share",
        type=float,
        default=0.3,
        help="share of the rate for what finds prompts, which works from the start; 1 for a "
        "trained model",
    )
    a.add_argument("--workers", type=int, default=2, help="processes that share each step")
    a.add_argument("--threads", type=int, default=1, help="threads of each worker")


def add_evaluate(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """The command that measures a checkpoint."""
    a = command(
        commands,
        "evaluate",
        "Measure a checkpoint with the official image predictor on "
        "fresh scenes of 1024 px, and draw its masks on photographs.",
    )
    a.set_defaults(run=evaluate)
    a.add_argument(
        "checkpoint", type=Path, nargs="?", help="model.pt of a run (default: the one that ships)"
    )
    a.add_argument("--config", type=Path, default=CONFIG, help="model configuration")
    a.add_argument("--held-out", type=int, default=50, help="scenes, up to 6 objects each")
    a.add_argument(
        "--first",
        type=int,
        default=0,
        help="number of the first scene; to choose between checkpoints, take scenes beyond those "
        "that the published figures are of, say 60",
    )
    a.add_argument("--json", type=Path, help="where the figures go")
    a.add_argument(
        "--pictures",
        type=Path,
        help="folder for overlays on held-out scenes and on scikit-image's sample photographs; "
        "measures the photographed coins too",
    )
    a.add_argument("--threads", type=int, default=2, help="threads to use")


def add_plot(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """The command that draws the training curve."""
    a = command(commands, "plot", "Draw curve.csv of a run as a picture (needs matplotlib).")
    a.set_defaults(run=plot)
    a.add_argument("curve", type=Path, help="curve.csv of a run")
    a.add_argument("picture", type=Path, help="PNG to write")


def train(args: argparse.Namespace) -> None:
    """Train one stage with one or several processes."""
    if args.workers == 1:
        work(0, args)
        return
    with tempfile.TemporaryDirectory() as meeting:
        spawn(work, (args, f"file://{meeting}/workers"), nprocs=args.workers)  # type: ignore[no-untyped-call]


def work(rank: int, args: argparse.Namespace, meeting: str = "") -> None:
    """What each process does; they average gradients, and the first one keeps the records."""
    torch.set_num_threads(args.threads)
    if meeting:
        distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=args.workers
        )
    torch.manual_seed(args.seed)
    model = network.build(args.config)
    network.initialise(model, args.seed)
    scenes = store.SceneStore(args.scenes)
    trainer = Trainer(model, scenes, args.folder, args.seed, rank, args.workers)
    if (args.folder / "last.pt").exists():
        trainer.resume(args.folder / "last.pt")
    elif args.start:
        trainer.start(read_start(args.start, args.config))
    trainer.run(
        Stage(
            name=args.stage,
            size=args.size,
            steps=args.steps,
            images=args.images,
            prompts=args.prompts,
            rate=args.rate,
            last_rate=args.last_rate,
            warmup=args.warmup,
            boxes=args.boxes,
            corrections=args.corrections,
            half=args.bfloat16,
            seed_weight=args.seed_weight,
            mean_decay=args.mean_decay,
            slow_share=args.slow_share,
        )
    )


def read_start(start: str, config: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or of the demo model that ships."""
    from demo_model.evaluate import shipped_checkpoint

    if start != "shipped":
        return read_state_dict(Path(start))
    with tempfile.TemporaryDirectory() as folder:
        return read_state_dict(shipped_checkpoint(config, Path(folder)))


def evaluate(args: argparse.Namespace) -> None:
    """Print held-out figures and, if asked for, write them and the overlays."""
    from demo_model import evaluate as measure

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or measure.shipped_checkpoint(args.config, Path(folder))
        predictor = measure.load_predictor(args.config, checkpoint)
    summary = measure.held_out(predictor, range(args.first, args.first + args.held_out)).summary()
    if args.pictures:
        measure.write_pictures(predictor, args.pictures)
        summary |= measure.ask_for_coins(predictor).summary()
    for name, figures in summary.items():
        print(f"{name:36}", "  ".join(f"{k} {v}" for k, v in figures.items()))
    if args.json:
        measure.write_summary(summary, args.json)


def plot(args: argparse.Namespace) -> None:
    """Draw held-out IoU and losses over training time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with args.curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    minutes = [float(row["minutes"]) for row in rows]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6))
    for key, label in (("held_click", "one click"), ("held_box", "box")):
        above.plot(minutes, [float(row[key]) for row in rows], label=label)
    above.set_ylabel("held-out IoU at training size")
    for key, label in (("loss", "prompts"), ("seed_loss", "seeds"), ("bridge", "read places")):
        below.plot(minutes, [float(row[key]) for row in rows], label=label)
    below.set_ylabel("loss")
    below.set_xlabel("minutes of training")
    for axes in (above, below):
        for before, row, at in zip(rows, rows[1:], minutes[1:], strict=False):
            if before["size"] != row["size"]:
                axes.axvline(at, color="grey", linestyle=":")
                axes.annotate(
                    f" {row['size']} px",
                    (at, axes.get_ylim()[0]),
                    rotation=90,
                    va="bottom",
                    color="grey",
                )
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Export every variant of every family and write the table of docs/export.md.

A checkpoint that is in the folder of checkpoints is used; for one that is not, random weights in
the same format stand in: they have the same size and take the same time. Each export runs in a
process of its own, into a repository that is deleted afterwards. What was measured is kept in
docs/exports.json after each one, so that `--only` measures a part again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from triton_sam.export.checkpoints import make_checkpoint
from triton_sam.export.wrappers import WRAPPERS
from triton_sam.files import write_atomically
from triton_sam.specs import FAMILIES, Family, Variant

_DOCS = Path(__file__).parent.parent / "docs"
_BEGIN, _END = "<!-- measured -->\n", "<!-- end -->"

Row = dict[str, Any]

# Columns of the table: title and format of the key's value.
_COLUMNS = {
    "weights": ("weights", "{}"),
    "parameters_m": ("parameters", "{:.1f} M"),
    "encoder_mb": ("encoder", "{:.0f} MB"),
    "decoder_mb": ("decoder", "{:.0f} MB"),
    "seconds": ("time", "{:.0f} s"),
    "peak_memory_gb": ("peak memory", "{:.1f} GB"),
    "difference": ("largest logit difference", "{:.1e}"),
    "mask_iou": ("smallest mask IoU", "{:.5f}"),
    "fp16_encoder_mb": ("fp16 encoder", "{:.0f} MB"),
    "fp16_decoder_mb": ("fp16 decoder", "{:.0f} MB"),
    "fp16_mask_iou": ("fp16 mask IoU", "{:.4f}"),
}


def main() -> int:
    """Measure what the command line names, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = dict(_known())
    parser.add_argument(
        "--only", nargs="+", choices=known, default=list(known), metavar="FAMILY:VARIANT"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=["fp32", "fp16"], default=["fp32", "fp16"]
    )
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), metavar="DIR")
    parser.add_argument(
        "--docs", type=Path, default=_DOCS, metavar="DIR", help="where export.md is to be written"
    )
    args = parser.parse_args()
    for key in args.only:
        rows = read(args.docs)
        rows[key] = rows.get(key, {}) | _measure(*known[key], args.checkpoints, args.precisions)
        _write(args.docs, {name: rows[name] for name in known if name in rows})
    return 0


def _known() -> Iterator[tuple[str, tuple[Family, Variant]]]:
    for name in WRAPPERS:
        for variant in FAMILIES[name].variants.values():
            if variant.url or variant.hub:
                yield f"{name}:{variant.name}", (FAMILIES[name], variant)


def _measure(family: Family, variant: Variant, checkpoints: Path, precisions: Sequence[str]) -> Row:
    row: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, row["weights"] = checkpoints / variant.file, "official"
        if not checkpoint.exists():
            checkpoint, row["weights"] = Path(folder) / variant.file, "random"
            make_apart(family, variant, checkpoint)
        for precision in precisions:
            command = [sys.executable, "-m", "triton_sam.cli", "export", family.name, "--default"]
            command += ["--variant", variant.name, "--checkpoint", str(checkpoint)]
            command += ["--precision", precision, "--output", folder]
            subprocess.run(command, check=True)
            manifests = [_manifest(Path(folder), model.name) for model in family.models]
            row |= _row(*manifests) if precision == "fp32" else _half_row(*manifests)
    return row


def make_apart(family: Family, variant: Variant, path: Path) -> None:
    """In a process of its own, whose memory is free again when the export begins."""
    arguments = (family.name, variant.model_cfg, path)
    process = multiprocessing.get_context("spawn").Process(target=_make, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def _make(family: str, model_cfg: str, path: Path) -> None:
    make_checkpoint(FAMILIES[family], model_cfg, path)


def _manifest(root: Path, model: str) -> Row:
    content: Row = json.loads((root / model / "1/export.json").read_text())
    return content


def _row(encoder: Row, decoder: Row) -> Row:
    parity = encoder["parity"]
    difference = max(case["max_difference"] / case["max_logit"] for case in parity)
    return {
        "parameters_m": round(encoder["parameters"] / 1e6, 1),
        "encoder_mb": round(_bytes(encoder) / 1e6),
        "decoder_mb": round(_bytes(decoder) / 1e6),
        "seconds": round(encoder["seconds"]),
        "peak_memory_gb": round(encoder["peak_memory_mb"] / 1e3, 1),
        "difference": float(f"{difference:.1e}"),
        "mask_iou": round(min(case["mask_iou"] for case in parity), 5),
    }


def _half_row(encoder: Row, decoder: Row) -> Row:
    return {
        "fp16_encoder_mb": round(_bytes(encoder) / 1e6),
        "fp16_decoder_mb": round(_bytes(decoder) / 1e6),
        "fp16_mask_iou": round(min(case["mask_iou"] for case in encoder["parity"]), 4),
    }


def _bytes(manifest: Row) -> int:
    return int(manifest["bytes"] + manifest.get("data", {}).get("bytes", 0))


def read(docs: Path) -> dict[str, Row]:
    """What was measured so far, by ``family:variant``."""
    path = docs / "exports.json"
    rows: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}
    return rows


def _write(docs: Path, rows: dict[str, Row]) -> None:
    page = (docs / "export.md").read_text()
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END)
    lines = ",\n".join(f' "{key}": {json.dumps(row)}' for key, row in rows.items())
    write_atomically(docs / "exports.json", f"{{\n{lines}\n}}\n".encode())
    write_atomically(docs / "export.md", f"{before}{_BEGIN}{table(rows)}{_END}{after}".encode())


def table(rows: dict[str, Row]) -> str:
    """The rows, by ``family:variant``, as a Markdown table."""
    titles = [title for title, _ in _COLUMNS.values()]
    lines = [f"| family | variant | {' | '.join(titles)} |"]
    lines.append("|---|---|---|" + "---:|" * (len(titles) - 1))
    for key, row in rows.items():
        family, variant = key.split(":")
        cells = [
            form.format(row[column]) if column in row else "–"
            for column, (_, form) in _COLUMNS.items()
        ]
        lines.append(f"| {FAMILIES[family].title} | `{variant}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

"""Model configurations of our own, as YAML files in the format of each family's wrapper."""

from __future__ import annotations

from pathlib import Path


def find(model_cfg: str, *folders: Path) -> Path | None:
    """The file ``model_cfg``, here or in one of ``folders``; ``None`` when there is none."""
    ours = Path(__file__).parent
    candidates = (Path(model_cfg), *(folder / model_cfg for folder in (ours, *folders)))
    return next((path for path in candidates if path.is_file()), None)

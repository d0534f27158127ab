"""Shipped model configurations: ``hf:NAME`` on the command line. Facts of the published models, one JSON file each."""

from __future__ import annotations

import difflib
from pathlib import Path

from shardplan.errors import TargetError

FOLDER = Path(__file__).parent
OWN = {"unet": "shardplan.configs.unet"}
"""model_type -> the module that builds it: ``build(settings)``, ``shapes(model, dtype, batch, seq)``, ``loss_fn``."""


def names() -> list[str]:
    """As ``hf:NAME`` takes them."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def file_of(text: str) -> Path:
    """A path, or the file of a shipped configuration. Raises TargetError on an unknown name, naming the nearest."""
    path = Path(text)
    if path.suffix == ".json" or path.exists():
        return path
    shipped = FOLDER / f"{text.lower()}.json"
    if shipped.is_file():
        return shipped
    near = difflib.get_close_matches(text.lower(), names(), 3, 0.5)
    raise TargetError(
        f"there is no configuration {text!r}",
        ["hf: takes the path of a config.json, or one of " + ", ".join(names())],
        [f"did you mean {' or '.join(f'hf:{name}' for name in near)}?"] if near else [],
    )

"""TARGET of the command line: where the model, and perhaps its batch, come from."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shardplan import configs
from shardplan.errors import ShardplanError, TargetError, UsageError

_INPUT = re.compile(r"^(?P<name>[\w.]+)=(?P<dtype>\w+)\[(?P<shape>[\d,\s]*)\]$")


@dataclass(slots=True)
class Target:
    """A model and how to make a batch for it. name: what reports call it."""

    name: str
    model: torch.nn.Module
    batch: Any = None
    loss_fn: Callable[..., Any] | None = None
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)

    def example(self) -> Any:
        """The factory's own batch, or tensors of the wanted shapes without data. Raises UsageError if neither is
        known."""
        if self.shapes:
            return {n: torch.empty(shape, dtype=dtype, device="meta") for n, (dtype, shape) in self.shapes.items()}
        if self.batch is None:
            raise UsageError(
                f"{self.name} gives no example batch",
                hints=["return (model, batch) from the factory", "--input ids=int64[8,2048]"],
            )
        return self.batch

    def random_batch(self, seed: int) -> Any:
        """A batch with data: the factory's own, or random numbers (token ids below the smallest embedding)."""
        if not self.shapes:
            return self.example()
        generator = torch.Generator().manual_seed(seed)
        tables = [m.num_embeddings for m in self.model.modules() if isinstance(m, torch.nn.Embedding)]
        labels = getattr(getattr(self.model, "config", None), "num_labels", None)
        high = max(min(tables), 2) if tables else 2
        found = {}
        for name, (dtype, shape) in self.shapes.items():
            if dtype.is_floating_point:
                found[name] = torch.randn(shape, generator=generator).to(dtype)
            elif name == "labels" and len(shape) == 1 and labels:
                found[name] = torch.randint(0, labels, shape, generator=generator).to(dtype)
            else:
                found[name] = torch.randint(0, high, shape, generator=generator).to(dtype)
        return found


def load_target(
    text: str, inputs: Sequence[str] = (), batch: int | None = None, seq: int | None = None, on_meta: bool = True
) -> Target:
    """Load ``file.py:factory``, ``package.module:factory``, ``hf:CONFIG.json`` or ``hf:NAME`` of a shipped one.

    inputs: ``name=dtype[shape]`` texts, which replace the example. batch, seq: sizes for ``hf:`` targets. on_meta:
    build ``hf:`` models without memory. Raises TargetError, or UsageError for inputs that make no sense.
    """
    if text.startswith("hf:"):
        target = _from_config(text, batch or 8, seq, on_meta)
    else:
        target = _from_factory(text)
        if (batch is not None or seq is not None) and not inputs:
            raise UsageError(
                "--batch and --seq say nothing about the inputs of a factory",
                hints=["return (model, batch) from the factory, or give --input ids=int64[8,2048]"],
            )
    for item in inputs:
        name, dtype, shape = parse_input(item)
        target.shapes[name] = (dtype, shape)
    return target


def parse_input(text: str) -> tuple[str, torch.dtype, tuple[int, ...]]:
    """``ids=int64[8,2048]`` -> name, dtype, shape. Raises UsageError."""
    found = _INPUT.match(text.strip())
    dtype = getattr(torch, found["dtype"], None) if found else None
    if not found or not isinstance(dtype, torch.dtype):
        raise UsageError(f"cannot read input {text!r}", hints=["write name=dtype[shape], such as ids=int64[8,2048]"])
    return found["name"], dtype, tuple(int(part) for part in found["shape"].split(",") if part.strip())


# -- factories ---------------------------------------------------------------------------------------------------------


def _from_factory(text: str) -> Target:
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise TargetError(
            f"cannot read target {text!r}",
            hints=["write file.py:factory, package.module:factory or hf:config.json"],
        )
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    factory = getattr(module, name, None)
    if not callable(factory):
        near = difflib.get_close_matches(name, [n for n in vars(module) if callable(vars(module)[n])], 3, 0.4)
        raise TargetError(
            f"{where} has no factory {name!r}", hints=[f"did you mean {' or '.join(near)}?"] if near else ()
        )
    try:
        made = factory()
    except ShardplanError:
        raise
    except Exception as error:
        raise TargetError(f"{text} raised {type(error).__name__}: {error}") from error
    parts: tuple[Any, ...] = made if isinstance(made, tuple) else (made,)
    if not isinstance(parts[0], torch.nn.Module) or len(parts) > 3:
        raise TargetError(
            f"{text} returned {', '.join(type(part).__name__ for part in parts)}",
            hints=["return a model, (model, batch), or (model, batch, loss_fn)"],
        )
    return Target(text, *parts)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise TargetError(f"there is no file {path}")
    directory = os.path.abspath(path.parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TargetError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise TargetError(f"module {name} cannot be imported: {type(error).__name__}: {error}") from error


# -- Hugging Face configurations ---------------------------------------------------------------------------------------


def _from_config(text: str, batch: int, seq: int | None, on_meta: bool) -> Target:
    path = configs.file_of(text.removeprefix("hf:"))
    try:
        data = json.loads(path.read_text())
        kind = data["model_type"]
    except OSError as error:
        raise TargetError(f"cannot read {path}", [str(error)], ["hf: takes the path of a config.json"]) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{path} is not a model configuration", [f"{type(error).__name__}: {error}"]) from error
    from shardplan.runtime.meta import meta_model

    if kind in configs.OWN:
        return _own(path, kind, data, batch, seq, on_meta)
    try:
        import transformers
    except ImportError as error:
        raise TargetError("hf: needs the package transformers", hints=["pip install transformers"]) from error
    try:
        settings = {name: value for name, value in data.items() if name != "model_type"}
        config: Any = transformers.AutoConfig.for_model(kind, **settings)
        config.use_cache = False
        architecture = getattr(transformers, (data.get("architectures") or [""])[0], None)

        def build() -> torch.nn.Module:
            made = architecture(config) if architecture else transformers.AutoModelForCausalLM.from_config(config)
            return made.to(config.dtype) if isinstance(config.dtype, torch.dtype) else made

        model = meta_model(build) if on_meta else build()
    except Exception as error:
        raise TargetError(f"cannot build {kind} from {path}: {type(error).__name__}: {error}") from error
    model.train()
    return Target(path.stem if path.stem != "config" else kind, model, shapes=_shapes(model, config, batch, seq))


def _own(path: Path, kind: str, data: Any, batch: int, seq: int | None, on_meta: bool) -> Target:
    """A model of an architecture that is built here."""
    from shardplan.runtime.meta import meta_model

    made = importlib.import_module(configs.OWN[kind])
    try:
        dtype = getattr(torch, data.get("dtype", "float32"))

        def build() -> torch.nn.Module:
            return made.build(data).to(dtype)

        model = meta_model(build) if on_meta else build()
        shapes = made.shapes(model, dtype, batch, seq)
    except Exception as error:
        raise TargetError(f"cannot build {kind} from {path}: {type(error).__name__}: {error}") from error
    return Target(path.stem if path.stem != "config" else kind, model, loss_fn=made.loss_fn, shapes=shapes)


def _shapes(model: Any, config: Any, batch: int, seq: int | None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """A global training batch by the model's main input: token ids, images or audio features, with labels."""
    main = getattr(model, "main_input_name", "input_ids")
    floating = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if main == "input_features":
        frames = (batch, config.num_mel_bins, 2 * config.max_source_positions)
        length = min(seq or config.max_target_positions, config.max_target_positions)
        return {"input_features": (floating, frames), "labels": (torch.int64, (batch, length))}
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        image = (batch, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": (floating, image), "labels": (torch.int64, (batch,))}
    longest = getattr(config, "max_position_embeddings", None) or 2048
    length = seq or min(longest, 2048)
    return {"input_ids": (torch.int64, (batch, length)), "labels": (torch.int64, (batch, length))}

"""Shipped configurations: each builds, with as many parameters as its publication says, and gets a batch that fits."""

import json

import pytest
import torch

from shardplan import cli_flags, configs, targets
from shardplan.errors import TargetError
from shardplan.planner.cluster import Cluster
from shardplan.planner.export import trace_model
from shardplan.planner.search import SolveOptions, solve
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests.plans import random_plan
from tests.prices import SimplePrices

# Billions of parameters as published (model cards and papers; GPT-3's table 2.1, ViT-22B's table 1).
PUBLISHED = {
    "bert-base": 0.110, "bert-large": 0.335, "deepseek-v3": 671.0, "gpt2": 0.124, "gpt2-medium": 0.355,
    "gpt2-large": 0.774, "gpt2-xl": 1.558, "gpt3-1.3b": 1.3, "gpt3-2.7b": 2.7, "gpt3-6.7b": 6.7, "gpt3-13b": 13.0,
    "gpt3-175b": 175.0, "llama-2-7b": 6.74, "llama-2-13b": 13.0, "llama-2-70b": 69.0, "llama-3-8b": 8.03,
    "llama-3-70b": 70.6, "llama-3.1-405b": 405.9, "llama-3.2-1b": 1.24, "mistral-7b": 7.25, "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 141.0, "qwen2.5-7b": 7.62, "qwen2.5-32b": 32.8, "qwen2.5-72b": 72.7, "qwen3-8b": 8.19,
    "qwen3-32b": 32.8, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235.0, "t5-small": 0.0605, "t5-base": 0.223,
    "t5-large": 0.738, "t5-3b": 2.85, "t5-11b": 11.3, "vit-base": 0.0866, "vit-large": 0.304, "vit-huge": 0.632,
    "vit-22b": 21.7, "stable-diffusion-1.5": 0.860, "stable-diffusion-xl": 2.567, "whisper-small": 0.242,
    "whisper-large-v3": 1.54,
}  # fmt: skip


def test_every_configuration_is_checked_here():
    assert configs.names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", ["gpt2", "t5-small", "vit-base", "whisper-small", "llama-3.2-1b", "bert-base"])
def test_a_shipped_model_is_as_large_as_published_and_gets_a_batch(name):
    target = targets.load_target(f"hf:{name}", batch=4)
    assert target.name == name
    count = sum(p.numel() for p in target.model.parameters()) / 1e9
    assert count == pytest.approx(PUBLISHED[name], rel=0.012)
    wanted = json.loads((configs.FOLDER / f"{name}.json").read_text())["dtype"]
    assert {p.dtype for p in target.model.parameters()} == {getattr(torch, wanted)}
    batch = target.example()
    assert all(tensor.shape[0] == 4 for tensor in batch.values()) and "labels" in batch


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_sizes_by_the_configuration_alone(name):
    """The large ones without building a module: a stage of the model cards' own arithmetic."""
    data = json.loads((configs.FOLDER / f"{name}.json").read_text())
    assert {"model_type", "dtype"} <= set(data)
    if data["model_type"] not in configs.OWN:
        import transformers

        assert hasattr(transformers, data["architectures"][0])


@pytest.mark.parametrize("name", ["stable-diffusion-1.5", "stable-diffusion-xl"])
def test_a_unet_is_as_large_as_published(name):
    target = targets.load_target(f"hf:{name}", batch=4)
    # The published network of the XL model also embeds sizes and a pooled text: 2816 -> 1280 -> 1280.
    more = 2817 * 1280 + 1281 * 1280 if name.endswith("xl") else 0
    count = sum(p.numel() for p in target.model.parameters()) + more
    assert count == {"stable-diffusion-1.5": 859_520_964, "stable-diffusion-xl": 2_567_463_684}[name]
    assert target.example()["encoder_hidden_states"].shape[:2] == (4, 77) and target.loss_fn is not None


def test_a_small_unet_is_planned_and_computes_what_one_device_does(tmp_path):
    """Convolutions, both attentions and skips that cross the stages; planned, split and run in this process."""
    path = tmp_path / "config.json"
    settings = {"model_type": "unet", "dtype": "float64", "sample_size": 4, "block_out_channels": [8, 8]}
    settings |= {"layers_per_block": 1, "cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 4}
    path.write_text(json.dumps(settings))
    torch.manual_seed(0)
    target = targets.load_target(f"hf:{path}", batch=4, seq=5, on_meta=False)
    assert target.name == "unet" and target.loss_fn is not None
    values = target.random_batch(0)
    wanted = values.pop("target")
    trace = trace_model(target.model, (), values, loss_fn=target.loss_fn, target=wanted)
    cluster = Cluster.parse("2xh100")
    plan = solve(trace, cluster, SimplePrices(cluster), SolveOptions(gap=0.2))
    assert len(plan.devices) == 2 and plan.step_seconds > 0
    loss = target.loss_fn(target.model(**values), wanted)
    gradients = torch.autograd.grad(loss, list(target.model.parameters()))
    state = {name: value.detach().clone() for name, value in target.model.state_dict().items()}
    drawn = random_plan(trace, tp=2, pp=2, microbatches=2, seed=1)
    result = run_program(compile(trace, drawn), state, {**values, "target": wanted})
    assert result.loss is not None and result.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for (name, _), gradient in zip(target.model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"attention_head_dim": [2]}, {"block_out_channels": [7, 8]}])
def test_a_unet_that_makes_no_sense_is_a_target_error(tmp_path, wrong):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "unet", "block_out_channels": [8, 8], "norm_num_groups": 4} | wrong))
    with pytest.raises(TargetError, match="cannot build unet"):
        targets.load_target(f"hf:{path}")


def test_an_unknown_name_says_which_are_near():
    with pytest.raises(TargetError) as caught:
        targets.load_target("hf:lama-3-8b")
    assert "hf:llama-3-8b" in str(caught.value)


def test_names_are_not_case_sensitive_and_files_come_first(tmp_path, monkeypatch):
    assert configs.file_of("GPT2") == configs.file_of("gpt2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").write_text("{}")
    assert configs.file_of("gpt2").read_text() == "{}"


def test_the_shell_completes_names():
    assert cli_flags._complete_target("h") == ["hf:"] and cli_flags._complete_target("model.py") == []
    assert cli_flags._complete_target("hf:llama-3-") == ["hf:llama-3-70b", "hf:llama-3-8b"]

"""Tiny models and global batches shared by the tests; nothing is downloaded.

``make(name, seed)`` gives a `Case`: a model on the CPU in training mode, a batch of 8 samples and a loss function
(None: the model computes its own loss). Every dimension divides by 4, dropout is 0, token labels contain -100 in
uneven numbers per sample, and attention is the models' default (sdpa). A batch is a dict of keyword arguments; its
entry "target", where there is one, is what `loss_fn` gets besides the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

BATCH = 8
SEQUENCE = 16


@dataclass(slots=True)
class Case:
    """See module docstring. Unpacks as ``model, batch, loss_fn = case``."""

    model: nn.Module
    batch: dict[str, Any]
    loss_fn: Callable[[Any, torch.Tensor], torch.Tensor] | None = None

    def __iter__(self):
        return iter((self.model, self.batch, self.loss_fn))

    @property
    def kwargs(self) -> dict[str, Any]:
        return {name: value for name, value in self.batch.items() if name != "target"}

    @property
    def target(self) -> torch.Tensor | None:
        return self.batch.get("target")


@dataclass(slots=True)
class Result:
    """Loss, flat output tensors, and the gradient and mutated buffers by name, of one forward and backward."""

    loss: torch.Tensor | None
    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def tokens(vocabulary: int, *shape: int) -> torch.Tensor:
    """int64 token ids in [1, vocabulary)."""
    return torch.randint(1, vocabulary, shape)


def ragged_labels(ids: torch.Tensor) -> torch.Tensor:
    """A copy of ids [batch, seq] in which sample i has its last ``i % 4 * 2 + 1`` labels set to -100."""
    labels = ids.clone()
    for row in range(len(labels)):
        labels[row, -(row % 4 * 2 + 1) :] = -100
    return labels


def padding_mask(batch: int, sequence: int) -> torch.Tensor:
    """int64 [batch, seq], 1 for a token; sample i ends with ``i % 3`` padded positions."""
    lengths = sequence - torch.arange(batch) % 3
    return (torch.arange(sequence)[None] < lengths[:, None]).long()


# -- Hugging Face families ---------------------------------------------------------------------------------------------


def llama(layers: int = 2, **changes: Any) -> Case:
    """Decoder with grouped-query attention and a gated mlp; own causal loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    ids = tokens(96, BATCH, SEQUENCE)
    return Case(model, {"input_ids": ids, "labels": ragged_labels(ids)})


def llama_padded() -> Case:
    """As `llama` with a padding mask, so that attention is not purely causal."""
    case = llama()
    case.batch["attention_mask"] = padding_mask(BATCH, SEQUENCE)
    return case


def gpt2(layers: int = 2) -> Case:
    """Decoder with fused query-key-value weights and embeddings tied to the head; own causal loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=96,
        n_positions=32,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = tokens(96, BATCH, SEQUENCE)
    return Case(GPT2LMHeadModel(config), {"input_ids": ids, "labels": ragged_labels(ids)})


def bert(layers: int = 2) -> Case:
    """Encoder with a padding mask, token types and a tied masked-language head; own loss."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = tokens(96, BATCH, SEQUENCE)
    mask = padding_mask(BATCH, SEQUENCE)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.arange(SEQUENCE).ge(SEQUENCE // 2).long().expand(BATCH, SEQUENCE).contiguous(),
        "labels": ragged_labels(ids),
    }
    return Case(BertForMaskedLM(config), batch)


def t5(layers: int = 2) -> Case:
    """Encoder-decoder with relative position bias shared by the layers and tied embeddings; own loss."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        decoder_start_token_id=0,
    )
    batch = {
        "input_ids": tokens(96, BATCH, SEQUENCE),
        "attention_mask": padding_mask(BATCH, SEQUENCE),
        "labels": ragged_labels(tokens(96, BATCH, 12)),
    }
    return Case(T5ForConditionalGeneration(config), batch)


def vit(layers: int = 2) -> Case:
    """Image classifier on patches; own loss."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=12,
    )
    batch = {"pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": torch.randint(0, 12, (BATCH,))}
    return Case(ViTForImageClassification(config), batch)


def resnet() -> Case:
    """Convolutional image classifier with batch normalisation (running statistics are mutated); own loss."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[2, 2],
        layer_type="basic",
        num_labels=12,
    )
    batch = {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.randint(0, 12, (BATCH,))}
    return Case(ResNetForImageClassification(config), batch)


def mixtral() -> Case:
    """Decoder with routed experts (batched-matmul experts, which export); own loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        experts_implementation="batched_mm",
    )
    ids = tokens(96, BATCH, SEQUENCE)
    return Case(MixtralForCausalLM(config), {"input_ids": ids, "labels": ragged_labels(ids)})


# -- plain modules -----------------------------------------------------------------------------------------------------


class SkipMLP(nn.Module):
    """Wide layers, a residual around each, and one long skip from the first to the last."""

    def __init__(self, width: int = 32, hidden: int = 64, depth: int = 6, classes: int = 12) -> None:
        super().__init__()
        self.inner = nn.Linear(16, width)
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outer = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 16] -> [batch, classes]."""
        first = x = self.inner(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.gelu(up(x)))
        return self.outer(self.norm(x + first))


def mlp() -> Case:
    """Residual mlp with a long skip; cross entropy as loss_fn."""
    batch = {"x": torch.randn(BATCH, 16), "target": torch.randint(0, 12, (BATCH,))}
    return Case(SkipMLP(), batch, F.cross_entropy)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` over token embeddings, mean pooled."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, seq] int64 -> [batch, 4]."""
        return self.head(self.layers(self.embed(ids)).mean(1))


def encoder() -> Case:
    """Plain PyTorch transformer encoder; mean squared error as loss_fn."""
    batch = {"ids": tokens(96, BATCH, SEQUENCE), "target": torch.randn(BATCH, 4)}
    return Case(Encoder(), batch, F.mse_loss)


class Block(nn.Module):
    """Pre-norm decoder block with one fused query-key-value linear."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, width] -> the same shape."""
        b, s, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.view(b, s, self.heads, w // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, s, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteGPT(nn.Module):
    """A small GPT over bytes with learned positions."""

    def __init__(
        self, width: int = 32, heads: int = 4, layers: int = 2, vocabulary: int = 128, length: int = 64
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, seq] int64 -> logits [batch, seq, vocabulary]."""
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the tokens that are not -100. logits: [batch, seq, v]; target: [batch, seq] int64."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)


def bytegpt(layers: int = 2) -> Case:
    """Hand-written GPT with a token-weighted loss_fn."""
    ids = tokens(128, BATCH, SEQUENCE)
    return Case(ByteGPT(layers=layers), {"ids": ids, "target": ragged_labels(ids)}, token_loss)


MODELS: dict[str, Callable[..., Case]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "resnet": resnet,
    "encoder": encoder,
    "mlp": mlp,
    "bytegpt": bytegpt,
}
"""The families that every layer is tested on. `llama_padded` and `mixtral` are extras."""

EXTRAS: dict[str, Callable[..., Case]] = {"llama_padded": llama_padded, "mixtral": mixtral}


def make(name: str, seed: int = 0, **changes: Any) -> Case:
    """The case of that name, the same numbers for the same seed. The caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        case = (MODELS | EXTRAS)[name](**changes)
    case.model.train()
    return case


# -- numeric helpers ---------------------------------------------------------------------------------------------------


def loss_of(output: Any) -> torch.Tensor | None:
    """The loss that a model returned itself: a scalar, or the `loss` attribute or key."""
    if isinstance(output, torch.Tensor):
        return output if output.ndim == 0 else None
    return output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)


def run_eager(case: Case) -> Result:
    """Forward and backward of the model itself. Its gradients are cleared first; buffers are left mutated."""
    case.model.zero_grad(set_to_none=True)
    if hasattr(case.model, "config"):
        output = case.model(**case.kwargs, use_cache=False) if _caches(case.model) else case.model(**case.kwargs)
    else:
        output = case.model(**case.kwargs)
    loss = case.loss_fn(output, case.batch["target"]) if case.loss_fn else loss_of(output)
    if loss is not None:
        loss.backward()
    leaves = [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    gradients = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    buffers = {name: b.detach().clone() for name, b in case.model.named_buffers()}
    return Result(None if loss is None else loss.detach(), leaves, gradients, buffers)


def _caches(model: nn.Module) -> bool:
    return hasattr(model.config, "use_cache")


def run_trace(trace: Any, model: nn.Module, batch: dict[str, Any]) -> Result:
    """Forward and backward of the traced graph on the model's real parameters and buffers and a batch.

    batch: keyword arguments plus "target" where the trace has one, as in `Case`. Parameters and buffers are copied:
    the model is left alone.
    """
    from shardplan.planner.export import in_order

    names = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    given = in_order(model, {k: v for k, v in batch.items() if k != "target"})
    leaves = pytree.tree_leaves(((), given))
    values: dict[str, torch.Tensor] = {}
    arguments = []
    for node, source in trace.sources.items():
        if source.kind == "param":
            value = names[source.name].detach().clone().requires_grad_(source.trainable)
            values[source.name] = value
        elif source.kind == "buffer":
            value = names[source.name].detach().clone()
            values[source.name] = value
        elif source.kind == "constant":
            value = trace.constants[node]
        else:
            value = batch["target"] if source.name == "target" else leaves[source.leaf]
        arguments.append(value)
    result = trace.module(*arguments)
    loss = result[0]
    if loss is not None and loss.requires_grad:
        loss.backward()
    outputs = [result[leaf] for leaf in trace.output_leaves if isinstance(leaf, int)]
    gradients, buffers = {}, {}
    for source in trace.sources.values():
        if source.kind == "param" and values[source.name].grad is not None:
            gradients[source.name] = values[source.name].grad
        elif source.kind == "buffer":
            buffers[source.name] = values[source.name]
    return Result(None if loss is None else loss.detach(), [o.detach() for o in outputs], gradients, buffers)

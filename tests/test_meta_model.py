"""Models without values: what is recorded makes what the constructor makes, in any order, and only if it is known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import shardplan as sp
from shardplan import errors
from shardplan.runtime.meta import initialize, origin
from tests import models

# -- deterministic programs: exactly what eager makes ------------------------------------------------------------------

SIZE = 4
OPS = st.tuples(st.integers(0, 13), st.integers(0, 99), st.integers(0, 99), st.integers(0, 3))


def build(program):
    """A module whose parameters are all tensors that a small program of creations, views and changes made."""
    held = [torch.arange(SIZE * SIZE, dtype=torch.float32).reshape(SIZE, SIZE) / 8]
    for kind, first, second, index in program:
        a, b = held[first % len(held)], held[second % len(held)]
        if kind == 0:
            held.append(torch.full((SIZE, SIZE), float(index)))
        elif kind == 1:
            held.append(torch.empty(SIZE, SIZE).copy_(a))
        elif kind == 2:
            held.append(a.t())
        elif kind == 3:
            held.append((a + b) / 2)
        elif kind == 4:
            a[index].mul_(0.5)
        elif kind == 5:
            a.t().add_(b.clone())
        elif kind == 6:
            a[:, index] = 1.0
        elif kind == 7:
            torch.add(a, b.clone(), out=a)
        elif kind == 8:
            a.copy_(b.clone())
        elif kind == 9:
            b.add_(a.mean().item())
        elif kind == 10:
            held.append(torch.tensor(a.flatten().tolist()).reshape(SIZE, SIZE))
        elif kind == 11:
            held.append(a.clone().masked_fill_(b > 1.0, float(index)))
        elif kind == 12 and bool((a > 2.0).any()):
            a.clamp_(max=2.0)
        elif kind == 13:
            values, _ = torch.sort(a.flatten())
            held.append(torch.cat(torch.chunk(values, 2)[::-1]).reshape(SIZE, SIZE) + torch.tensor(0.5))
    # A clone is a leaf; the tensor itself keeps its ties with others.
    return nn.ParameterList([nn.Parameter(value, requires_grad=False) for value in held])


@given(st.lists(OPS, max_size=12))
@settings(max_examples=150, deadline=None)
def test_recorded_programs_make_what_eager_makes(program):
    expected = build(program)
    made = sp.meta_model(lambda: build(program))
    for ours, theirs in zip(made, expected, strict=True):
        found = ours if not ours.is_meta else origin(ours).make()
        assert found.shape == theirs.shape and found.stride() == theirs.stride()
        torch.testing.assert_close(found, theirs, rtol=0, atol=0)


# -- models ------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Parameters that a constructor computes, buffers, tables that are not registered, numbers read from tensors."""

    def __init__(self):
        super().__init__()
        rates = [x.item() for x in torch.linspace(0, 0.1, 3)]
        self.weight = nn.Parameter(torch.randn(64, 64) / math.sqrt(64) * (1 + rates[-1]))
        self.decay = nn.Parameter(torch.log(torch.arange(1, 65, dtype=torch.float32)).repeat(4, 1))
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril(), persistent=False)
        self.table = [torch.arange(8) * 2]
        left, right = torch.randn(2, 32, 32).unbind()
        self.left, self.right = nn.Parameter(left), nn.Parameter(right.contiguous())
        self.target = copy.deepcopy(self.left)
        assert self.weight.device.type == "cpu" and not self.weight.is_meta
        if self.weight.abs().max() > 100:
            raise ValueError("never")


FACTORIES = {
    "llama": lambda: models.make("llama").model,
    "gpt2": lambda: models.make("gpt2").model,
    "t5": lambda: models.make("t5").model,
    "resnet": lambda: models.make("resnet").model,
    "mixtral": lambda: models.make("mixtral").model,
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
    "scaled": Scaled,
    "modules": lambda: nn.Sequential(
        nn.LSTM(8, 16, 2), nn.BatchNorm1d(4), nn.Embedding(10, 16, padding_idx=0), nn.GRUCell(4, 8)
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_recorded_model_is_like_the_constructed_one(name):
    made = sp.meta_model(FACTORIES[name])
    torch.manual_seed(0)
    expected = FACTORIES[name]()
    assert list(made.state_dict()) == list(expected.state_dict())
    theirs = dict(expected.named_parameters(remove_duplicate=False))
    ours = dict(made.named_parameters(remove_duplicate=False))
    assert {n: next(m for m in ours if ours[m] is ours[n]) for n in ours} == {
        n: next(m for m in theirs if theirs[m] is theirs[n]) for n in theirs
    }
    for parameter_name, parameter in ours.items():
        assert parameter.is_meta
        value, wanted = origin(parameter).make(), theirs[parameter_name].detach()
        assert (value.dtype, value.shape, value.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        assert parameter.requires_grad == theirs[parameter_name].requires_grad
        spread = float(wanted.std(correction=0))
        if spread == 0 or wanted.unique().numel() < 3:
            torch.testing.assert_close(value, wanted)
        elif wanted.numel() >= 32:
            assert abs(float(value.mean() - wanted.mean())) < 8 * spread / math.sqrt(wanted.numel())
            assert float(value.std(correction=0)) == pytest.approx(spread, rel=5 / math.sqrt(wanted.numel()) + 0.02)
        zero_rows = (wanted == 0).flatten(1).all(1) if wanted.ndim > 1 else wanted == 0
        assert torch.equal((value == 0).flatten(1).all(1) if wanted.ndim > 1 else value == 0, zero_rows)
    for buffer_name, buffer in made.named_buffers():
        torch.testing.assert_close(buffer, expected.get_buffer(buffer_name))


def test_values_depend_on_one_another_as_in_the_constructor():
    made = sp.meta_model(Scaled)
    left, target = origin(made.left).make(), origin(made.target).make()
    assert torch.equal(left, target), "a copy of a random parameter has its numbers"
    assert not torch.equal(left, origin(made.right).make())
    assert torch.equal(made.mask, torch.ones(8, 8, dtype=torch.bool).tril()) and torch.equal(
        made.table[0], torch.arange(8) * 2
    )
    torch.testing.assert_close(origin(made.decay).make(), torch.arange(1, 65).float().log().repeat(4, 1))
    normed = sp.meta_model(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(16, 16))))
    weight = normed[0].parametrizations.weight
    largest = weight[0]._u @ origin(weight.original).make() @ weight[0]._v
    torch.testing.assert_close(largest, torch.linalg.svdvals(origin(weight.original).make())[0], rtol=1e-2, atol=0)


def test_values_depend_on_the_seed_alone():
    def values(model, names):
        return {name: origin(model.get_parameter(name)).make() for name in names}

    factory = FACTORIES["gpt2"]
    first, again, other = sp.meta_model(factory), sp.meta_model(factory), sp.meta_model(factory, seed=1)
    names = [name for name, _ in first.named_parameters()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    mine, theirs = values(first, names), values(again, reversed(names))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(mine[name], theirs[name]) for name in names)
    changed = {name for name, value in values(other, names).items() if not torch.equal(value, mine[name])}
    assert changed == {name for name in names if mine[name].std() > 0}
    matrices = [value for value in mine.values() if value.shape == mine["transformer.h.0.attn.c_attn.weight"].shape]
    assert len(matrices) == 2 and not torch.equal(*matrices)


def test_a_recipe_holds_no_more_than_its_own_parameter_needs():
    made = sp.meta_model(lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(20))))
    recipe = origin(made[10].weight)
    assert len(recipe.steps) == 1 and list(recipe.nbytes.values()) == [64 * 64 * 4]


def test_real_tensors_stay_real():
    table = torch.randn(6, 3)
    made = sp.meta_model(lambda: nn.Sequential(nn.Embedding.from_pretrained(table, freeze=False), nn.Linear(3, 2)))
    assert torch.equal(made[0].weight, table) and made[1].weight.is_meta


# -- models that are on the meta device already ------------------------------------------------------------------------


class Initialised(nn.Module):
    """Initialises its modules by the usual convention."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.25)


def on_meta(factory):
    with torch.device("meta"):
        return factory()


def test_modules_on_the_meta_device_are_initialised_by_their_own_methods():
    model = on_meta(lambda: nn.Sequential(Initialised(), nn.Linear(8, 8), nn.BatchNorm1d(8)))
    initialize(model, None, 0)
    value = {name: origin(tensor).make() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert (value["0.inner.weight"] == 0.25).all() and (value["0.norm.weight"] == 1).all()
    assert 0 < value["0.inner.bias"].abs().max() <= 1 / math.sqrt(8)
    assert 0 < value["1.weight"].abs().max() <= 1 / math.sqrt(8)
    assert (value["2.running_var"] == 1).all() and int(value["2.num_batches_tracked"]) == 0

    def zero(module):
        if isinstance(module, nn.Linear):
            module.weight.data.zero_()

    model = on_meta(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    initialize(model, zero, 0)
    assert (origin(model[1].weight).make() == 0).all() and origin(model[1].bias).make().abs().max() > 0


def test_hugging_face_models_on_the_meta_device_get_their_rotary_tables():
    model, real = on_meta(FACTORIES["llama"]), FACTORIES["llama"]()
    initialize(model, None, 0)
    for name, buffer in real.named_buffers():
        torch.testing.assert_close(origin(model.get_buffer(name)).make(), buffer)
    weight = origin(model.model.layers[0].mlp.up_proj.weight).make()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.1)


def test_what_has_values_keeps_them():
    real = nn.Linear(8, 8)
    before = real.weight.detach().clone()
    model = nn.Sequential(real, on_meta(lambda: nn.Linear(8, 8)), sp.meta_model(lambda: nn.Linear(8, 8)))
    recipe = origin(model[2].weight)
    initialize(model, lambda module: [p.data.zero_() for p in module.parameters()], 0)
    assert torch.equal(real.weight, before) and origin(model[2].weight) is recipe
    assert (origin(model[1].weight).make() == 0).all()


def test_half_written_parameters_are_not_known():
    def factory():
        made = nn.Module()
        made.first = nn.Parameter(torch.empty(4, 4))
        made.second = nn.Parameter(torch.empty(4, 4))
        made.third = nn.Parameter(torch.empty(4, 4) + 1)
        with torch.no_grad():
            made.first[:2] = 1.0
            made.fourth = nn.Parameter(torch.ones_like(made.first * 2))
            made.second[:2] = 1.0
            made.second[2:].normal_()
        return made

    made = sp.meta_model(factory)
    assert origin(made.first) is None and origin(made.third) is None
    assert (origin(made.second).make()[:2] == 1).all() and (origin(made.fourth).make() == 1).all()


def test_errors():
    with pytest.raises(errors.UsageError, match="returned Tensor"):
        sp.meta_model(lambda: torch.zeros(2))
    with pytest.raises(errors.UsageError, match="has none yet"):
        sp.meta_model(lambda: nn.Linear(int(torch.empty(1).item()), 2))
    with pytest.raises(RuntimeError, match="2, 3"):
        sp.meta_model(lambda: nn.Parameter(torch.empty(2, 3) @ torch.empty(2, 3)))

    def bad(module):
        raise ValueError("no")

    with pytest.raises(errors.UsageError, match="bad of 0 failed: ValueError: no"):
        initialize(on_meta(lambda: nn.Sequential(nn.Linear(2, 2))), bad, 0)

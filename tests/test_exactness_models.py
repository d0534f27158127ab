"""Models of every make under many plans: parameters that are tied, frozen, unused or of several dtypes, inputs of every
kind, losses beside the main one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shardplan.errors import UsageError
from tests.exactness import PLANS, Case, Planned, check, close, eager

BATCH, WIDTH, CLASSES = 8, 12, 16
FEW = ("one device", "dp2", "m4", "tp2", "pp2 m4", "dp2 tp2 pp2 m2")


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(BATCH, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, CLASSES, (BATCH, *shape), generator=torch.Generator().manual_seed(seed))


def mean_entropy(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(y.flatten(0, -2), target.flatten())


def made(model: nn.Module) -> nn.Module:
    """In fp64 and with parameters that are the same every time."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.double().train()


class Tower(nn.Module):
    """Blocks on [batch, width] with options that make parameters special."""

    def __init__(self, special: str = "", dtypes: tuple[torch.dtype, torch.dtype] | None = None) -> None:
        super().__init__()
        self.special = special
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(WIDTH, CLASSES, bias=special == "bias tied")
        if special in ("tied", "tied thrice", "bias tied"):
            self.head.weight = self.embed.weight
        if special == "tied thrice":
            self.blocks[2].weight = self.blocks[0].weight
        if special == "frozen":
            self.embed.requires_grad_(False)
            self.blocks[1].weight.requires_grad_(False)
            self.scale.requires_grad_(False)
        if special == "unused":
            self.never = nn.Linear(WIDTH, WIDTH)
            self.register_parameter("also_never", nn.Parameter(torch.zeros(3)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if self.special == "tied thrice":
            x = x + self.embed(ids.flip(-1))  # twice in one stage
        x = self.first(x).tanh()
        for block in self.blocks:
            x = x + self.scale * F.gelu(block(x))
        if self.special == "detached":
            x = x.detach() + self.embed(ids)
        return self.head(x)


@pytest.mark.parametrize("special", ["", "tied", "tied thrice", "bias tied", "frozen", "unused", "detached"])
def test_special_parameters(special):
    check(Case(made(Tower(special)), (labels(5, seed=2),), mean_entropy, labels(5)), PLANS)


def test_gradients_of_unused_parameters_are_none():
    planned = Planned(Case(made(Tower("unused")), (labels(5, seed=2),), mean_entropy, labels(5)))
    for plan in FEW:
        found = planned.run(**PLANS[plan]).gradients
        assert found["never.weight"] is None and found["also_never"] is None


class Nothing(nn.Module):
    """No parameters at all, or some that the loss does not depend on."""

    def __init__(self, parameters: bool) -> None:
        super().__init__()
        self.idle = nn.Linear(WIDTH, WIDTH) if parameters else None

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        idle = None if self.idle is None else self.idle(x)
        return {"loss": x.square().mean(), "idle": idle}


@pytest.mark.parametrize("parameters", [False, True])
def test_nothing_to_train_is_an_error(parameters):
    with pytest.raises(UsageError, match="does not depend on any trainable parameter"):
        Planned(Case(made(Nothing(parameters)), (rows(WIDTH),)))


class Experts(nn.Module):
    """Dense mixture with the balance loss of Switch transformers: a product of two batch means."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        shares = self.router(x).softmax(-1)
        mixed = torch.stack([expert(x) for expert in self.experts], -1) @ shares.unsqueeze(-1)
        routed = F.one_hot(shares.argmax(-1), shares.shape[-1]).to(x.dtype)
        balance = shares.shape[-1] * (routed.mean(0) * shares.mean(0)).sum()
        z = self.router(x).logsumexp(-1).square().mean()
        return {"loss": F.cross_entropy(self.head(mixed.squeeze(-1)), target) + 0.1 * balance + 0.01 * z}


def test_a_balance_loss_is_that_of_the_batch():
    check(Case(made(Experts()), (rows(WIDTH), labels()), whole=("mb",)), FEW)


# -- inputs ------------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Floats, integers, truth values and a scalar, in tuples and dicts, some not led by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Linear(WIDTH, CLASSES)

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], more: dict[str, Any]) -> torch.Tensor:
        x, ids = pair
        x = self.project(x) + self.embed(ids)
        x = torch.where(more["keep"].unsqueeze(-1), x, torch.zeros_like(x))
        x = x * more["temperature"] + more["offset"] @ self.project.weight
        return self.table(x)


def test_inputs_of_every_kind():
    more = {
        "keep": labels(3, seed=7) > 4,
        "temperature": torch.tensor(0.7, dtype=torch.float64),
        "offset": torch.randn(3, WIDTH, dtype=torch.float64),
        "unread": torch.randn(5),
        "flag": True,
        "none": None,
    }
    args = ((rows(3, WIDTH), labels(3, seed=3)), more)
    check(Case(made(Mixed()), args, mean_entropy, labels(3)), FEW)


class Perceptron(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.parametrize("how", ["transposed", "strided", "expanded"])
def test_inputs_that_are_not_contiguous(how):
    x = {
        "transposed": rows(WIDTH).T.contiguous().T,
        "strided": torch.randn(2 * BATCH, 2 * WIDTH, dtype=torch.float64)[::2, ::2],
        "expanded": torch.randn(1, WIDTH, dtype=torch.float64).expand(BATCH, WIDTH),
    }[how]
    check(Case(made(Perceptron()), (x,), F.cross_entropy, labels()), FEW)


def test_a_batch_of_one():
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    check(Case(made(Perceptron()), (x,), mean_entropy, labels(6)[:1]), ("one device", "tp2", "tp2 other", "pp2"))


class SequenceFirst(nn.Module):
    """[seq, batch, width] inside, and handed out so."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.rnn(x.transpose(0, 1))
        return self.head(y)


def test_outputs_that_the_batch_does_not_lead():
    def loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(y.flatten(0, 1), target.T.flatten())

    # Tokens that are flattened behind the sequence cannot be followed in microbatches as far as the loss.
    check(Case(made(SequenceFirst()), (rows(5, WIDTH),), loss, labels(5), whole=("mb",)), FEW)


# -- precision ---------------------------------------------------------------------------------------------------------


def worst(found: dict[str, torch.Tensor | None], truth: dict[str, torch.Tensor | None]) -> float:
    """Largest error of a gradient relative to its norm."""
    errors = []
    for name, exact in truth.items():
        mine = found[name]
        if exact is not None and mine is not None:
            errors.append(float((mine.double() - exact).norm() / exact.norm().clamp_min(1e-12)))
    return max(errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", ["tower", "perceptron"])
def test_low_precision_is_no_worse_than_on_one_device(model, dtype):
    """Against the same numbers in fp64: the error of a plan is at most twice that of the model itself."""
    if model == "tower":
        case = Case(made(Tower("tied")).to(dtype), (labels(5, seed=2),), mean_entropy, labels(5))
    else:
        case = Case(made(Perceptron()).to(dtype), (rows(6, WIDTH, dtype=dtype),), mean_entropy, labels(6))
    truth, alone, planned = eager(case, torch.float64), eager(case), Planned(case)
    allowed = 2 * worst(alone.gradients, truth.gradients) + torch.finfo(dtype).eps / 4
    loss_allowed = 2 * abs(float(alone.loss.double() - truth.loss)) + torch.finfo(dtype).eps * float(truth.loss)
    for plan in FEW:
        found = planned.run(**PLANS[plan])
        assert found.loss is not None and found.loss.dtype == alone.loss.dtype
        assert worst(found.gradients, truth.gradients) <= allowed, plan
        assert abs(float(found.loss.double() - truth.loss)) <= loss_allowed, plan


def test_parameters_of_several_dtypes():
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Perceptron()
            self.head = nn.Linear(CLASSES, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x).float())

    model = made(Casting())
    model.get_submodule("head").to(torch.float32)
    check(Case(model, (rows(WIDTH),), F.cross_entropy, labels()), FEW, tolerance=1e-5)


class Under(nn.Module):
    """A body under autocast, or without."""

    def __init__(self, low: bool) -> None:
        super().__init__()
        self.body = Perceptron()
        self.out = nn.Linear(CLASSES, CLASSES)
        self.low = low

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            y = self.body(x)
        return self.out(y.float() if self.low else y)


def test_autocast():
    x, target = rows(6, WIDTH, dtype=torch.float32), labels(6)
    case, plain = (Case(made(Under(low)).float(), (x,), mean_entropy, target) for low in (True, False))
    exact, alone, planned = eager(plain, torch.float64), eager(case), Planned(case)
    allowed = 2 * worst(alone.gradients, exact.gradients)
    assert allowed > 1e-3, "nothing ran in low precision"
    for plan in FEW:
        assert worst(planned.run(**PLANS[plan]).gradients, exact.gradients) <= allowed, plan


def test_losses_close_by_their_words():
    """The comparison itself notices a difference, and a gradient that is missing."""
    x = torch.ones(3)
    close(x, x.clone(), 1e-9, 1e-12, "same")
    close(None, torch.zeros(3), 1e-9, 1e-12, "none is zero")
    for mine in (x + 1e-3, None, x.double(), x[:2]):
        with pytest.raises(AssertionError):
            close(mine, x, 1e-9, 1e-12, "differs")

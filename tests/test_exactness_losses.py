"""Losses in every form people write them, under many plans: they are those of the whole batch on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.exactness import PLANS, Case, Planned, check, eager

BATCH, LENGTH, WIDTH, CLASSES = 8, 6, 12, 16
FEW = ("one device", "dp2", "m4", "tp2", "pp2 m4", "dp2 tp2 pp2 m2")


class Tagger(nn.Module):
    """A logit vector per token; computes `own(logits, target)` itself where it is given one."""

    def __init__(self, own: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.hidden = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.own = own

    def forward(self, ids: torch.Tensor, target: torch.Tensor | None = None, **more: torch.Tensor) -> Any:
        x = self.embed(ids)
        x = x + self.down(F.gelu(self.hidden(x)))
        logits = self.head(x)
        return logits if self.own is None else self.own(logits, target, **more)


def tokens(valid: tuple[int, ...] = (6, 5, 0, 0, 1, 0, 3, 6)) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, target); the target's row i has that many tokens that count, the others are -100."""
    torch.manual_seed(0)
    ids = torch.randint(0, CLASSES, (BATCH, LENGTH))
    target = torch.randint(0, CLASSES, (BATCH, LENGTH))
    for row, count in enumerate(valid):
        target[row, count:] = -100
    return ids, target


def entropy(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)


WEIGHTS = torch.linspace(0.1, 3, CLASSES, dtype=torch.float64)
UNEVEN = (6, 5, 0, 0, 1, 0, 3, 6)


def masked_mean(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    mask = target != -100
    losses = F.cross_entropy(logits.transpose(1, 2), target.clamp_min(0), reduction="none")
    return (losses * mask).sum() / mask.sum()


def mean_of_rows(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Every sample counts the same, however many tokens it has."""
    mask = (target != -100).to(logits.dtype)
    losses = F.cross_entropy(logits.transpose(1, 2), target.clamp_min(0), reduction="none")
    return ((losses * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()


def shifted(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return entropy(logits[:, :-1], target[:, 1:])


def with_z_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return entropy(logits, target) + 1e-2 * logits.logsumexp(-1).square().mean()


def masked_z_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    mask = (target != -100).to(logits.dtype)
    return entropy(logits, target) + 1e-2 * (logits.logsumexp(-1).square() * mask).sum() / mask.sum()


def several_terms(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    terms = {
        "entropy": entropy(logits, target),
        "sum": entropy(logits, target, reduction="sum") / 100,
        "sparse": logits.abs().mean(),
        "mse": F.mse_loss(logits.softmax(-1), torch.full_like(logits, 1 / CLASSES)),
        "kl": F.kl_div(logits.log_softmax(-1), torch.full_like(logits, 1 / CLASSES), reduction="batchmean"),
    }
    weights = {"entropy": 1.0, "sum": 0.5, "sparse": 0.1, "mse": 2.0, "kl": 0.3}
    return sum(weights[name] * term for name, term in terms.items())  # type: ignore[return-value]


def focal(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    mask = target != -100
    logs = logits.log_softmax(-1).gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -(((1 - logs.exp()) ** 2) * logs * mask).sum() / mask.sum().clamp(min=1)


def by_count_of_samples(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As some trainers have it: a sum divided by the number of samples in the batch."""
    return entropy(logits, target, reduction="sum") / logits.shape[0]


def selected(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Written out with where, as a mean over valid tokens."""
    logs = -logits.log_softmax(-1).gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(target == -100, torch.zeros_like(logs), logs).sum() / (target != -100).sum()


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mean": entropy,
    "sum": lambda y, t: entropy(y, t, reduction="sum"),
    "weighted": lambda y, t: entropy(y, t, weight=WEIGHTS),
    "weighted and smoothed": lambda y, t: entropy(y, t, weight=WEIGHTS, label_smoothing=0.2),
    "smoothed": lambda y, t: entropy(y, t, label_smoothing=0.1),
    "smoothed sum": lambda y, t: entropy(y, t, label_smoothing=0.1, reduction="sum"),
    "another index ignored": lambda y, t: entropy(y, t.clamp_min(3), ignore_index=3),
    "classes in the middle": lambda y, t: F.cross_entropy(y.transpose(1, 2), t),
    "nll": lambda y, t: F.nll_loss(y.log_softmax(-1).flatten(0, 1), t.flatten(), weight=WEIGHTS),
    "masked mean": masked_mean,
    "mean of rows": mean_of_rows,
    "shifted": shifted,
    "z loss": with_z_loss,
    "masked z loss": masked_z_loss,
    "several terms": several_terms,
    "focal": focal,
    "by count of samples": by_count_of_samples,
    "selected": selected,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_over_uneven_tokens(name):
    ids, target = tokens(UNEVEN)
    check(Case(Tagger().double(), (ids,), LOSSES[name], target), FEW)


@pytest.mark.parametrize("valid", [(0,) * 7 + (1,), (6,) + (0,) * 7, (0, 0, 6, 6, 6, 6, 6, 6)], ids=str)
@pytest.mark.parametrize("name", ["mean", "weighted", "masked mean", "smoothed"])
def test_replicas_and_microbatches_without_a_token(name, valid):
    ids, target = tokens(valid)
    check(Case(Tagger().double(), (ids,), LOSSES[name], target), tuple(PLANS))


@pytest.mark.parametrize("name", ["sum", "focal", "mean of rows"])
def test_nothing_counts(name):
    ids, target = tokens((0,) * 8)
    check(Case(Tagger().double(), (ids,), LOSSES[name], target), FEW)


@pytest.mark.parametrize("name", ["mean", "masked mean"])
def test_a_mean_over_nothing_is_no_number(name):
    ids, target = tokens((0,) * 8)
    case = Case(Tagger().double(), (ids,), LOSSES[name], target)
    planned = Planned(case)
    assert eager(case).loss.isnan()
    for plan in FEW:
        loss = planned.run(**PLANS[plan]).loss
        assert loss is not None and loss.isnan(), plan


@pytest.mark.parametrize("name", ["mean", "masked mean", "several terms"])
def test_losses_that_the_model_computes(name):
    ids, target = tokens(UNEVEN)
    check(Case(Tagger(LOSSES[name]).double(), (ids, target)), FEW)
    as_dict = Tagger(lambda y, t: {"logits": y, "loss": LOSSES[name](y, t), "nothing": None}).double()
    check(Case(as_dict, (ids,), kwargs={"target": target}), FEW)


def test_a_count_that_the_caller_gives():
    """Hugging Face models take the number of tokens as an input."""
    ids, target = tokens(UNEVEN)
    count = (target != -100).sum()
    model = Tagger(lambda y, t, count: entropy(y, t, reduction="sum") / count).double()
    check(Case(model, (ids, target), kwargs={"count": count}), FEW)


# -- losses that are no mean over the batch ----------------------------------------------------------------------------


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def contrastive(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Every sample against all others."""
    scores = F.normalize(y, dim=-1) @ F.normalize(t, dim=-1).T / 0.1
    labels = torch.arange(y.shape[0], device=y.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


WHOLE: dict[str, Callable[..., torch.Tensor]] = {
    "root of the mean": lambda y, t: F.mse_loss(y, t).sqrt(),
    "ratio": lambda y, t: (y - t).square().sum() / (t - t.mean(0)).square().sum(),
    "ratio of two of the model": lambda y, t: (y - t).square().sum() / y.square().sum(),
    "correlation": lambda y, t: -F.cosine_similarity((y - y.mean(0)).flatten(), (t - t.mean(0)).flatten(), dim=0),
    "variance over the batch": lambda y, t: F.mse_loss(y, t) + (1 - y.var(0)).relu().mean(),
    "contrastive": contrastive,
    "worst sample": lambda y, t: (y - t).square().mean(1).max(),
    "hardest half": lambda y, t: (y - t).square().mean(1).topk(4).values.mean(),
    "log of a sum": lambda y, t: (y - t).square().mean(1).logsumexp(0),
    "norm": lambda y, t: (y - t).norm(),
    "dice": lambda y, t: 1 - 2 * (y.sigmoid() * t.sigmoid()).sum() / (y.sigmoid().sum() + t.sigmoid().sum()),
}
EXACT_IN_MICROBATCHES = {"ratio"}


@pytest.mark.parametrize("name", WHOLE)
def test_losses_that_are_no_mean(name):
    """Replicas compute them exactly; microbatches, which cannot talk, only where they need not."""
    torch.manual_seed(1)
    x, t = torch.randn(BATCH, WIDTH, dtype=torch.float64), torch.randn(BATCH, 4, dtype=torch.float64)
    whole = () if name in EXACT_IN_MICROBATCHES else ("mb",)
    check(Case(Regression().double(), (x,), WHOLE[name], t, whole=whole), FEW)


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_elementwise_losses(loss, reduction):
    torch.manual_seed(1)
    x, t = torch.randn(BATCH, WIDTH, dtype=torch.float64), torch.randn(BATCH, 4, dtype=torch.float64)
    check(Case(Regression().double(), (x,), lambda y, t: loss(y, t, reduction=reduction), t), FEW)


@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy_with_weights(weighted):
    torch.manual_seed(1)
    x, t = torch.randn(BATCH, WIDTH, dtype=torch.float64), torch.randint(0, 2, (BATCH, 4)).double()
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    check(Case(Regression().double(), (x,), nn.BCEWithLogitsLoss(weight=weight, pos_weight=weight), t), FEW)

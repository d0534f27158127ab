"""Functions with checks of, and branches on, the numbers in a tensor. Not in a test module, where pytest would rewrite
their asserts.

Each maps hidden values h and inputs x, both [8, 8], to [8, 8].
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def raises(h, x):
    if (x > 1e6).any():
        raise ValueError("too large")
    return h


def asserts(h, x):
    assert (x < 1e6).all() and not torch.isnan(x).any(), f"bad input {x}"
    return h * 2


def raises_behind_a_reading(h, x):
    if x.max().item() > 1e6:
        raise RuntimeError("too large")
    return h


def complain(x):
    raise KeyError("bad")


def raises_in_a_function(h, x):
    for part in h.chunk(4):
        if part.abs().max() > 1e6:
            complain(part)
    return h


def library_checks(h, x):
    torch._assert((x < 1e6).all(), "too large")
    distribution = torch.distributions.Normal(h, F.softplus(h) + 1e-3, validate_args=True)
    return h + F.gaussian_nll_loss(h, x, F.softplus(h)) + distribution.log_prob(x)


def sizes_of_checks(h, x):
    assert h[x > 0].numel() <= h.numel()
    torch._check(bool(x[:, 0].nonzero().shape[0] <= x.shape[0]))
    return h


def chooses(h, x):
    if (x > 0).any():
        return h
    return -h


def chooses_behind_a_check(h, x):
    assert (x < 1e6).all()
    return chooses(h, x)


def raises_later(h, x):
    if (x > 0).any():
        h = h + 1
    if (x < -1e6).any():
        raise ValueError("too small")
    return h


def fails_on_one_side(h, x):
    if (x > 1e6).any():
        h = h @ torch.zeros(3, 3)  # an op that fails is not a check
    return h


def is_low(x):
    return bool((x < -1e6).any())


def chooses_by_the_same_question(h, x):
    if is_low(x):
        raise ValueError("too small")
    if is_low(h):
        h = -h
    return h


def never(h, x):
    if (x > 0).any():
        raise ValueError("positive")
    raise ValueError("not positive")

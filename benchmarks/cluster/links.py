"""What the links of an emulated cluster are: a rate and a delay for every ordered pair of hosts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """rate_mbit: megabits per second, 0 for no limit. delay_us: one way."""

    rate_mbit: float = 0.0
    delay_us: float = 0.0


@dataclass(frozen=True, slots=True)
class Links:
    """name: for tables. pairs: (source, target) -> link; a host's links share its one wire."""

    name: str
    hosts: int
    pairs: tuple[tuple[tuple[int, int], Link], ...]

    def text(self) -> str:
        """As the forwarder reads it."""
        return "".join(f"{a} {b} {link.rate_mbit:g} {link.delay_us:g}\n" for (a, b), link in self.pairs)


def uniform(hosts: int, rate_mbit: float = 0.0, delay_ms: float = 0.0) -> Links:
    """The same link between all hosts."""
    link = Link(rate_mbit, delay_ms * 1000)
    rate = f"{rate_mbit:g} Mbit/s" if rate_mbit else "unlimited"
    return Links(f"{rate}, {delay_ms:g} ms", hosts, tuple(((a, b), link) for a, b in _pairs(hosts)))


def nodes(hosts: int, per_node: int, inside_mbit: float, between_mbit: float, delay_ms: float = 0.0) -> Links:
    """Nodes of `per_node` hosts: fast inside, slow (and far) between."""
    inside, between = Link(inside_mbit), Link(between_mbit, delay_ms * 1000)
    pairs = tuple(((a, b), inside if a // per_node == b // per_node else between) for a, b in _pairs(hosts))
    fast = f"{inside_mbit:g}" if inside_mbit else "unlimited"
    return Links(
        f"nodes of {per_node}: {fast} inside, {between_mbit:g} Mbit/s and {delay_ms:g} ms between", hosts, pairs
    )


def _pairs(hosts: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(hosts) for b in range(hosts) if a != b]

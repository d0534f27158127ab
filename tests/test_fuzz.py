"""Random models under random plans compute what one device computes. The long run is ``make fuzz``."""

from __future__ import annotations

from tests.fuzz.examples import run

EXAMPLES = 100


def test_random_models():
    """The same models and plans every time."""
    tally = run(EXAMPLES, None)
    assert tally.graphs > EXAMPLES // 2 and tally.plans > 2 * EXAMPLES

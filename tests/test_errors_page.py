"""docs/errors.md: every class is there, and every example still raises it (those that start a worker are not run)."""

import re

import pytest

from shardplan import errors
from tests import error_examples as examples

KINDS = examples.classes()
QUICK = [kind for kind in KINDS if kind.__name__ not in examples.SPAWNING]


def masked(text: str) -> str:
    """Without numbers, which follow the planner's prices, and names of graphs."""
    return re.sub(r"\b[0-9a-f]{16}\b|\d[\d.,]*", "#", text)


def sections() -> dict[str, str]:
    found = re.split(r"^## SP\d+ (\w+)$", examples.PAGE.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2]))


def test_codes_are_unique_and_every_class_has_an_example_and_a_section():
    assert len({kind.code for kind in KINDS}) == len(KINDS)
    assert list(sections()) == [kind.__name__ for kind in KINDS]
    for kind in KINDS:
        assert examples.lines_of(kind) in sections()[kind.__name__]
        assert f"SP{kind.code[2:]} {kind.__name__}: " in sections()[kind.__name__]


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.__name__)
def test_an_example_raises_what_the_page_shows(kind: type[errors.ShardplanError]):
    error = examples.provoke(kind)
    assert type(error) is kind
    assert masked(examples.message(error)) in masked(sections()[kind.__name__])

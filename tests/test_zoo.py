"""One architecture of every family of the zoo, under forced degrees, against one device; `make zoo` runs them all."""

from __future__ import annotations

import pytest

from tests.zoo.check import check
from tests.zoo.registry import FAMILIES, zoo

SAMPLE = {
    "decoders": "smollm3",
    "encoders": "xlnet",
    "encoder_decoders": "mbart",
    "experts": "dbrx",
    "state_space": "lfm2",
    "vision": "shufflenet",
    "audio": "spectrogram_net",
    "multimodal": "captioner",
    "diffusion": "dit",
    "recurrent": "gru",
    "graphs": "gin",
    "recommendation": "dlrm",
    "plain": "simclr",
    "generative": "made",
    "routing": "soft_experts",
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_family_equals_one_device(family):
    entry = zoo()[SAMPLE[family]]
    row = check(entry, ("dp2", "tp2", "pp2", "mix"), mix=FAMILIES.index(family) % 3)
    assert row.traced != "no", row.problem
    for column, outcome in row.columns.items():
        assert outcome.passed, f"{entry.name} {column} ({outcome.what}): {outcome.problem}"
    if entry.transformer and row.share is not None:
        assert row.share >= 0.95, row.whole


def test_names_and_summaries():
    entries = zoo()
    assert len(entries) >= 60
    assert {entry.family for entry in entries.values()} == set(FAMILIES) == set(SAMPLE)

"""The card says what was measured."""

from __future__ import annotations

from examples.tiny_moe.card import card, results
from examples.tiny_moe.checkpoint import hf_config
from examples.tiny_moe.network import Shape
from examples.tiny_moe.sources import SOURCES

NAMES = ("tokens", "nats", "ngram_nats", "right", "drafts", "mtp_right", "accepted")
EVALUATION = {
    "plays": dict(zip(NAMES, (100, 250.0, 350.0, 40, 99, 30, 50), strict=True)),
    "code": dict(zip(NAMES, (300, 450.0, 950.0, 200, 297, 90, 198), strict=True)),
}


def test_all_domains_are_weighed_by_their_tokens() -> None:
    *_, plays, code, together = results(EVALUATION).splitlines()
    assert plays == "| plays | 100 | 12.2 | 33.1 | 40.0% | 30.3% | 50.5% |"  # e^2.5 and e^3.5
    assert code == "| code | 300 | 4.5 | 23.7 | 66.7% | 30.3% | 66.7% |"
    assert together == "| all | 400 | 5.8 | 25.8 | 60.0% | 30.3% | 62.6% |"  # e^(700/400), e^(1300/400)


def test_the_card_names_sizes_and_every_source() -> None:
    metrics = [{"step": 5000, "seconds": 450.0, "batch_tokens": 65_536, "device": "NVIDIA H100"}]
    text = card(metrics, EVALUATION, hf_config(Shape()), 15_800_000, 7_878_240, 32_768_000)
    assert "7.9 million parameters" in text
    assert "15.8 MB in `model.safetensors`" in text
    assert "7.5 minutes on one NVIDIA H100" in text
    assert "328 million tokens (10.0 times the text), 5000 steps" in text
    assert all(f"{source.name} {source.version} | {source.licence}" in text for source in SOURCES)

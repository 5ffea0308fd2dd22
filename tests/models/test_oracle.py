"""Greedy tokens against transformers, in float32: 20 prompts of 5 to 600 tokens, 64 tokens each."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from splitserve.models.layers import SingleRank
from splitserve.models.resolve import SMOLLM2, load_model_config, resolve_model
from splitserve.models.weights import load_model
from tests.models.conftest import TINY_MODELS
from tests.models.driver import CPU, Driver, greedy

NUM_TOKENS = 64
LENGTHS = [round(5 + 595 * index / 19) for index in range(20)]
TIE = 1e-4
TinyModels = Callable[[str], tuple[Path, Any]]


def our_greedy(folder: Path, prompts: list[list[int]], dtype: torch.dtype = torch.float32) -> list[list[int]]:
    config = load_model_config(str(folder))
    model = load_model(folder, config, dtype, CPU, SingleRank(), "auto", max_positions=700)
    return greedy(Driver(model, config, SingleRank(), len(prompts), 700), prompts, NUM_TOKENS)


@torch.inference_mode()
def count_ties(oracle: Any, prompts: list[list[int]], answers: list[list[int]]) -> int:
    """Check that greedy decoding by `oracle` gives `answers`; returns how many tokens differ by a tie.

    Each answer's tokens are judged after the same tokens before them, all in one pass: generate's own tokens follow by
    induction as long as none differs.
    """
    ties = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = oracle(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
        chosen = torch.tensor(answer)
        behind = logits.amax(-1) - logits[range(len(answer)), chosen]
        assert behind.max() <= TIE, f"prompt of {len(prompt)} tokens: {behind.max():.2g} behind the best logit"
        ties += int((logits.argmax(-1) != chosen).sum())
    return ties


def random_prompts(vocab_size: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in LENGTHS]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_models(tiny: TinyModels, name: str) -> None:
    folder, oracle = tiny(name)
    prompts = random_prompts(oracle.config.vocab_size)
    answers = our_greedy(folder, prompts)
    assert len({token for answer in answers for token in answer}) > 25, "the model says too little to be told apart"
    assert count_ties(oracle, prompts, answers) <= 2
    generated = oracle.generate(
        torch.tensor(prompts[3:4]),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    assert generated[0, len(prompts[3]) :].tolist() == answers[3]


@pytest.fixture(scope="module")
def smollm2() -> tuple[Path, LlamaForCausalLM]:
    folder = resolve_model(SMOLLM2)
    return folder, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def smollm2_prompts(folder: Path) -> list[list[int]]:
    """Half of them text, half random tokens."""
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(Path(torch.__file__).read_text()[:40_000]).ids
    noise = random_prompts(49152)
    return [
        text[index * 300 : index * 300 + length] if index % 2 else noise[index] for index, length in enumerate(LENGTHS)
    ]


def test_smollm2(smollm2: tuple[Path, LlamaForCausalLM]) -> None:
    folder, oracle = smollm2
    prompts = smollm2_prompts(folder)
    answers = our_greedy(folder, prompts)
    assert count_ties(oracle, prompts, answers) <= 2


def test_smollm2_in_bfloat16_stays_close(smollm2: tuple[Path, LlamaForCausalLM]) -> None:
    folder, oracle = smollm2
    prompts = smollm2_prompts(folder)[1:4:2]
    answers = our_greedy(folder, prompts, torch.bfloat16)
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = oracle(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
            behind = logits.amax(-1) - logits[range(len(answer)), torch.tensor(answer)]
            assert behind.max() < 1.0
            assert (behind == 0).float().mean() > 0.9

"""On a GPU in bfloat16: logits no further from a float64 reference than those of transformers in bfloat16."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitserve.models.layers import SingleRank
from splitserve.models.resolve import load_model_config
from splitserve.models.weights import load_model
from tests.models.conftest import TINY_MODELS
from tests.models.driver import Driver, Span

pytestmark = pytest.mark.gpu
PROMPTS = [random.Random(seed).choices(range(301), k=length) for seed, length in enumerate(range(10, 330, 10))]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_bfloat16(tiny: Callable[[str], tuple[Path, Any]], name: str) -> None:
    folder, oracle = tiny(name)
    reference = copy.deepcopy(oracle).double()
    reference.config._experts_implementation = "eager"  # the others know no float64
    expected = last_logits(reference)
    theirs = distances(last_logits(copy.deepcopy(oracle).cuda().bfloat16()), expected)
    ours = distances(our_logits(folder), expected)
    assert ours.median() <= 1.05 * theirs.median(), f"{ours.median():.4f} against {theirs.median():.4f}"


@torch.inference_mode()
def last_logits(model: Any) -> torch.Tensor:
    rows = [model(torch.tensor([prompt], device=model.device)).logits[0, -1].cpu().double() for prompt in PROMPTS]
    return torch.stack(rows)


def our_logits(folder: Path) -> torch.Tensor:
    """All prompts in two packed chunks each."""
    config, device = load_model_config(str(folder)), torch.device("cuda")
    model = load_model(folder, config, torch.bfloat16, device, SingleRank(), "auto", max_positions=512)
    driver = Driver(model, config, SingleRank(), len(PROMPTS), 512, device)
    halves = [(index, len(prompt) // 2, prompt) for index, prompt in enumerate(PROMPTS)]
    driver.run([Span(index, 0, prompt[:half]) for index, half, prompt in halves])
    logits = driver.run([Span(index, half, prompt[half:]) for index, half, prompt in halves])
    return torch.Tensor.double(logits.cpu())


def distances(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative distance of each row."""
    gap, size = (torch.linalg.vector_norm(rows, dim=-1) for rows in (logits - expected, expected))
    return torch.div(gap, size)

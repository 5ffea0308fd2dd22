"""A toy run on the CPU: it learns, goes on where it was cut off, and what it saves is DeepSeek-V3 to transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import DeepseekV3ForCausalLM

from examples.tiny_moe import checkpoint
from examples.tiny_moe.network import MixtureOfExperts, Shape, TinyMoe
from examples.tiny_moe.tokens import Ids
from examples.tiny_moe.train import Plan, Run, balance

TOY = Shape(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    max_position_embeddings=128,
)
PLAN = Plan(steps=40, batch=8, length=32, learning_rate=1e-2, warm_up=5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ids() -> Ids:
    """A cycle of tokens with skips: easy, but not for counting alone."""
    dice = np.random.default_rng(0)
    return (np.cumsum(dice.choice([1, 1, 1, 5], 20_000)) % 64).astype(np.uint16)


@pytest.fixture(scope="module")
def finished(ids: Ids, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyMoe, Path]:
    folder = tmp_path_factory.mktemp("run")
    run = Run(TOY, PLAN, folder, CPU)
    run.train(ids, ids[:2000])
    return run.model, folder


def test_it_learns(finished: tuple[TinyMoe, Path]) -> None:
    lines = [json.loads(line) for line in (finished[1] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    uniform = np.log(64)
    assert lines[-1]["loss"] < 0.6 * uniform
    assert lines[-1]["mtp_loss"] < 0.8 * uniform
    assert lines[-1]["heldout_loss"] == pytest.approx(lines[-1]["loss"], abs=0.5)


def test_a_run_that_is_cut_off_goes_on_as_if_nothing_had_been(
    ids: Ids, finished: tuple[TinyMoe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.tiny_moe.train.SAVE_SECONDS", 0.0)
    cut = Run(TOY, PLAN, tmp_path, CPU)
    step = cut._train_step

    def failing(tokens: torch.Tensor) -> object:
        if cut.step == 23:
            raise KeyboardInterrupt
        return step(tokens)

    monkeypatch.setattr(cut, "_train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        cut.train(ids, ids[:2000])
    again = Run(TOY, PLAN, tmp_path, CPU)
    assert again.step == 23
    again.train(ids, ids[:2000])
    expected = finished[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_other_settings_do_not_go_on_with_a_run(ids: Ids, finished: tuple[TinyMoe, Path]) -> None:
    with pytest.raises(SystemExit, match="other settings"):
        Run(TOY, replace(PLAN, batch=9), finished[1], CPU)


def test_routers_are_balanced_by_their_bias() -> None:
    model = TinyMoe(TOY)
    loads = torch.tensor([[9.0, 1.0] + [2.0] * 14, [2.0] * 16])
    balance(model, loads)
    routed = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]
    first, second = (mlp.gate.get_buffer("e_score_correction_bias") for mlp in routed)
    mean = loads[0].mean()
    assert first.sign().tolist() == (mean - loads[0]).sign().tolist()
    assert not second.any()


def test_transformers_agrees_with_what_is_saved(finished: tuple[TinyMoe, Path], ids: Ids, tmp_path: Path) -> None:
    checkpoint.save(finished[0], tmp_path)
    ours = checkpoint.load(tmp_path)
    oracle = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.from_numpy(ids[None, :100].astype(np.int64))
    with torch.no_grad():
        mine, theirs = ours(tokens).logits, oracle(tokens).logits
    assert float(theirs.std()) > 0.5
    torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)


def test_the_mtp_module_has_deepseeks_names(finished: tuple[TinyMoe, Path], tmp_path: Path) -> None:
    checkpoint.save(finished[0], tmp_path)
    with safe_open(tmp_path / checkpoint.WEIGHTS, "pt") as file:
        names = {name.removeprefix("model.layers.2.") for name in file.keys() if name.startswith("model.layers.2.")}  # noqa: SIM118 - not a dict
        bias = file.get_tensor("model.layers.2.mlp.gate.e_score_correction_bias")
    own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    layer = {"self_attn.kv_b_proj.weight", "mlp.experts.15.down_proj.weight", "mlp.shared_experts.up_proj.weight"}
    assert own | layer <= names
    assert bias.dtype == torch.float32


def test_no_expert_computes_what_its_weight_does_not_say() -> None:
    """All experts at once is the sum over the chosen ones."""
    torch.manual_seed(0)
    mlp = MixtureOfExperts(TOY)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(50, TOY.hidden_size)
    weights = mlp.gate(x)
    assert ((weights > 0).sum(-1) == TOY.num_experts_per_tok).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((50,), TOY.routed_scaling_factor))
    expected = mlp.shared_experts(x)
    for row, token in enumerate(x):
        for expert in weights[row].nonzero()[:, 0].tolist():
            gate, up = mlp.experts.gate_proj[expert] @ token, mlp.experts.up_proj[expert] @ token
            part = mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            expected[row] = expected[row] + weights[row, expert] * part
    torch.testing.assert_close(mlp(x)[0], expected, atol=1e-4, rtol=1e-4)

"""Routing: DeepSeek's two rules by hand, and the Triton kernel against the torch reference."""

from __future__ import annotations

import pytest
import torch

from splitserve.kernels.moe_routing import Routing, route, triton_route

V2_LITE = Routing(6, "softmax", 1, 1, normalise=False, scale=1.0)
V2 = Routing(6, "softmax", 8, 3, normalise=False, scale=16.0)
V3 = Routing(8, "sigmoid", 8, 4, normalise=True, scale=2.5)
SMALL = Routing(3, "sigmoid", 4, 2, normalise=True, scale=1.0)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def test_softmax_takes_the_best_of_the_best_group() -> None:
    rule = Routing(2, "softmax", 2, 1, normalise=False, scale=3.0)
    logits = torch.tensor([[0.0, 5.0, 4.0, 4.5], [1.0, 0.0, 2.0, -1.0]])
    weights, chosen = route(logits, None, rule)
    assert chosen.tolist() == [[1, 0], [2, 3]]
    torch.testing.assert_close(weights, 3 * logits.softmax(-1).gather(1, chosen))


def test_a_bias_takes_part_in_the_choice_alone() -> None:
    rule = Routing(2, "sigmoid", 2, 1, normalise=True, scale=2.0)
    logits, bias = torch.tensor([[3.0, 0.0, 1.0, 1.0]]), torch.tensor([0.0, 0.0, 0.0, 0.5])
    weights, chosen = route(logits, bias, rule)
    assert chosen.tolist() == [[3, 2]], "0.73 + 0.5 and 0.73 are worth more than 0.95 and 0.5"
    torch.testing.assert_close(weights, torch.ones(1, 2))


@devices
@pytest.mark.parametrize(("rule", "experts"), [(V2_LITE, 64), (V2, 160), (V3, 256), (SMALL, 16)])
@pytest.mark.parametrize("shared", [0, 2])
def test_triton_routes_alike(device: str, rule: Routing, experts: int, shared: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(33, experts, generator=generator)
    bias = torch.randn(experts, generator=generator) / 10 if rule.scoring == "sigmoid" else None
    expected, expected_ids = route(logits, bias, rule, shared)
    assert expected_ids[:, rule.top_k :].tolist() == [list(range(experts, experts + shared))] * 33
    on_device = None if bias is None else bias.to(device)
    weights, chosen = triton_route(logits.to(device), on_device, rule, shared)
    assert torch.equal(chosen.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu(), expected, atol=1e-6, rtol=1e-5)


@devices
def test_logits_may_be_terms_of_a_sum(device: str) -> None:
    terms = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    rule = Routing(2, "softmax", 1, 1, normalise=True, scale=1.0)
    weights, chosen = triton_route(terms.to(device), None, rule)
    expected, expected_ids = route(terms.sum(0), None, rule)
    assert torch.equal(chosen.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu(), expected)

"""methods.py: what a step does, and that a restored state continues where it stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import losses
import methods
import netlib
from auxiliaries import UserError, seed_everything

LABELS = torch.arange(4).repeat_interleave(2)
IMAGES = torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(lr: float = 0.1, embed_dim: int = 4, **schedule: Any) -> methods.MetricLossOnly:
    """A method with a tiny network, learned betas, and a schedule of steps after epochs 1 and 3."""
    seed_everything(0)
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net = netlib.EmbeddingNet(backbone, 12, embed_dim)
    criterion = losses.MarginLoss(losses.Sampler("distance"), num_classes=4)
    groups = [*net.parameter_groups(lr, 0.01), {"name": "marginloss", "params": [criterion.beta], "lr": 0.5}]
    schedule = {"name": "step", "gamma": 0.5, "tau": [1, 3], **schedule}
    return methods.MetricLossOnly(net, criterion, torch.optim.Adam(groups), schedule)


def train(method: methods.MetricLossOnly, *epochs: int) -> list[dict[str, float]]:
    """One step per epoch; the learning rates that each was trained with."""
    rates = []
    for epoch in epochs:
        seed_everything(0, epoch)
        rates.append(method.learning_rates())
        method.start_epoch()
        method.step(IMAGES, LABELS, epoch)
        method.end_epoch()
    return rates


def saved(method: methods.MetricLossOnly, epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, **method.state_dict()}


def test_a_step_learns_and_tells_what_it_did() -> None:
    method = build()
    before = method.net.embedding.weight.detach().clone()
    assert method.statistics() == {}
    method.start_epoch()
    parts = method.step(IMAGES, LABELS, epoch=1)
    assert set(parts) == {"loss"}
    assert not parts["loss"].requires_grad
    assert not torch.equal(method.net.embedding.weight, before)
    assert {"Embedding Norm", "Tuples", "Violations", "Mean Beta"} <= set(method.statistics())
    assert method.learning_rates() == {"Learning Rate": 0.1, "Learning Rate marginloss": 0.5}


def test_a_restored_state_continues_bit_for_bit() -> None:
    whole, stopped, resumed = build(), build(), build()
    rates = train(whole, 1, 2, 3, 4)
    train(stopped, 1, 2)
    resumed.load_state_dict(saved(stopped, 2))
    assert train(resumed, 3, 4) == rates[2:]
    assert [rate["Learning Rate"] for rate in rates] == pytest.approx([0.1, 0.05, 0.05, 0.025])
    one, other = whole.state_dict(), resumed.state_dict()
    for name in whole.networks:
        assert all(torch.equal(value, other[name][key]) for key, value in one[name].items())
    assert one["scheduler"] == other["scheduler"]


@pytest.mark.parametrize("has_schedule", [True, False], ids=["now", "before schedules were saved"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.05, 0.05, 0.025]),
        ({"lr": 0.2}, [0.1, 0.1, 0.05]),  # the current rate is scaled
        ({"tau": [3]}, [0.1, 0.1, 0.05]),  # as if it had been followed from the start
        ({"name": "none"}, [0.1, 0.1, 0.1]),
        ({"gamma": 0.1, "lr": 1.0}, [0.1, 0.1, 0.01]),
    ],
)
def test_changed_flags_take_effect(changes: dict[str, Any], expected: list[float], has_schedule: bool) -> None:
    stopped, resumed = build(), build(**changes)
    train(stopped, 1)
    state = saved(stopped, 1)
    if not has_schedule:
        del state["scheduler"]
    resumed.load_state_dict(state)
    assert [rate["Learning Rate"] for rate in train(resumed, 2, 3, 4)] == pytest.approx(expected)


def test_a_state_of_another_network_is_refused() -> None:
    with pytest.raises(UserError, match="network or loss differs from what these flags give") as error:
        build(embed_dim=5).load_state_dict(saved(build(), 0))
    assert "\n" not in str(error.value)

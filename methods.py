"""What is trained, and how one step goes: training methods with their networks, losses, optimizers and schedules."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LRScheduler, MultiStepLR

import losses
import netlib
from auxiliaries import FlagParser, UserError, number, seed_everything

SCHEDULERS: dict[str, Callable[..., LRScheduler]] = {
    "step": lambda optimizer, gamma, tau: MultiStepLR(optimizer, tau, gamma),
    "exp": lambda optimizer, gamma, tau: ExponentialLR(optimizer, gamma),
    "none": lambda optimizer, gamma, tau: ConstantLR(optimizer, factor=1),
}


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of optimizer and schedule."""
    # fmt: off
    add = parser.add_argument_group("optimization").add_argument
    add("--training_method", choices=METHODS, default="MetricLossOnly", fixed=True, help="what is trained, and how")
    add("--lr", type=number(float, 0), default=1e-5, help="learning rate of the network (Adam)")
    add("--fc_lr_mul", type=number(float, 0), default=0.0,
        help="learning rate of the embedding layer as a multiple of --lr; 0: it shares --lr")
    add("--decay", type=number(float, 0), default=4e-4, help="weight decay of the network")
    add("--scheduler", choices=SCHEDULERS, default="step",
        help="step: multiply all learning rates by --gamma at --tau; exp: after every epoch; none: keep them")
    add("--gamma", type=number(float, 0), default=0.3, help="factor of all learning rates at a step of --scheduler")
    add("--tau", type=number(int, 1), nargs="*", default=[30, 55], help="epochs after which --scheduler step acts")
    # fmt: on


class MetricLossOnly:
    """Trains a network on the metric loss of its embeddings.

    Args:
        net: images `(B, 3, H, W)` uint8 to embeddings `(B, D)`.
        criterion: embeddings `(B, D)` and labels `(B,)` to a scalar.
        optimizer: of all parameters of both, in named groups.
        schedule: name (a key of `SCHEDULERS`) and parameters of the learning rates' schedule.

    Attributes:
        networks: the bare networks by their name in checkpoints.
    """

    def __init__(
        self,
        net: netlib.EmbeddingNet,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Mapping[str, Any],
    ):
        self.net = net
        self.criterion = criterion
        self.networks: dict[str, nn.Module] = {"state_dict": net, "criterion": criterion}
        self.optimizer = optimizer
        self.schedule = dict(schedule)
        parameters = {key: value for key, value in schedule.items() if key != "name"}
        self.scheduler = SCHEDULERS[schedule["name"]](optimizer, **parameters)
        self._last_batch: tuple[torch.Tensor, torch.Tensor] | None = None

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` uint8 to embeddings `(B, D)`."""
        return self.net(images)

    def step(self, images: torch.Tensor, labels: torch.Tensor, epoch: int) -> dict[str, torch.Tensor]:
        """Learns from one batch.

        Args:
            images: `(B, 3, H, W)` uint8, on the network's device.
            labels: `(B,)` int64, on the host, where tuples are decided on.
            epoch: counted from 1.

        Returns:
            The `loss` and its parts, detached scalars on the device.
        """
        embeddings = self.embed(images)  # (B, D)
        loss = self.criterion(embeddings, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._last_batch = embeddings.detach(), labels
        return {"loss": loss.detach()}

    def start_epoch(self) -> None:
        """Puts everything into training mode."""
        for network in self.networks.values():
            network.train()

    def end_epoch(self) -> None:
        """Advances the schedule of the learning rates."""
        self.scheduler.step()

    def learning_rates(self) -> dict[str, float]:
        """The network's learning rate, and those of the other parameter groups by their names."""
        first, *others = self.optimizer.param_groups
        return {"Learning Rate": first["lr"], **{f"Learning Rate {group['name']}": group["lr"] for group in others}}

    @torch.no_grad()
    def statistics(self) -> dict[str, torch.Tensor]:
        """Statistics of the last step's batch, tuples and loss: scalars on the device."""
        return losses.statistics(self.criterion, *self._last_batch) if self._last_batch else {}

    def state_dict(self) -> dict[str, Any]:
        """The states of the networks, the optimizer and the schedule, for a checkpoint."""
        return {
            **{name: network.state_dict() for name, network in self.networks.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"schedule": self.schedule, "state": self.scheduler.state_dict()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a checkpoint's state after `state["epoch"]`.

        Flags that have changed since then take effect: weight decay at once; a changed learning rate scales the
        current one; a changed schedule counts as having been followed from the first epoch.

        Raises:
            UserError: it is the state of another network or loss.
        """
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            for name, network in self.networks.items():
                network.load_state_dict(state[name])
            self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the run's network or loss differs from what these flags give ({reason})") from None
        saved = state.get("scheduler")  # run folders of version 1 lack it
        if saved and saved["schedule"] == self.schedule:
            self._continue_schedule(saved["state"], state["optimizer"]["param_groups"])
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about steps of the schedule without steps of the optimizer
                for _ in range(state["epoch"]):
                    self.scheduler.step()

    def _continue_schedule(self, state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the state of the same schedule, and the shares of the initial learning rates that were left."""
        initial = [group["initial_lr"] for group in self.optimizer.param_groups]
        self.scheduler.load_state_dict({**state, "base_lrs": initial})
        for group, saved in zip(self.optimizer.param_groups, groups):
            is_same = group["initial_lr"] == saved["initial_lr"]
            share = saved["lr"] / saved["initial_lr"] if saved["initial_lr"] else 1.0
            group["lr"] = saved["lr"] if is_same else group["initial_lr"] * share
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]


METHODS: dict[str, type[MetricLossOnly]] = {
    "MetricLossOnly": MetricLossOnly,
}


def build_training(
    opt: argparse.Namespace, num_classes: int, device: torch.device, load_pretrained: bool = True
) -> MetricLossOnly:
    """Builds what the resolved flags train: network, loss, optimizer and schedule, on the device.

    Args:
        opt: the resolved flags.
        num_classes: number of training classes.
        device: where to train.
        load_pretrained: whether to load pretrained weights, where the flags ask for them.
    """
    seed_everything(opt.seed, 0)
    net = netlib.networkselect(opt, load_pretrained).to(device)
    groups = net.parameter_groups(opt.lr, opt.decay, opt.fc_lr_mul)
    criterion, groups = losses.loss_select(opt.loss, opt, groups, num_classes)
    schedule = {"name": opt.scheduler, "gamma": opt.gamma, "tau": opt.tau}
    return METHODS[opt.training_method](net, criterion.to(device), torch.optim.Adam(groups), schedule)

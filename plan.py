"""What a training run is made of and what it will take, in words: what it prints at its start, and --dry_run."""

from __future__ import annotations

import argparse
import copy
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import auxiliaries
import records
from auxiliaries import counted

if TYPE_CHECKING:
    import datasets
    import netlib
    import runs
    from methods import MetricLossOnly


def print_start(run: runs.Run, device: torch.device, num_batches: int) -> None:
    """Prints what a run is made of."""
    opt, net = run.opt, run.method.net
    weights = "random weights" if opt.not_pretrained else f"weights of {opt.weights}" if opt.weights else "pretrained"
    million = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    network = f"{opt.arch} ({weights}), {million:.2f} million parameters, {net.embed_dim}-dimensional embeddings"
    sampling = f" with {records.join_names(opt.sampling)} sampling" if opt.sampling else ""
    batches = f"{counted(num_batches, 'batch', 'batches')} of {counted(opt.bs, 'image')} per epoch"
    loss = f"{records.join_names(opt.loss)}{sampling}, --lr {opt.lr:g}, {batches}"
    mirrors = run.log.mirrors.places()
    records.print_start(opt.dataset, run.splits, network, loss, device, run.folder, run.epoch, mirrors)


# What would happen


def print_plan(run: runs.Run, loaders: datasets.Loaders, device: torch.device) -> None:
    """Prints what a run would do from where it is, without doing it: --dry_run."""
    opt = run.opt
    print_start(run, device, len(loaders.train))
    records.print_facts(
        {
            "batch": describe_batches(opt, loaders.train, run.epoch + 1),
            "parameters": describe_parameters(run.method),
            "epochs": describe_epochs(opt, run.epoch, len(loaders.train)),
            "memory": describe_memory(opt, run.method, device),
        }
    )
    print("nothing was trained or written: drop --dry_run to start")


def describe_batches(opt: argparse.Namespace, loader: datasets.ImageLoader, epoch: int) -> str:
    """The number of classes in the batches of an epoch, in words."""
    auxiliaries.seed_everything(opt.seed, epoch)
    loader.dataset.set_epoch(epoch)
    counts = [len(np.unique(loader.labels[[draw[0] for draw in batch]])) for batch in loader.dataset.batches]
    fewest = "" if min(counts) == max(counts) else f"{min(counts)} to "
    classes = f"{fewest}{counted(max(counts), 'class', 'classes')}"
    return f"{counted(opt.bs, 'image')} of {classes}, {opt.batch_sampler}"


def count_parameters(method: MetricLossOnly) -> tuple[int, int]:
    """The numbers of parameters that are trained, the loss's included, and of those that stay as they are."""
    groups = [parameter for group in method.optimization.groups() for parameter in group["params"]]
    trained = {id(parameter): parameter.numel() for parameter in groups if parameter.requires_grad}
    everything = [parameter for network in method.networks.values() for parameter in network.parameters()]
    others = {id(parameter): parameter.numel() for parameter in everything if id(parameter) not in trained}
    return sum(trained.values()), sum(others.values())


def describe_parameters(method: MetricLossOnly) -> str:
    trained, frozen = count_parameters(method)
    return f"{trained:,} are trained, {frozen:,} are frozen"


def describe_epochs(opt: argparse.Namespace, done: int, num_batches: int) -> str:
    left = max(0, opt.n_epochs - done)
    if not left:
        return f"{opt.n_epochs}: nothing is left to train"
    first = f"{done + 1} to {opt.n_epochs}" if done else f"{opt.n_epochs}"
    every = f"every {opt.save_interval} epochs" if opt.save_interval > 1 else "every epoch"
    patience = f", until {counted(opt.patience, 'epoch')} without improvement (--patience)" if opt.patience else ""
    each = f"{counted(num_batches, 'iteration')} each, {left * num_batches:,} in all"
    return f"{first}, with {each}; evaluated {every}{patience}"


# Memory


def describe_memory(opt: argparse.Namespace, method: MetricLossOnly, device: torch.device) -> str:
    """An estimate of the peak of a training step or an evaluation, in words."""
    parts = estimate_memory(opt, method)
    program = auxiliaries.peak_memory(device) * 2**30 - parts["weights"] if device.type == "cpu" else 0
    if program > 0:
        parts["the program"] = program
    total = sum(parts.values()) / 2**30
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    workers = f", beside {counted(opt.kernels, 'worker')}" if opt.kernels else ""
    return f"about {total:.1f} GiB, computed from the shapes of a step's tensors ({listed}){workers}"


def estimate_memory(opt: argparse.Namespace, method: MetricLossOnly) -> dict[str, float]:
    """Bytes that training takes on its device.

    Returns:
        `weights` of all networks, `gradients`, `optimizer` state, and `activations`: what a batch that is trained on or
        evaluated takes beside these at the moment when most is taken. Of losses only the parameters count, and memory
        that the device's libraries need for themselves doesn't.
    """
    networks = [*method.networks.values(), *([method.averaged] if method.averaged is not None else [])]
    values = {id(value): value for net in networks for value in (*net.parameters(), *net.buffers())}
    optimizers = method.optimization.optimizers
    learning = [
        (parameter, optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
    share = auxiliaries.ranks().count
    train_bs = min(opt.bs // share, method.net.chunk or opt.bs)
    return {
        "weights": sum(value.nbytes for value in values.values()),
        "gradients": sum(parameter.nbytes for parameter, _, _ in learning),
        "optimizer": sum(_state_per_byte(optimizer, group) * one.nbytes for one, optimizer, group in learning),
        "activations": max(
            activation_bytes(method.net, train_bs, opt.crop_size, learns=True),
            activation_bytes(method.net, opt.eval_bs // share, opt.crop_size, learns=False),
        ),
    }


def _state_per_byte(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """How many bytes of state an optimizer keeps for each byte of a parameter: it is tried out on a small one."""
    probe = nn.Parameter(torch.zeros(16, 16))
    probe.grad = torch.zeros_like(probe)
    tried = type(optimizer)([probe], **{name: group[name] for name in optimizer.defaults if name in group})
    tried.step()
    state = [value for value in tried.state[probe].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in state if value.numel() > 1) / probe.nbytes


def activation_bytes(net: netlib.EmbeddingNet, bs: int, crop_size: int, learns: bool) -> float:
    """The most bytes that a batch takes at a time, beside the parameters and their gradients.

    A copy of the network without data runs forward and, if it learns, backward; every tensor that comes and goes is
    counted, and takes half in the backbone's 16-bit arithmetic.
    """
    twin = copy.deepcopy(net).to("meta").train(learns)
    twin.precision, twin.compiles, twin.chunk, twin.takes_features = "fp32", False, None, False
    images = torch.empty(bs, 3, crop_size, crop_size, dtype=torch.uint8, device="meta")
    with _PeakMemory() as memory, torch.set_grad_enabled(learns):
        embeddings = twin(images)
        if embeddings.requires_grad:
            embeddings.sum().backward()
    gradients = sum(parameter.grad.nbytes for parameter in twin.parameters() if parameter.grad is not None)
    scale = 0.5 if net.precision != "fp32" else 1
    return images.nbytes + scale * max(0, memory.peak - gradients)


class _PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block.

    Attributes:
        peak: the most that existed at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        old = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in old and storage not in self._known:  # a view has its source's
                    self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size

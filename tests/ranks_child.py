"""Trains small networks for a few steps as one of several processes, or alone, and saves their weights.

`python tests/ranks_child.py FILE` is started by test_ranks.py with the environment that torchrun gives. One process
goes through all cases, since imports take longer than they do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from conftest import SMALL  # noqa: E402

import auxiliaries  # noqa: E402
import config  # noqa: E402
import methods  # noqa: E402
import netlib  # noqa: E402

NUM_CLASSES, PER_CLASS, STEPS = 6, 4, 5
CASES = {
    "triplet": ["--loss", "triplet", "--sampling", "semihard"],
    "margin with learned beta": ["--loss", "marginloss", "--sampling", "distance", "--beta_lr", "0.1"],
    "proxynca": ["--loss", "proxynca", "--clip_grad_norm", "0.1"],
    "smoothap": ["--loss", "smoothap", "--optimizer", "SGD", "--ema", "0.9"],
    "library loss with a miner": ["--loss", "MultiSimilarityLoss", "--sampling", "MultiSimilarityMiner"],
    "memory": ["--loss", "ContrastiveLoss", "--memory_size", "48"],
    "classifier": ["--training_method", "TrainWithClassifier", "--loss", "npair"],
    "accumulated": ["--loss", "crossentropy", "--accumulate", "2"],
    "trunk that waits": ["--loss", "proxynca", "--freeze_trunk_epochs", "1"],
    "gradient cache": ["--loss", "marginloss", "--sampling", "distance", "--grad_cache", "5"],
    "S2SD": ["--training_method", "S2SD", "--loss", "triplet", "--s2sd_dims", "8", "--s2sd_feature_start", "2"],
    "generator": ["--training_method", "DeepAdversarialMetricLearning", "--loss", "triplet"],
    "generator alone": [
        *("--training_method", "DeepAdversarialMetricLearning", "--loss", "triplet"),
        *("--generator_alone_epochs", "1"),
    ],
}


def small_network(opt: object, _: bool) -> netlib.EmbeddingNet:
    """A network in float64, whose BatchNorm keeps its statistics."""
    backbone = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, stride=2)),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
    )
    backbone[1].running_var.uniform_(0.5, 2)  # type: ignore[operator]
    chunk = getattr(opt, "grad_cache", None)
    return netlib.EmbeddingNet(backbone, 8, 6, freeze_batchnorm=True, chunk=chunk).double().train()


def train(flags: list[str]) -> dict[str, torch.Tensor]:
    """All that is learned, and the loss, after some steps."""
    opt = config.resolve(config.parse([*SMALL, "--embed_dim", "6", "--bs", "24", "--lr", "1e-2", *flags]))
    method = methods.build_training(opt, NUM_CLASSES, torch.device("cpu"))
    for network in method.networks.values():
        network.double()
    own = auxiliaries.share(NUM_CLASSES * PER_CLASS)
    auxiliaries.seed_everything(1, 1)
    method.start_epoch(1)
    values: dict[str, Any] = {}
    for step in range(STEPS):
        rng = np.random.default_rng(step)
        labels = torch.from_numpy(rng.permutation(np.repeat(np.arange(NUM_CLASSES), PER_CLASS)))
        images = torch.from_numpy(rng.integers(0, 60, (len(labels), 3, 16, 16), dtype=np.uint8))
        images += (30 * labels).to(torch.uint8)[:, None, None, None]
        values[f"loss {step}"] = method.step(images[own], labels, epoch=1)["loss"]
    method.end_epoch()
    for name, network in method.networks.items():
        values |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
    values |= {f"evaluated.{key}": value for key, value in method.evaluated.state_dict().items()}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    auxiliaries.start_ranks()
    netlib.networkselect = small_network  # type: ignore[assignment]
    results = {name: train(flags) for name, flags in CASES.items()}
    torch.save(results, f"{sys.argv[1]}_{auxiliaries.ranks().number}")
    auxiliaries.wait_for_ranks()
    auxiliaries.leave(0)

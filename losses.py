"""Sampling of tuples inside a batch (`Sampler`), losses (`LOSSES`), and `loss_select`.

Whatever depends on the labels alone is decided on the host, before anything is asked of the device: no sampler and no
loss makes the host wait.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from auxiliaries import FlagParser, UserError, nearest_name, number, upload

Method = TypeVar("Method", bound=Callable[..., Any])


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of losses and sampling; a loss gets those that its constructor has keywords for."""
    # fmt: off
    add = parser.add_argument_group("loss and sampling").add_argument
    add("--loss", default="marginloss", choices=LOSSES, fixed=True, help="loss that is minimized")
    add("--sampling", choices=Sampler().methods,
        help="how tuples are picked in a batch (default: distance; npair for npair; none for losses without tuples)")
    add("--margin", type=number(float, 0), default=0.2, help="margin of triplet, marginloss, and semihard sampling")
    add("--beta", type=number(float, 0), default=1.2, help="marginloss: initial value of the boundary β")
    add("--beta_lr", type=number(float, 0), default=5e-4, help="marginloss: learning rate of β")
    add("--beta_constant", action="switch", fixed=True,
        help="marginloss: one β for all classes, which is not learned (default: one per class, learned)")
    add("--nu", type=number(float, 0), default=0.0, help="marginloss: weight ν of the sum of β")
    add("--proxy_lr", type=number(float, 0), default=1e-5, help="proxynca: learning rate of the proxies")
    add("--l2npair", type=number(float, 0), default=0.02, help="npair: weight of the squared norms of the embeddings")
    add("--lower_cutoff", type=number(float, 0, exclusive=True), default=0.5,
        help="distance sampling: smaller distances count as this one")
    add("--upper_cutoff", type=number(float, 0, exclusive=True),
        help="distance sampling: no negatives beyond this distance, 1.4 in the paper (default: no limit)")
    # fmt: on


class ClassGroups:
    """The classes of a batch, on the host.

    Attributes:
        labels: `(B,)` int64.
        order: `(B,)` batch positions, sorted by class.
        first: `(B,)` for each batch position, where its class begins in `order`.
        size: `(B,)` for each batch position, the number of images of its class.
        anchors: `(A,)` the positions that have a positive and a negative in the batch, ascending.

    Raises:
        UserError: no position has both.
    """

    def __init__(self, labels: torch.Tensor):
        self.labels = labels.cpu().numpy()
        self.order = np.argsort(self.labels, kind="stable")
        in_order = self.labels[self.order]
        starts = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))  # (C,)
        sizes = np.diff(np.append(starts, len(in_order)))  # (C,)
        self.first, self.size = np.empty_like(self.order), np.empty_like(self.order)
        self.first[self.order], self.size[self.order] = np.repeat(starts, sizes), np.repeat(sizes, sizes)
        self.anchors = np.flatnonzero((self.size > 1) & (self.size < len(self.labels)))
        if len(self.anchors) == 0:
            raise UserError(
                f"a batch of {len(self.labels)} images from {len(sizes)} class(es) gives no tuples: it needs two "
                "classes, and two images of one of them, so raise --samples_per_class or --bs"
            )

    def random_positives(self, anchors: np.ndarray) -> np.ndarray:
        """Draws, for each anchor `(A,)`, a uniform other member of its class, `(A,)`."""
        rank = np.empty_like(self.order)
        rank[self.order] = np.arange(len(self.order))  # (B,) where each position stands in `order`
        step = 1 + _uniform_below(self.size[anchors] - 1)  # (A,)
        rank_in_class = (rank[anchors] - self.first[anchors] + step) % self.size[anchors]  # (A,)
        return self.order[self.first[anchors] + rank_in_class]

    def random_negatives(self, anchors: np.ndarray) -> np.ndarray:
        """Draws, for each anchor `(A,)`, a uniform member of another class, `(A,)`."""
        others = _uniform_below(len(self.order) - self.size[anchors])  # (A,) ranks in `order` without the own class
        return self.order[others + self.size[anchors] * (others >= self.first[anchors])]


def _uniform_below(bounds: np.ndarray) -> np.ndarray:
    """Draws a uniform integer 0 … bound - 1 for each bound, from NumPy's global generator."""
    return (np.random.random_sample(bounds.shape) * bounds).astype(np.int64)


def _draw_columns(allowed: torch.Tensor, preferred: torch.Tensor) -> torch.Tensor:
    """Draws, for each row, a uniform column among the preferred ones, or among the allowed where none is preferred.

    Args:
        allowed: `(A, B)` bool.
        preferred: `(A, B)` bool, a part of the allowed.

    Returns:
        `(A,)` columns.
    """
    return (torch.rand(allowed.shape, device=allowed.device) + allowed + preferred).argmax(dim=1)


def gives(tuple_kind: str) -> Callable[[Method], Method]:
    """Marks a sampling method with the kind of tuples that it gives; a method without a mark gives triplets."""

    def mark(method: Method) -> Method:
        method.tuple_kind = tuple_kind  # type: ignore[attr-defined]
        return method

    return mark


class Sampler:
    """Picks tuples inside a batch.

    Args:
        method: a key of `self.methods`, or a Sampler, whose method and keywords are taken over.
        params: keywords that every call of the method gets.

    Attributes:
        tuples: the tuples of the last call of `give`; None before the first.
    """

    method: str
    params: dict[str, Any]
    tuples: torch.Tensor | None = None
    num_embeddings = 0  # of the batch that the last tuples were picked from

    def __init__(self, method: str | Sampler = "distance", **params: Any):
        if isinstance(method, Sampler):
            params = {**method.params, **params}
            method = method.method
        self.methods: dict[str, Callable[..., Any]] = {
            "distance": self.distance_sampling,
            "semihard": self.semihard_sampling,
            "softhard": self.softhard_sampling,
            "random": self.random_sampling,
            "npair": self.npair_sampling,
        }
        if method not in self.methods:
            raise UserError(f"--sampling {method} is unknown{nearest_name(method, self.methods)}")
        self.method = method
        self.params = params

    @torch.no_grad()
    def give(
        self, batch: torch.Tensor, labels: torch.Tensor | np.ndarray | Sequence[int], **additional_parameters: Any
    ) -> torch.Tensor:
        """Picks tuples of batch positions.

        Args:
            batch: `(B, D)` embeddings, on any device.
            labels: `(B,)` integers; the host waits for a tensor that is not on the host.
            additional_parameters: further keywords for the method; they take precedence over the constructor's.

        Returns:
            `(T, 3)` int64 on the batch's device, (anchor, positive, negative); `npair`: `(T, 1 + 1 + (C - 1))`.

        Raises:
            UserError: no tuple can be formed: there is only one class, or no class with two images.
        """
        if not isinstance(labels, torch.Tensor):
            labels = torch.from_numpy(np.array(labels, dtype=np.int64))
        tuples = self.methods[self.method](batch, labels, **{**self.params, **additional_parameters})
        if not isinstance(tuples, torch.Tensor):
            tuples = torch.from_numpy(np.asarray(tuples, dtype=np.int64))
        if tuples.ndim != 2 or len(tuples) == 0:
            raise UserError(f"--sampling {self.method} gave no tuples for a batch: raise --samples_per_class or --bs")
        self.tuples, self.num_embeddings = upload(tuples, batch.device), len(batch)
        return self.tuples

    def statistics(self, batch: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Computes statistics of the last tuples, for the records.

        A hard positive is farther from the anchor than the nearest negative in the batch, a hard negative is nearer
        than the farthest positive.

        Args:
            batch: `(B, D)` the embeddings that the tuples were picked from.
            labels: `(B,)` int64.

        Returns:
            Number of tuples, shares of hard positives and hard negatives, mean distances: scalars on the batch's
            device. Nothing when no tuples were picked from a batch of B embeddings.
        """
        if self.tuples is None or self.num_embeddings != len(batch):
            return {}
        labels = upload(labels, batch.device)
        anchors, positives, negatives = self.tuples[:, 0], self.tuples[:, 1:2], self.tuples[:, 2:]
        distances = torch.cdist(batch, batch).index_select(0, anchors)  # (T, B)
        same = labels.index_select(0, anchors)[:, None] == labels  # (T, B)
        farthest_positive = distances.masked_fill(~same, -torch.inf).amax(dim=1, keepdim=True)  # (T, 1)
        nearest_negative = distances.masked_fill(same, torch.inf).amin(dim=1, keepdim=True)  # (T, 1)
        to_positive = distances.gather(1, positives)  # (T, 1)
        to_negative = distances.gather(1, negatives)  # (T, 1), n-pairs: (T, C - 1)
        return {
            "Tuples": batch.new_full((), len(self.tuples)),
            "Hard Positives": (to_positive > nearest_negative).float().mean(),
            "Hard Negatives": (to_negative < farthest_positive).float().mean(),
            "d(a, p)": to_positive.mean(),
            "d(a, n)": to_negative.mean(),
        }

    def random_sampling(self, batch: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        """Picks B triplets, uniformly and with replacement from all valid ones."""
        groups = ClassGroups(labels)
        num_triplets = (groups.size - 1) * (len(labels) - groups.size)  # (B,) of each anchor
        chosen = _uniform_below(np.full(len(labels), num_triplets.sum()))  # (B,)
        anchors = np.searchsorted(np.cumsum(num_triplets), chosen, side="right")  # (B,)
        triplets = np.stack([anchors, groups.random_positives(anchors), groups.random_negatives(anchors)], axis=1)
        return upload(triplets, batch.device)  # (B, 3)

    def semihard_sampling(
        self, batch: torch.Tensor, labels: torch.Tensor, margin: float = 0.2, squared: bool = False, **_: Any
    ) -> torch.Tensor:
        """Picks, per anchor, a uniform positive p and a uniform negative n with d(a, p) < d(a, n) < d(a, p) + margin.

        Where there is no such negative, any negative is picked. Schroff et al., FaceNet, CVPR 2015.

        Args:
            batch: `(B, D)` embeddings.
            labels: `(B,)` int64.
            margin: in the unit of d.
            squared: whether d is the squared Euclidean distance.
        """
        pairs, distances, same = self._anchors_and_distances(batch, labels)
        if squared:
            distances = distances.square()  # (A, B)
        to_positive = distances.gather(1, pairs[:, 1:])  # (A, 1)
        semihard = (distances > to_positive) & (distances < to_positive + margin) & ~same  # (A, B)
        negatives = _draw_columns(~same, semihard)  # (A,)
        return torch.cat([pairs, negatives[:, None]], dim=1)  # (A, 3)

    def softhard_sampling(self, batch: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        """Picks, per anchor, a uniform hard positive and a uniform hard negative.

        A hard positive is farther than the nearest negative, a hard negative nearer than the farthest positive. Where
        there is none, any positive, or negative, is picked.
        """
        pairs, distances, same = self._anchors_and_distances(batch, labels)
        positive = same.scatter(1, pairs[:, :1], False)  # (A, B), without the anchor itself
        farthest_positive = distances.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)  # (A, 1)
        nearest_negative = distances.masked_fill(same, torch.inf).amin(dim=1, keepdim=True)  # (A, 1)
        negatives = _draw_columns(~same, ~same & (distances < farthest_positive))  # (A,)
        positives = _draw_columns(positive, positive & (distances > nearest_negative))  # (A,)
        return torch.stack([pairs[:, 0], positives, negatives], dim=1)  # (A, 3)

    def distance_sampling(
        self,
        batch: torch.Tensor,
        labels: torch.Tensor,
        lower_cutoff: float = 0.5,
        upper_cutoff: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Picks, per anchor, a uniform positive, and a negative with probability proportional to 1 / q(d).

        q(d) is the density of the distance between two uniform points of the unit sphere in D dimensions:
        log q(d) = (D - 2) log d + (D - 3) / 2 log(1 - d² / 4). Wu et al., Sampling Matters, ICCV 2017, section 4.1.

        Args:
            batch: `(B, D)` embeddings.
            labels: `(B,)` int64.
            lower_cutoff: distances below it count as equal to it.
            upper_cutoff: negatives beyond it are picked only where all are, and then uniformly.
        """
        pairs, distances, same = self._anchors_and_distances(batch, labels)
        dim = batch.shape[1]
        d = distances.clamp(lower_cutoff, torch.finfo(distances.dtype).max)  # (A, B)
        inside = (1 - d.square() / 4).clamp(min=1e-8)  # (A, B)
        log_weights = -(dim - 2) * d.log() - (dim - 3) / 2 * inside.log()  # (A, B)
        if upper_cutoff is not None:
            reached = (distances <= upper_cutoff) & ~same  # (A, B)
            weighted = log_weights.masked_fill(~reached, -torch.inf)  # (A, B)
            log_weights = torch.where(reached.any(dim=1, keepdim=True), weighted, 0.0)  # (A, B)
        # The column with the largest log weight + Gumbel noise is a draw from the weights (torch.multinomial would
        # make the host wait); -log of exponential noise is Gumbel noise.
        noise = torch.empty_like(log_weights).exponential_().log_()  # (A, B)
        negatives = (log_weights - noise).masked_fill_(same, -torch.inf).argmax(dim=1)  # (A,)
        return torch.cat([pairs, negatives[:, None]], dim=1)  # (A, 3)

    @gives("n-pairs")
    def npair_sampling(self, batch: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        """Picks one anchor and one positive per class that has two images; negatives are the other classes' positives.

        Sohn, NIPS 2016.
        """
        groups = ClassGroups(labels)
        starts = np.unique(groups.first[groups.anchors])  # (C,) where each of these classes begins in `order`
        sizes = groups.size[groups.order[starts]]  # (C,)
        anchors = groups.order[starts + _uniform_below(sizes)]  # (C,)
        positives = groups.random_positives(anchors)  # (C,)
        num_classes = len(anchors)
        if num_classes < 2:
            raise UserError(
                "npair needs two classes with two images each in a batch: raise --samples_per_class or --bs"
            )
        others = (np.arange(num_classes)[:, None] + np.arange(1, num_classes)) % num_classes  # (C, C - 1)
        tuples = np.concatenate([anchors[:, None], positives[:, None], positives[others]], axis=1)
        return upload(tuples, batch.device)  # (C, 1 + 1 + (C - 1))

    @staticmethod
    def _anchors_and_distances(
        batch: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pairs every anchor with a uniform positive.

        Returns:
            `(A, 2)` anchors and positives; `(A, B)` Euclidean distances of the anchors to all; `(A, B)` bool, which
            images are of the anchor's class, itself included.
        """
        groups = ClassGroups(labels)
        positives = groups.random_positives(groups.anchors)
        pairs = upload(np.stack([groups.anchors, positives], axis=1), batch.device)  # (A, 2)
        anchors = pairs[:, 0]
        distances = torch.cdist(batch.index_select(0, anchors), batch)  # (A, B)
        labels = upload(labels, batch.device)
        return pairs, distances, labels.index_select(0, anchors)[:, None] == labels


class Criterion(nn.Module):
    """A loss, and what it needs of the network and the batch.

    A subclass takes constructor keywords from the flags of the same names, and, where it asks for them, `sampler`,
    `num_classes` and `embed_dim`. Parameters of its own learn with the learning rate `self.lr`.

    Attributes:
        normalize: whether the network L2-normalizes the embeddings.
        samples_per_class: images per class in a batch, unless the user gives another number.
        sampling: the sampling method, unless the user gives another one; None for a loss without tuples.
        tuple_kind: the kind of tuples that it takes, see `gives`.
        sampler: gives the tuples; a loss without tuples has none.
        active: `(T,)` bool, which of the last tuples violate what the loss asks for; None where the loss doesn't say.
    """

    normalize = True
    samples_per_class = 4
    sampling: str | None = "distance"
    tuple_kind = "triplets"
    sampler: Sampler
    active: torch.Tensor | None = None

    def own_statistics(self) -> dict[str, torch.Tensor]:
        """Statistics that only this loss has, for the records: scalars on its device."""
        return {}


@torch.no_grad()
def statistics(criterion: nn.Module, batch: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Computes statistics of a loss's last forward pass, for the records.

    Args:
        criterion: any loss; a `Sampler` among its attributes adds statistics of its tuples.
        batch: `(B, D)` the embeddings of that pass.
        labels: `(B,)` int64.

    Returns:
        Scalars on the batch's device.
    """
    values = {"Embedding Norm": torch.linalg.norm(batch, dim=1).mean()}
    for sampler in vars(criterion).values():
        if isinstance(sampler, Sampler):
            values |= sampler.statistics(batch, labels)
    if isinstance(criterion, Criterion):
        if criterion.active is not None:
            values["Violations"] = criterion.active.float().mean()
        values |= criterion.own_statistics()
    return values


class TripletLoss(Criterion):
    """mean max(0, d²(a, p) - d²(a, n) + margin). Schroff et al., FaceNet, CVPR 2015, equation 3.

    Args:
        sampler: gives triplets.
        margin: in the unit of d².
    """

    def __init__(self, sampler: Sampler, margin: float = 0.2):
        super().__init__()
        self.sampler = sampler
        self.margin = margin

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""
        triplets = self.sampler.give(batch, labels, margin=self.margin, squared=True)  # (T, 3)
        anchors, positives, negatives = (batch.index_select(0, column) for column in triplets.T)  # (T, D) each
        to_positive = (anchors - positives).square().sum(dim=1)  # (T,)
        to_negative = (anchors - negatives).square().sum(dim=1)  # (T,)
        terms = F.relu(to_positive - to_negative + self.margin)  # (T,)
        self.active = terms.detach() > 0
        return terms.mean()


class MarginLoss(Criterion):
    """Pulls positive pairs nearer than β - α, pushes negative pairs farther than β + α.

    The sum of the hinge terms and of ν β over the anchors is divided by the number of terms above zero. Wu et al.,
    Sampling Matters, ICCV 2017, equations 4 and 5.

    Args:
        sampler: gives triplets.
        num_classes: number of training classes, each of which has its own β.
        margin: α.
        beta: initial value of β.
        beta_lr: learning rate of β.
        beta_constant: one β for all classes, which is not learned.
        nu: ν.
    """

    def __init__(
        self,
        sampler: Sampler,
        num_classes: int,
        margin: float = 0.2,
        beta: float = 1.2,
        beta_lr: float = 5e-4,
        beta_constant: bool = False,
        nu: float = 0.0,
    ):
        super().__init__()
        self.sampler = sampler
        self.margin = margin
        self.nu = nu
        self.lr = beta_lr
        self.beta_constant = beta_constant
        self.beta = nn.Parameter(
            torch.full((1 if beta_constant else num_classes,), beta), requires_grad=not beta_constant
        )

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""
        triplets = self.sampler.give(batch, labels, margin=self.margin)  # (T, 3)
        anchors, positives, negatives = (batch.index_select(0, column) for column in triplets.T)  # (T, D) each
        # linalg.norm has gradient 0 where two embeddings are the same
        to_positive = torch.linalg.norm(anchors - positives, dim=1)  # (T,)
        to_negative = torch.linalg.norm(anchors - negatives, dim=1)  # (T,)
        if self.beta_constant:
            beta = self.beta.expand(len(triplets))  # (T,)
        else:
            beta = self.beta.index_select(0, upload(labels, batch.device).index_select(0, triplets[:, 0]))  # (T,)
        positive_terms = F.relu(to_positive - beta + self.margin)  # (T,)
        negative_terms = F.relu(beta - to_negative + self.margin)  # (T,)
        self.active = (positive_terms + negative_terms).detach() > 0
        num_active_terms = (positive_terms > 0).sum() + (negative_terms > 0).sum()
        total = positive_terms.sum() + negative_terms.sum()
        if self.nu:
            total = total + self.nu * beta.sum()
        return total / num_active_terms.clamp(min=1)

    def own_statistics(self) -> dict[str, torch.Tensor]:
        """Gives the mean β."""
        return {"Mean Beta": self.beta.mean()}


class NPairLoss(Criterion):
    """mean log(1 + Σ exp(a·n - a·p)) + l2npair · mean(‖a‖² + ‖p‖²). Sohn, NIPS 2016, equations 5 and 6.

    Args:
        sampler: gives n-pairs.
        l2npair: weight of the squared norms.
    """

    normalize = False
    sampling = "npair"
    tuple_kind = "n-pairs"

    def __init__(self, sampler: Sampler, l2npair: float = 0.02):
        super().__init__()
        self.sampler = sampler
        self.l2npair = l2npair

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""
        tuples = self.sampler.give(batch, labels)  # (T, 1 + 1 + (C - 1))
        pairs = batch.index_select(0, tuples[:, :2].flatten())  # (2 T, D), anchors and positives in turn
        products = (pairs[::2] @ batch.T).gather(1, tuples[:, 1:])  # (T, 1 + (C - 1)), the positive first
        self.active = (products[:, 1:].amax(dim=1) - products[:, 0]).detach() > 0
        norms = pairs.square().sum() / len(tuples)
        return F.cross_entropy(products, tuples.new_zeros(len(tuples))) + self.l2npair * norms


class ProxyNCA(Criterion):
    """mean d²(x, p_y) + log Σ_{z≠y} exp(-d²(x, p_z)). Movshovitz-Attias et al., ICCV 2017, equation 6.

    Embeddings and proxies are scaled to length 3.

    Args:
        num_classes: number of training classes, each of which has a proxy.
        embed_dim: dimension D of embeddings and proxies.
        proxy_lr: learning rate of the proxies.
    """

    samples_per_class = 1
    sampling = None
    length = 3.0

    def __init__(self, num_classes: int, embed_dim: int, proxy_lr: float = 1e-5):
        super().__init__()
        self.lr = proxy_lr
        self.proxies = nn.Parameter(torch.randn(num_classes, embed_dim) / 8)

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""
        labels = upload(labels, batch.device)
        # between vectors of length 3, d² = 18 - 18 cos, and the 18 cancel
        points = 2 * self.length**2 * F.normalize(batch, dim=1)  # (B, D)
        proxies = F.normalize(self.proxies, dim=1)  # (C, D)
        own = (points * proxies.index_select(0, labels)).sum(dim=1)  # (B,)
        # in place, because with many proxies a copy takes long
        others = (points @ proxies.T).scatter_(1, labels[:, None], -torch.inf)  # (B, C)
        return (others.logsumexp(dim=1) - own).mean()

    def own_statistics(self) -> dict[str, torch.Tensor]:
        """Gives the mean length of the proxies before they are scaled."""
        return {"Proxy Norm": torch.linalg.norm(self.proxies, dim=1).mean()}


class CrossEntropy(Criterion):
    """Cross entropy of a linear classifier of the embeddings.

    Args:
        num_classes: number of training classes C.
        embed_dim: dimension D of the embeddings.
        lr: learning rate of the classifier.
    """

    normalize = False
    samples_per_class = 1
    sampling = None

    def __init__(self, num_classes: int, embed_dim: int, lr: float = 1e-5):
        super().__init__()
        self.lr = lr
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""
        logits = self.classifier(batch)  # (B, C)
        return F.cross_entropy(logits, upload(labels, batch.device))


# A row is a loss's class, or a function that builds the loss; see `loss_select` for what they may ask for.
LOSSES: dict[str, Callable[..., Any]] = {
    "marginloss": MarginLoss,
    "triplet": TripletLoss,
    "npair": NPairLoss,
    "proxynca": ProxyNCA,
    "crossentropy": CrossEntropy,
}


class Needs(NamedTuple):
    """What a loss needs of the network and the batch: the attributes of `Criterion` of the same names."""

    normalize: bool
    samples_per_class: int
    sampling: str | None
    tuple_kind: str


def needs_of(loss: str) -> Needs:
    """What a loss needs: the attributes of its row in `LOSSES`, and those of `Criterion` where the row has none."""
    return Needs(*(getattr(LOSSES[loss], name, getattr(Criterion, name)) for name in Needs._fields))


def choose_sampling(loss: str, sampling: str | None) -> str | None:
    """Chooses the sampling method: the user's where the loss can use it, else the loss's own.

    Raises:
        UserError: the loss can't use the user's method.
    """
    needs = needs_of(loss)
    if sampling is None or sampling == needs.sampling:
        return needs.sampling
    if needs.sampling is None:
        raise UserError(f"--loss {loss} uses no tuples: drop --sampling {sampling}")
    given = getattr(Sampler().methods[sampling], "tuple_kind", Criterion.tuple_kind)
    if given != needs.tuple_kind:
        raise UserError(
            f"--loss {loss} takes {needs.tuple_kind}, but --sampling {sampling} gives {given}: use --sampling "
            f"{needs.sampling}"
        )
    return sampling


def loss_select(
    loss: str, opt: argparse.Namespace, to_optim: Sequence[dict[str, Any]], num_classes: int
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Builds a loss from the resolved flags.

    The loss's row, a class or a function, gets those of these keywords that it asks for: every flag by its name,
    `sampler` (or `sampling_method`), `num_classes` (or `n_classes`), `opt`, and `to_optim`, to which it may append
    parameter groups. It returns the loss, or the loss and the groups.

    Args:
        loss: a key of `LOSSES`.
        opt: the resolved flags.
        to_optim: the optimizer's parameter groups so far.
        num_classes: number of training classes.

    Returns:
        The loss; and the groups, with those that the row appended, or else with one for the loss's own parameters, if
        it has any, whose learning rate is the loss's `lr` or that of the flags. They are named after the loss, and
        have no weight decay unless the row says otherwise.
    """
    groups = list(to_optim)
    values = {**vars(opt), "opt": opt, "to_optim": groups, "num_classes": num_classes, "n_classes": num_classes}
    if opt.sampling:
        sampler = Sampler(opt.sampling, lower_cutoff=opt.lower_cutoff, upper_cutoff=opt.upper_cutoff)
        values |= {"sampler": sampler, "sampling_method": sampler}
    build = LOSSES[loss]
    built = build(**{name: values[name] for name in inspect.signature(build).parameters if name in values})
    criterion, groups = built if isinstance(built, tuple) else (built, groups)
    before, appended = groups[: len(to_optim)], groups[len(to_optim) :]
    trainable = [parameter for parameter in criterion.parameters() if parameter.requires_grad]
    if trainable and not appended:
        appended = [{"params": trainable, "lr": getattr(criterion, "lr", opt.lr)}]
    names = [loss, *(f"{loss} {position}" for position in range(2, len(appended) + 1))]
    defaults = {"lr": opt.lr, "weight_decay": 0.0}
    return criterion, [*before, *({"name": name, **defaults, **group} for name, group in zip(names, appended))]

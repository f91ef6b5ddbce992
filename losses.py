"""Which tuples a batch gives (`Sampler`), the losses (`LOSSES`), and `loss_select`.

Whatever depends on the labels alone is decided on the host, before anything is asked of the device: no sampler and no
loss makes the host wait.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from auxiliaries import UserError, nearest_name, number, upload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags; a loss gets those that its constructor has keywords of the same name for."""
    group = parser.add_argument_group("loss and sampling")
    group.add_argument("--loss", default="marginloss", choices=LOSSES, help="what is minimised")
    group.add_argument(
        "--sampling",
        choices=Sampler().methods,
        help="how tuples are picked in a batch (default: distance; npair for npair; none for losses without tuples)",
    )
    group.add_argument(
        "--margin",
        type=number(float, 0),
        default=0.2,
        help="margin of triplet and marginloss, and of semihard sampling",
    )
    group.add_argument("--beta", type=number(float, 0), default=1.2, help="marginloss: the boundary β at the start")
    group.add_argument("--beta_lr", type=number(float, 0), default=5e-4, help="marginloss: learning rate of the β")
    group.add_argument(
        "--beta_constant",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="marginloss: one β for all classes, not learned",
    )
    group.add_argument("--nu", type=number(float, 0), default=0.0, help="marginloss: weight ν of the sum of β")
    group.add_argument("--proxy_lr", type=number(float, 0), default=1e-5, help="proxynca: learning rate of the proxies")
    group.add_argument("--l2npair", type=number(float, 0), default=0.02, help="npair: weight of the embeddings' norms")
    group.add_argument(
        "--lower_cutoff",
        type=number(float, 0, exclusive=True),
        default=0.5,
        help="distance sampling: nearer negatives count as this near",
    )
    group.add_argument(
        "--upper_cutoff",
        type=number(float, 0, exclusive=True),
        help="distance sampling: no negatives beyond this distance, 1.4 in the paper (default: no limit)",
    )


class ClassGroups:
    """Where the classes of a batch are, known on the host.

    Attributes:
        labels: `(B,)` int64.
        order: `(B,)` batch positions sorted by class.
        first, size: `(B,)` for each batch position, where its class begins in `order` and how many it has.
        anchors: positions with a positive and a negative in the batch, in order.
    """

    def __init__(self, labels: torch.Tensor):
        self.labels = labels.cpu().numpy()
        self.order = np.argsort(self.labels, kind="stable")
        in_order = self.labels[self.order]
        starts = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))
        counts = np.diff(np.append(starts, len(in_order)))
        self.first, self.size = np.empty_like(self.order), np.empty_like(self.order)
        self.first[self.order], self.size[self.order] = np.repeat(starts, counts), np.repeat(counts, counts)
        self.anchors = np.flatnonzero((self.size > 1) & (self.size < len(self.labels)))
        if len(self.anchors) == 0:
            raise UserError(
                f"a batch of {len(self.labels)} images from {len(counts)} class(es) gives no tuples: it needs two "
                "classes, and two images of one of them, so raise --samples_per_class or --bs"
            )

    def random_positives(self, anchors: np.ndarray) -> np.ndarray:
        """For each anchor a uniform other member of its class."""
        rank = np.empty_like(self.order)
        rank[self.order] = np.arange(len(self.order))  # where each position stands in `order`
        step = 1 + _uniform_below(self.size[anchors] - 1)
        within = (rank[anchors] - self.first[anchors] + step) % self.size[anchors]
        return self.order[self.first[anchors] + within]

    def random_negatives(self, anchors: np.ndarray) -> np.ndarray:
        """For each anchor a uniform member of another class."""
        others = _uniform_below(len(self.order) - self.size[anchors])
        return self.order[others + self.size[anchors] * (others >= self.first[anchors])]


def _uniform_below(bounds: np.ndarray) -> np.ndarray:
    """Uniform integers 0 … bound - 1, from NumPy's global generator."""
    return (np.random.random_sample(bounds.shape) * bounds).astype(np.int64)


def _draw_columns(allowed: torch.Tensor, preferred: torch.Tensor) -> torch.Tensor:
    """For each row a uniform column `(A,)` among the preferred ones, or among the allowed where none is preferred.

    Both masks are `(A, B)`; what is preferred must be allowed.
    """
    return (torch.rand(allowed.shape, device=allowed.device) + allowed + preferred).argmax(dim=1)


class Sampler:
    """Picks tuples inside a batch.

    Args:
        method: a key of `self.methods`.
        params: keywords that every call of the method gets.
    """

    def __init__(self, method: str = "distance", **params: Any):
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
        self.tuples: torch.Tensor | None = None  # the last that were given

    @torch.no_grad()
    def give(self, batch: torch.Tensor, labels: torch.Tensor, **additional_parameters: Any) -> torch.Tensor:
        """Picks tuples of batch positions.

        Args:
            batch: `(B, D)` embeddings, on any device.
            labels: `(B,)` int64; on the host, or the host waits for them.
            additional_parameters: further keywords for the method; they take precedence over the constructor's.

        Returns:
            `(T, 3)` int64 on the batch's device, (anchor, positive, negative); `npair`: `(T, 1 + 1 + (C - 1))`.

        Raises:
            UserError: no tuple can be formed: one class only, or no class with two images.
        """
        tuples = self.methods[self.method](batch, labels, **{**self.params, **additional_parameters})
        if not isinstance(tuples, torch.Tensor):
            tuples = torch.from_numpy(np.asarray(tuples, dtype=np.int64))
        if tuples.ndim != 2 or len(tuples) == 0:
            raise UserError(f"--sampling {self.method} gave no tuples for a batch: raise --samples_per_class or --bs")
        self.tuples = upload(tuples, batch.device)
        return self.tuples

    def statistics(self, batch: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the last tuples, of this batch, are like; scalars on its device.

        A hard positive is farther from the anchor than the nearest negative in the batch, a hard negative is nearer
        than the farthest positive: shares of all that the tuples hold.
        """
        if self.tuples is None:
            return {}
        labels = upload(labels, batch.device)
        anchors = self.tuples[:, 0]
        distances = torch.cdist(batch, batch).index_select(0, anchors)  # (T, B)
        same = labels.index_select(0, anchors)[:, None] == labels
        farthest_positive = distances.masked_fill(~same, -torch.inf).amax(dim=1, keepdim=True)
        nearest_negative = distances.masked_fill(same, torch.inf).amin(dim=1, keepdim=True)
        to_positive, to_negative = distances.gather(1, self.tuples[:, 1:2]), distances.gather(1, self.tuples[:, 2:])
        return {
            "Tuples": batch.new_full((), len(self.tuples)),
            "Hard Positives": (to_positive > nearest_negative).float().mean(),
            "Hard Negatives": (to_negative < farthest_positive).float().mean(),
            "d(a, p)": to_positive.mean(),
            "d(a, n)": to_negative.mean(),
        }

    def random_sampling(self, batch: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        """B triplets, uniformly and with replacement from all valid ones."""
        groups = ClassGroups(labels)
        triplets_of = (groups.size - 1) * (len(labels) - groups.size)
        chosen = _uniform_below(np.full(len(labels), triplets_of.sum()))
        anchors = np.searchsorted(np.cumsum(triplets_of), chosen, side="right")
        tuples = np.stack([anchors, groups.random_positives(anchors), groups.random_negatives(anchors)], axis=1)
        return upload(tuples, batch.device)

    def semihard_sampling(
        self, batch: torch.Tensor, labels: torch.Tensor, margin: float = 0.2, squared: bool = False, **_: Any
    ) -> torch.Tensor:
        """Per anchor a uniform positive p and a uniform negative n with d(a, p) < d(a, n) < d(a, p) + margin.

        Where there is no such negative, a uniform one. Schroff et al., FaceNet, CVPR 2015.

        Args:
            margin: in the unit of d.
            squared: whether d is the squared Euclidean distance.
        """
        pairs, distances, same = self._anchors_and_distances(batch, labels)
        if squared:
            distances = distances.square()
        to_positive = distances.gather(1, pairs[:, 1:])
        semihard = (distances > to_positive) & (distances < to_positive + margin) & ~same
        negatives = _draw_columns(~same, semihard)
        return torch.cat([pairs, negatives[:, None]], dim=1)

    def softhard_sampling(self, batch: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        """Per anchor a uniform negative nearer than the farthest positive and a uniform positive farther than the
        nearest negative; where there is none, a uniform one."""
        pairs, distances, same = self._anchors_and_distances(batch, labels)
        positive = same.scatter(1, pairs[:, :1], False)
        farthest_positive = distances.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
        nearest_negative = distances.masked_fill(same, torch.inf).amin(dim=1, keepdim=True)
        negatives = _draw_columns(~same, ~same & (distances < farthest_positive))
        positives = _draw_columns(positive, positive & (distances > nearest_negative))
        return torch.stack([pairs[:, 0], positives, negatives], dim=1)

    def distance_sampling(
        self,
        batch: torch.Tensor,
        labels: torch.Tensor,
        lower_cutoff: float = 0.5,
        upper_cutoff: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Per anchor a uniform positive and a negative with probability proportional to 1 / q(d).

        q(d) is the density of the distance between two uniform points of the unit sphere in D dimensions:
        log q(d) = (D - 2) log d + (D - 3) / 2 log(1 - d² / 4). Wu et al., Sampling Matters, ICCV 2017, section 4.1.

        Args:
            lower_cutoff: distances below it count as equal to it.
            upper_cutoff: negatives beyond it are picked only where all are, and then uniformly.
        """
        pairs, distances, same = self._anchors_and_distances(batch, labels)
        dim = batch.shape[1]
        d = distances.clamp(lower_cutoff, torch.finfo(distances.dtype).max)
        inside = (1 - d.square() / 4).clamp(min=1e-8)
        log_weights = -(dim - 2) * d.log() - (dim - 3) / 2 * inside.log()
        if upper_cutoff is not None:
            reached = (distances <= upper_cutoff) & ~same
            weighted = log_weights.masked_fill(~reached, -torch.inf)
            log_weights = torch.where(reached.any(dim=1, keepdim=True), weighted, 0.0)
        # The column with the largest log weight + Gumbel noise is a draw from the weights (torch.multinomial would
        # make the host wait); -log of exponential noise is Gumbel noise.
        noise = torch.empty_like(log_weights).exponential_().log_()
        negatives = (log_weights - noise).masked_fill_(same, -torch.inf).argmax(dim=1)
        return torch.cat([pairs, negatives[:, None]], dim=1)

    def npair_sampling(self, batch: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        """Per class with two images or more one anchor and one positive; negatives are the other classes' positives.

        Sohn, NIPS 2016.
        """
        groups = ClassGroups(labels)
        starts = np.unique(groups.first[groups.anchors])  # where each such class begins in `order`
        sizes = groups.size[groups.order[starts]]
        anchors = groups.order[starts + _uniform_below(sizes)]
        positives = groups.random_positives(anchors)
        count = len(anchors)
        if count < 2:
            raise UserError(
                "npair needs two classes with two images each in a batch: raise --samples_per_class or --bs"
            )
        others = (np.arange(count)[:, None] + np.arange(1, count)) % count
        return upload(np.concatenate([anchors[:, None], positives[:, None], positives[others]], axis=1), batch.device)

    @staticmethod
    def _anchors_and_distances(
        batch: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All anchors with a uniform positive each.

        Returns:
            `(A, 2)` anchor and positive positions; `(A, B)` Euclidean distances of the anchors to all; `(A, B)` bool,
            which are of the anchor's class, itself included.
        """
        groups = ClassGroups(labels)
        pairs = np.stack([groups.anchors, groups.random_positives(groups.anchors)], axis=1)
        pairs_on_device = upload(pairs, batch.device)
        anchors = pairs_on_device[:, 0]
        distances = torch.cdist(batch.index_select(0, anchors), batch)
        labels = upload(labels, batch.device)
        return pairs_on_device, distances, labels.index_select(0, anchors)[:, None] == labels


class Criterion(nn.Module):
    """A loss and what it needs of the network and the batch.

    A subclass takes constructor keywords from the flags of the same names, and, where it asks for them, `sampler`,
    `num_classes` and `embed_dim`. Parameters of its own are trained with learning rate `self.lr`.

    Attributes:
        normalize: whether the embeddings are to be L2-normalised.
        samples_per_class: images of each class in a batch, unless the user says otherwise.
        sampling: the sampling method unless the user says otherwise; None for a loss without tuples.
        sampler: what gives the tuples; losses without tuples have none.
        violations: `(T,)` of the last tuples, above zero where one violates what the loss asks for; None where the loss
            doesn't say.
    """

    normalize = True
    samples_per_class = 4
    sampling: str | None = "distance"
    sampler: Sampler
    violations: torch.Tensor | None = None

    def statistics(self, batch: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What can be said of the last forward pass, which had this batch; scalars on its device, for the records."""
        values = {"Embedding Norm": torch.linalg.norm(batch, dim=1).mean()}
        if hasattr(self, "sampler"):
            values |= self.sampler.statistics(batch, labels)
        if self.violations is not None:
            values["Violations"] = (self.violations > 0).float().mean()
        return values


class TripletLoss(Criterion):
    """mean max(0, d²(a, p) - d²(a, n) + margin). Schroff et al., FaceNet, CVPR 2015, equation 3."""

    def __init__(self, sampler: Sampler, margin: float = 0.2):
        super().__init__()
        self.sampler = sampler
        self.margin = margin

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Embeddings `(B, D)` and labels `(B,)` to a scalar."""
        triplets = self.sampler.give(batch, labels, margin=self.margin, squared=True)
        anchors, positives, negatives = (batch.index_select(0, column) for column in triplets.T)
        to_positive = (anchors - positives).square().sum(dim=1)
        to_negative = (anchors - negatives).square().sum(dim=1)
        terms = F.relu(to_positive - to_negative + self.margin)
        self.violations = terms.detach()
        return terms.mean()


class MarginLoss(Criterion):
    """Positive pairs nearer than β - α, negative pairs farther than β + α. Wu et al., ICCV 2017, equations 4 and 5.

    The sum of the hinge terms and of ν β over the anchors is divided by the number of terms above zero.

    Args:
        sampler: gives triplets.
        num_classes: number of β, one for each training class.
        margin: α.
        beta: β at the start.
        beta_lr: learning rate of the β.
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
        """Embeddings `(B, D)` and labels `(B,)` to a scalar."""
        triplets = self.sampler.give(batch, labels, margin=self.margin)
        anchors, positives, negatives = (batch.index_select(0, column) for column in triplets.T)
        # linalg.norm has gradient 0 where two embeddings are the same
        to_positive = torch.linalg.norm(anchors - positives, dim=1)
        to_negative = torch.linalg.norm(anchors - negatives, dim=1)
        if self.beta_constant:
            beta = self.beta.expand(len(triplets))
        else:
            beta = self.beta.index_select(0, upload(labels, batch.device).index_select(0, triplets[:, 0]))
        positive_terms = F.relu(to_positive - beta + self.margin)
        negative_terms = F.relu(beta - to_negative + self.margin)
        self.violations = (positive_terms + negative_terms).detach()
        count = (positive_terms > 0).sum() + (negative_terms > 0).sum()
        total = positive_terms.sum() + negative_terms.sum()
        if self.nu:
            total = total + self.nu * beta.sum()
        return total / count.clamp(min=1)

    def statistics(self, batch: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """As of every loss, and the mean β."""
        return {**super().statistics(batch, labels), "Mean Beta": self.beta.detach().mean()}


class NPairLoss(Criterion):
    """mean log(1 + Σ exp(a·n - a·p)) + l2npair · mean(‖a‖² + ‖p‖²). Sohn, NIPS 2016, equations 5 and 6."""

    normalize = False
    sampling = "npair"

    def __init__(self, sampler: Sampler, l2npair: float = 0.02):
        super().__init__()
        self.sampler = sampler
        self.l2npair = l2npair

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Embeddings `(B, D)` and labels `(B,)` to a scalar."""
        tuples = self.sampler.give(batch, labels)
        pairs = batch.index_select(0, tuples[:, :2].flatten())  # (2 T, D), anchors and positives in turn
        products = (pairs[::2] @ batch.T).gather(1, tuples[:, 1:])  # (T, 1 + (C - 1)), the positive first
        self.violations = (products[:, 1:].amax(dim=1) - products[:, 0]).detach()
        norms = pairs.square().sum() / len(tuples)
        return F.cross_entropy(products, tuples.new_zeros(len(tuples))) + self.l2npair * norms


class ProxyNCA(Criterion):
    """mean d²(x, p_y) + log Σ_{z≠y} exp(-d²(x, p_z)). Movshovitz-Attias et al., ICCV 2017, equation 6.

    Embeddings and proxies are scaled to length 3.

    Args:
        num_classes: number of proxies.
        embed_dim: their dimension D.
        proxy_lr: their learning rate.
    """

    samples_per_class = 1
    sampling = None
    length = 3.0

    def __init__(self, num_classes: int, embed_dim: int, proxy_lr: float = 1e-5):
        super().__init__()
        self.lr = proxy_lr
        self.proxies = nn.Parameter(torch.randn(num_classes, embed_dim) / 8)

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Embeddings `(B, D)` and labels `(B,)` to a scalar."""
        labels = upload(labels, batch.device)
        # between vectors of length 3, d² = 18 - 18 cos, and the 18 cancel
        points, proxies = 2 * self.length**2 * F.normalize(batch, dim=1), F.normalize(self.proxies, dim=1)
        own = (points * proxies.index_select(0, labels)).sum(dim=1)
        # in place: with many proxies, a copy takes long
        others = (points @ proxies.T).scatter_(1, labels[:, None], -torch.inf)
        return (others.logsumexp(dim=1) - own).mean()

    def statistics(self, batch: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """As of every loss, and the mean length of the proxies before they are scaled."""
        norms = torch.linalg.norm(self.proxies.detach(), dim=1)
        return {**super().statistics(batch, labels), "Proxy Norm": norms.mean()}


class CrossEntropy(Criterion):
    """Cross entropy of a linear classifier on the embedding.

    Args:
        num_classes: number of training classes.
        embed_dim: dimension D of the embeddings.
        lr: the classifier's learning rate.
    """

    normalize = False
    samples_per_class = 1
    sampling = None

    def __init__(self, num_classes: int, embed_dim: int, lr: float = 1e-5):
        super().__init__()
        self.lr = lr
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Embeddings `(B, D)` and labels `(B,)` to a scalar."""
        return F.cross_entropy(self.classifier(batch), upload(labels, batch.device))


LOSSES: dict[str, type[Criterion]] = {
    "marginloss": MarginLoss,
    "triplet": TripletLoss,
    "npair": NPairLoss,
    "proxynca": ProxyNCA,
    "crossentropy": CrossEntropy,
}


def choose_sampling(loss: str, sampling: str | None) -> str | None:
    """The sampling method: the user's where the loss can use it, else the loss's own.

    Raises:
        UserError: the loss can't use the method.
    """
    own = LOSSES[loss].sampling
    if sampling is None or sampling == own:
        return own
    if own is None:
        raise UserError(f"--loss {loss} compares with its own parameters and uses no tuples: leave --sampling out")
    if "npair" in (own, sampling):
        raise UserError(f"--loss {loss} can't use the tuples of --sampling {sampling}: use --sampling {own}")
    return sampling


def loss_select(
    loss: str, opt: argparse.Namespace, to_optim: Sequence[dict[str, Any]], num_classes: int
) -> tuple[Criterion, list[dict[str, Any]]]:
    """Builds a loss from the resolved flags.

    Args:
        loss: a key of `LOSSES`.
        opt: the resolved flags.
        to_optim: the optimiser's parameter groups so far.
        num_classes: number of training classes.

    Returns:
        The loss, and the groups with one for its own parameters, if it has any: without weight decay.
    """
    values = {**vars(opt), "num_classes": num_classes}
    if opt.sampling:
        values["sampler"] = Sampler(opt.sampling, lower_cutoff=opt.lower_cutoff, upper_cutoff=opt.upper_cutoff)
    keywords = inspect.signature(LOSSES[loss]).parameters
    criterion = LOSSES[loss](**{name: values[name] for name in keywords})
    own = [parameter for parameter in criterion.parameters() if parameter.requires_grad]
    groups = [{"name": loss, "params": own, "lr": criterion.lr, "weight_decay": 0.0}] if own else []
    return criterion, [*to_optim, *groups]

"""Sampling of tuples inside a batch (`Sampler`), losses (`LOSSES`), and `loss_select`.

Whatever depends on the labels alone is decided on the host, before anything is asked of the device: no sampler and no
loss of this module makes the host wait. Losses, miners, distances, reducers and regularizers of pytorch-metric-learning
are known by their class names; those may make it wait. `python losses.py` prints a table of all losses.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from auxiliaries import (
    FlagParser,
    UserError,
    check_memory,
    check_params,
    nearest_name,
    number,
    parse_value,
    reason,
    seeded,
    shown,
    upload,
)

Method = TypeVar("Method", bound=Callable[..., Any])
Indices = tuple[torch.Tensor, ...]  # (anchors, positives, negatives), or (anchors, positives, anchors, negatives)
ELEMENTS_AT_ONCE = 1 << 22  # of the largest tensors of losses and samplers that work on pairs against the whole batch


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of losses and sampling; a loss gets those that its constructor has keywords for."""
    # fmt: off
    add = parser.add_argument_group("loss and sampling").add_argument
    add("--loss", action="names", type=_known_loss, default="marginloss", metavar="NAME", fixed=True,
        help=f"loss that is minimized, or several, whose weighted sum is: {', '.join(LOSSES)}; or a class of "
        f"pytorch-metric-learning: {', '.join(LIBRARY_LOSSES)}")
    add("--loss_params", action="params", default={},
        help="parameters of --loss by the names of its constructor, with several losses as LOSS.key=value; lr is the "
        "learning rate of a library loss's own parameters")
    add("--loss_weights", nargs="+", type=number(float, 0), metavar="WEIGHT",
        help="a weight for each --loss (default: 1 each)")
    add("--sampling", action="names", type=_known_sampling, metavar="NAME",
        help=f"how tuples are picked in a batch, or several ways, whose tuples are put together: "
        f"{', '.join(Sampler().methods)}; a class of pytorch-metric-learning: {', '.join(LIBRARY_MINERS)}; or none "
        "(default: distance; npair for npair; none for losses that take all pairs or no tuples)")
    add("--sampling_params", action="params", default={},
        help="parameters of --sampling by name, with several as NAME.key=value")
    add("--positives_per_anchor", choices=("1", "all"), default="1",
        help="distance, semihard and softhard sampling: one random positive for each anchor, or every one, each with "
        "a negative of its own")
    add("--rho", type=number(float, 0, below=1), default=0.0,
        help="distance sampling: probability that a triplet's positive becomes the anchor itself and its negative "
        "another image of the class, 0.2 in the paper; 0: off")
    add("--distance", type=_known_in("--distance", LIBRARY_DISTANCES), metavar="NAME",
        help=f"distance in losses and miners of pytorch-metric-learning: {', '.join(LIBRARY_DISTANCES)} (default: "
        "their own)")
    add("--distance_params", action="params", default={}, help="parameters of --distance")
    add("--reducer", type=_known_in("--reducer", LIBRARY_REDUCERS), metavar="NAME",
        help=f"how losses of pytorch-metric-learning become one number: {', '.join(LIBRARY_REDUCERS)} (default: their "
        "own)")
    add("--reducer_params", action="params", default={}, help="parameters of --reducer")
    add("--regularizer", type=_known_in("--regularizer", LIBRARY_REGULARIZERS), metavar="NAME",
        help="regularizer of the embeddings or of the loss's own weights, for losses of pytorch-metric-learning: "
        f"{', '.join(LIBRARY_REGULARIZERS)}; its weight: --loss_params embedding_reg_weight=… or weight_reg_weight=…")
    add("--regularizer_params", action="params", default={}, help="parameters of --regularizer")
    add("--memory_size", type=number(int, 0), default=0, fixed=True,
        help="cross-batch memory: number of past embeddings that each batch is also compared with, for tuple losses "
        "of pytorch-metric-learning; 0: none")
    add("--memory_start", type=number(int, 0), default=1000, needs="memory_size",
        help="iterations before the cross-batch memory is filled and used")
    add("--margin", type=number(float, 0), default=0.2, help="margin of triplet, marginloss, and semihard sampling")
    add("--beta", type=number(float, 0), default=1.2, help="marginloss: initial value of the boundary β")
    add("--beta_lr", type=number(float, 0), default=5e-4, help="marginloss: learning rate of β")
    add("--beta_constant", action="switch", fixed=True,
        help="marginloss: one β for all classes, which is not learned (default: one per class, learned)")
    add("--nu", type=number(float, 0), default=0.0, help="marginloss: weight ν of the sum of β")
    add("--proxy_lr", type=number(float, 0),
        help="learning rate of proxies and of class weights in losses of pytorch-metric-learning (default: 1e-5 for "
        "proxynca, 100 times --lr for all others)")
    add("--l2npair", type=number(float, 0), default=0.02, help="npair: weight of the squared norms of the embeddings")
    add("--lower_cutoff", type=number(float, 0, exclusive=True), default=0.5,
        help="distance sampling: smaller distances count as this one")
    add("--upper_cutoff", type=number(float, 0, exclusive=True),
        help="distance sampling: no negatives beyond this distance, 1.4 in the paper (default: no limit)")
    # fmt: on


def check_batch(
    batch: torch.Tensor, labels: torch.Tensor | np.ndarray | Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings `(B, D)` in float32 at least, and their labels `(B,)` as int64, on the devices where they are.

    Raises:
        UserError: the embeddings are not `(B, D)`, or the labels are not one integer for each.
    """
    if not isinstance(labels, torch.Tensor):
        try:
            array = np.asarray(labels)
            labels = torch.from_numpy(array.astype(np.int64, casting="same_kind" if array.size else "unsafe"))
        except (TypeError, ValueError):
            raise UserError("labels are integers, one for each embedding, but these are something else") from None
    if labels.dtype is not torch.int64:
        if labels.is_floating_point() or labels.is_complex():
            raise UserError(f"labels are integers, not {str(labels.dtype).removeprefix('torch.')}")
        labels = labels.long()
    if batch.ndim != 2 or labels.shape != batch.shape[:1]:
        shapes = f"embeddings {tuple(batch.shape)} and labels {tuple(labels.shape)}"
        raise UserError(f"a loss takes embeddings (B, D) and labels (B,), but got {shapes}")
    if batch.dtype is not torch.float32:
        batch = batch.to(torch.promote_types(batch.dtype, torch.float32))
    return batch, labels


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
        return self._members_after(anchors, 1 + _uniform_below(self.size[anchors] - 1))

    def all_positives(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs every anchor with every positive: ranks in `anchors`, and positives, `(P,)` each."""
        counts = self.size[self.anchors] - 1  # (A,)
        rows = np.repeat(np.arange(len(counts)), counts)  # (P,)
        steps = 1 + np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # (P,) 1 … count of the anchor
        return rows, self._members_after(self.anchors[rows], steps)

    def _members_after(self, positions: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """For each position `(A,)`, the member of its class that comes so many steps after it, in a circle, `(A,)`."""
        rank = np.empty_like(self.order)
        rank[self.order] = np.arange(len(self.order))  # (B,) where each position stands in `order`
        rank_in_class = (rank[positions] - self.first[positions] + steps) % self.size[positions]  # (A,)
        return self.order[self.first[positions] + rank_in_class]

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


def _draw_by_sums(sums: torch.Tensor) -> torch.Tensor:
    """Draws, for each row, a column with probability proportional to its weight.

    Args:
        sums: `(P, B)` cumulative sums of the weights, int32 or float64.

    Returns:
        `(P,)` columns; B where all weights are zero.
    """
    uniform = torch.rand((len(sums), 1), dtype=torch.float64, device=sums.device)  # (P, 1), below 1
    return torch.searchsorted(sums, (uniform * sums[:, -1:]).to(sums.dtype), right=True).squeeze(1)


def gives(tuple_kind: str) -> Callable[[Method], Method]:
    """Marks a sampling method with the kind of tuples that it gives; a method without a mark gives triplets."""

    def mark(method: Method) -> Method:
        method.tuple_kind = tuple_kind  # type: ignore[attr-defined]
        return method

    return mark


def names_of(one_or_more: str | Sequence[str]) -> list[str]:
    """The names of a flag that stores one name as text, and several as a list."""
    return [one_or_more] if isinstance(one_or_more, str) else list(one_or_more)


def _as_pairs(tuples: torch.Tensor | Indices) -> Indices:
    """Tuples of any kind as positive and negative pairs: (anchors, positives, anchors, negatives)."""
    if isinstance(tuples, torch.Tensor):
        anchors, num_negatives = tuples[:, 0], tuples.shape[1] - 2
        return anchors, tuples[:, 1], anchors.repeat_interleave(num_negatives), tuples[:, 2:].flatten()
    return tuples if len(tuples) == 4 else (tuples[0], tuples[1], tuples[0], tuples[2])


def _as_triplets(tuples: torch.Tensor | Indices) -> Indices:
    """Tuples as (anchors, positives, negatives); every positive pair goes with every negative pair of its anchor."""
    if isinstance(tuples, torch.Tensor) and tuples.shape[1] == 3:
        return tuple(tuples.T)
    if isinstance(tuples, tuple) and len(tuples) == 3:
        return tuples
    anchors, positives, other_anchors, negatives = _as_pairs(tuples)
    of_positive, of_negative = torch.where(anchors[:, None] == other_anchors)  # makes the host wait, as miners do
    return anchors[of_positive], positives[of_positive], negatives[of_negative]


class _InParts(torch.autograd.Function):
    """See `_in_parts`. Checkpoints would do, but what they keep of each part leaves holes in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        points: torch.Tensor,
        tuples: torch.Tensor,
        compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        size: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(points, tuples)
        ctx.compute, ctx.size = compute, size
        first = compute(points, tuples[:size])
        results = first.new_empty(len(tuples), *first.shape[1:])
        results[:size] = first
        for result, part in zip(results[size:].split(size), tuples[size:].split(size)):
            result.copy_(compute(points, part))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        points, tuples = ctx.saved_tensors
        points = points.detach().requires_grad_()
        parts = zip(tuples.split(ctx.size), gradients[0].split(ctx.size))
        for part, gradient in reversed(list(parts)):  # the order in which autograd itself would sum
            with torch.enable_grad():
                result = ctx.compute(points, part)
            result.backward(gradient)
        return points.grad, None, None, None


def _in_parts(
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], points: torch.Tensor, tuples: torch.Tensor
) -> torch.Tensor:
    """Calls a function with points and tuples, in parts where its intermediate results would be large.

    Args:
        compute: gives `(P, …)` for points and tuples `(P, m)`, each by itself; its intermediate results for a tuple are
            as wide as the points.
        points: `(B, W)`, which the gradient is of.
        tuples: `(T, m)`.

    Returns:
        `(T, …)`. Of several parts only these results are kept; all others are computed again on the way back.
    """
    size = max(1, ELEMENTS_AT_ONCE // points.shape[1])
    if len(tuples) <= size:
        return compute(points, tuples)
    return _InParts.apply(points, tuples, compute, size)


class Sampler:
    """Picks tuples inside a batch.

    Args:
        method: a key of `self.methods`, or the name of a miner of pytorch-metric-learning; several of them, whose
            tuples are put together; or a Sampler, whose method, miners and keywords are taken over.
        miners: the miners among them, with their parameters (default: with the library's).
        params: keywords that every call of an own method gets.

    Attributes:
        tuples: the tuples of the last pick: `(T, 3)`, n-pairs `(T, 1 + 1 + (C - 1))`, or, where a method gives pairs,
            their four columns (anchors, positives, anchors, negatives); None before the first.
    """

    method: str | list[str]
    miners: dict[str, nn.Module]
    params: dict[str, Any]
    tuples: torch.Tensor | Indices | None = None
    num_embeddings = 0  # of the batch that the last tuples were picked from

    def __init__(
        self,
        method: str | Sequence[str] | Sampler = "distance",
        miners: Mapping[str, nn.Module] | None = None,
        **params: Any,
    ):
        if isinstance(method, Sampler):
            params, miners, method = {**method.params, **params}, miners or method.miners, method.method
        self.methods: dict[str, Callable[..., Any]] = {
            "distance": self.distance_sampling,
            "semihard": self.semihard_sampling,
            "softhard": self.softhard_sampling,
            "random": self.random_sampling,
            "npair": self.npair_sampling,
        }
        self.method = method if isinstance(method, str) else list(method)
        self.miners = dict(miners or {})
        for name in names_of(self.method):
            if name in LIBRARY_MINERS and name not in self.miners:
                self.miners[name] = build_miner(name)
            elif name not in self.methods and name not in self.miners:
                near = nearest_name(name, [*self.methods, *LIBRARY_MINERS])
                raise UserError(f"--sampling {shown(name)} is unknown{near}")
        self.params = params
        if params.get("positives_per_anchor", "1") not in ("1", "all"):
            raise UserError(f"positives_per_anchor is 1 or all, not {params['positives_per_anchor']}")

    @torch.no_grad()
    def give(
        self, batch: torch.Tensor, labels: torch.Tensor | np.ndarray | Sequence[int], **additional_parameters: Any
    ) -> torch.Tensor:
        """Picks tuples of batch positions.

        Args:
            batch: `(B, D)` embeddings, on any device; distances are computed in float32 at least.
            labels: `(B,)` integers; the host waits for a tensor that is not on the host.
            additional_parameters: further keywords for own methods; they take precedence over the constructor's.

        Returns:
            `(T, 3)` int64 on the batch's device, (anchor, positive, negative); `npair`: `(T, 1 + 1 + (C - 1))`. A
            miner may find none.

        Raises:
            UserError: no tuple can be formed: there is only one class, or no class with two images; or the labels are
                not one integer for each embedding.
        """
        picked = self._pick(batch, labels, additional_parameters)
        only = picked[0] if len(picked) == 1 else None
        if isinstance(only, torch.Tensor):
            tuples = only
        else:
            tuples = torch.cat([torch.stack(_as_triplets(one), dim=1) for one in picked])
        self.tuples = tuples
        return tuples

    @torch.no_grad()
    def give_indices(self, batch: torch.Tensor, labels: torch.Tensor, **additional_parameters: Any) -> Indices:
        """Picks tuples as pytorch-metric-learning takes them.

        Returns:
            Positions (anchors, positives, negatives), or, where a method gives pairs or n-pairs, those of the positive
            and of the negative pairs (anchors, positives, anchors, negatives).
        """
        picked = self._pick(batch, labels, additional_parameters)
        are_triplets = all((one.shape[1] if isinstance(one, torch.Tensor) else len(one)) == 3 for one in picked)
        columns = [_as_triplets(one) if are_triplets else _as_pairs(one) for one in picked]
        indices = tuple(torch.cat(parts) for parts in zip(*columns))
        self.tuples = torch.stack(indices, dim=1) if are_triplets else indices
        return indices

    def _pick(self, batch: torch.Tensor, labels: Any, additional: Mapping[str, Any]) -> list[torch.Tensor | Indices]:
        """What each method gives: tuples, or a miner's columns."""
        batch, labels = check_batch(batch, labels)
        picked: list[Any] = []
        for name in names_of(self.method):
            if name in self.miners:
                picked.append(self.miners[name](batch, upload(labels, batch.device)))
                continue
            tuples = self.methods[name](batch, labels, **{**self.params, **additional})
            if not isinstance(tuples, torch.Tensor):
                tuples = torch.from_numpy(np.asarray(tuples, dtype=np.int64))
            if tuples.ndim != 2 or len(tuples) == 0:
                raise UserError(f"--sampling {name} gave no tuples for a batch: raise --samples_per_class or --bs")
            picked.append(upload(tuples, batch.device))
        self.num_embeddings = len(batch)
        return picked

    @torch.no_grad()
    def mine(self, batch: torch.Tensor, labels: torch.Tensor, others: torch.Tensor, other_labels: torch.Tensor) -> Any:
        """What the miners find between a batch and other embeddings; own methods know only the batch."""
        self.tuples = None
        found = [self.miners[name](batch, labels, others, other_labels) for name in names_of(self.method)]
        if any(len(one) == 4 for one in found):
            found = [_as_pairs(one) for one in found]
        return tuple(torch.cat(parts) for parts in zip(*found))

    def statistics(self, batch: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Computes statistics of the last tuples, for the records.

        A hard positive is farther from the anchor than the nearest negative in the batch, a hard negative is nearer
        than the farthest positive.

        Args:
            batch: `(B, D)` the embeddings that the tuples were picked from.
            labels: `(B,)` int64.

        Returns:
            Number of tuples (of pairs, where a method gives pairs), shares of hard positives and hard negatives, mean
            distances: scalars on the batch's device, NaN where a miner found none; and the miners' own. Nothing when no
            tuples were picked from a batch of B embeddings.
        """
        if self.tuples is None or self.num_embeddings != len(batch):
            return {}
        batch, labels = check_batch(batch, labels)
        labels = upload(labels, batch.device)
        distances = torch.cdist(batch, batch)  # (B, B)
        same = labels[:, None] == labels  # (B, B)
        farthest_positive = distances.masked_fill(~same, -torch.inf).amax(dim=1)  # (B,)
        nearest_negative = distances.masked_fill(same, torch.inf).amin(dim=1)  # (B,)
        anchors, positives, other_anchors, negatives = _as_pairs(self.tuples)
        flat = distances.flatten()
        to_positive = flat.index_select(0, anchors * len(batch) + positives)
        to_negative = flat.index_select(0, other_anchors * len(batch) + negatives)
        is_hard_positive = to_positive > nearest_negative.index_select(0, anchors)
        is_hard_negative = to_negative < farthest_positive.index_select(0, other_anchors)
        is_tensor = isinstance(self.tuples, torch.Tensor)
        values = {
            "Tuples": batch.new_full((), len(self.tuples) if is_tensor else len(anchors) + len(negatives)),
            "Hard Positives": is_hard_positive.float().mean(),
            "Hard Negatives": is_hard_negative.float().mean(),
            "d(a, p)": to_positive.mean(),
            "d(a, n)": to_negative.mean(),
        }
        return values | self.miners_statistics(batch, labels)

    def miners_statistics(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gives the library's statistics of the miners, which are run once more on what they were run on."""
        values: dict[str, torch.Tensor] = {}
        for name, miner in self.miners.items():
            values |= _library_statistics(name, miner, *inputs)
        return values

    def random_sampling(self, batch: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        """Picks B triplets, uniformly and with replacement from all valid ones."""
        groups = ClassGroups(labels)
        num_triplets = (groups.size - 1) * (len(labels) - groups.size)  # (B,) of each anchor
        chosen = _uniform_below(np.full(len(labels), num_triplets.sum()))  # (B,)
        anchors = np.searchsorted(np.cumsum(num_triplets), chosen, side="right")  # (B,)
        triplets = np.stack([anchors, groups.random_positives(anchors), groups.random_negatives(anchors)], axis=1)
        return upload(triplets, batch.device)  # (B, 3)

    def semihard_sampling(
        self,
        batch: torch.Tensor,
        labels: torch.Tensor,
        margin: float = 0.2,
        squared: bool = False,
        positives_per_anchor: str = "1",
        **_: Any,
    ) -> torch.Tensor:
        """Picks, per anchor, a uniform positive p and a uniform negative n with d(a, p) < d(a, n) < d(a, p) + margin.

        Where there is no such negative, any negative is picked. Schroff et al., FaceNet, CVPR 2015.

        Args:
            batch: `(B, D)` embeddings.
            labels: `(B,)` int64.
            margin: in the unit of d.
            squared: whether d is the squared Euclidean distance.
            positives_per_anchor: 1, or all: every positive, each with a negative of its own.
        """
        groups, pairs, distances, same = self._anchors_and_distances(batch, labels)
        if squared:
            distances = distances.square()  # (A, B)
        if positives_per_anchor == "1":
            to_positive = distances.gather(1, pairs[:, 1:])  # (A, 1)
            semihard = (distances > to_positive) & (distances < to_positive + margin) & ~same  # (A, B)
            negatives = _draw_columns(~same, semihard)  # (A,)
            return torch.cat([pairs, negatives[:, None]], dim=1)  # (A, 3)
        of_others = distances.masked_fill(same, -torch.inf)  # (A, B), the own class is nearer than any positive

        def draw(rows: torch.Tensor, positives: torch.Tensor, any_negatives: torch.Tensor) -> torch.Tensor:
            to_positive = distances.flatten().index_select(0, rows * len(batch) + positives)[:, None]  # (P, 1)
            some = of_others.index_select(0, rows)  # (P, B)
            num_semihard = ((some > to_positive) & (some < to_positive + margin)).cumsum(dim=1, dtype=torch.int32)
            return torch.where(num_semihard[:, -1] > 0, _draw_by_sums(num_semihard), any_negatives)  # (P,)

        return self._with_all_positives(groups, batch, draw)

    def softhard_sampling(
        self, batch: torch.Tensor, labels: torch.Tensor, positives_per_anchor: str = "1", **_: Any
    ) -> torch.Tensor:
        """Picks, per anchor, a uniform hard positive and a uniform hard negative.

        A hard positive is farther than the nearest negative, a hard negative nearer than the farthest positive. Where
        there is none, any positive, or negative, is picked. With all positives per anchor, every one is picked, hard
        or not, each with a hard negative of its own.
        """
        groups, pairs, distances, same = self._anchors_and_distances(batch, labels)
        positive = same.scatter(1, pairs[:, :1], False)  # (A, B), without the anchor itself
        farthest_positive = distances.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)  # (A, 1)
        hard_negative = ~same & (distances < farthest_positive)  # (A, B)
        if positives_per_anchor == "1":
            nearest_negative = distances.masked_fill(same, torch.inf).amin(dim=1, keepdim=True)  # (A, 1)
            negatives = _draw_columns(~same, hard_negative)  # (A,)
            positives = _draw_columns(positive, positive & (distances > nearest_negative))  # (A,)
            return torch.stack([pairs[:, 0], positives, negatives], dim=1)  # (A, 3)
        preferred = torch.where(hard_negative.any(dim=1, keepdim=True), hard_negative, ~same)  # (A, B)
        num_preferred = preferred.cumsum(dim=1, dtype=torch.int32)  # (A, B)
        return self._with_all_positives(
            groups, batch, lambda rows, *_: _draw_by_sums(num_preferred.index_select(0, rows))
        )

    def distance_sampling(
        self,
        batch: torch.Tensor,
        labels: torch.Tensor,
        lower_cutoff: float = 0.5,
        upper_cutoff: float | None = None,
        positives_per_anchor: str = "1",
        rho: float = 0.0,
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
            positives_per_anchor: 1, or all: every positive, each with a negative of its own.
            rho: probability that a triplet (a, p, n) becomes (a, a, p), which keeps classes from collapsing. Roth et
                al., Revisiting Training Strategies, ICML 2020, section 6.
        """
        groups, pairs, distances, same = self._anchors_and_distances(batch, labels)
        dim = batch.shape[1]
        d = distances.clamp(lower_cutoff, torch.finfo(distances.dtype).max)  # (A, B)
        inside = (1 - d.square() / 4).clamp(min=1e-8)  # (A, B)
        log_weights = -(dim - 2) * d.log() - (dim - 3) / 2 * inside.log()  # (A, B)
        if upper_cutoff is not None:
            reached = (distances <= upper_cutoff) & ~same  # (A, B)
            weighted = log_weights.masked_fill(~reached, -torch.inf)  # (A, B)
            log_weights = torch.where(reached.any(dim=1, keepdim=True), weighted, 0.0)  # (A, B)
        if positives_per_anchor == "1":
            # The column with the largest log weight + Gumbel noise is a draw from the weights (torch.multinomial would
            # make the host wait); -log of exponential noise is Gumbel noise.
            noise = torch.empty_like(log_weights).exponential_().log_()  # (A, B)
            negatives = (log_weights - noise).masked_fill_(same, -torch.inf).argmax(dim=1)  # (A,)
            triplets = torch.cat([pairs, negatives[:, None]], dim=1)  # (A, 3)
        else:
            weights = log_weights.masked_fill(same, -torch.inf).softmax(dim=1)  # (A, B)
            # embeddings that are not numbers give valid tuples, too
            sums = weights.nan_to_num_(1.0).masked_fill_(same, 0.0).cumsum(dim=1, dtype=torch.float64)  # (A, B)
            triplets = self._with_all_positives(
                groups, batch, lambda rows, *_: _draw_by_sums(sums.index_select(0, rows))
            )
        if rho:
            is_regularized = upload(np.random.random_sample((len(triplets), 1)) < rho, batch.device)  # (P, 1)
            anchors, positives, _ = triplets.T
            triplets = torch.where(is_regularized, torch.stack([anchors, anchors, positives], dim=1), triplets)
        return triplets

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
    ) -> tuple[ClassGroups, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pairs every anchor with a uniform positive.

        Returns:
            The classes; `(A, 2)` anchors and positives; `(A, B)` Euclidean distances of the anchors to all; `(A, B)`
            bool, which images are of the anchor's class, itself included.
        """
        groups = ClassGroups(labels)
        positives = groups.random_positives(groups.anchors)
        pairs = upload(np.stack([groups.anchors, positives], axis=1), batch.device)  # (A, 2)
        anchors = pairs[:, 0]
        distances = torch.cdist(batch.index_select(0, anchors), batch)  # (A, B)
        labels = upload(labels, batch.device)
        return groups, pairs, distances, labels.index_select(0, anchors)[:, None] == labels

    @staticmethod
    def _with_all_positives(
        groups: ClassGroups, batch: torch.Tensor, draw: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """Makes a triplet of every pair of an anchor and a positive.

        Args:
            groups: the classes.
            batch: `(B, D)` embeddings.
            draw: gives negatives `(P,)` for ranks in `groups.anchors`, positives, and uniform negatives, `(P,)` each.

        Returns:
            `(P, 3)` triplets.
        """
        rows, positives = groups.all_positives()  # (P,) each
        anchors = groups.anchors[rows]  # (P,)
        columns = upload(np.stack([anchors, positives, rows, groups.random_negatives(anchors)]), batch.device)  # (4, P)
        parts = columns.split(max(1, ELEMENTS_AT_ONCE // len(batch)), dim=1)
        negatives = torch.cat([draw(rows, positives, uniform) for _, positives, rows, uniform in parts])  # (P,)
        return torch.stack([columns[0], columns[1], negatives], dim=1)  # (P, 3)


class Criterion(nn.Module):
    """A loss, and what it needs of the network and the batch.

    A subclass takes constructor keywords from the flags of the same names, and, where it asks for them, `sampler`,
    `num_classes` and `embed_dim`. Parameters of its own learn with the learning rate `self.lr`.

    Attributes:
        kind: "tuple", "classification", "proxy" or "rank".
        paper: where it was published.
        normalize: whether the network L2-normalizes the embeddings.
        samples_per_class: images per class in a batch, unless the user gives another number.
        sampling: the sampling method, unless the user gives another one; None for a loss that takes no tuples, or all
            pairs.
        tuple_kind: the kind of tuples that it takes, see `gives`; "pairs" are tuples of any kind, or all pairs.
        sampler: gives the tuples; a loss without tuples has none.
        active: `(T,)` bool, which of the last tuples violate what the loss asks for; None where the loss doesn't say.
        parts: the terms of the last loss by name, detached scalars; empty where the loss has only one.
    """

    kind = "tuple"
    paper = ""
    normalize = True
    samples_per_class = 4
    sampling: str | None = "distance"
    tuple_kind = "triplets"
    sampler: Sampler | None
    active: torch.Tensor | None = None
    parts: Mapping[str, torch.Tensor] = {}

    def __call__(self, batch: torch.Tensor, labels: torch.Tensor | np.ndarray | Sequence[int]) -> torch.Tensor:
        """Calls `forward` with embeddings in float32 at least, also under autocast, and with labels as a tensor."""
        batch, labels = check_batch(batch, labels)
        if not torch.is_autocast_enabled(batch.device.type):
            return super().__call__(batch, labels)
        with torch.autocast(batch.device.type, enabled=False):
            return super().__call__(batch, labels)

    def own_statistics(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Statistics that only this loss has, of the embeddings `(B, D)` of the last pass: scalars on its device."""
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
    batch, labels = check_batch(batch, labels)
    values = {"Embedding Norm": torch.linalg.norm(batch, dim=1).mean()}
    for sampler in vars(criterion).values():
        if isinstance(sampler, Sampler):
            values |= sampler.statistics(batch, labels)
    if isinstance(criterion, Criterion):
        if criterion.active is not None:
            values["Violations"] = criterion.active.float().mean()
        values |= {f"Loss {name}": part for name, part in criterion.parts.items()}
        values |= criterion.own_statistics(batch)
    if isinstance(criterion, SumOfLosses):
        for name, part in criterion.criteria.items():
            found = statistics(part, batch, labels)
            values |= {f"{name} {key}": value for key, value in found.items() if key != "Embedding Norm"}
    return values


class TripletLoss(Criterion):
    """mean max(0, d²(a, p) - d²(a, n) + margin). Schroff et al., FaceNet, CVPR 2015, equation 3.

    Args:
        sampler: gives triplets.
        margin: in the unit of d².
    """

    paper = "Schroff et al., CVPR 2015"
    sampler: Sampler

    def __init__(self, sampler: Sampler, margin: float = 0.2):
        super().__init__()
        self.sampler = sampler
        self.margin = margin

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""
        triplets = self.sampler.give(batch, labels, margin=self.margin, squared=True)  # (T, 3)

        def distances(batch: torch.Tensor, triplets: torch.Tensor) -> torch.Tensor:
            anchors, positives, negatives = (batch.index_select(0, column) for column in triplets.T)  # (P, D) each
            others = positives, negatives
            return torch.stack([(anchors - other).square().sum(dim=1) for other in others], dim=1)  # (P, 2)

        apart = _in_parts(distances, batch, triplets)  # (T, 2)
        terms = F.relu(apart[:, 0] - apart[:, 1] + self.margin)  # (T,)
        self.active = terms.detach() > 0
        return terms.sum() / max(1, len(terms))  # a miner may find none


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

    paper = "Wu et al., ICCV 2017"
    sampler: Sampler

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

        def distances(batch: torch.Tensor, triplets: torch.Tensor) -> torch.Tensor:
            anchors, positives, negatives = (batch.index_select(0, column) for column in triplets.T)  # (P, D) each
            # linalg.norm has gradient 0 where two embeddings are the same
            others = positives, negatives
            return torch.stack([torch.linalg.norm(anchors - other, dim=1) for other in others], dim=1)  # (P, 2)

        apart = _in_parts(distances, batch, triplets)  # (T, 2)
        if self.beta_constant:
            beta = self.beta.expand(len(triplets))  # (T,)
        else:
            beta = self.beta.index_select(0, upload(labels, batch.device).index_select(0, triplets[:, 0]))  # (T,)
        positive_terms = F.relu(apart[:, 0] - beta + self.margin)  # (T,)
        negative_terms = F.relu(beta - apart[:, 1] + self.margin)  # (T,)
        self.active = (positive_terms + negative_terms).detach() > 0
        num_active_terms = (positive_terms > 0).sum() + (negative_terms > 0).sum()
        total = positive_terms.sum() + negative_terms.sum()
        if self.nu:
            total = total + self.nu * beta.sum()
        return total / num_active_terms.clamp(min=1)

    def own_statistics(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gives the mean β."""
        return {"Mean Beta": self.beta.mean()}


class NPairLoss(Criterion):
    """mean log(1 + Σ exp(a·n - a·p)) + l2npair · mean(‖a‖² + ‖p‖²). Sohn, NIPS 2016, equations 5 and 6.

    Args:
        sampler: gives n-pairs.
        l2npair: weight of the squared norms.
    """

    paper = "Sohn, NIPS 2016"
    normalize = False
    sampling = "npair"
    tuple_kind = "n-pairs"
    sampler: Sampler

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

    kind = "proxy"
    paper = "Movshovitz-Attias et al., ICCV 2017"
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

    def own_statistics(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gives the mean length of the proxies before they are scaled."""
        return {"Proxy Norm": torch.linalg.norm(self.proxies, dim=1).mean()}


class CrossEntropy(Criterion):
    """Cross entropy of a linear classifier of the embeddings.

    Args:
        num_classes: number of training classes C.
        embed_dim: dimension D of the embeddings.
        lr: learning rate of the classifier.
    """

    kind = "classification"
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


class ProxyNCAPlusPlus(Criterion):
    """mean -log(exp(-d²(x, p_y) / T) / Σ_p exp(-d²(x, p) / T)), x and p of length 1, the own proxy in the sum too.

    Teh et al., ECCV 2020, equation 6.

    Args:
        num_classes: number of training classes, each of which has a proxy.
        embed_dim: dimension D of embeddings and proxies.
        temperature: T.
        proxy_lr: learning rate of the proxies.
    """

    kind = "proxy"
    paper = "Teh et al., ECCV 2020"
    sampling = None

    def __init__(self, num_classes: int, embed_dim: int, temperature: float = 1 / 9, proxy_lr: float = 1e-3):
        super().__init__()
        self.lr = proxy_lr
        self.temperature = temperature
        self.proxies = nn.Parameter(torch.randn(num_classes, embed_dim) / 8)

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""
        # between vectors of length 1, d² = 2 - 2 cos, and the 2 cancel
        points = 2 / self.temperature * F.normalize(batch, dim=1)  # (B, D)
        logits = points @ F.normalize(self.proxies, dim=1).T  # (B, C)
        return F.cross_entropy(logits, upload(labels, batch.device))

    def own_statistics(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gives the mean length of the proxies before they are scaled."""
        return {"Proxy Norm": torch.linalg.norm(self.proxies, dim=1).mean()}


class ContrastiveLoss(Criterion):
    """The mean of max(0, d - pos_margin) over positive pairs plus that of max(0, neg_margin - d) over negative pairs.

    Each mean is over the terms above zero. Hadsell et al., CVPR 2006, with hinges that are not squared.

    Args:
        sampler: gives the pairs (default: all pairs of the batch).
        pos_margin: in the unit of the Euclidean distance d.
        neg_margin: likewise.
    """

    paper = "Hadsell et al., CVPR 2006"
    sampling = None
    tuple_kind = "pairs"

    def __init__(self, sampler: Sampler | None = None, pos_margin: float = 0.0, neg_margin: float = 0.5):
        super().__init__()
        self.sampler = sampler
        self.pos_margin, self.neg_margin = pos_margin, neg_margin

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""
        if self.sampler is None:
            return self._of_all_pairs(batch, upload(labels, batch.device))
        anchors, positives, others, negatives = _as_pairs(self.sampler.give_indices(batch, labels))

        def distances(batch: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
            one, other = (batch.index_select(0, column) for column in pairs.T)  # (P, D) each
            return torch.linalg.norm(one - other, dim=1)  # (P,), with gradient 0 where two embeddings are the same

        to_positive = _in_parts(distances, batch, torch.stack([anchors, positives], dim=1))  # (T,)
        to_negative = _in_parts(distances, batch, torch.stack([others, negatives], dim=1))  # (N,)
        return self.of_distances(to_positive, to_negative)

    def of_distances(self, to_positive: torch.Tensor, to_negative: torch.Tensor) -> torch.Tensor:
        """Computes the loss of the distances of positive pairs `(P,)` and of negative pairs `(N,)`."""
        return _mean_above_zero(to_positive - self.pos_margin) + _mean_above_zero(self.neg_margin - to_negative)

    def _of_all_pairs(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # through a product of matrices, the distance of near duplicates would be wrong in its first digits
        distances = torch.cdist(batch, batch, compute_mode="donot_use_mm_for_euclid_dist")  # (B, B)
        same = labels[:, None] == labels  # (B, B)
        is_other = ~torch.eye(len(batch), dtype=torch.bool, device=batch.device)  # (B, B)
        positive_terms = (distances - self.pos_margin).masked_fill(~(same & is_other), 0.0)  # (B, B)
        negative_terms = (self.neg_margin - distances).masked_fill(same, 0.0)  # (B, B)
        return _mean_above_zero(positive_terms) + _mean_above_zero(negative_terms)


def _mean_above_zero(terms: torch.Tensor) -> torch.Tensor:
    """The mean of those terms that are above zero; 0 where none is."""
    return F.relu(terms).sum() / (terms > 0).sum().clamp(min=1)


class RankLoss(Criterion):
    """A loss that ranks, for each image as a query, the other images of the batch by their cosine similarity.

    Classes may have any sizes, in any order; queries without a positive in the batch don't count. Every (query,
    positive) pair is compared with the whole batch, in parts, so that memory stays bounded.
    """

    kind = "rank"
    sampling = None

    def _rank(
        self,
        batch: torch.Tensor,
        labels: torch.Tensor,
        rank: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ranks every positive of every query.

        Args:
            batch: `(B, D)` embeddings.
            labels: `(B,)` int64.
            rank: gives `(P, n)` for pairs `(P, 2)`, the similarity of the batch to the query minus that of the positive
                `(P, B)`, and which images are of the query's class `(P, B)` bool.

        Returns:
            What `rank` gives for all pairs, `(P, n)`; their queries `(P,)`; the number of positives of each image
            `(B,)`, int64. All on the device.

        Raises:
            UserError: no image has a positive.
        """
        on_host = labels.cpu().numpy()
        is_positive = (on_host[:, None] == on_host) & ~np.eye(len(on_host), dtype=bool)  # (B, B)
        pairs = np.argwhere(is_positive)  # (P, 2)
        if len(pairs) == 0:
            raise UserError(
                f"a batch of {len(on_host)} images has no two images of one class: raise --samples_per_class or --bs"
            )
        points = F.normalize(batch, dim=1)  # (B, D)
        similarities = points @ points.T  # (B, B)
        labels = upload(labels, batch.device)

        def rank_some(similarities: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
            queries = some[:, 0]
            rows = similarities.index_select(0, queries)  # (P, B)
            return rank(some, rows - rows.gather(1, some[:, 1:]), labels.index_select(0, queries)[:, None] == labels)

        ranks = _in_parts(rank_some, similarities, upload(pairs, batch.device))  # (P, n)
        num_positives = upload(is_positive.sum(axis=1), batch.device)  # (B,)
        return ranks, upload(np.ascontiguousarray(pairs[:, 0]), batch.device), num_positives


def _mean_over_queries(terms: torch.Tensor, queries: torch.Tensor, num_positives: torch.Tensor) -> torch.Tensor:
    """The mean over queries of the means over their positives.

    Args:
        terms: `(P,)` of (query, positive) pairs.
        queries: `(P,)` their queries.
        num_positives: `(B,)` of each image.
    """
    weights = 1 / num_positives.index_select(0, queries)  # (P,)
    return (terms * weights).sum() / (num_positives > 0).sum()


class SmoothAP(RankLoss):
    """1 - mean AP with σ(x / temperature) in place of the step function of ranks. Brown et al., ECCV 2020, equation 7.

    Args:
        temperature: of the sigmoid.
    """

    paper = "Brown et al., ECCV 2020"

    def __init__(self, temperature: float = 0.01):
        super().__init__()
        self.temperature = temperature

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""

        def rank(pairs: torch.Tensor, differences: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
            ahead = torch.sigmoid(differences / self.temperature).scatter(1, pairs, 0.0)  # (P, B)
            return torch.stack([1 + (ahead * same).sum(dim=1), 1 + ahead.sum(dim=1)], dim=1)  # (P, 2)

        ranks, queries, num_positives = self._rank(batch, labels, rank)
        return 1 - _mean_over_queries(ranks[:, 0] / ranks[:, 1], queries, num_positives)


class RecallAtK(RankLoss):
    """1 - the mean of a smooth recall @ k over queries and k. Patel et al., CVPR 2022, equations 5 to 7.

    Args:
        k_values: the k.
        count_temperature: τ₁, of the sigmoid that counts positives among the first k.
        rank_temperature: τ₂, of the sigmoid in ranks.
    """

    paper = "Patel et al., CVPR 2022"

    def __init__(
        self,
        k_values: Sequence[int] = (1, 2, 4, 8, 16),
        count_temperature: float = 1.0,
        rank_temperature: float = 0.01,
    ):
        super().__init__()
        if not all(type(k) is int and k > 0 for k in k_values) or len(k_values) == 0:
            raise UserError(f"recallatk: k_values takes a list of integers above 0, not {k_values}")
        self.k_values = tuple(k_values)
        self.count_temperature, self.rank_temperature = count_temperature, rank_temperature

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""

        def rank(pairs: torch.Tensor, differences: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
            ahead = torch.sigmoid(differences / self.rank_temperature).scatter(1, pairs, 0.0)  # (P, B)
            return 1 + ahead.sum(dim=1, keepdim=True)  # (P, 1)

        ranks, queries, num_positives = self._rank(batch, labels, rank)
        k = upload(torch.tensor(self.k_values), batch.device)  # (K,)
        within = torch.sigmoid((k - ranks) / self.count_temperature)  # (P, K)
        found = within.new_zeros(len(batch), len(k)).index_add(0, queries, within)  # (B, K)
        possible = torch.minimum(num_positives[:, None], k)  # (B, K)
        recalls = torch.minimum(found, k) / possible.clamp(min=1)  # (B, K), 0 for queries without positives
        return 1 - recalls.mean(dim=1).sum() / (num_positives > 0).sum()


class SupAP(RankLoss):
    """An upper bound of 1 - mean AP that has gradients where it matters, plus a calibration of similarities.

    Positives before a positive are counted without gradient; a negative that is x more similar than the positive counts
    σ(x / temperature) for x ≤ 0, half more for x ≤ delta, and slope · (x - delta) + offset beyond. The calibration of
    similarities s is the mean of [positive - s]₊ over positive pairs plus that of [s - negative]₊ over negative pairs,
    each over its terms above zero. Ramzi et al., ROADMAP, NeurIPS 2021, equations 4 to 7.

    Args:
        temperature: of the sigmoid.
        delta: where the linear part begins.
        slope: of the linear part.
        offset: of the linear part.
        calibration_positive: similarity that positive pairs should have at least.
        calibration_negative: similarity that negative pairs should have at most.
        calibration_weight: weight of the calibration.
    """

    paper = "Ramzi et al., NeurIPS 2021"

    def __init__(
        self,
        temperature: float = 0.01,
        delta: float = 0.05,
        slope: float = 100.0,
        offset: float = 1.44,
        calibration_positive: float = 0.9,
        calibration_negative: float = 0.6,
        calibration_weight: float = 1.0,
    ):
        super().__init__()
        self.temperature, self.delta, self.slope, self.offset = temperature, delta, slope, offset
        self.calibration_positive, self.calibration_negative = calibration_positive, calibration_negative
        self.calibration_weight = calibration_weight

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""

        def rank(pairs: torch.Tensor, differences: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
            ahead = (differences.detach() >= 0).to(differences.dtype).scatter(1, pairs, 0.0)  # (P, B)
            among_positives = 1 + (ahead * same).sum(dim=1)  # (P,)
            steps = torch.sigmoid(differences / self.temperature)  # (P, B)
            steps = torch.where(differences > 0, 0.5 + steps, steps)
            linear = self.slope * (differences - self.delta) + self.offset  # (P, B)
            steps = torch.where(differences > self.delta, linear, steps).masked_fill(same, 0.0)
            return torch.stack([among_positives, among_positives + steps.sum(dim=1)], dim=1)  # (P, 2)

        ranks, queries, num_positives = self._rank(batch, labels, rank)
        ranking = 1 - _mean_over_queries(ranks[:, 0] / ranks[:, 1], queries, num_positives)
        calibration = self._calibrate(F.normalize(batch, dim=1), upload(labels, batch.device))
        self.parts = {"ranking": ranking.detach(), "calibration": calibration.detach()}
        return ranking + self.calibration_weight * calibration

    def _calibrate(self, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        similarities = points @ points.T  # (B, B)
        same = labels[:, None] == labels  # (B, B)
        is_other = ~torch.eye(len(points), dtype=torch.bool, device=points.device)  # (B, B)
        too_far = (self.calibration_positive - similarities).masked_fill(~(same & is_other), 0.0)
        too_near = (similarities - self.calibration_negative).masked_fill(same, 0.0)
        return _mean_above_zero(too_far) + _mean_above_zero(too_near)


class SumOfLosses(Criterion):
    """Σ weight · loss.

    Args:
        criteria: the losses by name.
        weights: their weights, in the same order.
    """

    def __init__(self, criteria: Mapping[str, nn.Module], weights: Sequence[float]):
        super().__init__()
        self.criteria = nn.ModuleDict(dict(criteria))
        self.weights = list(weights)

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""
        terms = {name: criterion(batch, labels) for name, criterion in self.criteria.items()}
        self.parts = {name: term.detach() for name, term in terms.items()}
        total: torch.Tensor = sum(weight * term for weight, term in zip(self.weights, terms.values()))
        return total


# A row is a loss's class, or a function that builds the loss; see `loss_select` for what they may ask for.
LOSSES: dict[str, Callable[..., Any]] = {
    "marginloss": MarginLoss,
    "triplet": TripletLoss,
    "npair": NPairLoss,
    "proxynca": ProxyNCA,
    "proxynca++": ProxyNCAPlusPlus,
    "crossentropy": CrossEntropy,
    "contrastive": ContrastiveLoss,
    "smoothap": SmoothAP,
    "recallatk": RecallAtK,
    "supap": SupAP,
}


# pytorch-metric-learning's classes, by name. The tables stand here so that a start need not import the library; a test
# holds them against it.


class LibraryRow(NamedTuple):
    """A loss class of pytorch-metric-learning: what its constructor doesn't say.

    The attributes of `Criterion`'s names mean the same as there.

    Attributes:
        fills: those of its parameters that the run fills in.
        takes_memory: whether CrossBatchMemory takes it.
        note: what is known to be wrong with it, or different from its paper.
        paper_params: what its paper gives for parameters that have no default.
    """

    kind: str
    paper: str
    fills: tuple[str, ...] = ()
    tuple_kind: str = "pairs"
    takes_memory: bool = False
    normalize: bool = True
    samples_per_class: int = 4
    note: str = ""
    sampling: None = None
    paper_params: tuple[str, ...] = ()


_tuples = partial(LibraryRow, "tuple")
_with_memory = partial(LibraryRow, "tuple", takes_memory=True)
_weights = ("num_classes", "embedding_size")
_classifier = partial(LibraryRow, "classification", fills=_weights, tuple_kind="none", samples_per_class=1)
_proxies = partial(LibraryRow, "proxy", fills=_weights, tuple_kind="none", samples_per_class=1)
_ranks = partial(LibraryRow, "rank", tuple_kind="none")

LIBRARY_LOSSES: dict[str, LibraryRow] = {
    "AngularLoss": _with_memory("Wang et al., ICCV 2017"),
    "ArcFaceLoss": _classifier("Deng et al., CVPR 2019"),
    "CircleLoss": _with_memory("Sun et al., CVPR 2020"),
    "ContrastiveLoss": _with_memory("Hadsell et al., CVPR 2006"),
    "CosFaceLoss": _classifier("Wang et al., CVPR 2018"),
    "DynamicSoftMarginLoss": _tuples(
        "Zhang and Rusinkiewicz, ICCV 2019",
        note="keeps the graph of the last batch in its histogram, which is cut off here; fails where a positive is 1.6 "
        "farther than a negative",
    ),
    "FastAPLoss": _ranks("Cakir et al., CVPR 2019"),
    "GeneralizedLiftedStructureLoss": _with_memory("Hermans et al., 2017"),
    "HistogramLoss": _tuples("Ustinova and Lempitsky, NIPS 2016"),
    "InstanceLoss": LibraryRow(
        "classification",
        "Zheng et al., TOMM 2020",
        tuple_kind="none",
        note="wrong with labels: takes the number of a class for a position in the batch",
    ),
    "IntraPairVarianceLoss": _with_memory("Yu and Tao, ICCV 2019", note="meant to be added to TupletMarginLoss"),
    "LargeMarginSoftmaxLoss": _classifier("Liu et al., ICML 2016", normalize=False),
    "LiftedStructureLoss": _with_memory("Oh Song et al., CVPR 2016"),
    "ManifoldLoss": _proxies(
        "Aziere and Todorovic, CVPR 2019",
        fills=("l",),
        note="knows no labels: here an image's class, modulo K, is its proxy; K is the number of classes unless given",
    ),
    "MarginLoss": _with_memory("Wu et al., ICCV 2017", fills=("num_classes",), note="β is constant unless learn_beta"),
    "MultiSimilarityLoss": _with_memory("Wang et al., CVPR 2019"),
    "NCALoss": _with_memory("Goldberger et al., NIPS 2004", note="tuples only weight the images"),
    "NPairsLoss": _tuples("Sohn, NIPS 2016", note="of normalized embeddings, unless normalize_embeddings=false"),
    "NTXentLoss": _with_memory("Sohn, NIPS 2016; Chen et al., ICML 2020"),
    "NormalizedSoftmaxLoss": _classifier("Zhai and Wu, BMVC 2019"),
    "P2SGradLoss": _classifier("Zhang et al., CVPR 2019", fills=("num_classes", "descriptors_dim")),
    "PNPLoss": _ranks("Li et al., AAAI 2022"),
    "ProxyAnchorLoss": _proxies("Kim et al., CVPR 2020"),
    "ProxyNCALoss": _proxies(
        "Movshovitz-Attias et al., ICCV 2017",
        note="has the own proxy in its sum: ProxyNCA++ with T = 1 / softmax_scale",
    ),
    "RankedListLoss": _ranks(
        "Wang et al., CVPR 2019", note="has no defaults for margin and Tn", paper_params=("margin=0.4", "Tn=10")
    ),
    "SignalToNoiseRatioContrastiveLoss": _with_memory("Yuan et al., CVPR 2019"),
    "SmoothAPLoss": _ranks(
        "Brown et al., ECCV 2020",
        note="wrong unless the batch is sorted by class and has as many classes as images of each: use smoothap",
    ),
    "SoftTripleLoss": _proxies(
        "Qian et al., ICCV 2019", note="without the paper's regularizer unless --regularizer SparseCentersRegularizer"
    ),
    "SphereFaceLoss": _classifier("Liu et al., CVPR 2017", normalize=False),
    "SubCenterArcFaceLoss": _classifier("Deng et al., ECCV 2020"),
    "SupConLoss": _with_memory("Khosla et al., NeurIPS 2020"),
    "ThresholdConsistentMarginLoss": _tuples("Zhang et al., ICLR 2024", note="meant to be added to another loss"),
    "TripletMarginLoss": _with_memory("Schroff et al., CVPR 2015"),
    "TupletMarginLoss": _with_memory(
        "Yu and Tao, ICCV 2019", note="its gradient is not finite where two embeddings are the same"
    ),
    "VICRegLoss": _tuples(
        "Bardes et al., ICLR 2022",
        tuple_kind="none",
        normalize=False,
        note="knows no labels: here a random positive is the other view of an image",
    ),
}
_BASE = "it is a base class, not a loss"
REFUSED_LOSSES = {
    "BaseLossWrapper": _BASE,
    "BaseMetricLossFunction": _BASE,
    "EmbeddingRegularizerMixin": _BASE,
    "GenericPairLoss": _BASE,
    "WeightRegularizerMixin": _BASE,
    "CrossBatchMemory": "it wraps a loss: name that loss, and give --memory_size",
    "MultipleLosses": "it wraps losses: name them all in --loss, with --loss_weights",
    "SelfSupervisedLoss": "it wraps a loss: name that loss, whose positives are the images of one class",
}

LIBRARY_MINERS = {  # the kind of tuples that each gives
    "AngularMiner": "triplets",
    "BatchEasyHardMiner": "pairs",
    "BatchHardMiner": "triplets",
    "DistanceWeightedMiner": "triplets",
    "HDCMiner": "pairs",
    "MultiSimilarityMiner": "pairs",
    "PairMarginMiner": "pairs",
    "TripletMarginMiner": "triplets",
    "UniformHistogramMiner": "pairs",
}
REFUSED_MINERS = {
    "BaseMiner": "it is a base class, not a miner",
    "EmbeddingsAlreadyPackagedAsTriplets": "it takes batches that are made of triplets, which batches here are not",
}
LIBRARY_DISTANCES = ("CosineSimilarity", "DotProductSimilarity", "LpDistance", "SNRDistance")
LIBRARY_REDUCERS = (
    "AvgNonZeroReducer", "DivisorReducer", "MeanReducer", "PerAnchorReducer", "SumReducer", "ThresholdReducer"
)  # fmt: skip
LIBRARY_REGULARIZERS = {  # what each regularizes
    "CenterInvariantRegularizer": "weight",
    "LpRegularizer": "embedding",
    "RegularFaceRegularizer": "weight",
    "SparseCentersRegularizer": "weight",
    "ZeroMeanRegularizer": "embedding",
}
REFUSED_PARTS = {
    "BaseDistance": "it is a base class",
    "BatchedDistance": "it wraps a distance and gives no matrix",
    "BaseReducer": "it is a base class",
    "ClassWeightedReducer": "it needs a weight for each class, which flags can't give",
    "DoNothingReducer": "it doesn't reduce losses to one number",
    "MultipleReducers": "it needs a reducer for each part of a loss, which flags can't give",
    "BaseRegularizer": "it is a base class",
}
# The number of centers per class, which SparseCentersRegularizer needs to know, with the library's defaults.
CENTERS = {"SoftTripleLoss": ("centers_per_class", 10), "SubCenterArcFaceLoss": ("sub_centers", 3)}
# What a constructor asks for and other flags, or the run, fill in.
RESERVED = (
    "num_classes", "embedding_size", "descriptors_dim", "l", "distance", "reducer", "embedding_regularizer",
    "weight_regularizer", "weight_init_func", "collect_stats", "mat_based_loss"
)  # fmt: skip
STATE_OF_LOSSES = ("hist_",)  # attributes that change from batch to batch, and that the library keeps from checkpoints


def _known_in(flag: str, known: Collection[str]) -> Callable[[str], str]:
    """An argparse type: one of the names, with the reason for those that can't be used."""

    def parse(name: str) -> str:
        refused = {**REFUSED_LOSSES, **REFUSED_MINERS, **REFUSED_PARTS}
        if name in known:
            return name
        if name in refused:
            raise UserError(f"{flag} {name} can't be used: {refused[name]}")
        near = nearest_name(name, known)
        raise UserError(f"{flag} {shown(name)} is unknown{near}; {flag} takes {', '.join(known)}")

    return parse


def _known_loss(name: str) -> str:
    return _known_in("--loss", [*LOSSES, *LIBRARY_LOSSES])(name)


def _known_sampling(name: str) -> str:
    return _known_in("--sampling", [*Sampler().methods, *LIBRARY_MINERS, "none"])(name)


@contextmanager
def _with_statistics() -> Iterator[None]:
    """Inside the block, objects of the library are built so that they can collect statistics."""
    from pytorch_metric_learning.utils import common_functions

    before, common_functions.COLLECT_STATS = common_functions.COLLECT_STATS, True
    try:
        yield
    finally:
        common_functions.COLLECT_STATS = before


def _collect(module: nn.Module, is_on: bool) -> None:
    """Makes an object of the library, and those in it, collect statistics or not: each of them makes the host wait."""
    for part in module.modules():
        if hasattr(part, "collect_stats"):
            names = vars(part).setdefault("_statistics", getattr(part, "_record_these_stats", []))
            vars(part).update(collect_stats=is_on, _record_these_stats=names if is_on else [])


def _library_statistics(name: str, module: nn.Module, *inputs: Any) -> dict[str, torch.Tensor]:
    """Runs an object of the library once more, with statistics; random draws and its own state stay as they were."""
    device = inputs[0].device
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    _collect(module, True)
    with seeded(0), torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        _quietly(module, *inputs)
    values = {}
    for path, part in module.named_modules():
        for statistic in getattr(part, "_record_these_stats", ()):
            words = " ".join([name, *filter(None, path.split(".")), statistic])
            values[words] = torch.as_tensor(getattr(part, statistic), dtype=torch.float32, device=device).detach()
    _collect(module, False)
    for name, buffer in module.named_buffers():
        buffer.copy_(kept[name])
    return values


def _quietly(function: Callable[..., Any], *inputs: Any) -> Any:
    """Calls the library without its warnings about torch's own deprecations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using a non-tuple sequence for multidimensional indexing")
        return function(*inputs)


def _build_part(flag: str, module: str, name: str, params: Mapping[str, str], **given: Any) -> nn.Module:
    """Builds an object of the library.

    Args:
        flag: the flag that names it, such as `--sampling`; its parameters are those of `<flag>_params`.
        module: where the library has it.
        name: its class.
        params: its parameters as the user typed them.
        given: parameters that are filled in.

    Raises:
        UserError: the library is missing, the parameters are wrong, or the constructor refuses them.
    """
    import importlib

    try:
        build = getattr(importlib.import_module(f"pytorch_metric_learning.{module}"), name)
    except ImportError:
        raise UserError(f"{flag} {name} needs pytorch-metric-learning: pip install pytorch-metric-learning") from None
    typed = check_params(f"{flag}_params", params, build, (*RESERVED, *given))
    numbers = {key: parse_value(value) if isinstance(value, str) else value for key, value in typed.items()}
    typed = {key: value if isinstance(value, int) else typed[key] for key, value in numbers.items()}
    asked = inspect.signature(build).parameters.values()
    required = [one.name for one in asked if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    missing = [f"{key}=…" for key in required if key not in given and key not in typed]
    if missing:
        raise UserError(f"{flag} {name} has no default for all its parameters: give {flag}_params {' '.join(missing)}")
    with _with_statistics(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            built: nn.Module = build(**given, **typed)
        except Exception as error:  # the library raises anything at all
            raise UserError(f"{flag} {name} can't be built so: {reason(error)}") from None
    _collect(built, False)
    return built


def build_miner(
    name: str, params: Mapping[str, str] | None = None, distance: Callable[[], dict[str, Any]] = dict
) -> nn.Module:
    """Builds a miner of pytorch-metric-learning.

    Args:
        name: its class.
        params: its parameters as the user typed them.
        distance: gives the `distance` of miner and loss, where they shall not have their own.
    """
    return _build_part("--sampling", "miners", name, params or {}, **distance())


class LibraryLoss(Criterion):
    """A loss of pytorch-metric-learning.

    Args:
        name: its class.
        loss: the loss.
        sampler: gives its tuples (default: what the loss does without).
        lr: learning rate of its parameters.
    """

    def __init__(self, name: str, loss: nn.Module, sampler: Sampler | None = None, lr: float = 1e-3):
        super().__init__()
        self.name, self.lr = name, lr
        self.loss = loss
        self.sampler = sampler
        self._inputs_of: Callable[[torch.Tensor], tuple[Any, ...]] | None = None
        self._state = [attribute for attribute in STATE_OF_LOSSES if hasattr(loss, attribute)]
        for attribute in self._state:
            value = getattr(loss, attribute)
            delattr(loss, attribute)
            loss.register_buffer(attribute, value)

    def remember(self, *inputs: Any) -> None:
        """Keeps what the library is called with beside the embeddings, for its statistics."""
        self._inputs_of = lambda batch: (batch, *inputs)

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""
        for attribute in self._state:
            setattr(self.loss, attribute, getattr(self.loss, attribute).detach())
        inputs_of = SPECIAL_INPUTS.get(self.name, _with_labels)(self, batch, labels)
        vars(self)["_inputs_of"] = inputs_of  # a module's own way to set an attribute takes several times as long
        inputs = inputs_of(batch)
        value = _quietly(self.loss, *inputs) if self.name == "HistogramLoss" else self.loss(*inputs)
        return value.squeeze() if value.ndim else value

    def own_statistics(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gives the library's statistics of the last call."""
        return _library_statistics(self.name, self.loss, *self._inputs_of(batch)) if self._inputs_of else {}


# What a loss of the library is called with, as a function of the embeddings: keeping them would cost time and memory.
InputsOf = Callable[[torch.Tensor], tuple[Any, ...]]


def _with_labels(criterion: LibraryLoss, batch: torch.Tensor, labels: torch.Tensor) -> InputsOf:
    indices = criterion.sampler.give_indices(batch, labels) if criterion.sampler else None
    on_device = upload(labels, batch.device)
    return lambda batch: (batch, on_device, indices)


def _with_proxies(criterion: LibraryLoss, batch: torch.Tensor, labels: torch.Tensor) -> InputsOf:
    proxies = upload(labels, batch.device) % len(criterion.loss.get_parameter("proxies"))
    return lambda batch: (batch, None, proxies)


def _with_views(criterion: LibraryLoss, batch: torch.Tensor, labels: torch.Tensor) -> InputsOf:
    groups = ClassGroups(labels)
    views = upload(groups.random_positives(groups.anchors), batch.device)  # (A,)
    if len(groups.anchors) == len(batch):
        return lambda batch: (batch, None, None, batch.index_select(0, views))
    anchors = upload(groups.anchors, batch.device)  # (A,)
    return lambda batch: (batch.index_select(0, anchors), None, None, batch.index_select(0, views))


SPECIAL_INPUTS = {"ManifoldLoss": _with_proxies, "VICRegLoss": _with_views}


class MemoryLoss(LibraryLoss):
    """A loss of pytorch-metric-learning between the batch and past embeddings. Wang et al., XBM, CVPR 2020.

    Args:
        name: the loss's class.
        loss: the loss.
        sampler: its miners, which search the memory (default: all pairs).
        lr: learning rate of its parameters.
        embed_dim: dimension D of the embeddings.
        memory_size: number of past embeddings, the batch's own included.
        memory_start: iterations before the memory is filled and used; until then the loss is that of the batch alone.
    """

    def __init__(
        self,
        name: str,
        loss: nn.Module,
        sampler: Sampler | None = None,
        lr: float = 1e-3,
        *,
        embed_dim: int,
        memory_size: int,
        memory_start: int,
    ):
        super().__init__(name, loss, sampler, lr)
        from pytorch_metric_learning.losses import CrossBatchMemory

        self.memory = CrossBatchMemory(loss, embed_dim, memory_size, sampler.mine if sampler else None)
        loss.register_forward_pre_hook(lambda _, inputs: self.remember(*inputs[1:]))  # the memory calls the loss itself
        self.memory_start = memory_start
        self.iteration = 0

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of embeddings `(B, D)` and labels `(B,)`."""
        self.iteration += 1
        if self.iteration <= self.memory_start:
            return super().forward(batch, labels)
        return self.memory(batch, upload(labels, batch.device))

    def own_statistics(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gives the library's statistics of the last call, and how many embeddings the memory holds."""
        values = super().own_statistics(batch)
        num = self.memory.memory_size if self.memory.has_been_filled else self.memory.queue_idx
        if num and self.sampler and self._inputs_of:
            batch, labels, _, *others = self._inputs_of(batch)
            values |= self.sampler.miners_statistics(batch, labels, *others)
        return {**values, "Memory": self.memory.embedding_memory.new_full((), num)}

    def get_extra_state(self) -> dict[str, Any]:
        """What the library keeps outside its state dict."""
        names = ("queue_idx", "has_been_filled")
        return {"iteration": self.iteration, **{name: getattr(self.memory, name) for name in names}}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `get_extra_state`."""
        self.iteration = state["iteration"]
        self.memory.queue_idx, self.memory.has_been_filled = state["queue_idx"], state["has_been_filled"]


class Requirements(NamedTuple):
    """What a loss needs of the network and the batch: the attributes of `Criterion` of the same names."""

    normalize: bool
    samples_per_class: int
    sampling: str | None
    tuple_kind: str


def requirements(loss: str | Sequence[str]) -> Requirements:
    """What a loss needs: the attributes of its row, and those of `Criterion` where the row has none.

    Several losses get embeddings of length 1 where one of them needs that, and the most images per class that one of
    them needs; each has its own sampling.
    """
    names = names_of(loss)
    if len(names) > 1:
        all_needs = [requirements(name) for name in names]
        most = max(needs.samples_per_class for needs in all_needs)
        return Requirements(any(needs.normalize for needs in all_needs), most, None, "none")
    return Requirements(*(getattr(_row(names[0]), name, getattr(Criterion, name)) for name in Requirements._fields))


def _row(loss: str) -> Any:
    """A loss's row in `LOSSES` or in `LIBRARY_LOSSES`."""
    return LOSSES[loss] if loss in LOSSES else LIBRARY_LOSSES[loss]


def _takes_tuples(needs: Requirements) -> bool:
    return needs.sampling is not None or needs.tuple_kind == "pairs"


def needs_positives(loss: str | Sequence[str]) -> bool:
    """Whether a loss can't learn from batches without two images of one class."""
    rows = [(requirements(name), getattr(_row(name), "kind", None)) for name in names_of(loss)]
    return any(needs.sampling is not None or kind in ("tuple", "rank") for needs, kind in rows)


def choose_sampling(loss: str | Sequence[str], sampling: str | Sequence[str] | None) -> str | list[str] | None:
    """Chooses the sampling method: the user's where the loss can use it, else the loss's own.

    Of several losses, those that take tuples get the user's, else each its own, for which None stands.

    Raises:
        UserError: the loss can't use the user's method, or none of the losses can.
    """
    names = names_of(loss)
    if len(names) == 1:
        return _choose_for_one(names[0], sampling)
    if sampling is None:
        return None
    given = [name for name in names if _takes_tuples(requirements(name))]
    if not given:
        raise UserError(f"--loss {' '.join(names)} use no tuples: drop --sampling {' '.join(names_of(sampling))}")
    chosen = [_choose_for_one(name, sampling) for name in given]
    return chosen[0]


def _choose_for_one(loss: str, sampling: str | Sequence[str] | None) -> str | list[str] | None:
    needs = requirements(loss)
    if sampling is None or sampling == needs.sampling:
        return needs.sampling
    methods = names_of(sampling)
    if methods == ["none"]:
        if needs.sampling is not None:
            raise UserError(f"--loss {loss} learns from {needs.tuple_kind}: drop --sampling none")
        return None
    if "none" in methods or len(set(methods)) < len(methods):
        raise UserError(f"--sampling {' '.join(methods)} contradicts itself: name each way of sampling once")
    if not _takes_tuples(needs):
        raise UserError(f"--loss {loss} uses no tuples: drop --sampling {' '.join(methods)}")
    own = Sampler().methods
    for method in methods:
        kind = LIBRARY_MINERS.get(method) or getattr(own[method], "tuple_kind", Criterion.tuple_kind)
        fits = (
            needs.tuple_kind == "pairs" or kind == needs.tuple_kind or (needs.tuple_kind, kind) == ("triplets", "pairs")
        )
        if not fits or (kind == "n-pairs" and len(methods) > 1 and needs.tuple_kind != "pairs"):
            raise UserError(
                f"--loss {loss} takes {needs.tuple_kind}, but --sampling {method} gives {kind}: use --sampling "
                f"{needs.sampling}"
            )
    return methods[0] if len(methods) == 1 else methods


def default_proxy_lr(loss: str | Sequence[str], lr: float) -> float:
    """The learning rate of proxies: the published one of proxynca, and 100 times that of the network for others."""
    others = [name for name in names_of(loss) if name == "proxynca++" or (name in LIBRARY_LOSSES)]
    return 100 * lr if others else 1e-5


def split_params(flag: str, params: Mapping[str, str], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Parameters `key=value`, or with several things `NAME.key=value`, by the names of what they go to.

    Raises:
        UserError: a parameter doesn't say which of several it is for, or is for something else.
    """
    split: dict[str, dict[str, str]] = {name: {} for name in names}
    for key, value in params.items():
        name, dot, rest = key.rpartition(".")
        if dot and name not in split:
            what = f"{shown(name)} of {shown(key)}"
            raise UserError(f"{flag}: {what} is not among {', '.join(names) or 'what was named'}")
        if not names:
            what = shown(f"{key}={value}")
            raise UserError(f"{flag} {what} is for nothing: name what it is for with {flag.removesuffix('_params')}")
        if not dot and len(names) > 1:
            raise UserError(f"{flag}: say which one {shown(key)} is for, such as {shown(f'{names[0]}.{key}={value}')}")
        split[name if dot else names[0]][rest] = value
    return split


def loss_select(
    loss: str | Sequence[str], opt: argparse.Namespace, to_optim: Sequence[dict[str, Any]], num_classes: int
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Builds a loss, or the weighted sum of several, from the resolved flags.

    An own loss's row, a class or a function, gets those of these keywords that it asks for: every flag by its name,
    `sampler` (or `sampling_method`), `num_classes` (or `n_classes`), `opt`, and `to_optim`, to which it may append
    parameter groups. It returns the loss, or the loss and the groups.

    Args:
        loss: a key of `LOSSES` or `LIBRARY_LOSSES`, or several.
        opt: the resolved flags.
        to_optim: the optimizer's parameter groups so far.
        num_classes: number of training classes.

    Returns:
        The loss; and the groups, with those that the row appended, or else with one for the loss's own parameters, if
        it has any, whose learning rate is the loss's `lr` or that of the flags. They are named after the loss, and
        have no weight decay unless the row says otherwise.

    Raises:
        UserError: it can't be built so.
    """
    names = names_of(loss)
    params = split_params("--loss_params", _flag(opt, "loss_params", {}), names)
    criteria: dict[str, nn.Module] = {}
    groups = list(to_optim)
    for name in names:
        select = _select_own if name in LOSSES else _select_of_library
        criteria[name], groups = select(name, params[name], opt, groups, num_classes)
    weights = _flag(opt, "loss_weights", None)
    if len(names) == 1 and weights is None:
        return criteria[names[0]], groups
    return SumOfLosses(criteria, weights or [1.0] * len(names)), groups


def _flag(opt: argparse.Namespace, name: str, default: Any) -> Any:
    """A flag that resolved flags of earlier versions lack."""
    value = getattr(opt, name, None)
    return default if value is None else value


def _select_sampler(loss: str, opt: argparse.Namespace, num_classes: int) -> Sampler | None:
    """Builds what gives a loss its tuples; None for a loss that takes none, or all."""
    needs = requirements(loss)
    sampling = _choose_for_one(loss, opt.sampling) if _takes_tuples(needs) else None
    if sampling is None:
        return None
    names = names_of(sampling)
    params = split_params("--sampling_params", _flag(opt, "sampling_params", {}), names)
    distance = partial(_build_distance, opt)
    for name in names:
        _check_sizes("--sampling_params", name, params[name], opt, num_classes)
    miners = {name: build_miner(name, params[name], distance) for name in names if name in LIBRARY_MINERS}
    own = {name: method for name, method in Sampler().methods.items() if name in names}
    flags = {"margin": opt.margin, "lower_cutoff": opt.lower_cutoff, "upper_cutoff": opt.upper_cutoff}
    flags |= {"positives_per_anchor": _flag(opt, "positives_per_anchor", "1"), "rho": _flag(opt, "rho", 0.0)}
    for name, method in own.items():
        flags |= check_params("--sampling_params", params[name], method, ("batch", "labels", "margin", "squared"))
    return Sampler(sampling, miners, **flags)


def _select_own(
    name: str, params: Mapping[str, str], opt: argparse.Namespace, groups: list[dict[str, Any]], num_classes: int
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Builds a loss of `LOSSES`, and adds its groups."""
    build = LOSSES[name]
    asked = inspect.signature(build).parameters
    own = {"to_optim": [*groups], "opt": opt, "num_classes": num_classes, "n_classes": num_classes}
    sampler = _select_sampler(name, opt, num_classes)
    if sampler:
        own |= {"sampler": sampler, "sampling_method": sampler}
    reserved = ("sampler", "sampling_method", "embed_dim", *own)
    has_default = {key for key, one in asked.items() if one.default is not inspect.Parameter.empty}
    flags = {key: value for key, value in vars(opt).items() if value is not None or key not in has_default}
    values = {**flags, **check_params("--loss_params", params, build, reserved), **own}
    try:
        built = build(**{key: values[key] for key in asked if key in values})
    except (TypeError, ValueError) as error:
        if not params:
            raise
        raise UserError(f"--loss {name} can't be built so: {reason(error)}") from None
    criterion, all_groups = built if isinstance(built, tuple) else (built, own["to_optim"])
    return criterion, [*groups, *_name_groups(name, criterion, opt.lr, all_groups[len(groups) :])]


def _name_groups(
    name: str, criterion: nn.Module, lr: float, appended: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The parameter groups of a loss, named after it."""
    trainable = [parameter for parameter in criterion.parameters() if parameter.requires_grad]
    if trainable and not appended:
        appended = [{"params": trainable, "lr": getattr(criterion, "lr", lr)}]
    names = [name, *(f"{name} {position}" for position in range(2, len(appended) + 1))]
    defaults = {"lr": lr, "weight_decay": 0.0}
    return [{"name": name, **defaults, **group} for name, group in zip(names, appended)]


def _build_distance(opt: argparse.Namespace) -> dict[str, Any]:
    """The `distance` of --distance as a keyword; none without the flag."""
    if not _flag(opt, "distance", None):
        return {}
    return {"distance": _build_part("--distance", "distances", opt.distance, opt.distance_params)}


def _build_parts(loss: str, params: Mapping[str, str], opt: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """Distance, reducer and regularizer of a library loss, as keywords of its constructor."""
    parts = _build_distance(opt)
    if _flag(opt, "reducer", None):
        parts["reducer"] = _build_part("--reducer", "reducers", opt.reducer, opt.reducer_params)
    if _flag(opt, "regularizer", None):
        given: dict[str, Any] = {}
        if opt.regularizer == "SparseCentersRegularizer":
            key, default = CENTERS[loss]
            centers = parse_value(params[key]) if key in params else default
            if type(centers) is not int:
                raise UserError(f"--loss_params: {key} of {loss} takes an integer, not {shown(params[key])}")
            given = {"num_classes": num_classes, "centers_per_class": centers}
        built = _build_part("--regularizer", "regularizers", opt.regularizer, opt.regularizer_params, **given)
        parts[f"{LIBRARY_REGULARIZERS[opt.regularizer]}_regularizer"] = built
    return parts


# Parameters of the library that are sizes, and the bytes that so many take, in the largest tensors or while they learn.
SIZES: dict[str, Callable[[int, int, int, int], float]] = {
    "sub_centers": lambda count, num_classes, embed_dim, bs: 16.0 * count * num_classes * embed_dim,
    "centers_per_class": lambda count, num_classes, embed_dim, bs: 16.0 * count * num_classes * embed_dim,
    "K": lambda count, num_classes, embed_dim, bs: 16.0 * count * (embed_dim + count),
    "n_bins": lambda count, num_classes, embed_dim, bs: 4.0 * count * bs**2,
    "num_bins": lambda count, num_classes, embed_dim, bs: 4.0 * count * bs**2,
    "pos_per_bin": lambda count, num_classes, embed_dim, bs: 8.0 * count,
    "neg_per_bin": lambda count, num_classes, embed_dim, bs: 8.0 * count,
}


def _check_sizes(flag: str, name: str, params: Mapping[str, str], opt: argparse.Namespace, num_classes: int) -> None:
    """Makes sure that this machine has the memory for parameters of the library that are sizes."""
    for key in params.keys() & SIZES:
        count = parse_value(params[key])
        if isinstance(count, int):
            needed = SIZES[key](count, num_classes, opt.embed_dim, _flag(opt, "bs", 1))
            check_memory(needed, f"{flag} {shown(f'{key}={params[key]}')} of {name}")


def _select_of_library(
    name: str, params: Mapping[str, str], opt: argparse.Namespace, groups: list[dict[str, Any]], num_classes: int
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Builds a loss of pytorch-metric-learning, and adds its group."""
    lr = parse_value(params["lr"]) if "lr" in params else _flag(opt, "proxy_lr", default_proxy_lr(name, opt.lr))
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not lr >= 0:
        raise UserError(f"--loss_params: lr of {name} takes a number of at least 0, not {shown(params['lr'])}")
    own = {key: value for key, value in params.items() if key != "lr"}
    known = {"num_classes": num_classes, **dict.fromkeys(("embedding_size", "descriptors_dim", "l"), opt.embed_dim)}
    given = {key: known[key] for key in LIBRARY_LOSSES[name].fills}
    if name == "ManifoldLoss" and "K" not in own:
        given["K"] = num_classes
    if name == "MarginLoss" and own.get("learn_beta", "false").lower() != "true":
        del given["num_classes"]
    _check_sizes("--loss_params", name, own, opt, num_classes)
    given |= _build_parts(name, own, opt, num_classes)
    loss = _build_part("--loss", "losses", name, own, **given)
    sampler = _select_sampler(name, opt, num_classes)
    criterion = LibraryLoss(name, loss, sampler, lr)
    if _flag(opt, "memory_size", 0):
        check_memory(4.0 * opt.memory_size * opt.embed_dim, f"--memory_size {opt.memory_size}")
        sizes = {"memory_size": opt.memory_size, "memory_start": opt.memory_start}
        criterion = MemoryLoss(name, loss, sampler, lr, embed_dim=opt.embed_dim, **sizes)
    if "lr" in params and not any(parameter.requires_grad for parameter in criterion.parameters()):
        raise UserError(f"--loss_params: {name} has no parameters that learn: drop lr")
    return criterion, [*groups, *_name_groups(name, criterion, opt.lr)]


# Flags that contradict each other


def check(opt: argparse.Namespace, get_default: Callable[[str], Any]) -> None:
    """Checks resolved flags of losses and sampling against each other, and tries library losses on a few numbers.

    Args:
        opt: the resolved flags.
        get_default: gives a flag's default.

    Raises:
        UserError: they can't work together.
    """
    names = names_of(opt.loss)
    if len(set(names)) < len(names):
        raise UserError(f"--loss {' '.join(names)} names a loss twice: weight it with --loss_weights instead")
    if opt.loss_weights is not None and len(opt.loss_weights) != len(names):
        raise UserError(f"--loss_weights gives {len(opt.loss_weights)} weight(s) for {len(names)} loss(es)")
    methods = [method for name in names for method in names_of(_sampling_of(name, opt) or [])]
    _check_parts(opt, names, methods)
    _check_memory(opt, names, methods)
    if opt.rho and "distance" not in methods:
        raise UserError("--rho needs --sampling distance: add it, or drop --rho")
    if opt.positives_per_anchor != "1" and not {"distance", "semihard", "softhard"} & set(methods):
        raise UserError("--positives_per_anchor is for --sampling distance, semihard or softhard: drop it")
    if opt.sampling_params and not methods:
        raise UserError("--sampling_params needs a --sampling that takes parameters: add it, or drop them")
    _refuse_twice(opt, names, methods, get_default)
    theirs = {*LIBRARY_LOSSES, *LIBRARY_MINERS} & {*names, *methods}
    if not (theirs or opt.loss_params or opt.sampling_params):
        return
    values = {**vars(opt), "embed_dim": 8, "memory_size": 32 if opt.memory_size else 0, "memory_start": 1}
    _try_out(repr(sorted((name, value) for name, value in values.items() if name in TRIED_FLAGS)))


def _sampling_of(loss: str, opt: argparse.Namespace) -> str | list[str] | None:
    return _choose_for_one(loss, opt.sampling) if _takes_tuples(requirements(loss)) else None


def _check_parts(opt: argparse.Namespace, names: Sequence[str], methods: Sequence[str]) -> None:
    """Checks that --distance, --reducer and --regularizer have something to act on."""
    theirs = [name for name in names if name in LIBRARY_LOSSES]
    if opt.distance and not theirs and not set(methods) & set(LIBRARY_MINERS):
        raise UserError(
            f"--distance is for losses and miners of pytorch-metric-learning: --loss {names[0]} has its own"
        )
    for flag in ("reducer", "regularizer"):
        if getattr(opt, flag) and not theirs:
            raise UserError(f"--{flag} is for losses of pytorch-metric-learning, not for --loss {names[0]}: drop it")
    for flag in ("distance", "reducer", "regularizer"):
        if getattr(opt, f"{flag}_params") and not getattr(opt, flag):
            raise UserError(f"--{flag}_params needs --{flag}: add it, or drop the parameters")
    if opt.regularizer and LIBRARY_REGULARIZERS[opt.regularizer] == "weight":
        without = [name for name in theirs if not set(LIBRARY_LOSSES[name].fills) >= set(_weights)]
        if without:
            raise UserError(f"--regularizer {opt.regularizer} is for a loss's own weights, which {without[0]} lacks")
    without = [name for name in theirs if name not in CENTERS]
    if opt.regularizer == "SparseCentersRegularizer" and without:
        raise UserError(f"--regularizer {opt.regularizer} is for {' or '.join(CENTERS)}, not for --loss {without[0]}")
    if opt.regularizer == "LpRegularizer" and opt.normalize:
        raise UserError(
            "--regularizer LpRegularizer has no effect on embeddings of length 1: drop it, or give --distance with "
            "--distance_params normalize_embeddings=false"
        )


def _check_memory(opt: argparse.Namespace, names: Sequence[str], methods: Sequence[str]) -> None:
    """Checks that --memory_size can be used with these losses and samplings."""
    if not opt.memory_size:
        return
    able = [name for name, row in LIBRARY_LOSSES.items() if row.takes_memory]
    unable = [name for name in names if name not in able]
    if unable:
        raise UserError(
            f"--memory_size can't be used with --loss {unable[0]}, which compares images inside the batch alone; it "
            f"can with {', '.join(able)}"
        )
    own = [method for method in methods if method not in LIBRARY_MINERS]
    if own:
        raise UserError(
            f"--memory_size can't be used with --sampling {own[0]}, which picks inside the batch alone: use none or a "
            "miner of pytorch-metric-learning"
        )
    if opt.memory_size < opt.bs:
        raise UserError(f"--memory_size {opt.memory_size} is less than --bs {opt.bs}: the memory must hold a batch")


def _refuse_twice(
    opt: argparse.Namespace, names: Sequence[str], methods: Sequence[str], get_default: Callable[[str], Any]
) -> None:
    """Refuses one value that is given in two ways, and flags that library losses don't read."""
    params = split_params("--loss_params", opt.loss_params, names)
    known = {key for name in names if name in LOSSES for key in inspect.signature(LOSSES[name]).parameters}
    of_losses = {name: list(values) for name, values in params.items() if name in LOSSES}
    of_methods = split_params("--sampling_params", opt.sampling_params, list(dict.fromkeys(methods)))
    both: list[tuple[str, dict[str, Any]]] = [
        ("loss", of_losses),
        ("sampling", {name: v for name, v in of_methods.items() if name not in LIBRARY_MINERS}),
    ]
    for flag, keys_of in both:
        for key in (key for keys in keys_of.values() for key in keys):
            if hasattr(opt, key) and key != "lr" and getattr(opt, key) != get_default(key) and key != "proxy_lr":
                raise UserError(f"--{key} and {key} in --{flag}_params are the same value: give one of them")
    if known:
        return
    for key in ("margin", "beta", "beta_lr", "beta_constant", "nu", "l2npair"):
        if getattr(opt, key) != get_default(key) and not (key == "margin" and "semihard" in methods):
            raise UserError(
                f"--{key} is not read by --loss {' '.join(names)}: its parameters are given by --loss_params"
            )


TRIED_FLAGS = (
    "loss", "loss_params", "loss_weights", "sampling", "sampling_params", "distance", "distance_params", "reducer",
    "reducer_params", "regularizer", "regularizer_params", "memory_size", "memory_start", "embed_dim", "lr", "proxy_lr",
    "lower_cutoff", "upper_cutoff", "positives_per_anchor", "rho", "margin", "beta", "beta_lr", "beta_constant", "nu",
    "l2npair", "bs"
)  # fmt: skip


@cache
def _try_out(flags: str) -> None:
    """Builds a loss and computes it twice on a few numbers, which shows what the library refuses only at work.

    Args:
        flags: the `TRIED_FLAGS` with their values, as text.

    Raises:
        UserError: it can't be built, or computed.
    """
    import ast

    opt = argparse.Namespace(**dict(ast.literal_eval(flags)))
    labels = torch.arange(4).repeat_interleave(4)
    with seeded(0):
        criterion, _ = loss_select(opt.loss, opt, [], num_classes=4)
        try:
            for _ in range(3):
                batch = F.normalize(torch.randn(16, 8) + 3 * torch.eye(8)[labels], dim=1).requires_grad_()
                value = criterion(batch, labels)
                value.backward()
                if value.ndim or batch.grad is None:
                    raise ValueError("it gives no single number that depends on the embeddings")
        except UserError:
            raise
        except Exception as error:  # the library raises anything at all
            words = [f"--{name} {' '.join(names_of(value))}" for name, value in _named_parts(opt)]
            raise UserError(f"{' with '.join(words)} can't work: {reason(error)}") from None


def _named_parts(opt: argparse.Namespace) -> Iterable[tuple[str, Any]]:
    parts = ("loss", "sampling", "distance", "reducer", "regularizer")
    return ((name, getattr(opt, name)) for name in parts if getattr(opt, name))


# The table of docs/methods.md


def table() -> str:
    """A Markdown table of every loss: name, whose it is, kind, what it needs, paper, and what is wrong with it."""
    lines = ["| `--loss` | kind | images per class | tuples | paper | note |", "|---|---|---|---|---|---|"]
    for name in [*LOSSES, *LIBRARY_LOSSES]:
        row, needs = _row(name), requirements(name)
        tuples = needs.tuple_kind if needs.sampling else "all pairs, or --sampling" if _takes_tuples(needs) else "–"
        tuples = f"{tuples}, by {needs.sampling}" if needs.sampling else tuples
        kind, paper = (getattr(row, field, getattr(Criterion, field)) for field in ("kind", "paper"))
        note = getattr(row, "note", "own")
        lines.append(f"| `{name}` | {kind} | {needs.samples_per_class} | {tuples} | {paper or '–'} | {note} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

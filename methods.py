"""What is trained, and how one step goes: training methods with their networks, losses, optimizers and schedules."""

from __future__ import annotations

import argparse
import copy
import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_multi_avg_fn

import losses
import netlib
from auxiliaries import (
    FlagParser,
    UserError,
    check_memory,
    check_params,
    copy_from_first_rank,
    drawing_apart,
    gather_rows,
    nearest_name,
    notice,
    number,
    parse_value,
    ranks,
    reason,
    seed_everything,
    shown,
    sum_gradients,
    upload,
)

# Classes of torch.optim and torch.optim.lr_scheduler. They are written down so that --help needn't build anything.
OPTIMIZERS = (
    "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adafactor", "SGD", "ASGD", "RMSprop", "Adagrad", "Adadelta",
)  # fmt: skip
REFUSED_OPTIMIZERS = {
    "LBFGS": "it evaluates the loss several times per step, and a loss that samples tuples would differ each time",
    "SparseAdam": "it takes sparse gradients only, and no layer here has them",
    "Muon": "it takes matrices only, and every network here also has vectors and convolutions",
    "Rprop": "it needs the gradient of all images at once, and has no weight decay",
}
RESERVED_PARAMS = ("params", "maximize", "differentiable", "capturable")
SHORT_SCHEDULERS = ("step", "exp", "none")
SCHEDULERS = (
    *SHORT_SCHEDULERS, "StepLR", "MultiStepLR", "ExponentialLR", "ConstantLR", "LinearLR", "PolynomialLR",
    "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR", "ReduceLROnPlateau",
)  # fmt: skip
REFUSED_SCHEDULERS = {
    "LambdaLR": "it takes a function, which flags can't give",
    "MultiplicativeLR": "it takes a function, which flags can't give",
    "SequentialLR": "it takes other schedules, which flags can't give",
    "ChainedScheduler": "it takes other schedules, which flags can't give",
}
RESERVED_SCHEDULE_PARAMS = ("optimizer", "last_epoch", "scale_fn", "epochs", "steps_per_epoch")
INTERVALS = ("epoch", "iteration")
PARTS = ("trunk", "embedder", "loss", "classifier", "generator")  # of what is trained: prefixes of --optim_params

# The short flags, and the parameters that say the same.
SHORT_FLAGS = {
    ("optim_params", "class"): "optimizer",
    ("optim_params", "lr"): "lr",
    ("optim_params", "weight_decay"): "decay",
    ("optim_params", "embedder.lr"): "fc_lr_mul",
    ("optim_params", "loss.lr"): ("beta_lr", "proxy_lr"),
    ("scheduler_params", "gamma"): "gamma",
    ("scheduler_params", "tau"): "tau",
    ("scheduler_params", "milestones"): "tau",
    ("scheduler_params", "base_lr"): "lr",  # of CyclicLR
    ("scheduler_params", "max_lr"): "lr",  # of OneCycleLR; CyclicLR's is another value
}

Group = dict[str, Any]


def not_refused(flag: str, refused: Mapping[str, str]) -> Callable[[str], str]:
    """An argparse type: a name that is not one of those that can't be used, for which it gives the reason."""

    def parse(text: str) -> str:
        if text in refused:
            raise UserError(f"{flag} {text} can't be used here: {refused[text]}")
        return text

    return parse


def _percent(text: str) -> float:
    """An argparse type: a number above 0 and at most 100."""
    value = float(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 100")
    return value


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of training method, optimizer and schedule."""
    # fmt: off
    add = parser.add_argument_group("training method").add_argument
    add("--training_method", choices=METHODS, default="MetricLossOnly", fixed=True, help="what is trained, and how")
    add("--classifier_loss_weight", type=number(float, 0), fixed=True,
        help="weight of the cross entropy of a classifier of the embeddings, which any method with labels can add "
        "(default: 0.1 for TrainWithClassifier, otherwise 0: no classifier)")
    add("--classifier_hidden", type=number(int, 1), nargs="*", default=[], metavar="N", fixed=True,
        help="widths of the classifier's hidden layers, each followed by a ReLU")
    add("--s2sd_dims", type=number(int, 1), nargs="+", default=[512, 1024, 1536, 2048], metavar="N", fixed=True,
        help="S2SD: dimensions of the wider embeddings that the network learns from")
    add("--s2sd_weight", type=number(float, 0), default=50.0, help="S2SD: weight of the divergence of similarities")
    add("--s2sd_temperature", type=number(float, 0, exclusive=True), default=1.0,
        help="S2SD: temperature of the similarities")
    add("--s2sd_feature_start", type=number(int, 0), default=1000, metavar="N",
        help="S2SD: iterations after which the network also learns from the features' similarities")
    add("--cascade_shares", type=_percent, nargs="+", default=[100.0, 50.0, 20.0], metavar="PERCENT", fixed=True,
        help="CascadedEmbeddings: share of the pairs kept by the depth before it on which each depth learns, the "
        "hardest ones, %%")
    add("--metric_alone_epochs", type=number(int, 0), default=0, metavar="N",
        help="DeepAdversarialMetricLearning: number of first epochs without the generator")
    add("--generator_alone_epochs", type=number(int, 0), default=0, metavar="N",
        help="DeepAdversarialMetricLearning: number of epochs after these in which only the generator learns")
    add("--triplets_per_anchor", type=number(int, 1), default=100, metavar="N",
        help="DeepAdversarialMetricLearning: random triplets of each image that the generator gets; fewer take less "
        "memory")
    add("--synth_margin", type=number(float, 0), default=0.01,
        help="DeepAdversarialMetricLearning: margin of the losses on generated negatives")
    add("--hard_loss_weight", type=number(float, 0), default=0.1,
        help="DeepAdversarialMetricLearning: weight of the distance of generated negatives to anchors")
    add("--reg_loss_weight", type=number(float, 0), default=0.1,
        help="DeepAdversarialMetricLearning: weight of the distance of generated negatives to real ones")
    add("--adv_loss_weight", type=number(float, 0), default=0.1,
        help="DeepAdversarialMetricLearning: weight of the loss that makes generated negatives hard")
    add("--synth_loss_weight", type=number(float, 0), default=0.1,
        help="DeepAdversarialMetricLearning: weight of the network's loss on generated negatives")
    add("--freeze_trunk_epochs", type=number(int, 0), default=0, metavar="N",
        help="train only what is new, embedding layer and loss parameters, for the first N epochs; Proxy-Anchor's "
        "warm-up is 1 or 5")
    add("--ema", type=number(float, 0, exclusive=True, below=1), metavar="DECAY",
        help="evaluate and keep an exponential moving average of the network's weights; try 0.999")

    add = parser.add_argument_group("optimization").add_argument
    add("--optimizer", type=not_refused("--optimizer", REFUSED_OPTIMIZERS), default="Adam", choices=OPTIMIZERS,
        metavar="NAME", fixed=True, help=f"class of torch.optim: {', '.join(OPTIMIZERS)}")
    add("--optim_params", action="params", default={},
        help="parameters of --optimizer, such as eps=1 betas=[0.9,0.99]; those of one part have its name before them, "
        f"such as trunk.lr=1e-6 or loss.class=SGD, with the parts {', '.join(PARTS)}")
    add("--lr", type=number(float, 0), default=1e-5, help="learning rate of the network")
    add("--fc_lr_mul", type=number(float, 0), default=0.0,
        help="learning rate of the embedding layer as a multiple of --lr; 0: it shares --lr")
    add("--decay", type=number(float, 0), default=4e-4, help="weight decay of the network")
    add("--scheduler", type=not_refused("--scheduler", REFUSED_SCHEDULERS), default="step", choices=SCHEDULERS,
        metavar="NAME",
        help="step: multiply all learning rates by --gamma at --tau; exp: after every epoch; none: keep them; or a "
        f"class of torch.optim.lr_scheduler: {', '.join(SCHEDULERS[3:])}, which acts after every epoch "
        "(ReduceLROnPlateau: after every evaluation, on --eval_metric_for_best_epoch)")
    add("--scheduler_params", action="params", default={},
        help="parameters of --scheduler, such as step_size=10 gamma=0.5; interval=iteration: it acts after every "
        "iteration; a period or total that isn't given is the whole training")
    add("--gamma", type=number(float, 0),
        help="factor of all learning rates at a step of --scheduler (default: 0.3 for step and exp)")
    add("--tau", type=number(int, 1), nargs="*",
        help="epochs after which --scheduler step acts (default: 30 55)")
    add("--clip_grad_norm", type=number(float, 0, exclusive=True), metavar="NORM",
        help="scale the gradient of all parameters together down to this norm where it is larger")
    add("--clip_grad_value", type=number(float, 0, exclusive=True), metavar="VALUE",
        help="cut each entry of the gradient off at ±VALUE; Proxy-Anchor uses 10")
    add("--accumulate", type=number(int, 1), default=1, metavar="N",
        help="step once for N batches, with the mean of their gradients; for classification losses only, and each "
        "batch keeps its own BatchNorm statistics")
    add("--fused", action="switch", default=None, machine=True, compared=False,
        help="update all parameters in one go, where the optimizer can: Adam, AdamW, SGD, Adagrad (default: only with "
        "--fast)")
    # fmt: on


# What follows from the flags


def resolve_optimization(opt: argparse.Namespace) -> None:
    """Checks optimizer and schedule, and moves to the short flags what the mappings say of the same values.

    Raises:
        UserError: a name or a parameter is wrong.
    """
    flag, optim_params = "--optim_params", dict(opt.optim_params)
    if "class" in optim_params:
        opt.optimizer = find_class(f"{flag} class", optim_params.pop("class"))
    for key, name in (("lr", "lr"), ("weight_decay", "decay")):
        if key in optim_params:
            text = optim_params.pop(key)
            value = parse_value(text)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"{flag}: {key} takes a number of at least 0, not {shown(text)}")
            setattr(opt, name, float(value))
    opt.optim_params = optim_params
    if opt.classifier_loss_weight is None:
        opt.classifier_loss_weight = METHODS[opt.training_method].default_classifier_loss_weight
    if opt.scheduler in SHORT_SCHEDULERS:
        _resolve_short_schedule(opt)
    schedule_params(opt)
    settings = optimizer_settings(opt)
    if opt.optim_params or opt.scheduler_params or opt.optimizer != "Adam" or opt.scheduler not in SHORT_SCHEDULERS:
        for name, params in settings.values():
            _try_out(opt, name, params)


def find_class(flag: str, name: str) -> str:
    """The name of an optimizer that is given as a parameter.

    Raises:
        UserError: it is unknown, or can't be used.
    """
    name = not_refused(flag, REFUSED_OPTIMIZERS)(name)
    if name not in OPTIMIZERS:
        near = nearest_name(name, OPTIMIZERS)
        raise UserError(f"{flag}={shown(name)} is unknown{near}; it takes one of {', '.join(OPTIMIZERS)}")
    return name


def _resolve_short_schedule(opt: argparse.Namespace) -> None:
    """Fills --gamma and --tau, from --scheduler_params or by default."""
    known = {"step": ("gamma", "tau"), "exp": ("gamma",), "none": ()}[opt.scheduler]
    for key, text in opt.scheduler_params.items():
        if key not in known:
            listed = f"; it takes {', '.join(known)}" if known else "; it takes none"
            raise UserError(
                f"--scheduler_params: {opt.scheduler} has no parameter {shown(key)}{nearest_name(key, known)}{listed}"
            )
        value = parse_value(text)
        if key == "gamma" and not (type(value) in (int, float) and 0 <= value < math.inf):
            raise UserError(f"--scheduler_params: gamma takes a number of at least 0, not {shown(text)}")
        if key == "tau" and not (isinstance(value, list) and all(type(epoch) is int and epoch > 0 for epoch in value)):
            raise UserError(f"--scheduler_params: tau takes a list of epochs, such as [30,55], not {shown(text)}")
        setattr(opt, key, float(value) if key == "gamma" else value)
    opt.scheduler_params = {}
    opt.gamma = 0.3 if opt.gamma is None else opt.gamma
    opt.tau = [30, 55] if opt.tau is None else opt.tau


def refuse_doubles(given: Collection[str], opt: argparse.Namespace) -> None:
    """Checks that no value is given both by a short flag and in a mapping.

    Args:
        given: the flags that the user gave, other than those stored with a run.
        opt: all flags.

    Raises:
        UserError: one is.
    """
    for (mapping, key), short in SHORT_FLAGS.items():
        if key not in (getattr(opt, mapping) or {}) or (key == "max_lr" and opt.scheduler == "CyclicLR"):
            continue
        for name in [short] if isinstance(short, str) else short:
            if name in given:
                value = getattr(opt, mapping)[key]
                raise UserError(f"--{name} and --{mapping} {key}={value} say the same: drop --{name}")


def refuse_other_methods_flags(given: Collection[str], training_method: str) -> None:
    """Checks that no flag is given that only another training method reads.

    Raises:
        UserError: one is.
    """
    own = {*METHODS[training_method].flags, *METHODS[training_method].build_flags}
    for name, method in METHODS.items():
        for flag in (*method.flags, *method.build_flags):
            if flag in given and flag not in own:
                raise UserError(f"--{flag} is for --training_method {name}: drop it, or give that method")


def optimizer_settings(opt: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """The optimizer's class and its parameters for each of `PARTS`, from --optimizer and --optim_params.

    Parameters without a part's name go to all parts of the class --optimizer.

    Raises:
        UserError: a part, a class or a parameter is unknown, or a value has the wrong type.
    """
    of_part: dict[str, dict[str, str]] = {part: {} for part in PARTS}
    shared: dict[str, str] = {}
    for key, text in opt.optim_params.items():
        part, dot, name = key.partition(".")
        if not dot:
            shared[key] = text
        elif part in PARTS:
            of_part[part][name] = text
        else:
            near = nearest_name(part, PARTS)
            raise UserError(f"--optim_params: there is no part {shown(part)}{near}; the parts are {', '.join(PARTS)}")
    common = check_params("--optim_params", shared, getattr(torch.optim, opt.optimizer), RESERVED_PARAMS)
    settings = {}
    for part, own in of_part.items():
        name = find_class(f"--optim_params {part}.class", own.pop("class")) if "class" in own else opt.optimizer
        reserved = (*RESERVED_PARAMS, "initial_accumulator_value")  # which Adagrad takes for all parts at once
        kind = getattr(torch.optim, name)
        params = check_params(f"--optim_params {part}", own, kind, reserved)
        fused = {"fused": True} if opt.fused and "fused" in inspect.signature(kind).parameters else {}
        settings[part] = (name, {**fused, **(common if name == opt.optimizer else {}), **params})
    return settings


def schedule_params(opt: argparse.Namespace) -> dict[str, Any]:
    """The parameters of --scheduler, its `interval` included.

    Raises:
        UserError: a parameter is unknown or missing, or has the wrong type.
    """
    if opt.scheduler in SHORT_SCHEDULERS:
        return {"gamma": opt.gamma, "tau": opt.tau}
    params = dict(opt.scheduler_params)
    interval = params.pop("interval", "epoch")
    kind = getattr(lr_scheduler, opt.scheduler)
    is_plateau = kind is ReduceLROnPlateau
    if interval not in INTERVALS:
        raise UserError(f"--scheduler_params: interval is epoch or iteration, not {shown(interval)}")
    if is_plateau and interval != "epoch":
        raise UserError("--scheduler ReduceLROnPlateau acts after every evaluation: drop interval")
    reserved = (*RESERVED_SCHEDULE_PARAMS, *(["mode"] if is_plateau else []))
    typed = check_params("--scheduler_params", params, kind, reserved)
    takes = inspect.signature(kind).parameters
    for name, value in (("gamma", opt.gamma), ("milestones", opt.tau)):
        if value is not None and name in takes:
            typed.setdefault(name, value)
    for name, value in typed.items():  # a rate below 0 would climb
        numbers = [one for one in (value if isinstance(value, list) else [value]) if type(one) in (int, float)]
        if name != "threshold" and not all(0 <= one < math.inf for one in numbers):
            raise UserError(f"--scheduler_params: {name} takes a number of at least 0, not {shown(value)}")
    filled = {"optimizer", "T_max", "total_steps", "base_lr", *(["max_lr"] if opt.scheduler == "OneCycleLR" else [])}
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in typed and name not in filled:
            raise UserError(f"--scheduler {opt.scheduler} needs --scheduler_params {name}=…")
    return {**typed, "interval": interval}


def _try_out(opt: argparse.Namespace, name: str, params: Mapping[str, Any]) -> None:
    """Makes a step of an optimizer and of the schedule on a parameter of its own.

    Raises:
        UserError: one of them refuses its parameters.
    """
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    group = {"params": [parameter], "name": "try", "part": "trunk"}
    what, kind = "--optim_params", name
    try:
        optimizer = getattr(torch.optim, name)([group], **{"lr": opt.lr, "weight_decay": opt.decay, **params})
        optimizer.step()
        what, kind = "--scheduler_params", opt.scheduler
        optimizer.zero_grad()
        schedule = Schedule(opt.scheduler, schedule_params(opt), num_steps=1_000_000)
        scheduler: Any = schedule.build(optimizer)
        for _ in range(3):
            optimizer.step()
            scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    except UserError:
        raise
    except Exception as error:  # torch raises anything at all on odd values
        raise UserError(f"{what}: {kind} can't take these values ({reason(error)})") from None


# Optimizers and schedules


@dataclass(frozen=True)
class Schedule:
    """A schedule of the learning rates.

    Attributes:
        name: one of `SCHEDULERS`.
        params: its parameters, `interval` included; for a short name `gamma` and `tau`.
        num_steps: steps of the whole training, in its interval.
        metric: the metric of each evaluation that ReduceLROnPlateau follows.
        mode: whether that is best at its `max` or `min`.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    num_steps: int = 1
    metric: str = ""
    mode: str = "max"

    @property
    def interval(self) -> str:
        """When it acts: after every `epoch`, `iteration` or `evaluation`."""
        return "evaluation" if self.name == "ReduceLROnPlateau" else self.params.get("interval", "epoch")

    def describe(self) -> dict[str, Any]:
        """What makes it another schedule when it changes, as plain values."""
        if self.name in SHORT_SCHEDULERS:
            return {"name": self.name, **self.params}
        depends = {"metric": self.metric} if self.interval == "evaluation" else self._filled()
        return {"name": self.name, **self.params, **depends}

    def _filled(self) -> dict[str, int]:
        """Periods and totals that were not given: the whole training."""
        name = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps"}.get(self.name)
        return {name: self.num_steps} if name and name not in self.params else {}

    def build(self, optimizer: torch.optim.Optimizer) -> Any:
        """Builds its scheduler for an optimizer.

        Raises:
            UserError: it ends before the training does.
        """
        if self.name == "step":
            return lr_scheduler.MultiStepLR(optimizer, self.params["tau"], self.params["gamma"])
        if self.name == "exp":
            return lr_scheduler.ExponentialLR(optimizer, self.params["gamma"])
        if self.name == "none":
            return lr_scheduler.ConstantLR(optimizer, factor=1)
        params = {name: value for name, value in self.params.items() if name != "interval"} | self._filled()
        rates = [group["lr"] for group in optimizer.param_groups]
        if self.name == "OneCycleLR":
            params.setdefault("max_lr", rates)
            if params["total_steps"] < self.num_steps < 1_000_000:
                raise UserError(
                    f"--scheduler_params: OneCycleLR ends after total_steps={params['total_steps']}, before the "
                    f"{self.num_steps} steps of this training: raise it, or drop it"
                )
        if self.name == "CyclicLR":
            params.setdefault("base_lr", rates)
        if self.name == "ReduceLROnPlateau":
            params["mode"] = self.mode
        return getattr(lr_scheduler, self.name)(optimizer, **params)


class Optimization:
    """The optimizers of named parameter groups, one for each class, and the schedule of their learning rates.

    Args:
        groups: parameter groups with `name`, `part` (one of `PARTS`), `lr` and `weight_decay`.
        settings: class and parameters of each part, see `optimizer_settings`; by default Adam.
        schedule: the schedule of all learning rates.
        clip_grad_norm: the largest norm of the gradient of all parameters together.
        clip_grad_value: the largest absolute value of an entry of the gradient.
        accumulate: number of batches whose mean gradient makes one step.
        steps_per_epoch: number of steps in an epoch.
        scaler: scales the loss of a network that computes in 16 bits, so that small gradients are not lost.
        trunk: the parameters of the backbone, of which each rank has the gradient of its share of a batch.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        settings: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
        schedule: Schedule | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        accumulate: int = 1,
        steps_per_epoch: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        trunk: Iterable[nn.Parameter] = (),
    ):
        self._of_shares = {id(parameter) for parameter in trunk}
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.names = [group["name"] for group in groups]
        by_class: dict[str, list[Group]] = {}
        for group in groups:
            name, params = (settings or {}).get(group["part"], ("Adam", {}))
            by_class.setdefault(name, []).append({**group, **params, "class": name})
        self.optimizers: list[torch.optim.Optimizer] = [
            getattr(torch.optim, name)(of_class) for name, of_class in by_class.items()
        ]
        self.schedule = schedule or Schedule("none", {"gamma": 1.0, "tau": []})
        self.schedulers = [self.schedule.build(optimizer) for optimizer in self.optimizers]
        for group in self.groups():
            group.setdefault("initial_lr", group["lr"])
        self.clip_grad_norm, self.clip_grad_value = clip_grad_norm, clip_grad_value
        self.accumulate, self.steps_per_epoch = accumulate, steps_per_epoch
        self._waiting = 0  # batches whose gradients wait for a step

    def groups(self) -> list[Group]:
        """The optimizers' parameter groups, in the order in which they were given."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return sorted(groups, key=lambda group: self.names.index(group["name"]))

    def step(self, loss: torch.Tensor) -> bool:
        """Back-propagates a loss, and makes a step unless more batches are waited for; returns whether it did."""
        if self._waiting == 0:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss / self.accumulate if self.accumulate > 1 else loss).backward()
        self._waiting += 1
        if self._waiting < self.accumulate:
            return False
        self._apply()
        return True

    def _apply(self) -> None:
        parameters = [parameter for group in self.groups() for parameter in group["params"]]
        if self._waiting < self.accumulate:  # the epoch ended before: their mean, too
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.accumulate / self._waiting)
        self._waiting = 0
        sum_gradients(parameters, self._of_shares)
        scaled = [optimizer for optimizer in self.optimizers if _has_gradient(optimizer)]
        if self.clip_grad_norm is not None or self.clip_grad_value is not None:
            for optimizer in scaled:
                self.scaler.unscale_(optimizer)
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
        if self.clip_grad_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_grad_value)
        for optimizer in self.optimizers:
            if optimizer in scaled:
                self.scaler.step(optimizer)
            else:
                optimizer.step()  # schedules ask for it
        self.scaler.update()
        if self.schedule.interval == "iteration":
            self._advance()

    def _advance(self, *arguments: float) -> None:
        """Makes a step of the schedule.

        Raises:
            UserError: it gives a learning rate below 0.
        """
        for scheduler in self.schedulers:
            scheduler.step(*arguments)
        lowest = min(group["lr"] for group in self.groups())
        if lowest < -1e-12:  # more than a rounding error
            raise UserError(
                f"--scheduler {self.schedule.name} gives a learning rate of {lowest:.3g}, which is below 0: change "
                "--scheduler_params"
            )

    def end_epoch(self) -> bool:
        """Makes the step that waits for more batches, and advances the schedule; returns whether it made one."""
        is_waiting = self._waiting > 0
        if is_waiting:
            self._apply()
        if self.schedule.interval == "epoch":
            self._advance()
        return is_waiting

    def end_evaluation(self, value: float) -> None:
        """Tells a schedule that follows it the selection metric of an evaluation."""
        if self.schedule.interval == "evaluation":
            self._advance(value)

    def learning_rates(self) -> dict[str, float]:
        """The network's learning rate, and those of the other parameter groups by their names."""
        first, *others = self.groups()
        return {"Learning Rate": first["lr"], **{f"Learning Rate {group['name']}": group["lr"] for group in others}}

    def state_dict(self) -> dict[str, Any]:
        """The states of optimizers and schedule, for a checkpoint."""
        first, *further = [optimizer.state_dict() for optimizer in self.optimizers]
        scheduler, *more = [scheduler.state_dict() for scheduler in self.schedulers]
        schedule = {"schedule": self.schedule.describe(), "state": scheduler, **({"further": more} if more else {})}
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        further_states = {"further_optimizers": further} if further else {}
        return {"optimizer": first, **further_states, "scheduler": schedule, **scaler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a checkpoint's state after `state["epoch"]`; see `MetricLossOnly.load_state_dict`.

        Raises:
            ValueError: it is the state of other optimizers or parameters.
        """
        saved = [state["optimizer"], *state.get("further_optimizers", [])]
        classes = [one["param_groups"][0].get("class", "Adam") for one in saved]
        own = [optimizer.param_groups[0]["class"] for optimizer in self.optimizers]
        if classes != own:
            raise ValueError(f"it was trained with {' and '.join(classes)}, not with {' and '.join(own)}")
        for optimizer, one in zip(self.optimizers, saved):
            optimizer.load_state_dict({**one, "param_groups": optimizer.state_dict()["param_groups"]})
            for parameter, values in optimizer.state.items():
                shapes = [value.shape for name, value in values.items() if name not in ("row_var", "col_var")]
                if any(shape and shape != parameter.shape for shape in shapes):  # Adafactor's are shorter
                    raise ValueError("the optimizer's state is of other parameters")
            _check_state_names(optimizer)
        if self.scaler.is_enabled() and "scaler" in state:
            self.scaler.load_state_dict(dict(state["scaler"]))
        self._restore_schedule(state, [group for one in saved for group in one["param_groups"]])

    def _restore_schedule(self, state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
        """Continues the same schedule, or follows a changed one from the first epoch."""
        saved = state.get("scheduler")  # run folders of version 1.0.0 lack it
        if saved and saved["schedule"] == self.schedule.describe():
            for scheduler, one in zip(self.schedulers, [saved["state"], *saved.get("further", [])]):
                _continue_schedule(scheduler, one, groups)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about steps of the schedule without steps of the optimizer
            for arguments in self._steps_so_far(state):
                self._advance(*arguments)

    def _steps_so_far(self, state: Mapping[str, Any]) -> Iterator[tuple[float, ...]]:
        """The arguments of each step that the schedule would have made."""
        if self.schedule.interval == "evaluation":
            rows = state["history"]["val"]
            return ((row[self.schedule.metric],) for row in rows if row["Epochs"] > 0 and self.schedule.metric in row)
        per_epoch = self.steps_per_epoch if self.schedule.interval == "iteration" else 1
        return (() for _ in range(state["epoch"] * per_epoch))


def _has_gradient(optimizer: torch.optim.Optimizer) -> bool:
    """Whether any of its parameters has a gradient."""
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def _check_state_names(optimizer: torch.optim.Optimizer) -> None:
    """Makes sure that the state of each parameter has what a step makes of it.

    Raises:
        ValueError: one lacks something.
    """
    kind: Any = type(optimizer)
    for group in optimizer.param_groups:
        wanted: dict[int, set[str]] = {}  # by number of dimensions
        for parameter in group["params"]:
            found = set(optimizer.state.get(parameter, {}))
            if found and parameter.ndim not in wanted:
                example = nn.Parameter(torch.zeros([1] * parameter.ndim))
                example.grad = torch.zeros_like(example)
                fresh = kind([{**group, "params": [example]}])
                fresh.step()
                wanted[parameter.ndim] = set(fresh.state[example])
            missing = found and wanted[parameter.ndim] - found
            if missing:
                raise ValueError(f"the optimizer's state lacks {sorted(missing)[0]}")


def _continue_schedule(scheduler: Any, state: Mapping[str, Any], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Takes over the state of the same schedule, and the shares of the initial learning rates that were left."""
    groups = scheduler.optimizer.param_groups
    own = {name: value for name, value in scheduler.state_dict().items() if name in ("max_lrs", "min_lrs")}
    if "base_lrs" in state:
        own["base_lrs"] = [group["initial_lr"] for group in groups]
    for name, value in scheduler.state_dict().items():
        numbers = (int, float) if isinstance(value, int | float) else type(state.get(name))
        if name in state and not isinstance(state[name], numbers):
            raise ValueError(f"{name} of the schedule is not a number")
    scheduler.load_state_dict({**state, **own})
    by_name = {group.get("name"): group for group in saved_groups}
    whole = by_name.get("network") or by_name.get("backbone")
    for position, group in enumerate(groups):
        # the network's group may have been split, or joined, since then
        saved = by_name.get(group["name"]) or (whole if group["part"] in ("trunk", "embedder") else None)
        saved = saved or saved_groups[position]
        is_same = group["initial_lr"] == saved["initial_lr"]
        share = saved["lr"] / saved["initial_lr"] if saved["initial_lr"] else 1.0
        group["lr"] = saved["lr"] if is_same else group["initial_lr"] * share
        if getattr(scheduler, "cycle_momentum", False):
            cycled = {name: saved[name] for name in ("momentum", "betas") if name in group}
            group.update({name: tuple(value) if name == "betas" else value for name, value in cycled.items()})
    scheduler._last_lr = [group["lr"] for group in groups]


# Training methods


def _further_group(name: str, network: nn.Module, opt: argparse.Namespace, part: str = "") -> Group:
    """The parameter group of a further network, with the rate and the weight decay of the trunk."""
    return {
        "name": name,
        "part": part or name,
        "params": list(network.parameters()),
        "lr": opt.lr,
        "weight_decay": opt.decay,
    }


class MetricLossOnly:
    """Trains a network on the metric loss of its embeddings.

    With a classifier, the cross entropy of its logits is added.

    Args:
        net: images `(B, 3, H, W)` uint8 to embeddings `(B, D)`.
        criterion: embeddings `(B, D)` and labels `(B,)` to a scalar.
        optimization: of all parameters.
        classifier: embeddings `(B, D)` to logits `(B, C)`.
        classifier_loss_weight: weight of its cross entropy.
        freeze_trunk_epochs: number of first epochs in which the backbone's parameters don't learn.
        ema: decay of a moving average of the network's parameters, which then is what is evaluated.

    Attributes:
        networks: the bare networks by their name in checkpoints.
        default_classifier_loss_weight: the weight of the classifier's loss unless the user gives another one.
        knows_labels: whether it learns from the images' labels.
        is_cascade: whether its network has a head at several depths, see `netlib.CascadeBackbone`.
        samples_per_class: images per class in a batch, unless the user gives another number; None: the loss's.
        flags: the flags that the constructor has keywords for.
        build_flags: the flags that only `build_networks` reads.
    """

    default_classifier_loss_weight = 0.0
    knows_labels = True
    is_cascade = False
    samples_per_class: int | None = None
    flags: tuple[str, ...] = ("classifier_loss_weight", "freeze_trunk_epochs", "ema")
    build_flags: tuple[str, ...] = ("classifier_hidden",)

    def __init__(
        self,
        net: netlib.EmbeddingNet,
        criterion: nn.Module,
        optimization: Optimization,
        classifier: nn.Module | None = None,
        classifier_loss_weight: float = 1.0,
        freeze_trunk_epochs: int = 0,
        ema: float | None = None,
    ):
        self.net, self.criterion, self.optimization = net, criterion, optimization
        self.networks: dict[str, nn.Module] = {"state_dict": net, "criterion": criterion}
        self.classifier, self.classifier_loss_weight = classifier, classifier_loss_weight
        if classifier is not None:
            self.networks["classifier"] = classifier
        self.freeze_trunk_epochs = freeze_trunk_epochs
        self._trunk = [parameter for parameter in net.backbone.parameters() if parameter.requires_grad]
        self.averaged = copy.deepcopy(net).requires_grad_(False) if ema else None
        self._average = get_ema_multi_avg_fn(ema) if ema else None
        self._last_batch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._batches = 0  # of this epoch

    @classmethod
    def build_networks(
        cls, opt: argparse.Namespace, net: netlib.EmbeddingNet, num_classes: int
    ) -> tuple[dict[str, Any], list[Group]]:
        """Builds, from the resolved flags, what is trained beside the network and its loss.

        Returns:
            Networks by keyword of the constructor, and their parameter groups.
        """
        if not opt.classifier_loss_weight:
            return {}, []
        classifier = netlib.mlp(net.embed_dim, *opt.classifier_hidden, num_classes)
        return {"classifier": classifier}, [_further_group("classifier", classifier, opt)]

    @property
    def evaluated(self) -> netlib.EmbeddingNet:
        """The network that is evaluated: the averaged one, if there is one."""
        return self.net if self.averaged is None else self.averaged

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """A batch's images `(B, 3, H, W)` uint8, or this rank's share of them, to features of all of them.

        Every rank runs the backbone on its share alone, and computes all that follows, the loss included, on the whole
        batch: tuples, random draws and gradients are those of a single process.
        """
        self._batches += 1
        with drawing_apart(self._batches, images.device):
            own = self.net.features(images)
        return gather_rows(own, len(own) * ranks().count)  # (B, features)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """A batch's images `(B, 3, H, W)` uint8, or this rank's share of them, to embeddings `(B, D)` of all."""
        return self.net.embed_features(self.features(images))

    def step(self, images: torch.Tensor, labels: torch.Tensor, epoch: int) -> dict[str, torch.Tensor]:
        """Learns from one batch.

        Args:
            images: `(B, 3, H, W)` uint8, on the network's device; of several ranks, each has its share of them.
            labels: `(B,)` int64, of the whole batch, on the host, where tuples are decided on.
            epoch: counted from 1.

        Returns:
            The `loss` and its parts, detached scalars on the device.
        """
        embeddings = self.embed(images)  # (B, D)
        return self.learn(self.criterion(embeddings, labels), embeddings, labels)

    def learn(
        self, loss: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor, **parts: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Adds the classifier's loss, if there is one, and makes a step.

        Args:
            loss: the method's own loss.
            embeddings: `(B, D)`.
            labels: `(B,)` int64, on the host.
            parts: what the loss consists of, for the records.

        Returns:
            What `step` returns.
        """
        if self.classifier is not None:
            classification = F.cross_entropy(self.classifier(embeddings), upload(labels, embeddings.device))
            parts = {**(parts or {"metric": loss}), "classifier": classification}
            loss = loss + self.classifier_loss_weight * classification
        self._last_batch = embeddings.detach(), labels
        if self.optimization.step(loss):
            self._update_average()
        return {name: value.detach() for name, value in {"loss": loss, **parts}.items()}

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.averaged is None or self._average is None:
            return
        self._average(list(self.averaged.parameters()), list(self.net.parameters()), 0)
        for averaged, own in zip(self.averaged.buffers(), self.net.buffers()):
            averaged.copy_(own)

    def start_epoch(self, epoch: int) -> None:
        """Puts everything into training mode."""
        self._batches = 0
        for network in self.networks.values():
            network.train()
        if self.freeze_trunk_epochs:
            for parameter in self._trunk:
                parameter.requires_grad_(epoch > self.freeze_trunk_epochs)

    def end_epoch(self) -> None:
        """Advances the schedule of the learning rates; from here on all ranks have the networks of the first one."""
        if self.optimization.end_epoch():
            self._update_average()
        networks = [*self.networks.values(), *([self.averaged] if self.averaged is not None else [])]
        copy_from_first_rank(value for network in networks for value in (*network.parameters(), *network.buffers()))

    def end_evaluation(self, value: float) -> None:
        """Takes the selection metric of an evaluation, which the schedule may follow."""
        self.optimization.end_evaluation(value)

    def learning_rates(self) -> dict[str, float]:
        """The network's learning rate, and those of the other parameter groups by their names."""
        return self.optimization.learning_rates()

    @torch.no_grad()
    def statistics(self) -> dict[str, torch.Tensor]:
        """Statistics of the last step's batch, tuples and loss: scalars on the device."""
        return losses.statistics(self.criterion, *self._last_batch) if self._last_batch else {}

    def state_dict(self) -> dict[str, Any]:
        """The states of the networks, the optimizers and the schedule, for a checkpoint.

        With an averaged network, `state_dict` is that one, and `raw_state_dict` the one that learns.
        """
        state = {name: network.state_dict() for name, network in self.networks.items()}
        if self.averaged is not None:
            state |= {"state_dict": self.averaged.state_dict(), "raw_state_dict": state["state_dict"]}
        return {**state, **self.optimization.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a checkpoint's state after `state["epoch"]`.

        Flags that have changed since then take effect: weight decay at once; a changed learning rate scales the
        current one; a changed schedule counts as having been followed from the first epoch.

        Raises:
            UserError: it is the state of another network, loss or optimizer.
        """
        try:
            for name, network in self.networks.items():
                own = "raw_state_dict" if name == "state_dict" and "raw_state_dict" in state else name
                network.load_state_dict(state[own])
            if self.averaged is not None:
                self.averaged.load_state_dict(state["state_dict"])
            self.optimization.load_state_dict(state)
        except Exception as error:  # torch raises anything at all on the state of something else
            raise UserError(
                f"the run's network, loss or optimizer differs from what these flags give: drop those that changed "
                f"({reason(error)})"
            ) from None


class TrainWithClassifier(MetricLossOnly):
    """Trains a network on the metric loss of its embeddings and on the cross entropy of a classifier of them."""

    default_classifier_loss_weight = 0.1  # embeddings of length 1 fit a classifier slowly: its gradient is large


class UnsupervisedByAugmentation(MetricLossOnly):
    """Trains a network without labels: each image is a class of its own, and its random transforms are its members.

    `--samples_per_class` is the number of transforms of an image in a batch. With NT-Xent it is SimCLR, Chen et al.,
    ICML 2020; the images' own labels are used by the evaluation alone.
    """

    knows_labels = False
    samples_per_class = 2


class S2SD(MetricLossOnly):
    """Trains a network on its metric loss, and on the similarities of wider embeddings of the same features.

    The loss is 1/2 (L + mean_t L_t) + weight · (mean_t D(S_t, S) + D(F, S)), where L_t are the losses of the wider
    embeddings; S, S_t and F are the batch's cosine similarities of embeddings, wider embeddings and features; and D is
    `similarity_divergence`. D(F, S) begins after some iterations. Roth et al., ICML 2021.

    Args:
        target_heads: features `(B, features)` to wider embeddings `(B, D_t)`, by name.
        target_criteria: the loss of each of them.
        s2sd_weight: weight of the divergences.
        s2sd_temperature: temperature T of the similarities.
        s2sd_feature_start: iterations after which the features' similarities are learned from, too.
    """

    flags = (*MetricLossOnly.flags, "s2sd_weight", "s2sd_temperature", "s2sd_feature_start")
    build_flags = (*MetricLossOnly.build_flags, "s2sd_dims")

    def __init__(
        self,
        *args: Any,
        target_heads: nn.ModuleDict,
        target_criteria: nn.ModuleDict,
        s2sd_weight: float = 50.0,
        s2sd_temperature: float = 1.0,
        s2sd_feature_start: int = 1000,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.heads, self.target_criteria = target_heads, target_criteria
        self.networks |= {"target_heads": target_heads, "target_criteria": target_criteria}
        self.weight, self.temperature, self.feature_start = s2sd_weight, s2sd_temperature, s2sd_feature_start
        self.iterations = 0

    @classmethod
    def build_networks(
        cls, opt: argparse.Namespace, net: netlib.EmbeddingNet, num_classes: int
    ) -> tuple[dict[str, Any], list[Group]]:
        """Builds the wider heads with a loss for each; see `MetricLossOnly.build_networks`."""
        networks, groups = super().build_networks(opt, net, num_classes)
        heads, criteria = nn.ModuleDict(), nn.ModuleDict()
        for dim in opt.s2sd_dims:
            name = str(dim)
            heads[name] = netlib.mlp(net.num_features, dim, dim)
            wider = argparse.Namespace(**{**vars(opt), "embed_dim": dim})
            criteria[name], of_criterion = losses.loss_select(opt.loss, wider, [], num_classes)
            groups += [{"part": "loss", **group, "name": f"{group['name']} of {dim}"} for group in of_criterion]
        groups.append(_further_group("target heads", heads, opt, "embedder"))
        return {**networks, "target_heads": heads, "target_criteria": criteria}, groups

    def step(self, images: torch.Tensor, labels: torch.Tensor, epoch: int) -> dict[str, torch.Tensor]:
        """Learns from one batch; see `MetricLossOnly.step`."""
        features = self.features(images)  # (B, features)
        embeddings = self.net.embed_features(features)  # (B, D)
        metric = self.criterion(embeddings, labels)
        target_losses, divergences = [], []
        for name, head in self.heads.items():
            target = head(features)  # (B, D_t)
            target = F.normalize(target, dim=1) if self.net.normalize else target
            target_losses.append(self.target_criteria[name](target, labels))
            divergences.append(similarity_divergence(target, embeddings, self.temperature))
        targets, distillation = torch.stack(target_losses).mean(), torch.stack(divergences).mean()
        if self.iterations >= self.feature_start:
            distillation = distillation + similarity_divergence(features, embeddings, self.temperature)
        self.iterations += 1
        loss = (metric + targets) / 2 + self.weight * distillation
        return self.learn(loss, embeddings, labels, metric=metric, targets=targets, distillation=distillation)

    def state_dict(self) -> dict[str, Any]:
        """The states of everything, for a checkpoint."""
        return {**super().state_dict(), "method": {"iterations": self.iterations}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a checkpoint's state; see `MetricLossOnly.load_state_dict`."""
        super().load_state_dict(state)
        self.iterations = state["method"]["iterations"]


def similarity_divergence(target: torch.Tensor, source: torch.Tensor, temperature: float) -> torch.Tensor:
    """T²/B Σ_i KL(softmax(S_i / T) ‖ softmax(S'_i / T)), without a gradient for the target.

    Args:
        target: `(B, D_t)`, whose cosine similarities are S.
        source: `(B, D)`, whose cosine similarities are S'.
        temperature: T.
    """
    wanted, own = (F.normalize(points, dim=1) for points in (target.detach(), source))
    wanted, own = wanted @ wanted.T / temperature, own @ own.T / temperature  # (B, B) each
    divergence = F.kl_div(own.log_softmax(dim=1), wanted.log_softmax(dim=1), reduction="batchmean", log_target=True)
    return divergence * temperature**2


class DeepAdversarialMetricLearning(MetricLossOnly):
    """Trains a network also on hard negatives that a generator makes of the trunk's features of triplets.

    The generator G learns weight_hard ‖x − a‖² + weight_reg ‖x − n‖² + weight_adv [d²(x, a) − d²(p, a) − τ]₊ for x =
    G(a, p, n), the network the metric loss and weight_synth [d²(a, p) − d²(a, x) + τ]₊. The first two distances are
    those of features of length 1, the others those of embeddings; no loss of the generator moves the network, and none
    of the network moves the generator. Duan et al., CVPR 2018.

    In the first epochs the network learns alone, then the generator, then both.

    Args:
        generator: features of anchors, positives and negatives, `(T, 3 features)`, to those of negatives, `(T,
            features)`.
        metric_alone_epochs: number of epochs in which the network learns alone, from its metric loss.
        generator_alone_epochs: number of epochs after these in which the generator learns alone.
        triplets_per_anchor: random triplets of each image of a batch.
        synth_margin: τ.
        hard_loss_weight, reg_loss_weight, adv_loss_weight, synth_loss_weight: the four weights.
    """

    flags = (
        *MetricLossOnly.flags, "metric_alone_epochs", "generator_alone_epochs", "triplets_per_anchor", "synth_margin",
        "hard_loss_weight", "reg_loss_weight", "adv_loss_weight", "synth_loss_weight",
    )  # fmt: skip

    def __init__(
        self,
        *args: Any,
        generator: nn.Module,
        metric_alone_epochs: int = 0,
        generator_alone_epochs: int = 0,
        triplets_per_anchor: int = 100,
        synth_margin: float = 0.01,
        hard_loss_weight: float = 0.1,
        reg_loss_weight: float = 0.1,
        adv_loss_weight: float = 0.1,
        synth_loss_weight: float = 0.1,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.generator = generator
        self.networks["generator"] = generator
        self.metric_alone_epochs, self.generator_alone_epochs = metric_alone_epochs, generator_alone_epochs
        self.triplets_per_anchor, self.margin = triplets_per_anchor, synth_margin
        self.weights = {"hard": hard_loss_weight, "reg": reg_loss_weight, "adv": adv_loss_weight}
        self.synth_weight = synth_loss_weight

    @classmethod
    def build_networks(
        cls, opt: argparse.Namespace, net: netlib.EmbeddingNet, num_classes: int
    ) -> tuple[dict[str, Any], list[Group]]:
        """Builds the generator; see `MetricLossOnly.build_networks`."""
        networks, groups = super().build_networks(opt, net, num_classes)
        features = net.num_features
        needed = 32.0 * opt.bs * opt.triplets_per_anchor * features  # of triplets and what is made of them
        check_memory(needed, f"--triplets_per_anchor {opt.triplets_per_anchor} at --bs {opt.bs}")
        generator = netlib.mlp(3 * features, features, features)
        return {**networks, "generator": generator}, [*groups, _further_group("generator", generator, opt)]

    def learns_alone(self, epoch: int) -> str | None:
        """Which of `network` and `generator` learns alone in an epoch; None: both learn."""
        if epoch <= self.metric_alone_epochs:
            return "network"
        return "generator" if epoch <= self.metric_alone_epochs + self.generator_alone_epochs else None

    def start_epoch(self, epoch: int) -> None:
        """Puts everything that learns into training mode."""
        super().start_epoch(epoch)
        if self.learns_alone(epoch) == "generator":
            self.net.eval()

    def step(self, images: torch.Tensor, labels: torch.Tensor, epoch: int) -> dict[str, torch.Tensor]:
        """Learns from one batch; see `MetricLossOnly.step`."""
        alone = self.learns_alone(epoch)
        if alone == "network":
            return super().step(images, labels, epoch)
        with torch.set_grad_enabled(alone != "generator"):
            features = self.features(images)  # (B, features)
            embeddings = self.net.embed_features(features)  # (B, D)
        triplets = upload(self.random_triplets(labels), features.device)  # (T, 3)
        anchors, positives, negatives = (features.detach().index_select(0, column) for column in triplets.T)
        made = self.generator(torch.cat([anchors, positives, negatives], dim=1))  # (T, features)
        parts = self.generator_losses(made, anchors, negatives, embeddings.detach(), triplets)
        loss = sum((self.weights[name] * part for name, part in parts.items()), made.new_zeros(()))
        if alone == "generator":
            self.optimization.step(loss)
            self._last_batch = None
            return {name: value.detach() for name, value in {"loss": loss, **parts}.items()}
        metric = self.criterion(embeddings, labels)
        synth = self.synthetic_loss(made.detach(), embeddings, triplets)
        loss = metric + self.synth_weight * synth + loss
        return self.learn(loss, embeddings, labels, metric=metric, synth=synth, **parts)

    def random_triplets(self, labels: torch.Tensor) -> np.ndarray:
        """Draws `triplets_per_anchor` random positives and negatives for each image that has both, `(T, 3)`."""
        groups = losses.ClassGroups(labels)
        anchors = np.repeat(groups.anchors, self.triplets_per_anchor)  # (T,)
        return np.stack([anchors, groups.random_positives(anchors), groups.random_negatives(anchors)], axis=1)

    def generator_losses(
        self,
        made: torch.Tensor,
        anchors: torch.Tensor,
        negatives: torch.Tensor,
        embeddings: torch.Tensor,
        triplets: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The generator's losses `hard`, `reg` and `adv`; the embedding layer gets no gradient from them.

        Args:
            made, anchors, negatives: features `(T, features)`.
            embeddings: `(B, D)` of the batch, without a graph.
            triplets: `(T, 3)` positions in the batch.
        """
        unit = F.normalize(made, dim=1)  # (T, features)
        with frozen(self.net):
            embedded = self.net.embed_features(made)  # (T, D)
        anchor, positive = (embeddings.index_select(0, column) for column in triplets.T[:2])  # (T, D) each
        to_anchor = (embedded - anchor).square().sum(dim=1)  # (T,)
        to_positive = (positive - anchor).square().sum(dim=1)  # (T,)
        return {
            "hard": (unit - F.normalize(anchors, dim=1)).square().sum(dim=1).mean(),
            "reg": (unit - F.normalize(negatives, dim=1)).square().sum(dim=1).mean(),
            "adv": F.relu(to_anchor - to_positive - self.margin).mean(),
        }

    def synthetic_loss(self, made: torch.Tensor, embeddings: torch.Tensor, triplets: torch.Tensor) -> torch.Tensor:
        """The triplet loss of anchors, positives and generated negatives.

        Args:
            made: `(T, features)`, without a graph.
            embeddings: `(B, D)` of the batch.
            triplets: `(T, 3)` positions in the batch.
        """
        embedded = self.net.embed_features(made)  # (T, D)
        anchors, positives = (embeddings.index_select(0, column) for column in triplets.T[:2])  # (T, D) each
        to_positive = (anchors - positives).square().sum(dim=1)  # (T,)
        to_made = (anchors - embedded).square().sum(dim=1)  # (T,)
        return F.relu(to_positive - to_made + self.margin).mean()


class CascadedEmbeddings(MetricLossOnly):
    """Trains an embedding of each of several depths of the trunk, the deeper ones on harder and harder pairs.

    Of the pairs that the depth before it kept, a depth keeps a share: the positive pairs that are farthest, and the
    negative pairs that are nearest, by its own embedding. The loss is the sum over depths of the contrastive loss of
    the pairs that they keep; the embedding is that of all depths together. Yuan et al., ICCV 2017.

    Args:
        cascade_shares: the share that each depth keeps, %.
    """

    is_cascade = True
    flags = (*MetricLossOnly.flags, "cascade_shares")
    build_flags = (*MetricLossOnly.build_flags, "cascade_layers")

    def __init__(self, *args: Any, cascade_shares: Sequence[float] = (100, 50, 20), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shares = [share / 100 for share in cascade_shares]

    @classmethod
    def build_networks(
        cls, opt: argparse.Namespace, net: netlib.EmbeddingNet, num_classes: int
    ) -> tuple[dict[str, Any], list[Group]]:
        """Checks the number of depths; see `MetricLossOnly.build_networks`."""
        depths = len(net.backbone.layers)  # type: ignore[arg-type]
        if depths != len(opt.cascade_shares):
            raise UserError(
                f"--cascade_shares gives {len(opt.cascade_shares)} share(s) for {depths} depth(s): give one for each"
            )
        return super().build_networks(opt, net, num_classes)

    def step(self, images: torch.Tensor, labels: torch.Tensor, epoch: int) -> dict[str, torch.Tensor]:
        """Learns from one batch; see `MetricLossOnly.step`."""
        features = self.features(images)  # (B, features)
        stages = self.net.embedding.stages(features)  # type: ignore[operator]  # (B, d) each
        positives, negatives = (upload(pairs, features.device) for pairs in all_pairs(labels))
        terms = {}
        for position, (stage, share) in enumerate(zip(stages, self.shares)):
            # through a product of matrices, the distance of near duplicates would be wrong in its first digits
            distances = torch.cdist(stage, stage, compute_mode="donot_use_mm_for_euclid_dist").flatten()  # (B²,)
            positives = hardest(distances, positives, share, farthest=True)
            negatives = hardest(distances, negatives, share, farthest=False)
            kept = distances.index_select(0, positives), distances.index_select(0, negatives)
            terms[f"stage {position}"] = self.criterion.of_distances(*kept)  # type: ignore[operator]
        embeddings = torch.cat(stages, dim=1)  # (B, D)
        embeddings = F.normalize(embeddings, dim=1) if self.net.normalize else embeddings
        return self.learn(torch.stack([*terms.values()]).sum(), embeddings, labels, **terms)


def all_pairs(labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of batch positions (i, j), as i B + j: those of one class `(P,)`, and those of two classes `(N,)`.

    Raises:
        UserError: there are none.
    """
    values = losses.ClassGroups(labels).labels  # (B,)
    one, other = np.triu_indices(len(values), k=1)
    is_positive, pairs = values[one] == values[other], one * len(values) + other
    return pairs[is_positive], pairs[~is_positive]


def hardest(distances: torch.Tensor, pairs: torch.Tensor, share: float, farthest: bool) -> torch.Tensor:
    """The farthest or the nearest of some pairs.

    Args:
        distances: `(B²,)`.
        pairs: positions in them, `(P,)`.
        share: of the pairs to keep, in (0, 1].
        farthest: whether the farthest are wanted.

    Returns:
        `(⌈share P⌉,)` of the pairs.
    """
    # less than a millionth of a pair is an error of rounding
    count = math.ceil(share * len(pairs) - 1e-6)
    chosen = distances.detach().index_select(0, pairs).topk(count, largest=farthest).indices
    return pairs.index_select(0, chosen)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside the block the network's parameters get no gradient; what is computed with them still hands one on."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


METHODS: dict[str, type[MetricLossOnly]] = {
    "MetricLossOnly": MetricLossOnly,
    "TrainWithClassifier": TrainWithClassifier,
    "UnsupervisedByAugmentation": UnsupervisedByAugmentation,
    "DeepAdversarialMetricLearning": DeepAdversarialMetricLearning,
    "S2SD": S2SD,
    "CascadedEmbeddings": CascadedEmbeddings,
}

# Losses that are means over the images of a batch, so that the mean of two batches' gradients is that of both together.
MEANS_OVER_IMAGES = (
    "crossentropy", "proxynca", "proxynca++", "ArcFaceLoss", "CosFaceLoss", "SphereFaceLoss", "SubCenterArcFaceLoss",
    "LargeMarginSoftmaxLoss", "NormalizedSoftmaxLoss", "SoftTripleLoss", "ProxyNCALoss",
)  # fmt: skip


def refuse_contradictions(opt: argparse.Namespace) -> None:
    """Checks the resolved flags of training method and optimization against each other.

    Raises:
        UserError: they contradict each other.
    """
    on_tuples = [name for name in np.atleast_1d(opt.loss).tolist() if name not in MEANS_OVER_IMAGES]
    if opt.accumulate > 1 and on_tuples:
        raise UserError(
            f"--accumulate {opt.accumulate} splits a batch, which --loss {on_tuples[0]} needs as a whole, since it "
            "compares its images with each other: drop it"
        )
    if opt.accumulate > 1 and opt.reducer not in (None, "MeanReducer"):
        raise UserError(
            f"--accumulate {opt.accumulate} steps with a mean over batches, and --reducer {opt.reducer} gives other "
            "values than a mean over images: drop one of them"
        )
    if len(set(opt.s2sd_dims)) < len(opt.s2sd_dims):
        raise UserError(f"--s2sd_dims {' '.join(map(str, opt.s2sd_dims))} repeats a dimension: give each once")
    method = METHODS[opt.training_method]
    if opt.accumulate > 1 and method.step is not MetricLossOnly.step:
        raise UserError(f"--accumulate needs a loss of single images, which {opt.training_method} is not: drop it")
    if not method.knows_labels:
        _refuse_labels(opt)
    if method.is_cascade and (opt.loss != "contrastive" or opt.sampling is not None):
        given = f"--loss {' '.join(losses.names_of(opt.loss))}" if opt.loss != "contrastive" else "--sampling"
        raise UserError(
            f"--training_method {opt.training_method} chooses pairs itself, by their distances, which {given} can't "
            "take: give --loss contrastive without --sampling"
        )
    if opt.freeze_trunk and opt.freeze_trunk_epochs:
        raise UserError(
            f"--freeze_trunk and --freeze_trunk_epochs {opt.freeze_trunk_epochs} contradict each other: the first "
            "freezes the backbone for good, so drop one"
        )
    if opt.fc_lr_mul and not opt.embed_dim:
        raise UserError("--fc_lr_mul is for the embedding layer, which --embed_dim 0 leaves out: drop one of them")
    if opt.classifier_hidden and not opt.classifier_loss_weight:
        raise UserError("--classifier_hidden needs a classifier: give --classifier_loss_weight, or drop it")


def _refuse_labels(opt: argparse.Namespace) -> None:
    """Refuses what needs labels, for a method that doesn't know them."""
    name = opt.training_method
    if opt.classifier_loss_weight:
        raise UserError(f"--classifier_loss_weight needs labels, which {name} does without: drop it")
    if opt.samples_per_class < 2 or opt.batch_sampler != "class_balanced":
        raise UserError(
            f"--training_method {name} compares transforms of an image: give --samples_per_class 2 or more, and "
            "--batch_sampler class_balanced"
        )
    if opt.dist_measure:
        raise UserError(f"--dist_measure needs labels of the training images, which {name} does without: drop it")
    if "train" in opt.splits_to_eval and opt.evaluate is None:
        raise UserError(
            f"--splits_to_eval train needs labels of the training images, which {name} does without: leave train out"
        )


def relabel(opt: argparse.Namespace, splits: Any) -> Any:
    """The splits as the training method sees them: without labels, each training image is a class of its own."""
    if METHODS[opt.training_method].knows_labels:
        return splits
    images = splits.train
    labels = np.arange(len(images))[:, None]  # (N, 1)
    return replace(splits, train=replace(images, labels=labels, class_names=[images.paths]))


def build_training(
    opt: argparse.Namespace,
    num_classes: int,
    device: torch.device,
    load_pretrained: bool = True,
    num_batches: int = 1,
    lower_is_better: bool = False,
) -> MetricLossOnly:
    """Builds what the resolved flags train: network, loss, optimizers and schedule, on the device.

    Args:
        opt: the resolved flags.
        num_classes: number of training classes.
        device: where to train.
        load_pretrained: whether to load pretrained weights, where the flags ask for them.
        num_batches: batches per epoch.
        lower_is_better: whether the metric that selects the epoch is better when it is lower.

    Raises:
        UserError: the network can't be built, or can't be trained with these flags.
    """
    seed_everything(opt.seed, 0)
    net = netlib.networkselect(opt, load_pretrained).to(device)
    if opt.bs == 1 and any(isinstance(module, _BatchNorm) and module.training for module in net.modules()):
        raise UserError("--bs 1 leaves BatchNorm nothing to normalize over: raise --bs, or give --freeze_batchnorm")
    if opt.grad_cache and any(isinstance(module, _BatchNorm) and module.training for module in net.backbone.modules()):
        notice(
            f"--grad_cache {opt.grad_cache}: BatchNorm normalizes over {opt.grad_cache} images instead of {opt.bs}, so "
            "that gradients are not those of the whole batch; --freeze_batchnorm makes them so"
        )
    _normalize_over_ranks(opt, net, device)
    of_net = _network_groups(opt, net)
    sized = argparse.Namespace(**{**vars(opt), "embed_dim": net.embed_dim})
    criterion, groups = losses.loss_select(opt.loss, sized, of_net, num_classes)
    groups = [{"part": "loss", **group} for group in groups]
    method = METHODS[opt.training_method]
    further, further_groups = method.build_networks(opt, net, num_classes)
    for network in (criterion, *further.values()):
        network.to(device)
    groups = [*groups, *further_groups]
    _refuse_nothing_to_learn(opt, net, groups)
    optimization = _build_optimization(opt, groups, num_batches, lower_is_better, device, net.backbone.parameters())
    return method(net, criterion, optimization, **further, **{name: getattr(opt, name) for name in method.flags})


def _normalize_over_ranks(opt: argparse.Namespace, net: netlib.EmbeddingNet, device: torch.device) -> None:
    """Makes BatchNorm of the backbone normalize over the images of all ranks, or says that it doesn't."""
    count = ranks().count
    if count == 1 or not any(isinstance(module, _BatchNorm) and module.training for module in net.backbone.modules()):
        return
    if opt.sync_batchnorm and device.type == "cuda":
        still = [name for name, module in net.backbone.named_modules() if any(module is one for one in net.still)]
        net.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(net.backbone)
        net.still = [net.backbone.get_submodule(name) for name in still]
        return
    advice = f"--freeze_batchnorm {'or --sync_batchnorm ' if device.type == 'cuda' else ''}makes them so"
    if opt.sync_batchnorm:
        advice += ", and --sync_batchnorm does on GPUs alone"
    notice(
        f"BatchNorm normalizes over the {opt.bs // count} images of each process instead of {opt.bs}, so that "
        f"gradients are not those of one process; {advice}"
    )


def _refuse_nothing_to_learn(opt: argparse.Namespace, net: netlib.EmbeddingNet, groups: Sequence[Group]) -> None:
    """Refuses training without a parameter that learns, in its first epochs or at all."""
    of_trunk = set(map(id, net.backbone.parameters()))
    learning = [parameter for group in groups for parameter in group["params"]]
    flag = "--freeze_trunk_epochs" if opt.freeze_trunk_epochs else "--freeze_trunk"
    if opt.freeze_trunk_epochs:
        learning = [parameter for parameter in learning if id(parameter) not in of_trunk]
    if opt.n_epochs and not learning:
        raise UserError(
            f"with {flag} and --embed_dim 0 nothing learns, since --loss {' '.join(losses.names_of(opt.loss))} has no "
            f"parameters: give --embed_dim 1 or more, drop {flag}, or only evaluate with --n_epochs 0"
        )


def _network_groups(opt: argparse.Namespace, net: netlib.EmbeddingNet) -> list[Group]:
    """The network's parameter groups; trunk and embedding layer are two where --optim_params tells them apart."""
    is_split = any(key.startswith(("trunk.", "embedder.")) for key in opt.optim_params)
    groups = net.parameter_groups(opt.lr, opt.decay, opt.fc_lr_mul or float(is_split))
    return [{"part": "embedder" if group["name"] == "embedding" else "trunk", **group} for group in groups]


def _build_optimization(
    opt: argparse.Namespace,
    groups: Sequence[Group],
    num_batches: int,
    lower_is_better: bool,
    device: torch.device,
    trunk: Iterable[nn.Parameter],
) -> Optimization:
    """Optimizers and schedule of the resolved flags.

    Raises:
        UserError: --optim_params names a part that this training doesn't have.
    """
    parts = {group["part"] for group in groups if group["params"]}
    for key in opt.optim_params:
        part, dot, _ = key.partition(".")
        if dot and part not in parts:
            raise UserError(f"--optim_params {key}: nothing of the {part} learns here, so drop it")
    steps_per_epoch = math.ceil(num_batches / opt.accumulate)
    params = schedule_params(opt)
    num_steps = max(1, opt.n_epochs) * (steps_per_epoch if params.get("interval") == "iteration" else 1)
    mode = "min" if lower_is_better else "max"
    schedule = Schedule(opt.scheduler, params, num_steps, opt.eval_metric_for_best_epoch, mode)
    settings = optimizer_settings(opt)
    clips = (opt.clip_grad_norm, opt.clip_grad_value)
    scaler = torch.amp.GradScaler(device.type, enabled=opt.precision == "fp16")
    return Optimization(groups, settings, schedule, *clips, opt.accumulate, steps_per_epoch, scaler, trunk)

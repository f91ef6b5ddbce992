"""methods.py: what a step does, and that a restored state continues where it stopped."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Run, csv_rows, training_flags
from test_losses import fake_cuda, needs_fake_cuda
from torch import nn

import config
import losses
import main
import methods
import netlib
from auxiliaries import UserError, seed_everything

LABELS = torch.arange(4).repeat_interleave(2)
IMAGES = torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
STEP = {"gamma": 0.5, "tau": [1, 3]}


def tiny_net(embed_dim: int = 4) -> netlib.EmbeddingNet:
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 12), nn.BatchNorm1d(12))
    return netlib.EmbeddingNet(backbone, 12, embed_dim)


def build(
    lr: float = 0.1,
    embed_dim: int = 4,
    fc_lr_mul: float = 0,
    schedule: methods.Schedule | None = None,
    settings: Any = None,
    method: Callable[..., methods.MetricLossOnly] = methods.MetricLossOnly,
    keywords: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A method with a tiny network and learned betas; by default with a schedule of steps after epochs 1 and 3."""
    seed_everything(0)
    net = tiny_net(embed_dim)
    criterion = losses.MarginLoss(losses.Sampler("distance"), num_classes=4)
    groups: list[dict[str, Any]] = net.parameter_groups(lr, 0.01, fc_lr_mul)
    groups = [{"part": "embedder" if group["name"] == "embedding" else "trunk", **group} for group in groups]
    groups.append({"name": "marginloss", "part": "loss", "params": [criterion.beta], "lr": 0.5, "weight_decay": 0.0})
    schedule = schedule or methods.Schedule("step", STEP)
    optimization = methods.Optimization(groups, settings, schedule, **changes)
    return method(net, criterion, optimization, **(keywords or {}))


def train(method: methods.MetricLossOnly, *epochs: int, steps: int = 1) -> list[dict[str, float]]:
    """Steps of some epochs, each with an evaluation; the learning rates that each epoch began with."""
    rates = []
    for epoch in epochs:
        seed_everything(0, epoch)
        rates.append(method.learning_rates())
        method.start_epoch(epoch)
        for _ in range(steps):
            method.step(IMAGES, LABELS, epoch)
        method.end_epoch()
        method.end_evaluation(VALUES[epoch])
    return rates


VALUES = {1: 0.5, 2: 0.4, 3: 0.4, 4: 0.4}  # of a metric that doesn't rise any more


def saved(method: methods.MetricLossOnly, epoch: int) -> dict[str, Any]:
    rows = [{"Epochs": done, "R@1": VALUES[done]} for done in range(1, epoch + 1)]
    return {"epoch": epoch, "history": {"val": rows}, **method.state_dict()}


def same(one: Any, other: Any) -> bool:
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_resumes(make: Callable[[], methods.MetricLossOnly], steps: int = 1) -> None:
    """Four epochs end in the very state of two, and two more of a method that was restored."""
    whole, stopped, resumed = make(), make(), make()
    rates = train(whole, 1, 2, 3, 4, steps=steps)
    train(stopped, 1, 2, steps=steps)
    resumed.load_state_dict(saved(stopped, 2))
    assert train(resumed, 3, 4, steps=steps) == rates[2:]
    assert same(whole.state_dict(), resumed.state_dict())


def test_a_step_learns_and_tells_what_it_did() -> None:
    method = build()
    before = method.net.embedding.weight.detach().clone()
    assert method.statistics() == {}
    method.start_epoch(1)
    parts = method.step(IMAGES, LABELS, epoch=1)
    assert set(parts) == {"loss"}
    assert not parts["loss"].requires_grad
    assert not torch.equal(method.net.embedding.weight, before)
    assert {"Embedding Norm", "Tuples", "Violations", "Mean Beta"} <= set(method.statistics())
    assert method.learning_rates() == {"Learning Rate": 0.1, "Learning Rate marginloss": 0.5}


def test_a_restored_state_continues_bit_for_bit() -> None:
    assert_resumes(build)
    rates = train(build(), 1, 2, 3, 4)
    assert [rate["Learning Rate"] for rate in rates] == pytest.approx([0.1, 0.05, 0.05, 0.025])


@pytest.mark.parametrize("has_schedule", [True, False], ids=["now", "before schedules were saved"])
@pytest.mark.parametrize(
    ("lr", "schedule", "expected"),
    [
        (0.1, {}, [0.05, 0.05, 0.025]),
        (0.2, {}, [0.1, 0.1, 0.05]),  # the current rate is scaled
        (0.1, {"tau": [3]}, [0.1, 0.1, 0.05]),  # as if it had been followed from the start
        (0.1, {"name": "none"}, [0.1, 0.1, 0.1]),
        (1.0, {"gamma": 0.1}, [0.1, 0.1, 0.01]),
    ],
)
def test_changed_flags_take_effect(
    lr: float, schedule: dict[str, Any], expected: list[float], has_schedule: bool
) -> None:
    name, params = schedule.get("name", "step"), {key: value for key, value in schedule.items() if key != "name"}
    stopped, resumed = build(), build(lr, schedule=methods.Schedule(name, {**STEP, **params}))
    train(stopped, 1)
    state = saved(stopped, 1)
    if not has_schedule:
        del state["scheduler"]
    resumed.load_state_dict(state)
    assert [rate["Learning Rate"] for rate in train(resumed, 2, 3, 4)] == pytest.approx(expected)


def test_a_state_of_another_network_or_optimizer_is_refused() -> None:
    with pytest.raises(UserError, match="differs from what these flags give") as error:
        build(embed_dim=5).load_state_dict(saved(build(), 0))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="trained with Adam, not with SGD"):
        build(settings=dict.fromkeys(methods.PARTS, ("SGD", {}))).load_state_dict(saved(build(), 0))


# Optimizers


def flags(*argv: str) -> Any:
    return config.resolve(config.parse(argv))


def classes_of(module: Any, base: type) -> set[str]:
    found = {name for name, kind in vars(module).items() if inspect.isclass(kind) and issubclass(kind, base)}
    return {name for name in found if not name.startswith("_")} - {base.__name__}


@pytest.mark.parametrize("name", ["Adam", "Adafactor", "RMSprop"])
def test_a_state_that_lacks_a_part_is_refused(name: str) -> None:
    method = build(settings=dict.fromkeys(methods.PARTS, (name, {})))
    train(method, 1)
    state = saved(method, 1)
    part = sorted(set(state["optimizer"]["state"][1]) - {"step"})[0]
    del state["optimizer"]["state"][1][part]
    with pytest.raises(UserError, match=f"the optimizer's state lacks {part}"):
        build(settings=dict.fromkeys(methods.PARTS, (name, {}))).load_state_dict(state)


def test_the_tables_hold_every_class_of_torch() -> None:
    names = classes_of(torch.optim, torch.optim.Optimizer)
    assert names == {*methods.OPTIMIZERS, *methods.REFUSED_OPTIMIZERS}
    names = classes_of(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert names == {*methods.SCHEDULERS, *methods.REFUSED_SCHEDULERS} - {*methods.SHORT_SCHEDULERS}


def test_adam_is_what_it_was_before_there_were_others() -> None:
    one = build()
    seed_everything(0)
    net, criterion = tiny_net(), losses.MarginLoss(losses.Sampler("distance"), num_classes=4)
    optimizer = torch.optim.Adam([*net.parameter_groups(0.1, 0.01), {"params": [criterion.beta], "lr": 0.5}])
    for epoch in (1, 2, 3):
        seed_everything(0, epoch)
        optimizer.zero_grad(set_to_none=True)
        criterion(net(IMAGES), LABELS).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.5 if epoch in (1, 3) else 1.0
    train(one, 1, 2, 3)
    assert same(one.net.state_dict(), net.state_dict())
    assert torch.equal(one.criterion.beta, criterion.beta)


@pytest.mark.parametrize("name", methods.OPTIMIZERS)
def test_every_optimizer_trains_and_continues_bit_for_bit(name: str) -> None:
    opt = flags("--optimizer", name, "--lr", "0.01")
    settings = methods.optimizer_settings(opt)
    assert {kind for kind, _ in settings.values()} == {name}
    method = build(settings=settings)
    before = method.net.embedding.weight.detach().clone()
    train(method, 1)
    assert not torch.equal(method.net.embedding.weight, before)
    assert_resumes(lambda: build(settings=settings))


def test_several_optimizers_each_with_its_part() -> None:
    opt = flags(
        *("--optimizer", "SGD", "--lr", "0.05", "--decay", "0.01"),
        *("--optim_params", "momentum=0.5", "trunk.class=RMSprop", "trunk.lr=0.02", "loss.lr=0.3", "loss.momentum=0"),
    )
    settings = methods.optimizer_settings(opt)
    assert settings["trunk"] == ("RMSprop", {"lr": 0.02})  # SGD's parameters are not its
    assert settings["embedder"] == ("SGD", {"momentum": 0.5})
    assert settings["loss"] == ("SGD", {"momentum": 0, "lr": 0.3})

    def make() -> Any:
        return build(0.05, fc_lr_mul=1, settings=settings)

    method = make()
    assert [type(one).__name__ for one in method.optimization.optimizers] == ["RMSprop", "SGD"]
    rates = {"Learning Rate": 0.02, "Learning Rate embedding": 0.05, "Learning Rate marginloss": 0.3}
    assert method.learning_rates() == rates
    train(method, 1)  # halves all of them
    assert method.learning_rates() == pytest.approx({name: rate / 2 for name, rate in rates.items()})
    assert_resumes(make)


def test_a_part_that_is_told_apart_when_resuming_takes_over_the_states() -> None:
    stopped, resumed = build(), build(fc_lr_mul=2)
    train(stopped, 1)
    resumed.load_state_dict(saved(stopped, 1))
    assert resumed.learning_rates() == pytest.approx(
        {"Learning Rate": 0.05, "Learning Rate embedding": 0.1, "Learning Rate marginloss": 0.25}
    )
    states = [method.optimization.optimizers[0].state_dict()["state"] for method in (stopped, resumed)]
    assert same(*states)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optimizer", "LBFGS"], "--optimizer LBFGS can't be used here: it evaluates the loss several times"),
        (["--optimizer", "SparseAdam"], "can't be used here: it takes sparse gradients"),
        (["--optimizer", "Muon"], "can't be used here: it takes matrices only"),
        (["--optimizer", "adamw"], r"--optimizer adamw is unknown \(did you mean AdamW\?\)"),
        (["--optim_params", "eps"], "eps is not of the form key=value"),
        (["--optim_params", "betaz=1"], r"Adam has no parameter betaz \(did you mean betas\?\)"),
        (["--optim_params", "eps=much"], "eps of Adam takes a number, not much"),
        (["--optim_params", "eps=-1"], "--optim_params: Adam can't take these values .Invalid epsilon"),
        (["--optim_params", "betas=[0.9]"], "--optim_params: Adam can't take these values"),
        (["--optim_params", "lr=fast"], "--optim_params: lr takes a number of at least 0, not fast"),
        (["--optim_params", "maximize=true"], "Adam has no parameter maximize"),
        (["--optim_params", "trnk.lr=1"], r"there is no part trnk \(did you mean trunk\?\)"),
        (["--optim_params", "trunk.momentum=1"], "--optim_params trunk: Adam has no parameter momentum"),
        (["--optim_params", "trunk.class=SGDD"], r"trunk.class=SGDD is unknown \(did you mean SGD\?\)"),
        (["--optim_params", "loss.class=LBFGS"], "loss.class LBFGS can't be used here"),
        (["--lr", "1", "--optim_params", "lr=1"], "--lr and --optim_params lr=1 say the same: drop --lr"),
        (["--decay", "1", "--optim_params", "weight_decay=1"], "--decay and --optim_params weight_decay=1 say"),
        (["--optimizer", "SGD", "--optim_params", "class=Adam"], "--optimizer and --optim_params class=Adam say"),
        (["--beta_lr", "1", "--optim_params", "loss.lr=1"], "--beta_lr and --optim_params loss.lr=1 say the same"),
        (["--fc_lr_mul", "1", "--optim_params", "embedder.lr=1"], "--fc_lr_mul and --optim_params embedder.lr=1 say"),
    ],
)
def test_wrong_optimizers_are_refused(argv: Sequence[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        flags(*argv)


def test_the_mappings_fill_what_the_short_flags_do() -> None:
    opt = flags("--optim_params", "class=SGD", "lr=0.5", "weight_decay=0.25", "momentum=0.9")
    assert (opt.optimizer, opt.lr, opt.decay, opt.optim_params) == ("SGD", 0.5, 0.25, {"momentum": "0.9"})
    opt = flags("--scheduler_params", "gamma=0.5", "tau=[3,5]")
    assert (opt.scheduler, opt.gamma, opt.tau) == ("step", 0.5, [3, 5])
    opt = flags()
    assert (opt.gamma, opt.tau) == (0.3, [30, 55])
    opt = flags("--scheduler", "StepLR", "--scheduler_params", "step_size=3", "--gamma", "0.5")
    assert methods.schedule_params(opt) == {"step_size": 3, "gamma": 0.5, "interval": "epoch"}
    opt = flags("--scheduler", "StepLR", "--scheduler_params", "step_size=3")
    assert "gamma" not in methods.schedule_params(opt)  # its own default


# Schedules

SCHEDULE_PARAMS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ExponentialLR": {"gamma": 0.5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"max_lr": 1.0, "step_size_up": 3},
    "ReduceLROnPlateau": {"patience": 0, "factor": 0.5},
    **dict.fromkeys(methods.SHORT_SCHEDULERS, STEP),
}
INTERVALS = [
    (name, interval)
    for name in methods.SCHEDULERS
    for interval in (["epoch"] if name in (*methods.SHORT_SCHEDULERS, "ReduceLROnPlateau") else methods.INTERVALS)
]


@pytest.mark.parametrize(("name", "interval"), INTERVALS)
def test_every_schedule_continues_bit_for_bit(name: str, interval: str) -> None:
    params = SCHEDULE_PARAMS.get(name, {})
    if name not in methods.SHORT_SCHEDULERS:
        params = {**params, "interval": interval}
    num_steps = 4 if interval == "epoch" else 12
    schedule = methods.Schedule(name, params, num_steps, "R@1", "max")
    kinds = {"trunk": ("Adam", {}), "embedder": ("SGD", {"momentum": 0.9}), "loss": ("SGD", {"momentum": 0.9})}

    def make(lr: float = 0.1) -> Any:
        return build(lr, fc_lr_mul=0.5, schedule=schedule, settings=kinds, steps_per_epoch=3)

    assert_resumes(make, steps=3)
    # a changed learning rate scales what is left of it
    stopped, resumed = make(), make(lr=0.2)
    train(stopped, 1, 2, steps=3)
    resumed.load_state_dict(saved(stopped, 2))
    before, after = stopped.learning_rates(), resumed.learning_rates()
    assert after["Learning Rate"] == pytest.approx(2 * before["Learning Rate"])
    assert after["Learning Rate marginloss"] == before["Learning Rate marginloss"]


def test_what_schedules_do() -> None:
    def rates(name: str, steps: int = 1, **params: Any) -> list[float]:
        num_steps = 4 * (steps if params.get("interval") == "iteration" else 1)
        method = build(schedule=methods.Schedule(name, params, num_steps, "R@1"), steps_per_epoch=steps)
        return [rate["Learning Rate"] for rate in train(method, 1, 2, 3, 4, steps=steps)]

    assert rates("StepLR", step_size=2, gamma=0.5) == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert rates("StepLR", steps=2, step_size=2, gamma=0.5, interval="iteration") == pytest.approx(
        [0.1, 0.05, 0.025, 0.0125]
    )
    cosine = [0.05 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 4)).item()) for epoch in range(4)]
    assert rates("CosineAnnealingLR") == pytest.approx(cosine)  # its period is the whole training
    assert rates("ReduceLROnPlateau", patience=0, factor=0.5) == pytest.approx([0.1, 0.1, 0.05, 0.025])
    assert max(rates("OneCycleLR", pct_start=0.5)) == pytest.approx(0.1)  # its peak is --lr


def test_a_plateau_that_is_new_when_resuming_counts_from_the_first_epoch() -> None:
    plateau = methods.Schedule("ReduceLROnPlateau", {"patience": 0, "factor": 0.5}, metric="R@1")
    stopped, resumed = build(schedule=methods.Schedule("none", STEP)), build(schedule=plateau)
    train(stopped, 1, 2)
    state = saved(stopped, 2)
    state["history"]["val"] = [{"Epochs": -1, "R@1": 9.0}, {"Epochs": 0, "R@1": 8.0}, *state["history"]["val"]]
    resumed.load_state_dict(state)
    assert resumed.learning_rates()["Learning Rate"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--training_method", "S2SD", "--s2sd_dims", "16", "16"], "--s2sd_dims 16 16 repeats a dimension"),
        (["--scheduler", "LambdaLR"], "--scheduler LambdaLR can't be used here: it takes a function"),
        (["--scheduler", "MultiplicativeLR"], "can't be used here: it takes a function"),
        (["--scheduler", "SequentialLR"], "can't be used here: it takes other schedules"),
        (["--scheduler", "cosine"], "--scheduler cosine is unknown; it takes one of step, exp, none, StepLR"),
        (
            ["--scheduler", "ExponentialLR", "--scheduler_params", "gamma=-1"],
            "--scheduler_params: gamma takes a number of at least 0, not -1",
        ),
        (
            ["--scheduler", "CosineAnnealingLR", "--scheduler_params", "eta_min=-5"],
            "eta_min takes a number of at least",
        ),
        (["--scheduler", "OneCycleLR", "--scheduler_params", "max_lr=-1"], "max_lr takes a number of at least 0"),
        (["--scheduler", "OneCycleLR", "--scheduler_params", "max_lr=[-1]"], "max_lr takes a number of at least 0"),
        (["--scheduler", "ReduceLROnPlateau", "--scheduler_params", "min_lr=-1"], "min_lr takes a number of at least"),
        (["--scheduler", "ExponentialLR", "--scheduler_params", "gamma=1e400"], "gamma takes a number of at least 0"),
        (["--scheduler", "StepLR"], "--scheduler StepLR needs --scheduler_params step_size=…"),
        (["--scheduler", "StepLR", "--scheduler_params", "step=1"], "StepLR has no parameter step"),
        (["--scheduler", "StepLR", "--scheduler_params", "step_size=1.5"], "step_size of StepLR takes an integer"),
        (["--scheduler", "StepLR", "--scheduler_params", "step_size=0"], "--scheduler_params: StepLR can't take these"),
        (["--scheduler", "LinearLR", "--scheduler_params", "interval=batch"], "interval is epoch or iteration, not"),
        (["--scheduler", "LinearLR", "--scheduler_params", "last_epoch=3"], "LinearLR has no parameter last_epoch"),
        (
            ["--scheduler", "ReduceLROnPlateau", "--scheduler_params", "interval=iteration"],
            "acts after every evaluation: drop interval",
        ),
        (["--scheduler", "ReduceLROnPlateau", "--scheduler_params", "mode=min"], "has no parameter mode"),
        (["--scheduler_params", "step_size=3"], "step has no parameter step_size; it takes gamma, tau"),
        (["--scheduler_params", "tau=3"], r"tau takes a list of epochs, such as \[30,55\], not 3"),
        (["--scheduler", "none", "--scheduler_params", "gamma=3"], "none has no parameter gamma; it takes none"),
        (["--gamma", "1", "--scheduler_params", "gamma=1"], "--gamma and --scheduler_params gamma=1 say the same"),
        (
            ["--lr", "1", "--scheduler", "OneCycleLR", "--scheduler_params", "max_lr=1"],
            "--lr and --scheduler_params max_lr=1 say the same",
        ),
        (["--tau", "1", "--scheduler_params", "tau=[1]"], r"--tau and --scheduler_params tau=\[1\] say the same"),
        (
            ["--optimizer", "Adagrad", "--scheduler", "OneCycleLR"],
            "--scheduler_params: OneCycleLR can't take these values .*momentum",
        ),
    ],
)
def test_wrong_schedules_are_refused(argv: Sequence[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        flags(*argv)


def test_a_rate_below_zero_stops_the_training() -> None:
    params = {"base_lr": 0.1, "max_lr": 0.0, "step_size_up": 1, "mode": "exp_range", "gamma": 2.0}
    method = build(schedule=methods.Schedule("CyclicLR", params))
    with pytest.raises(UserError, match=r"--scheduler CyclicLR gives a learning rate of -.*, which is below 0"):
        train(method, 1, 2, 3)


def test_a_cycle_that_ends_before_the_training_is_refused() -> None:
    with pytest.raises(UserError, match="OneCycleLR ends after total_steps=3, before the 4 steps of this training"):
        build(schedule=methods.Schedule("OneCycleLR", {"total_steps": 3}, 4))


# Warm-up, clipping, averages, accumulation


def test_a_frozen_trunk_waits_while_the_rest_learns() -> None:
    def make() -> Any:
        return build(keywords={"freeze_trunk_epochs": 1})

    method = make()
    before = {name: value.clone() for name, value in method.net.named_parameters()}
    train(method, 1)
    changed = {name for name, value in method.net.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"embedding.weight", "embedding.bias"}
    assert not torch.equal(method.criterion.beta, torch.full((4,), 1.2))
    train(method, 2)
    changed = {name for name, value in method.net.named_parameters() if not torch.equal(value, before[name])}
    assert changed == set(before)
    assert_resumes(make)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--freeze_trunk_epochs", "1"], "--freeze_trunk and --freeze_trunk_epochs 1 contradict each other"),
        (["--optim_params", "trunk.lr=1e-3"], "--optim_params trunk.lr: nothing of the trunk learns here"),
    ],
)
def test_a_trunk_that_is_frozen_for_good_refuses_what_would_do_nothing(argv: Sequence[str], message: str) -> None:
    small = ("--arch", "shufflenet_v2_x0_5", "--not_pretrained", "--crop_size", "32", "--freeze_trunk")
    with pytest.raises(UserError, match=message):
        methods.build_training(flags(*small, *argv), 3, torch.device("cpu"))


def test_one_image_per_batch_needs_no_statistics_where_batchnorm_is_frozen() -> None:
    small = ("--arch", "shufflenet_v2_x0_5", "--not_pretrained", "--crop_size", "32", "--bs", "1", "--loss")
    with pytest.raises(UserError, match="--bs 1 leaves BatchNorm nothing"):
        methods.build_training(flags(*small, "crossentropy"), 3, torch.device("cpu"))
    methods.build_training(flags(*small, "crossentropy", "--freeze_trunk"), 3, torch.device("cpu"))


def test_triplets_that_memory_cannot_hold_are_refused() -> None:
    method = ("--training_method", "DeepAdversarialMetricLearning", "--triplets_per_anchor", "100000000000")
    opt = flags("--arch", "resnet18", "--not_pretrained", "--crop_size", "32", "--embed_dim", "8", *method)
    with pytest.raises(UserError, match=r"--triplets_per_anchor 100000000000 at --bs \d+ would take"):
        methods.build_training(opt, 3, torch.device("cpu"))


def test_what_is_frozen_anyway_stays_frozen() -> None:
    method = build()
    method.net.backbone[2].weight.requires_grad_(False)
    again = methods.MetricLossOnly(method.net, method.criterion, method.optimization, freeze_trunk_epochs=1)
    train(again, 1, 2)
    assert not method.net.backbone[2].weight.requires_grad
    assert method.net.backbone[2].bias.requires_grad


def test_gradients_are_clipped() -> None:
    def gradients(**changes: Any) -> torch.Tensor:
        method = build(**changes)
        train(method, 1)
        parameters = [*method.net.parameters(), method.criterion.beta]
        return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])

    plain = gradients()
    norm, largest = plain.norm().item(), plain.abs().max().item()
    torch.testing.assert_close(gradients(clip_grad_norm=norm / 2), plain / 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradients(clip_grad_norm=norm * 2), plain)
    torch.testing.assert_close(gradients(clip_grad_value=largest / 3), plain.clamp(-largest / 3, largest / 3))


def test_the_average_is_what_is_evaluated_and_the_raw_network_what_learns() -> None:
    def make() -> Any:
        return build(keywords={"ema": 0.75})

    method, plain = make(), build()
    expected = {name: value.clone() for name, value in method.net.named_parameters()}
    for epoch in (1, 2, 3):
        train(method, epoch)
        for name, value in method.net.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * value.detach()
    train(plain, 1, 2, 3)
    assert same(method.net.state_dict(), plain.net.state_dict())  # the average changes nothing about it
    for name, value in method.evaluated.named_parameters():
        torch.testing.assert_close(value, expected[name])
        assert not value.requires_grad
    for one, other in zip(method.evaluated.buffers(), method.net.buffers()):
        assert torch.equal(one, other)
    state = method.state_dict()
    assert same(state["state_dict"], method.evaluated.state_dict())
    assert same(state["raw_state_dict"], method.net.state_dict())
    assert_resumes(make)


def test_an_average_begins_and_ends_when_resuming() -> None:
    averaged, plain = build(keywords={"ema": 0.5}), build()
    train(plain, 1)
    averaged.load_state_dict(saved(plain, 1))
    assert same(averaged.evaluated.state_dict(), plain.net.state_dict())
    train(averaged, 2)
    again = build()
    again.load_state_dict(saved(averaged, 2))
    assert same(again.net.state_dict(), averaged.net.state_dict())


def test_accumulated_batches_make_the_step_of_their_mean() -> None:
    def make(accumulate: int = 1) -> Any:
        seed_everything(0)
        net = netlib.EmbeddingNet(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), 12, 4, normalize=False)
        criterion = losses.CrossEntropy(4, 4)
        groups = [{"name": "network", "part": "trunk", "lr": 0.1, "params": [*net.parameters()]}]
        groups.append({"name": "loss", "part": "loss", "lr": 0.1, "params": [*criterion.parameters()]})
        settings: dict[str, Any] = dict.fromkeys(methods.PARTS, ("SGD", {}))
        return methods.MetricLossOnly(net, criterion, methods.Optimization(groups, settings, accumulate=accumulate))

    whole, split = make(), make(accumulate=2)
    for method in (whole, split):
        method.start_epoch(1)
    for _ in range(2):
        whole.step(IMAGES, LABELS, 1)
        before = split.net.embedding.weight.detach().clone()
        split.step(IMAGES[:4], LABELS[:4], 1)
        assert torch.equal(split.net.embedding.weight, before)
        split.step(IMAGES[4:], LABELS[4:], 1)
    for one, other in zip(whole.net.parameters(), split.net.parameters()):
        torch.testing.assert_close(one, other)
    # what is left at the end of an epoch makes a step of its own
    whole.step(IMAGES[:4], LABELS[:4], 1)
    split.step(IMAGES[:4], LABELS[:4], 1)
    for method in (whole, split):
        method.end_epoch()
    for one, other in zip(whole.net.parameters(), split.net.parameters()):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", ["marginloss", "triplet", "npair"])
def test_losses_on_tuples_need_the_whole_batch(loss: str) -> None:
    with pytest.raises(UserError, match=f"--accumulate 2 splits a batch, which --loss {loss} needs as a whole"):
        flags("--loss", loss, "--accumulate", "2")
    assert flags("--loss", "crossentropy", "--accumulate", "2").accumulate == 2


def test_a_reducer_that_is_no_mean_needs_the_whole_batch() -> None:
    with pytest.raises(UserError, match="--accumulate 2 steps with a mean over batches, and --reducer SumReducer"):
        flags("--loss", "ArcFaceLoss", "--accumulate", "2", "--reducer", "SumReducer")
    assert flags("--loss", "ArcFaceLoss", "--accumulate", "2", "--reducer", "MeanReducer").accumulate == 2


def test_losses_whose_batches_may_be_split_are_means_over_images() -> None:
    for name in set(methods.MEANS_OVER_IMAGES) & {*losses.LIBRARY_LOSSES}:
        criterion, _ = losses.loss_select(name, flags("--loss", name, "--embed_dim", "4"), [], 4)
        assert type(criterion.get_submodule("loss.reducer")).__name__ == "MeanReducer"
    for name in set(methods.MEANS_OVER_IMAGES) & {"crossentropy", "proxynca"}:
        opt = flags("--loss", name, "--embed_dim", "4")
        seed_everything(0)
        criterion, _ = losses.loss_select(name, opt, [], 4)
        embeddings = F.normalize(torch.randn(8, 4), dim=1)
        halves = [criterion(embeddings[part], LABELS[part]) for part in (slice(0, 4), slice(4, 8))]
        torch.testing.assert_close(criterion(embeddings, LABELS), torch.stack(halves).mean())


# A classifier


def with_classifier(weight: float = 0.5) -> Any:
    seed_everything(1)
    classifier = netlib.mlp(4, 6, 4)
    seed_everything(0)
    net, criterion = tiny_net(), losses.TripletLoss(losses.Sampler("random"))
    groups = [{"name": "network", "part": "trunk", "lr": 0.1, "params": [*net.parameters()]}]
    groups.append({"name": "classifier", "part": "classifier", "lr": 0.1, "params": [*classifier.parameters()]})
    optimization = methods.Optimization(groups, {"classifier": ("SGD", {})})
    return methods.TrainWithClassifier(
        net, criterion, optimization, classifier=classifier, classifier_loss_weight=weight
    )


def test_the_classifiers_loss_is_added() -> None:
    method = with_classifier()
    method.start_epoch(1)
    seed_everything(0, 1)
    parts = method.step(IMAGES, LABELS, 1)
    again = with_classifier()
    again.start_epoch(1)
    seed_everything(0, 1)
    embeddings = again.net(IMAGES)
    metric = again.criterion(embeddings, LABELS)
    logits = again.classifier(embeddings).detach()
    classification = torch.stack([row.logsumexp(0) - row[label] for row, label in zip(logits, LABELS)]).mean()
    assert set(parts) == {"loss", "metric", "classifier"}
    torch.testing.assert_close(parts["metric"], metric.detach())
    torch.testing.assert_close(parts["classifier"], classification)
    torch.testing.assert_close(parts["loss"], metric.detach() + 0.5 * classification)
    assert_resumes(with_classifier)


def test_classifiers_by_flags() -> None:
    assert flags().classifier_loss_weight == 0
    assert flags("--training_method", "TrainWithClassifier").classifier_loss_weight == 0.1
    with pytest.raises(UserError, match="--classifier_hidden needs a classifier"):
        flags("--classifier_hidden", "3")
    small = ("--arch", "shufflenet_v2_x0_5", "--not_pretrained", "--crop_size", "32", "--embed_dim", "8")
    more = ("--classifier_loss_weight", "2", "--classifier_hidden", "5", "--optim_params", "classifier.lr=0.5")
    method = methods.build_training(flags(*small, *more), 3, torch.device("cpu"))
    assert [tuple(p.shape) for p in method.networks["classifier"].parameters()] == [(5, 8), (5,), (3, 5), (3,)]
    assert method.learning_rates()["Learning Rate classifier"] == 0.5
    assert method.classifier_loss_weight == 2
    with pytest.raises(UserError, match=r"--optim_params classifier.lr: nothing of the classifier learns here"):
        methods.build_training(flags(*small, "--optim_params", "classifier.lr=0.5"), 3, torch.device("cpu"))


# Self-similarity distillation


def s2sd(feature_start: int = 1, weight: float = 3.0) -> Any:
    seed_everything(1)
    heads = nn.ModuleDict({str(dim): netlib.mlp(12, dim, dim) for dim in (6, 8)})
    criteria = nn.ModuleDict({name: losses.TripletLoss(losses.Sampler("random")) for name in heads})
    seed_everything(0)
    net, criterion = tiny_net(), losses.TripletLoss(losses.Sampler("random"))
    groups = [{"name": "network", "part": "trunk", "lr": 0.1, "params": [*net.parameters()]}]
    groups.append({"name": "target heads", "part": "embedder", "lr": 0.1, "params": [*heads.parameters()]})
    return methods.S2SD(
        *(net, criterion, methods.Optimization(groups)),
        target_heads=heads,
        target_criteria=criteria,
        s2sd_weight=weight,
        s2sd_temperature=0.5,
        s2sd_feature_start=feature_start,
    )


def divergence_by_hand(target: torch.Tensor, source: torch.Tensor, temperature: float) -> torch.Tensor:
    """A literal double loop over the pairs of a batch."""

    def probabilities(points: torch.Tensor, anchor: int) -> list[torch.Tensor]:
        cosines = [torch.dot(points[anchor], other) / points[anchor].norm() / other.norm() for other in points]
        weights = [(cosine / temperature).exp() for cosine in cosines]
        return [weight / torch.stack(weights).sum() for weight in weights]

    total = source.new_zeros(())
    for anchor in range(len(source)):
        for p, q in zip(probabilities(target.detach(), anchor), probabilities(source, anchor)):
            total = total + p * (p.log() - q.log())
    return total * temperature**2 / len(source)


def test_the_divergence_of_similarities_by_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    source = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    source.data[1] = source.data[0]  # exact duplicates
    order = torch.tensor([3, 1, 4, 0, 2])
    for temperature in (1.0, 0.25):
        value = methods.similarity_divergence(target, source, temperature)
        expected = divergence_by_hand(target, source, temperature)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(*(torch.autograd.grad(one, source)[0] for one in (value, expected)))
        torch.testing.assert_close(methods.similarity_divergence(target[order], source[order], temperature), value)
    assert methods.similarity_divergence(target, source.detach(), 1.0).requires_grad is False
    assert methods.similarity_divergence(source, source, 1.0).item() == pytest.approx(0, abs=1e-12)


def test_s2sd_adds_its_terms() -> None:
    method, again = s2sd(), s2sd()
    features_of = again.net.features
    for iteration in (1, 2):  # the features' similarities count from the second one on
        for one in (method, again):
            one.start_epoch(iteration)
        again.load_state_dict({**saved(method, 0)})
        seed_everything(0, iteration)
        parts = method.step(IMAGES, LABELS, iteration)
        seed_everything(0, iteration)
        features = features_of(IMAGES)
        embeddings = again.net.embed_features(features)
        metric, targets, divergences = again.criterion(embeddings, LABELS), [], []
        for name, head in again.networks["target_heads"].items():
            target = F.normalize(head(features), dim=1)
            targets.append(again.networks["target_criteria"][name](target, LABELS))
            divergences.append(divergence_by_hand(target, embeddings, 0.5))
        distillation = (divergences[0] + divergences[1]) / 2
        if iteration == 2:
            distillation = distillation + divergence_by_hand(features, embeddings, 0.5)
        loss = (metric + (targets[0] + targets[1]) / 2) / 2 + 3 * distillation
        torch.testing.assert_close(parts["distillation"], distillation.detach())
        torch.testing.assert_close(parts["loss"], loss.detach())
        assert set(parts) == {"loss", "metric", "targets", "distillation"}
    assert_resumes(lambda: s2sd(feature_start=3))


# Generated negatives


def daml(metric_alone: int = 0, generator_alone: int = 0, ema: float | None = None) -> Any:
    seed_everything(1)
    generator = netlib.mlp(36, 12, 12)
    seed_everything(0)
    net, criterion = tiny_net(), losses.TripletLoss(losses.Sampler("random"))
    groups = [{"name": "network", "part": "trunk", "lr": 0.1, "params": [*net.parameters()]}]
    groups.append({"name": "generator", "part": "generator", "lr": 0.01, "params": [*generator.parameters()]})
    return methods.DeepAdversarialMetricLearning(
        *(net, criterion, methods.Optimization(groups, {"generator": ("SGD", {})})),
        generator=generator,
        metric_alone_epochs=metric_alone,
        generator_alone_epochs=generator_alone,
        triplets_per_anchor=3,
        synth_margin=0.05,
        hard_loss_weight=0.2,
        reg_loss_weight=0.3,
        adv_loss_weight=0.4,
        synth_loss_weight=0.5,
        ema=ema,
    )


def daml_by_hand(method: Any, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The losses of a step, each as a loop over triplets: what the generator and what the network learns from."""
    seed_everything(0, seed)
    features = method.net.features(IMAGES)
    embeddings = method.net.embed_features(features)
    triplets = method.random_triplets(LABELS)
    assert len(triplets) == 24
    labels = LABELS.numpy()[triplets]
    assert (labels[:, 0] == labels[:, 1]).all()
    assert (labels[:, 0] != labels[:, 2]).all()
    assert (triplets[:, 0] != triplets[:, 1]).all()
    terms: dict[str, list[torch.Tensor]] = {"hard": [], "reg": [], "adv": [], "synth": []}
    for a, p, n in triplets.tolist():
        made = method.generator(torch.cat([features[a], features[p], features[n]]).detach()[None])[0]
        embedded = F.normalize(method.net.embedding(made), dim=0)
        fixed = embeddings.detach()
        terms["hard"].append(((made / made.norm() - features[a].detach() / features[a].norm()) ** 2).sum())
        terms["reg"].append(((made / made.norm() - features[n].detach() / features[n].norm()) ** 2).sum())
        pull = ((embedded - fixed[a]) ** 2).sum() - ((fixed[p] - fixed[a]) ** 2).sum()
        terms["adv"].append((pull - 0.05).clamp(min=0))
        pushed = F.normalize(method.net.embedding(made.detach()), dim=0)
        push = ((embeddings[a] - embeddings[p]) ** 2).sum() - ((embeddings[a] - pushed) ** 2).sum()
        terms["synth"].append((push + 0.05).clamp(min=0))
    means = {name: torch.stack(values).mean() for name, values in terms.items()}
    metric = method.criterion(embeddings, LABELS)
    return {name: means[name] for name in ("hard", "reg", "adv")}, {"metric": metric, "synth": means["synth"]}


def test_generated_negatives_by_their_equations() -> None:
    method, again = daml(), daml()
    for one in (method, again):
        one.start_epoch(1)
    seed_everything(0, 1)
    parts = method.step(IMAGES, LABELS, 1)
    of_generator, of_network = daml_by_hand(again, 1)
    assert set(parts) == {"loss", *of_generator, *of_network}
    for name, value in {**of_generator, **of_network}.items():
        torch.testing.assert_close(parts[name], value.detach())
    generator_loss = 0.2 * of_generator["hard"] + 0.3 * of_generator["reg"] + 0.4 * of_generator["adv"]
    network_loss = of_network["metric"] + 0.5 * of_network["synth"]
    torch.testing.assert_close(parts["loss"], (generator_loss + network_loss).detach())
    # no loss of the generator moves the network, and none of the network the generator
    expected = torch.autograd.grad(generator_loss, list(again.generator.parameters()), retain_graph=True)
    for parameter, gradient in zip(method.generator.parameters(), expected):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, gradient)
    expected = torch.autograd.grad(network_loss, list(again.net.parameters()))
    for parameter, gradient in zip(method.net.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_who_learns_in_which_phase() -> None:
    method = daml(metric_alone=1, generator_alone=1)
    learned = []
    for epoch in (1, 2, 3):
        before = [
            [value.clone() for value in network.state_dict().values()] for network in (method.net, method.generator)
        ]
        seed_everything(0, epoch)
        method.start_epoch(epoch)
        parts = method.step(IMAGES, LABELS, epoch)
        after = [list(network.state_dict().values()) for network in (method.net, method.generator)]
        learned.append(tuple(not same(one, other) for one, other in zip(before, after)))
        grads = [parameter.grad is not None for parameter in method.generator.parameters()]
        assert set(grads) == {epoch > 1}
        assert ("metric" in parts) == (epoch == 3)
        method.end_epoch()
    assert learned == [(True, False), (False, True), (True, True)]  # (network with its BatchNorm, generator)


def test_generated_negatives_resume() -> None:
    assert_resumes(lambda: daml(metric_alone=1, generator_alone=1))
    assert_resumes(lambda: daml(metric_alone=1, generator_alone=2, ema=0.9))


@pytest.mark.parametrize("make", [build, with_classifier, s2sd, daml])
def test_every_method_trains_on_a_frozen_trunk(make: Callable[[], Any]) -> None:
    def frozen() -> Any:
        method = make()
        method.net.backbone.requires_grad_(False)
        return method

    method = frozen()
    before = {name: value.clone() for name, value in method.net.named_parameters()}
    train(method, 1, 2)
    changed = {name for name, value in method.net.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"embedding.weight", "embedding.bias"}
    assert_resumes(frozen)


@needs_fake_cuda
@pytest.mark.parametrize("make", [with_classifier, s2sd, daml, lambda: daml(generator_alone=1), lambda: cascaded()])
def test_steps_do_not_wait_for_the_device(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    labels = LABELS.clone()
    made = []

    def only_look(self: methods.Optimization, loss: torch.Tensor) -> bool:  # backward() itself needs a CUDA driver
        made.append(loss)
        return True

    monkeypatch.setattr(methods.Optimization, "step", only_look)
    with fake_cuda():
        method = make()
        method.start_epoch(1)
        for _ in range(2):
            parts = method.step(torch.zeros(8, 3, 6, 6, dtype=torch.uint8), labels, 1)
        assert made[-1].is_cuda
        assert all(part.is_cuda for part in parts.values())


# Several depths


def cascaded(shares: Sequence[float] = (100, 50, 20), pos_margin: float = 0.1, neg_margin: float = 1.6) -> Any:
    seed_everything(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 3), nn.Conv2d(6, 7, 3))
    backbone = netlib.CascadeBackbone(layers, ["0", "1", "2"], "tiny", 6)
    heads = [nn.Linear(width, 4) for width in backbone.widths]
    embedding = netlib.CascadeEmbedding(heads, backbone.widths)
    net = netlib.EmbeddingNet(backbone, sum(backbone.widths), 12, embedding=embedding)
    criterion = losses.ContrastiveLoss(pos_margin=pos_margin, neg_margin=neg_margin)
    groups = [{"part": "trunk", **group} for group in net.parameter_groups(0.01, 0.0)]
    optimization = methods.Optimization(groups, None, methods.Schedule("step", STEP))
    return methods.CascadedEmbeddings(net, criterion, optimization, cascade_shares=shares)


def stages_by_hand(method: Any, shares: Sequence[float]) -> tuple[list[float], list[dict[bool, set[Any]]]]:
    """Each depth's loss and the pairs that it keeps, positive and negative, in loops."""
    net = method.net
    with torch.no_grad():
        stages = [stage.double() for stage in net.embedding.stages(net.features(IMAGES))]
    everything = [(i, j) for i in range(len(LABELS)) for j in range(i + 1, len(LABELS))]
    pairs = {kind: [(i, j) for i, j in everything if bool(LABELS[i] == LABELS[j]) is kind] for kind in (True, False)}
    values, kept = [], []
    for stage, share in zip(stages, shares):
        terms: dict[bool, list[float]] = {True: [], False: []}
        for kind, of_kind in pairs.items():
            by_distance = sorted(of_kind, key=lambda pair: (stage[pair[0]] - stage[pair[1]]).norm(), reverse=kind)
            pairs[kind] = by_distance[: -int(-share * len(of_kind) // 100)]
            for i, j in pairs[kind]:
                distance = (stage[i] - stage[j]).norm().item()
                term = distance - 0.1 if kind else 1.6 - distance
                terms[kind] += [term] if term > 0 else []
        values.append(sum(sum(one) / max(1, len(one)) for one in terms.values()))
        kept.append({kind: set(of_kind) for kind, of_kind in pairs.items()})
    return values, kept


@pytest.mark.parametrize("shares", [(100, 50, 20), (30, 100, 70)])
def test_each_depth_learns_from_the_hardest_pairs_of_the_one_before_it(
    shares: Sequence[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = cascaded(shares)
    method.start_epoch(1)
    values, wanted = stages_by_hand(method, shares)
    kept: list[torch.Tensor] = []
    hardest = methods.hardest

    def watching(*args: Any, **kwargs: Any) -> torch.Tensor:
        kept.append(hardest(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(methods, "hardest", watching)
    parts = method.step(IMAGES, LABELS, epoch=1)
    assert set(parts) == {"loss", "stage 0", "stage 1", "stage 2"}
    for position, value in enumerate(values):
        assert parts[f"stage {position}"].item() == pytest.approx(value, rel=1e-5)
    assert parts["loss"].item() == pytest.approx(sum(values), rel=1e-5)
    pairs = [{divmod(pair, len(LABELS)) for pair in one.tolist()} for one in kept]
    assert pairs == [of_stage[kind] for of_stage in wanted for kind in (True, False)]
    assert len(set(map(frozenset, pairs[1::2]))) == (3 if shares[1] < 100 else 2)  # the heads see different pairs
    for head in method.net.embedding.heads:
        assert head.weight.grad.abs().sum() > 0


def test_shares_of_pairs_are_rounded_up_exactly() -> None:
    distances, pairs = torch.arange(100.0), torch.arange(10, 60)
    assert methods.hardest(distances, pairs, 0.14, farthest=True).tolist() == [59, 58, 57, 56, 55, 54, 53]
    assert methods.hardest(distances, pairs, 0.15, farthest=False).tolist() == [10, 11, 12, 13, 14, 15, 16, 17]


def test_cascaded_embeddings_resume_exactly() -> None:
    assert_resumes(cascaded)


# Whole runs

CASCADE = ("--training_method", "CascadedEmbeddings", "--loss", "contrastive", "--embed_dim", "18")
WHOLE = {
    "optimizers": (
        *("--optimizer", "SGD", "--optim_params", "momentum=0.9", "trunk.class=RMSprop", "loss.lr=0.1"),
        *("--scheduler", "StepLR", "--scheduler_params", "step_size=3", "interval=iteration"),
    ),
    "warm-up": (
        *("--freeze_trunk_epochs", "1", "--clip_grad_value", "10", "--clip_grad_norm", "1", "--ema", "0.9"),
        *("--scheduler", "ReduceLROnPlateau", "--scheduler_params", "patience=0", "threshold=1"),
    ),
    "frozen trunk": ("--freeze_trunk", "--fc_lr_mul", "2", "--ema", "0.9"),
    "adapters": ("--arch", "timm:test_vit", "--lora", "2", "--pooling", "gem", "--embedder", "12", "--ema", "0.9"),
    "features alone": ("--embed_dim", "0", "--freeze_layers", "conv1", "stage2", "--embedder_norm", "layernorm"),
    "CascadedEmbeddings": (*CASCADE, "--loss_params", "neg_margin=1.5", "--classifier_loss_weight", "0.5"),
    "frozen cascade": (*CASCADE, "--freeze_trunk", "--ema", "0.9", "--pooling", "max"),
    "accumulate": ("--loss", "crossentropy", "--accumulate", "2"),
    "TrainWithClassifier": ("--training_method", "TrainWithClassifier", "--classifier_hidden", "7"),
    "UnsupervisedByAugmentation": ("--training_method", "UnsupervisedByAugmentation"),
    "S2SD": (
        *("--training_method", "S2SD", "--s2sd_dims", "32", "48", "--s2sd_feature_start", "3"),
        *("--classifier_loss_weight", "0.5"),
    ),
    "DeepAdversarialMetricLearning": (
        *("--training_method", "DeepAdversarialMetricLearning", "--metric_alone_epochs", "1"),
        *("--triplets_per_anchor", "4", "--classifier_loss_weight", "0.5"),
    ),
}


WHOLE |= {f"{name} with a frozen trunk": (*WHOLE[name], "--freeze_trunk") for name in WHOLE if name in methods.METHODS}


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith((*methods.METHODS,))) for name in WHOLE]
)
def test_whole_runs_resume_and_are_evaluated_bit_for_bit(name: str, run: Run, go_on: Run, tmp_path: Path) -> None:
    more = (*WHOLE[name], "--log_every", "1", "--eval_metrics", "Recall", "--iterations_per_epoch", "2")
    run(*more, "--savename", "whole")
    run(*more, "--n_epochs", "1", "--savename", "stopped")
    go_on("--resume_training", "--n_epochs", "2", savename="stopped")
    whole, stopped = tmp_path / "tiny" / "whole", tmp_path / "tiny" / "stopped"
    one, other = (torch.load(folder / "last.pth.tar", weights_only=True) for folder in (whole, stopped))
    assert set(one) == set(other)
    for key in set(one) - {"opt", "history"}:
        assert same(one[key], other[key]), key
    for log in ("log_val_Base.csv", "log_iterations.csv"):
        assert csv_rows(whole / log) == csv_rows(stopped / log)
    rows = csv_rows(whole / "log_val_Base.csv")
    metrics = go_on("--evaluate", savename="whole")
    best = max(rows, key=lambda row: (float(row["Recall @ 1"]), -int(row["Epochs"])))
    assert metrics["test Recall @ 1"] == float(best["Recall @ 1"])


@pytest.mark.usefixtures("without_pictures")
def test_parts_of_the_loss_are_columns(run: Run, tmp_path: Path) -> None:
    run(*WHOLE["DeepAdversarialMetricLearning"], "--log_every", "1")
    rows = csv_rows(tmp_path / "tiny" / "run" / "log_iterations.csv")
    assert {f"Loss {name}" for name in ("metric", "classifier", "hard", "reg", "adv", "synth")} <= set(rows[0])
    assert rows[0]["Loss hard"] == ""  # the network learns alone
    assert float(rows[-1]["Loss hard"]) > 0


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_names_flags_that_there_are(name: str) -> None:
    method, known = methods.METHODS[name], config.build_parser().traits
    keywords = {key for kind in method.__mro__[:-1] for key in inspect.signature(kind.__init__).parameters}  # type: ignore[misc]
    assert set(method.flags) <= known.keys() & keywords
    assert "step" in vars(method) or method.step is methods.MetricLossOnly.step


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["UnsupervisedByAugmentation", "--classifier_loss_weight", "1"], "--classifier_loss_weight needs labels"),
        (
            ["UnsupervisedByAugmentation", "--loss", "crossentropy", "--samples_per_class", "1"],
            "give --samples_per_class 2",
        ),
        (["UnsupervisedByAugmentation", "--batch_sampler", "shuffled"], "and --batch_sampler class_balanced"),
        (["UnsupervisedByAugmentation", "--dist_measure"], "--dist_measure needs labels of the training images"),
        (["UnsupervisedByAugmentation", "--splits_to_eval", "train"], "--splits_to_eval train needs labels of the"),
        (["S2SD", "--loss", "crossentropy", "--accumulate", "2"], "--accumulate needs a loss of single images, which"),
        (["CascadedEmbeddings"], "chooses pairs itself, by their distances, which --loss .* give --loss contrastive"),
        (["CascadedEmbeddings", "--loss", "contrastive", "--sampling", "distance"], "which --sampling can't take"),
        (["CascadedEmbeddings", "--cascade_shares", "0"], "0 is not above 0 and at most 100"),
        (["S2SDD"], r"--training_method S2SDD is unknown \(did you mean S2SD\?\)"),
    ],
)
def test_methods_refuse_what_they_cant_use(argv: Sequence[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        flags("--training_method", *argv)


def test_a_share_for_each_depth() -> None:
    small = ("--arch", "resnet18", "--not_pretrained", "--crop_size", "32", "--embed_dim", "12")
    method = ("--training_method", "CascadedEmbeddings", "--loss", "contrastive", "--cascade_shares", "100", "50")
    with pytest.raises(UserError, match=r"--cascade_shares gives 2 share\(s\) for 3 depth\(s\): give one for each"):
        methods.build_training(flags(*small, *method), 3, torch.device("cpu"))


@pytest.mark.parametrize("argv", [["--freeze_trunk"], ["--freeze_trunk_epochs", "1"]])
def test_training_in_which_nothing_learns_is_refused(argv: Sequence[str]) -> None:
    small = ("--arch", "resnet18", "--not_pretrained", "--crop_size", "32", "--embed_dim", "0", *argv, "--loss")
    with pytest.raises(
        UserError, match=f"with {argv[0]} and --embed_dim 0 nothing learns, since --loss triplet has no"
    ):
        methods.build_training(flags(*small, "triplet"), 3, torch.device("cpu"))
    method = methods.build_training(flags(*small, "crossentropy"), 3, torch.device("cpu"))
    assert method.criterion.get_parameter("classifier.weight").shape == (3, 512)
    if argv == ["--freeze_trunk"]:
        methods.build_training(flags(*small, "triplet", "--n_epochs", "0"), 3, torch.device("cpu"))


def test_adapters_stand_in_the_checkpoint_under_a_key_of_their_own(run: Run, tmp_path: Path) -> None:
    import peft

    run("--arch", "timm:test_vit", "--lora", "2", "--n_epochs", "1")
    folder = tmp_path / "tiny" / "run"
    state = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
    whole = netlib.networkselect(pickle.loads((folder / "hypa.pkl").read_bytes()))
    fresh = copy.deepcopy(whole)
    whole.load_state_dict(state["state_dict"])
    assert any(value.abs().sum() > 0 for name, value in state["lora"].items() if "lora_B" in name)
    peft.set_peft_model_state_dict(fresh.backbone, state["lora"])
    for name, parameter in whole.named_parameters():
        if ".lora_" in name:
            assert torch.equal(fresh.get_parameter(name), parameter), name


def test_flags_of_another_method_are_refused(run: Run) -> None:
    for flag in ("--s2sd_weight", "--s2sd_dims"):
        with pytest.raises(UserError, match=f"{flag} is for --training_method S2SD: drop it, or give that method"):
            run("--training_method", "DeepAdversarialMetricLearning", flag, "3")


@pytest.mark.usefixtures("without_pictures")
def test_without_labels_each_image_is_a_class(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    step = methods.UnsupervisedByAugmentation.step

    def watching(self: Any, images: torch.Tensor, labels: torch.Tensor, epoch: int) -> Any:
        seen.append((images, labels))
        return step(self, images, labels, epoch)

    monkeypatch.setattr(methods.UnsupervisedByAugmentation, "step", watching)
    capsys.readouterr()
    metrics = run("--training_method", "UnsupervisedByAugmentation", "--samples_per_class", "4")
    notices = capsys.readouterr().err
    assert "classes with fewer than" not in notices
    assert "classes are drawn equally often" not in notices
    assert 0 <= metrics["Recall @ 1"] <= 1
    for images, labels in seen:
        assert torch.bincount(labels)[labels].eq(4).all()
        views = images[labels == labels[0]]
        assert not torch.equal(views[0], views[1])
    assert max(labels.max() for _, labels in seen) > 4  # more than there are classes


def test_a_cascade_has_as_many_dimensions_per_head_unless_told_otherwise() -> None:
    flags = ["--training_method", "CascadedEmbeddings", "--loss", "contrastive"]
    assert config.resolve(config.parse(flags)).embed_dim == 129
    assert config.resolve(config.parse([*flags, "--cascade_shares", "100", "50"])).embed_dim == 128


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CosineAnnealingLR", "LinearLR"])
def test_schedules_of_no_epochs(source: Path, tmp_path: Path, scheduler: str) -> None:
    flags = ("--dataset", "tiny", "--n_epochs", "0", "--scheduler", scheduler, "--savename", "run")
    assert main.command(training_flags(source, tmp_path, *flags))

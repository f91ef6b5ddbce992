"""All flags of main.py: the parser, YAML files in layers below the command line, and what follows from what.

A file's entries are parsed exactly as flags are: raw scalars go to argparse, so that `1e-4` is a number and a savename
of `012` stays what it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

import datasets
import evaluate
import features
import image_cache
import losses
import methods
import netlib
import records
import retrieval
import transforms
from auxiliaries import (
    OVERRIDE,
    UNSET,
    FlagParser,
    FrozenNamespace,
    MappingAction,
    SwitchAction,
    UserError,
    atomic_write,
    check_memory,
    default_workers,
    find_device,
    nearest_name,
    number,
    shorten,
    shown,
    split_suffix,
    to_builtin,
    user_path,
)

VERSION = "2.0.0"  # as in CITATION.cff
PRESETS = Path(__file__).parent / "configs"
COMPLETE = "# Complete if the last line is three dots.\n"
MAX_SAVENAME = 200  # bytes: with what is put before and after it, it must fit into 255

# What runs did that were stored before these flags existed: a stored configuration that lacks one of them means this.
MEANT_BEFORE = {
    **{"crop_scale": 0.08, "flip": True, "redraw_images": True, "interpolation": "bilinear"},
    **{"normalize_members": False, "kmeans": "faiss"},
}

# What --fast changes, see `fast_flags`, and how it is without.
EXACT = {"precision": "fp32", "channels_last": False, "compile": False, "fused": False, "deterministic": True}

# What users bring along from other projects, and what it is here.
KNOWN_ELSEWHERE = {
    "learning_rate": "--lr", "base_lr": "--lr", "batch_size": "--bs", "train_batch_size": "--bs",
    "eval_batch_size": "--eval_bs", "epochs": "--n_epochs", "num_epochs": "--n_epochs", "max_epochs": "--n_epochs",
    "num_epochs_train": "--n_epochs", "num_workers": "--kernels", "workers": "--kernels",
    "dataloader_num_workers": "--kernels", "eval_dataloader_num_workers": "--kernels", "weight_decay": "--decay",
    "wd": "--decay", "model": "--arch", "backbone": "--arch", "embedding_size": "--embed_dim",
    "embedding_dim": "--embed_dim", "data_path": "--source_path", "data_dir": "--source_path",
    "data_root": "--source_path", "dataset_root": "--source_path", "root": "--source_path", "output_dir": "--save_path",
    "save_dir": "--save_path", "log_dir": "--save_path", "root_experiment_folder": "--save_path",
    "experiment_name": "--savename", "exp_name": "--savename", "name": "--savename", "run_name": "--savename",
    "resume": "--resume_training", "pretrained_weights": "--weights", "checkpoint": "--weights",
    "device": "--gpu", "gpu_id": "--gpu", "gpus": "--gpu", "random_seed": "--seed", "manual_seed": "--seed",
    "image_size": "--crop_size", "img_size": "--crop_size", "input_size": "--crop_size",
    "loss_funcs": "--loss", "criterion": "--loss", "mining_funcs": "--sampling", "miner": "--sampling",
    "sampler": "--batch_sampler", "m_per_class": "--samples_per_class", "images_per_class": "--samples_per_class",
    "num_instances": "--samples_per_class", "lr_scheduler": "--scheduler", "milestones": "--tau", "lr_steps": "--tau",
    "lr_decay_gamma": "--gamma", "eval_every": "--save_interval", "save_every": "--save_interval",
    "eval_metric": "--eval_metric_for_best_epoch", "primary_metric": "--eval_metric_for_best_epoch",
    "test": "--evaluate", "eval_only": "--evaluate", "eval": "--evaluate", "reproduce": "--reproduce_results",
    "freeze_backbone": "--freeze_trunk", "linear_probe": "--freeze_trunk", "lora_rank": "--lora", "lora_r": "--lora",
    "global_pool": "--pooling", "special_split_scheme_name": "--split_scheme", "config_file": "--config",
    "cfg": "--config",
}  # fmt: skip

Layer = list[tuple[str, list[str]]]  # flags with what a user would have typed for them; nothing: back to the default


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of the run itself, of its folder, and of what to do with a run that exists."""
    # fmt: off
    add = parser.add_argument_group("run").add_argument
    add("--n_epochs", type=number(int, 0), default=70,
        help="number of epochs; 0: only evaluate the network as it is, before training")
    add("--seed", type=number(int, 0), default=1, compared=False,
        help="seed of weights, batches, augmentation and sampling")
    add("--gpu", type=number(int, -1), default=0, machine=True, compared=False,
        help="number of the CUDA device; -1: the CPU. Of several processes on a machine, the first one has that "
        "device, and the others those after it")
    add("--fast", action="switch", machine=True, compared=False,
        help="turn on what is quicker on this device, among --precision, --channels_last, --compile, --fused and "
        "--no-deterministic; figures differ in their last digits")
    add("--deterministic", action="switch", default=None, machine=True, compared=False,
        help="on a GPU, use only algorithms of cuDNN that give the same digits each time; --no-deterministic: the "
        "quickest ones, by trial (default: on, except with --fast)")
    add("--savename", machine=True, compared=False,
        help="name of the run folder (default: dataset, architecture and time)")
    add("--save_path", type=user_path, default="Training_Results", machine=True, compared=False,
        help="folder of all run folders, which are sorted into it by dataset")

    add = parser.add_argument_group("configuration", stored=False).add_argument
    add("--config", nargs="+", type=user_path, metavar="FILE",
        help="YAML files of flags, later ones over earlier ones; a bare name is looked up in configs/; other flags win")

    add = parser.add_argument_group("finished and interrupted runs", stored=False).add_argument
    add("--resume_training", nargs="?", const="latest", choices=("latest", "best"),
        help="continue the run --savename, with its own flags and those given beside this one, after its latest or its "
        "best epoch")
    add("--reproduce_results", type=user_path, metavar="FOLDER",
        help="run the configuration of a run folder again, and compare")
    add("--evaluate", nargs="?", const="", type=user_path, metavar="FOLDER",
        help="evaluate the best network of a run, in FOLDER or of --savename, without training")
    add("--dry_run", action="switch",
        help="print what training, or --resume_training, would do: images, batches, parameters, memory, epochs and the "
        "run folder; then stop, with nothing written")
    add("--accept_changed_data", action="switch",
        help="continue or evaluate a run although its images or their classes have changed since it began")

    add = parser.add_argument_group("with --evaluate", stored=False).add_argument
    add("--eval_reference_set", choices=("compared_to_self", "compared_to_sets_combined", "compared_to_training_set"),
        needs="evaluate",
        help="--evaluate: where queries search: in their own set (or its gallery), in all --splits_to_eval together, "
        "or in the training images, which hold none of the other splits' classes (default: compared_to_self)")
    add("--eval_normalize_embeddings", action="switch", default=None, needs="evaluate",
        help="--evaluate: scale embeddings to length 1 (default: as trained)")
    add("--eval_use_trunk_output", action="switch", needs="evaluate",
        help="--evaluate: use the backbone's features instead of embeddings")
    add("--eval_pca", type=number(int, 1), metavar="N", needs="evaluate",
        help="--evaluate: use the first N principal components")
    add("--eval_pca_normalize", action="switch", needs="evaluate",
        help="--eval_pca: scale the projected embeddings to length 1 again")
    add("--eval_every_class", action="switch", needs="evaluate",
        help="--evaluate: write the retrieval metrics of each class to per_class_<split>.csv, and add their means over "
        "classes, in which each class counts alike, as Macro Recall @ 1, ...")
    add("--eval_dims", type=number(int, 1), nargs="+", metavar="N", needs="evaluate",
        help="--evaluate: also retrieve by the first N principal components of the training images' embeddings, and "
        "print Recall and MAP@R against bytes per image")
    add("--eval_quantize", choices=tuple(name for name in retrieval.PRECISIONS if name != "float32"), nargs="+",
        needs="evaluate",
        help="--evaluate: also retrieve by embeddings that are kept as 8-bit integers (int8) or signs (binary), of all "
        "dimensions and those of --eval_dims")
    add("--eval_size_of_tsne", type=number(int, 10), metavar="N", needs="evaluate",
        help="--evaluate: draw a t-SNE plot of N images of each set, class by class")
    # fmt: on


@cache
def build_parser() -> FlagParser:
    """The parser of all modules' flags."""
    return compose_parser(
        "main.py",
        "Trains an embedding network on labeled images and evaluates it by retrieval on classes it has never seen.",
    )


def compose_parser(prog: str, description: str, tunes: bool = False) -> FlagParser:
    """A new parser of all modules' flags; one that `tunes` also takes suffixes, such as --lr~BAYESIAN~."""
    parser = FlagParser(prog=prog, description=description, known_elsewhere=KNOWN_ELSEWHERE, tunes=tunes)
    parser.add_argument("--version", action="version", version=f"{parser.prog} {VERSION}")
    for module in (datasets, transforms, netlib, features, image_cache, losses, methods, evaluate, records, retrieval):
        module.add_arguments(parser)
    add_arguments(parser)
    parser.list_first("run", "configuration", "finished and interrupted runs")
    return parser


# Parsing in layers


def parse(argv: Sequence[str], stored: Path | None = None) -> argparse.Namespace:
    """Parses the command line on top of the files that its --config names.

    Args:
        argv: the command line.
        stored: a run's config.yaml, to lie below all of them.

    Raises:
        UserError: a flag is unknown or its value is invalid; for a file it names the line and the nearest flag.
    """
    return complete(parse_layers(build_parser(), argv, stored), given_flags(argv))


def complete(layered: Mapping[str, Any], given: Collection[str]) -> argparse.Namespace:
    """All flags, with their defaults where nobody gave them.

    Args:
        layered: every flag's value, or `UNSET`.
        given: the flags that the user gave, other than those stored with a run.

    Raises:
        UserError: a value is invalid.
    """
    values = {name: get_default(name) if value is UNSET else value for name, value in layered.items()}
    values["dataset"], values["source_path"] = datasets.find_dataset(values["dataset"], values["source_path"])
    for name, value in values.items():
        if isinstance(value, str):
            _check_text(name, value)
    opt = argparse.Namespace(**values)
    if opt.optim_params or opt.scheduler_params:
        methods.refuse_doubles(given, opt)
    return opt


def _check_text(name: str, text: str) -> None:
    """Refuses text that can't be written to files or be part of a path."""
    is_unicode = text.encode("utf-8", errors="replace").decode("utf-8") == text
    if "\0" in text or not is_unicode:
        raise UserError(f"--{name} {shown(text)} is not valid text: it has a NUL character or is not UTF-8")


def given_flags(argv: Sequence[str]) -> dict[str, Any]:
    """The flags that the command line, or a file that it names, gives."""
    given = parse_layers(build_parser(), argv)
    return {name: value for name, value in given.items() if value is not UNSET}


def get_default(name: str) -> Any:
    """A flag's default."""
    return build_parser().get_default(name)


def parse_layers(parser: FlagParser, argv: Sequence[str], stored: Path | None = None) -> dict[str, Any]:
    """Every flag's value, `UNSET` where neither the command line nor a file gives it."""
    given = _parse_tokens(parser, argv)
    files = [*([str(stored)] if stored else []), *(given["config"] if given["config"] is not UNSET else [])]
    if not files:
        return given
    layers: Layer = []
    if stored:
        layers = [(f"--{name}", [_as_token(name, value)]) for name, value in MEANT_BEFORE.items()]
    for name in files:
        layers = _merge(layers, read_layer(name, parser))
    return _parse_tokens(parser, [*(token for _, tokens in layers for token in tokens), *argv])


def _as_token(name: str, value: object) -> str:
    """A flag with its value as a user would have typed it."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def parse_one(name: str, text: str) -> Any:
    """One flag's value from text, true or false for a switch.

    Raises:
        UserError: it is invalid.
    """
    parser = build_parser()
    _, tokens = _as_tokens(name, yaml.ScalarNode("tag:yaml.org,2002:str", text), parser)
    return _parse_tokens(parser, tokens)[name]


def _parse_tokens(parser: FlagParser, tokens: Sequence[str]) -> dict[str, Any]:
    return vars(parser.parse_args(tokens, argparse.Namespace(**dict.fromkeys(parser.traits, UNSET))))


# libyaml's, where PyYAML was built with it: about ten times as fast, which comparing many runs needs.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path, load: Callable[..., Any] = yaml.load, loader: Any = YAML_LOADER) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: it can't be read, is not a YAML file, or is one of `save_config`'s that was cut off.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(COMPLETE) and not text.endswith("\n...\n"):
            raise UserError(f"{path} is incomplete: its last line, three dots, is missing")
        return load(text, Loader=loader)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None


def read_layer(name: str, parser: FlagParser) -> Layer:
    """Reads a file's entries.

    Raises:
        UserError: it can't be read, or an entry is invalid.
    """
    path = _find_file(name)
    root = read_yaml(path, yaml.compose, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} is not a mapping of flags to values")
    layer: Layer = []
    for key_node, value_node in root.value:
        where = f"{path}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{where}: a flag's name is a plain word")
        try:
            layer.append(_as_tokens(str(key_node.value), value_node, parser))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if any(split_suffix(layer[-1][0])[0] == split_suffix(flag)[0] for flag, _ in layer[:-1]):
            raise UserError(f"{where}: {split_suffix(layer[-1][0])[0]} is given twice")
    _check_layer(path, layer, [key_node.start_mark.line + 1 for key_node, _ in root.value], parser)
    return layer


def _check_layer(path: Path, layer: Layer, lines: Sequence[int], parser: FlagParser) -> None:
    """Makes sure that every entry can be parsed; only if not, finds out which one can't."""
    try:
        _parse_tokens(parser, [token for _, tokens in layer for token in tokens])
    except UserError:
        for (_, tokens), line in zip(layer, lines):
            try:
                _parse_tokens(parser, tokens)
            except UserError as error:
                raise UserError(f"{path}, line {line}: {error}") from None
        raise


def _merge(layers: Layer, layer: Layer) -> Layer:
    """Puts a layer over others: an entry without tokens removes those of its flag."""
    reset = {split_suffix(flag)[0] for flag, tokens in layer if not tokens}
    kept = [(flag, tokens) for flag, tokens in layers if split_suffix(flag.removesuffix(OVERRIDE))[0] not in reset]
    return [*kept, *layer]


def _find_file(name: str) -> Path:
    path, preset = Path(name), PRESETS / f"{name}.yaml"
    if path.is_file():
        return path
    if path.suffix or path.name != name:
        raise UserError(f"--config {shown(name)} does not exist or is not a file")
    if not preset.is_file():
        names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
        raise UserError(
            f"--config {shown(name)} is neither a file nor one in configs/{nearest_name(name, names)}, which has "
            f"{', '.join(names)}"
        )
    return preset


def _as_tokens(key: str, node: yaml.Node, parser: FlagParser) -> tuple[str, list[str]]:
    """An entry as its flag and what a user would have typed."""
    flag = f"--{key}"
    action = parser.flags().get(flag)
    if action is None and split_suffix(flag)[1]:
        raise parser.refuse_suffix(flag)
    if action is None or key in ("config", "help"):
        raise UserError(f"unknown flag {shown(flag)}{parser.nearest_flag(flag)}")
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        return flag, []
    if isinstance(node, yaml.MappingNode | yaml.SequenceNode):
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else [entry])]
        if isinstance(node, yaml.MappingNode):
            parts = [part for name, value in node.value for part in _list_tuned(name, value)]
        if not all(isinstance(part, yaml.ScalarNode) for part in parts):
            raise UserError(f"{flag} takes plain values, not lists or mappings of more lists or mappings")
        odd = [part.value for part in parts if part.value.startswith("-") and not _is_number(part.value)]
        if odd:
            raise UserError(f"{flag} takes values, not {shown(odd[0])}, which looks like a flag")
    if isinstance(node, yaml.MappingNode) and isinstance(action, MappingAction):
        return flag, [flag, *(f"{name.value}={_listed(value)}" for name, value in node.value)]
    if isinstance(node, yaml.SequenceNode) and action.nargs in ("*", "+"):
        return flag, [flag, *(item.value for item in node.value)]
    if not isinstance(node, yaml.ScalarNode) or isinstance(action, MappingAction):
        raise UserError(f"{flag} takes {'a mapping' if isinstance(action, MappingAction) else 'a plain value'}")
    if isinstance(action, SwitchAction):
        if node.value.lower() not in ("true", "false"):
            raise UserError(f"{flag} takes true or false, not {shown(node.value)}")
        on, off = action.option_strings
        return flag, [off if (node.value.lower() == "true") == (flag == off) else on]
    return flag, [f"{flag}={node.value}"]


def _list_tuned(name: yaml.Node, value: yaml.Node) -> list[yaml.Node]:
    """The parts of a mapping's entry; bounds or choices of a key with a suffix count as several."""
    is_tuned = isinstance(name, yaml.ScalarNode) and split_suffix(name.value)[1]
    return [name, *(value.value if is_tuned and isinstance(value, yaml.SequenceNode) else [value])]


def _listed(node: yaml.Node) -> str:
    """A value of a mapping as a user would have typed it."""
    return f"[{','.join(item.value for item in node.value)}]" if isinstance(node, yaml.SequenceNode) else node.value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# What follows from what


def resolve(opt: argparse.Namespace) -> argparse.Namespace:
    """A frozen copy of the flags in which everything that depends on something else is filled in.

    Raises:
        UserError: flags contradict each other.
    """
    opt = argparse.Namespace(**vars(opt))
    arch, needs = netlib.find_arch(opt.arch), losses.requirements(opt.loss)

    def fill(name: str, value: Any) -> None:
        if getattr(opt, name) is None:
            setattr(opt, name, value)

    _refuse_savename(opt.savename)
    opt.sampling = losses.choose_sampling(opt.loss, opt.sampling)
    keeps_lengths = opt.distance_params.get("normalize_embeddings", "").lower() == "false"
    opt.normalize = needs.normalize and not keeps_lengths
    fill("proxy_lr", losses.default_proxy_lr(opt.loss, opt.lr))
    fill("samples_per_class", methods.METHODS[opt.training_method].samples_per_class or needs.samples_per_class)
    fill("batch_sampler", "shuffled" if opt.samples_per_class == 1 else "class_balanced")
    fill("eval_bs", opt.bs)
    fill("kernels", default_workers(find_device(opt.gpu)))
    fill("k_vals", list(datasets.default_k_vals(opt.dataset)))
    _compute_what_selects(opt)
    heads = len(opt.cascade_shares) if methods.METHODS[opt.training_method].is_cascade else 1
    fill("embed_dim", -(-arch.embed_dim // heads) * heads)  # each has as many dimensions
    fill("interpolation", arch.interpolation)
    if methods.METHODS[opt.training_method].is_cascade:
        fill("cascade_layers", [])  # those of the architecture
    for name, value in _image_flags(opt, arch).items():
        fill(name, value)
    if opt.split_scheme != "predefined":
        fill("num_training_sets", min(4, opt.num_training_partitions))
    fill("splits_to_eval", ["val", "test"] if opt.split_scheme == "predefined" else ["val"])
    for name, value in (fast_flags(find_device(opt.gpu)) if opt.fast else EXACT).items():
        fill(name, value)
    fill("not_pretrained", not (arch.has_weights or opt.weights))
    fill("freeze_batchnorm", not opt.not_pretrained)
    methods.resolve_optimization(opt)
    fill("savename", f"{opt.dataset}_{opt.arch.replace(':', '-')}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    refuse_contradictions(opt)
    return FrozenNamespace(**vars(opt))


def fast_flags(device: torch.device) -> dict[str, Any]:
    """What is quicker on a device; `benchmark.py step` measures it."""
    if device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
        return {**EXACT, "precision": precision, "channels_last": True, "fused": True, "deterministic": False}
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.9 doesn't have it
    is_quick = able.get("avx512_bf16") or able.get("amx_bf16")
    return {**EXACT, "precision": "bf16" if is_quick else "fp32", "channels_last": True}


def _image_flags(opt: argparse.Namespace, arch: netlib.Arch) -> dict[str, Any]:
    """What the flags of images are where they aren't given; those that transforms by name replace stay None.

    Raises:
        UserError: such transforms can't be used.
    """
    spec, crop_size = datasets.find_spec(opt.dataset), transforms.input_side(opt) or opt.crop_size or arch.crop_size
    flags: dict[str, Any] = {"crop_size": crop_size}
    if not opt.train_transforms:
        flags |= {"crop_scale": spec.crop_scale, "flip": spec.flip}
    if not opt.eval_transforms:
        flags["resize"] = round(crop_size * arch.resize / arch.crop_size)
    return flags


def _compute_what_selects(opt: argparse.Namespace) -> None:
    """Adds the metric that selects the epoch to those that are computed.

    Raises:
        UserError: there is no such metric.
    """
    metric = opt.eval_metric_for_best_epoch
    if opt.label_hierarchy_level == datasets.ALL_LEVELS or opt.evaluate is not None:
        metric = evaluate.without_level(metric)
    names = evaluate.selecting_metrics(opt.k_vals, [*evaluate.METRICS, metric])
    if evaluate.without_level(metric) != metric and evaluate.without_level(metric) in names:
        raise UserError(
            f"--eval_metric_for_best_epoch {metric} needs --label_hierarchy_level {datasets.ALL_LEVELS}: add that, or "
            f"choose {evaluate.without_level(metric)}"
        )
    if metric not in names:
        near = nearest_name(metric, [name for name in names if name.startswith(f"{metric} @ ")] or names)
        raise UserError(
            f"--eval_metric_for_best_epoch {shown(metric)} is unknown{near}; it takes one of {', '.join(names)}"
        )
    if metric not in evaluate.chosen_metrics(opt.k_vals, opt.eval_metrics):
        opt.eval_metrics = [*opt.eval_metrics, metric]


def refuse_contradictions(opt: argparse.Namespace) -> None:
    """Checks resolved flags against each other.

    Raises:
        UserError: they contradict each other.
    """
    if opt.weights and opt.not_pretrained:
        raise UserError("--weights and --not_pretrained contradict each other: drop one")
    if opt.not_pretrained and opt.freeze_batchnorm:
        of_arch = " or --not_pretrained" if netlib.find_arch(opt.arch).has_weights else f"; --arch {opt.arch} has none"
        raise UserError(f"--freeze_batchnorm needs pretrained statistics to keep: drop it{of_arch}")
    if opt.resize is not None and opt.resize < opt.crop_size:
        raise UserError(
            f"--resize {opt.resize} is less than --crop_size {opt.crop_size}: the crop must fit into the image"
        )
    for name in ("bs", "eval_bs"):  # as uint8 and as float32
        pixels = getattr(opt, name) * 3 * opt.crop_size**2
        check_memory(5 * pixels, f"--{name} {getattr(opt, name)} at --crop_size {opt.crop_size}")
    if opt.bs % opt.samples_per_class:
        raise UserError(
            f"--bs {opt.bs} is not a multiple of --samples_per_class {opt.samples_per_class}: change one of them"
        )
    loss = " ".join(losses.names_of(opt.loss))
    if losses.needs_positives(opt.loss) and opt.samples_per_class == 1:
        raise UserError(f"--loss {loss} needs two images per class in a batch: raise --samples_per_class")
    if losses.needs_positives(opt.loss) and opt.bs < 2 * opt.samples_per_class:
        raise UserError(f"--loss {loss} needs two classes of {opt.samples_per_class} images in a batch: raise --bs")
    datasets.refuse_contradictions(opt)
    netlib.refuse_contradictions(opt)
    losses.check(opt, get_default)
    methods.refuse_contradictions(opt)
    features.refuse_contradictions(opt)
    image_cache.refuse_contradictions(opt)
    _refuse_folds(opt)


def _refuse_savename(name: str | None) -> None:
    """Refuses what can't be a folder's name."""
    if name is None:
        return
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"--savename '{shorten(name)}' is not a folder name: give a plain name, without slashes")
    if len(name.encode()) > MAX_SAVENAME:
        raise UserError(f"--savename '{name[:20]}…' is longer than {MAX_SAVENAME} bytes: give a shorter name")


def _refuse_folds(opt: argparse.Namespace) -> None:
    """Checks the flags of cross-validation against each other."""
    if opt.split_scheme == "predefined" and opt.fold is not None:
        raise UserError(f"--fold needs --split_scheme {datasets.WITH_FOLDS}: predefined splits have no folds")
    sets = opt.num_training_sets
    if sets is not None and sets > opt.num_training_partitions:
        raise UserError(
            f"--num_training_sets {sets} is more than --num_training_partitions {opt.num_training_partitions}: each "
            "fold needs a partition to validate on"
        )
    if opt.fold is not None and opt.fold >= sets:
        raise UserError(f"--fold {opt.fold} does not exist: with --num_training_sets {sets}, folds are 0 to {sets - 1}")


def refuse_unused(opt: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Checks that no flag is given beside which another one is missing, and no two modes at once.

    Args:
        opt: the flags.
        given: those of them that the user gave.

    Raises:
        UserError: a flag would do nothing.
    """
    parser = build_parser()
    modes = [name for name in ("resume_training", "reproduce_results", "evaluate") if getattr(opt, name) is not None]
    if opt.dry_run and opt.evaluate is not None:
        modes = ["dry_run", "evaluate"]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} contradict each other: drop one")
    unused = [name for name in parser.names_with(needs="evaluate") if name in given and opt.evaluate is None]
    if unused:
        raise UserError(f"--{unused[0]} says how to --evaluate a finished run: add --evaluate, or drop it")
    changed = [name for name in parser.names_with(needs="cross_validation") if getattr(opt, name) != get_default(name)]
    if changed and opt.split_scheme == "predefined" and not modes:
        raise UserError(f"--{changed[0]} needs --split_scheme {datasets.WITH_FOLDS}: predefined splits have no folds")
    for needed in ("memory_size", "cache_features"):
        for name in parser.names_with(needs=needed):
            is_changed = getattr(opt, name) != get_default(name)
            if is_changed and getattr(opt, needed) == get_default(needed) and not modes:
                raise UserError(f"--{name} does nothing without --{needed}: add that, or drop --{name}")
    if not modes:
        # a complete config.yaml gives every flag
        changed = [name for name in given if getattr(opt, name) != get_default(name)]
        methods.refuse_other_methods_flags(changed, opt.training_method)


def with_flags(opt: argparse.Namespace, **flags: Any) -> argparse.Namespace:
    """A copy of the flags with other values for some."""
    return argparse.Namespace(**{**vars(opt), **flags})


# A run's configuration


def with_todays_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Stored flags; those of earlier versions have become what they are today: `tensorboard` a part of `logger`."""
    values = dict(values)
    if "tensorboard" in values:
        is_on = values.pop("tensorboard")
        values.setdefault("logger", ["tensorboard"] if is_on else [])
    return values


def configuration(opt: argparse.Namespace) -> dict[str, Any]:
    """Every flag that says what a run is, as built-in types."""
    not_stored = build_parser().names_with(stored=False)
    return {name: value for name, value in to_builtin(vars(opt)).items() if name not in not_stored}


def changed_flags(before: argparse.Namespace, after: argparse.Namespace) -> dict[str, Any]:
    """The flags of `after`'s configuration that differ from `before`'s, except for the run folder's name and place."""
    old, new = configuration(before), configuration(after)
    return {name: new[name] for name in new if name not in ("savename", "save_path") and new[name] != old.get(name)}


def save_config(path: Path, values: Mapping[str, Any], comment: str = "") -> None:
    """Writes flags as YAML, below a comment; with all those of a resolved `opt`, `--config path` gives the same run."""
    flags = {name: value for name, value in values.items() if f"--{name}" in build_parser().flags()}
    with atomic_write(path) as beside:
        text = yaml.safe_dump(flags, sort_keys=False, allow_unicode=True, explicit_end=True)
        heading = f"# {comment}\n" if comment else ""
        beside.write_text(f"{COMPLETE}{heading}{text}", encoding="utf-8")

"""All flags of main.py: the parser, YAML files in layers below the command line, and what follows from what.

A file's entries are parsed exactly as flags are: raw scalars go to argparse, so that `1e-4` is a number and a savename
of `012` stays what it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import datasets
import evaluate
import losses
import methods
import netlib
import records
import transforms
from auxiliaries import (
    FlagParser,
    FrozenNamespace,
    SwitchAction,
    UserError,
    atomic_write,
    nearest_name,
    number,
    to_builtin,
)

OVERRIDE = "~OVERRIDE~"
PRESETS = Path(__file__).parent / "configs"
UNSET: Any = object()  # stands for a flag that nobody gave

Layer = list[tuple[str, list[str]]]  # flags with what a user would have typed for them; nothing: back to the default


class MappingAction(argparse.Action):
    """A flag of `key=value …`, which merges key by key with what earlier layers gave.

    With the suffix `~OVERRIDE~` on the flag it replaces what they gave.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        names = [name for option in option_strings for name in (option, option + OVERRIDE)]
        super().__init__(names, dest, nargs="*", metavar="key=value", **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        before = self.default if before is UNSET else before
        merged = {} if str(option_string).endswith(OVERRIDE) else dict(before or {})
        for entry in values:
            key, equals, value = entry.partition("=")
            if not equals or not key:
                raise UserError(f"{option_string} {entry} is not of the form key=value")
            merged[key] = value
        setattr(namespace, self.dest, merged)


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of the run itself, of its folder, and of what to do with a run that exists."""
    # fmt: off
    add = parser.add_argument_group("run").add_argument
    add("--n_epochs", type=number(int, 1), default=70, help="number of epochs")
    add("--seed", type=number(int, 0), default=1, compared=False,
        help="seed of weights, batches, augmentation and sampling")
    add("--gpu", type=number(int, -1), default=0, machine=True, compared=False,
        help="number of the CUDA device; -1: the CPU")
    add("--savename", machine=True, compared=False,
        help="name of the run folder (default: dataset, architecture and time)")
    add("--save_path", default="Training_Results", machine=True, compared=False,
        help="folder of all run folders, which are sorted into it by dataset")

    add = parser.add_argument_group("configuration", stored=False).add_argument
    add("--config", nargs="+", metavar="FILE",
        help="YAML files of flags, later ones over earlier ones; a bare name is looked up in configs/; other flags win")

    add = parser.add_argument_group("finished and interrupted runs", stored=False).add_argument
    add("--resume_training", nargs="?", const="latest", choices=("latest", "best"),
        help="continue the run --savename, with its own flags and those given beside this one, after its latest or its "
        "best epoch")
    add("--reproduce_results", metavar="FOLDER", help="run the configuration of a run folder again, and compare")
    add("--evaluate", nargs="?", const="", metavar="FOLDER",
        help="evaluate the best network of a run, in FOLDER or of --savename, without training")
    add("--splits_to_eval", nargs="+", choices=("train", "val", "test"), needs="evaluate",
        help="--evaluate: on which images (default: test)")
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
    add("--eval_size_of_tsne", type=number(int, 10), metavar="N", needs="evaluate",
        help="--evaluate: draw a t-SNE plot of N images of each set, class by class")
    # fmt: on


@cache
def build_parser() -> FlagParser:
    """The parser of all modules' flags."""
    parser = FlagParser(
        prog="main.py",
        description="Trains an embedding network on labeled images and evaluates it by retrieval on classes it has "
        "never seen.",
    )
    for module in (datasets, transforms, netlib, losses, methods, evaluate, records):
        module.add_arguments(parser)
    add_arguments(parser)
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
    opt = _parse_given(build_parser(), argv, stored)
    return argparse.Namespace(**{name: get_default(name) if opt[name] is UNSET else opt[name] for name in opt})


def given_flags(argv: Sequence[str]) -> dict[str, Any]:
    """The flags that the command line, or a file that it names, gives."""
    given = _parse_given(build_parser(), argv)
    return {name: value for name, value in given.items() if value is not UNSET}


def get_default(name: str) -> Any:
    """A flag's default."""
    return build_parser().get_default(name)


def _parse_given(parser: FlagParser, argv: Sequence[str], stored: Path | None = None) -> dict[str, Any]:
    """Every flag's value, `UNSET` where neither the command line nor a file gives it."""

    given = _parse_tokens(parser, argv)
    files = [*([str(stored)] if stored else []), *(given["config"] if given["config"] is not UNSET else [])]
    if not files:
        return given
    layers: Layer = []
    for name in files:
        layers = _merge(layers, read_layer(name, parser))
    return _parse_tokens(parser, [*(token for _, tokens in layers for token in tokens), *argv])


def _parse_tokens(parser: FlagParser, tokens: Sequence[str]) -> dict[str, Any]:
    return vars(parser.parse_args(tokens, argparse.Namespace(**dict.fromkeys(parser.traits, UNSET))))


def read_layer(name: str, parser: FlagParser) -> Layer:
    """Reads a file's entries.

    Raises:
        UserError: it can't be read, or an entry is invalid.
    """
    path = _find_file(name)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
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
        if any(layer[-1][0] == flag for flag, _ in layer[:-1]):
            raise UserError(f"{where}: {layer[-1][0]} is given twice")
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
    reset = {flag for flag, tokens in layer if not tokens}
    return [*((flag, tokens) for flag, tokens in layers if flag.removesuffix(OVERRIDE) not in reset), *layer]


def _find_file(name: str) -> Path:
    path, preset = Path(name), PRESETS / f"{name}.yaml"
    if path.is_file():
        return path
    if path.suffix or path.name != name:
        raise UserError(f"--config {name} does not exist or is not a file")
    if not preset.is_file():
        near = nearest_name(name, [file.stem for file in PRESETS.glob("*.yaml")])
        raise UserError(f"--config {name} is neither a file nor one in configs/{near}")
    return preset


def _as_tokens(key: str, node: yaml.Node, parser: FlagParser) -> tuple[str, list[str]]:
    """An entry as its flag and what a user would have typed."""
    flag = f"--{key}"
    action = parser.flags().get(flag)
    if action is None or key in ("config", "help"):
        raise UserError(f"unknown flag {flag}{nearest_name(flag, parser.flags())}")
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        return flag, []
    if isinstance(node, yaml.MappingNode | yaml.SequenceNode):
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else [entry])]
        if not all(isinstance(part, yaml.ScalarNode) for part in parts):
            raise UserError(f"{flag} takes plain values, not lists or mappings of more lists or mappings")
    if isinstance(node, yaml.MappingNode) and isinstance(action, MappingAction):
        return flag, [flag, *(f"{name.value}={value.value}" for name, value in node.value)]
    if isinstance(node, yaml.SequenceNode) and action.nargs in ("*", "+"):
        return flag, [flag, *(item.value for item in node.value)]
    if not isinstance(node, yaml.ScalarNode) or isinstance(action, MappingAction):
        raise UserError(f"{flag} takes {'a mapping' if isinstance(action, MappingAction) else 'a plain value'}")
    if isinstance(action, SwitchAction):
        if node.value.lower() not in ("true", "false"):
            raise UserError(f"{flag} takes true or false, not {node.value}")
        on, off = action.option_strings
        return flag, [off if (node.value.lower() == "true") == (flag == off) else on]
    return flag, [flag, node.value] if action.nargs in ("*", "+") else [f"{flag}={node.value}"]


# What follows from what


def resolve(opt: argparse.Namespace) -> argparse.Namespace:
    """A frozen copy of the flags in which everything that depends on something else is filled in.

    Raises:
        UserError: flags contradict each other.
    """
    opt = argparse.Namespace(**vars(opt))
    arch, needs = netlib.find_arch(opt.arch), losses.needs_of(opt.loss)

    def fill(name: str, value: Any) -> None:
        if getattr(opt, name) is None:
            setattr(opt, name, value)

    if opt.savename is not None and (opt.savename in ("", ".", "..") or Path(opt.savename).name != opt.savename):
        raise UserError(f"--savename '{opt.savename}' is not a folder name: give a plain name, without slashes")
    opt.sampling = losses.choose_sampling(opt.loss, opt.sampling)
    opt.normalize = needs.normalize
    fill("samples_per_class", needs.samples_per_class)
    fill("batch_sampler", "shuffled" if opt.samples_per_class == 1 else "class_balanced")
    fill("eval_bs", opt.bs)
    fill("k_vals", list(datasets.default_k_vals(opt.dataset)))
    fill("embed_dim", arch.embed_dim)
    fill("resize", arch.resize if opt.crop_size is None else round(opt.crop_size * arch.resize / arch.crop_size))
    fill("crop_size", arch.crop_size)
    if opt.split_scheme == "cross_validation":
        fill("num_training_sets", min(4, opt.num_training_partitions))
    fill("freeze_batchnorm", not opt.not_pretrained)
    fill("savename", f"{opt.dataset}_{opt.arch}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    refuse_contradictions(opt)
    return FrozenNamespace(**vars(opt))


def refuse_contradictions(opt: argparse.Namespace) -> None:
    """Checks resolved flags against each other.

    Raises:
        UserError: they contradict each other.
    """
    if opt.weights and opt.not_pretrained:
        raise UserError("--weights and --not_pretrained contradict each other: drop one")
    if opt.not_pretrained and opt.freeze_batchnorm:
        raise UserError("--freeze_batchnorm needs pretrained statistics to keep: drop it or --not_pretrained")
    if opt.resize < opt.crop_size:
        raise UserError(
            f"--resize {opt.resize} is less than --crop_size {opt.crop_size}: the crop must fit into the image"
        )
    if opt.bs % opt.samples_per_class:
        raise UserError(
            f"--bs {opt.bs} is not a multiple of --samples_per_class {opt.samples_per_class}: change one of them"
        )
    if opt.sampling and opt.samples_per_class == 1:
        raise UserError(f"--loss {opt.loss} needs two images per class in a batch: raise --samples_per_class")
    if opt.sampling and opt.bs < 2 * opt.samples_per_class:
        raise UserError(f"--loss {opt.loss} needs two classes of {opt.samples_per_class} images in a batch: raise --bs")
    _refuse_folds(opt)
    computed = list(evaluate.chosen_metrics(opt.k_vals, opt.eval_metrics))
    if opt.evaluate is None and opt.eval_metric_for_best_epoch not in computed:
        near = nearest_name(opt.eval_metric_for_best_epoch, computed)
        raise UserError(
            f"--eval_metric_for_best_epoch {opt.eval_metric_for_best_epoch} is not computed{near}: choose one of "
            f"{', '.join(computed)}, or add it to --eval_metrics and --k_vals"
        )


def _refuse_folds(opt: argparse.Namespace) -> None:
    """Checks the flags of cross-validation against each other."""
    if opt.split_scheme == "predefined" and opt.fold is not None:
        raise UserError("--fold needs --split_scheme cross_validation: predefined splits have no folds")
    sets = opt.num_training_sets
    if sets is not None and sets > opt.num_training_partitions:
        raise UserError(
            f"--num_training_sets {sets} is more than --num_training_partitions {opt.num_training_partitions}: each "
            "fold needs a partition to validate on"
        )
    if opt.fold is not None and opt.fold >= sets:
        raise UserError(f"--fold {opt.fold} does not exist: --num_training_sets {sets} counts from 0")


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
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} contradict each other: drop one")
    unused = [name for name in parser.names_with(needs="evaluate") if name in given and opt.evaluate is None]
    if unused:
        raise UserError(f"--{unused[0]} says how to --evaluate a finished run: add --evaluate, or drop it")
    changed = [name for name in parser.names_with(needs="cross_validation") if getattr(opt, name) != get_default(name)]
    if changed and opt.split_scheme == "predefined" and not modes:
        raise UserError(f"--{changed[0]} needs --split_scheme cross_validation: predefined splits have no folds")


def with_flags(opt: argparse.Namespace, **flags: Any) -> argparse.Namespace:
    """A copy of the flags with other values for some."""
    return argparse.Namespace(**{**vars(opt), **flags})


# A run's configuration


def configuration(opt: argparse.Namespace) -> dict[str, Any]:
    """Every flag that says what a run is, as built-in types."""
    not_stored = build_parser().names_with(stored=False)
    return {name: value for name, value in to_builtin(vars(opt)).items() if name not in not_stored}


def changed_flags(before: argparse.Namespace, after: argparse.Namespace) -> dict[str, Any]:
    """The flags of `after`'s configuration that differ from `before`'s, except for the run folder's name and place."""
    old, new = configuration(before), configuration(after)
    return {name: new[name] for name in new if name not in ("savename", "save_path") and new[name] != old.get(name)}


def save_config(path: Path, values: Mapping[str, Any]) -> None:
    """Writes flags as YAML; with all those of a resolved `opt`, `--config path` gives the same run."""
    flags = {name: value for name, value in values.items() if f"--{name}" in build_parser().flags()}
    with atomic_write(path) as beside:
        beside.write_text(yaml.safe_dump(flags, sort_keys=False, allow_unicode=True), encoding="utf-8")

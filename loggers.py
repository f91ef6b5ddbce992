"""Mirrors of a run's records in other libraries: TensorBoard, Weights & Biases, MLflow.

CSV and SQLite, which records.py writes, are the records. A mirror that fails is a notice, never a lost run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from auxiliaries import UNSET, SwitchAction, UserError, load_json, notice, reason, save_json

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

Row = dict[str, Any]
Rows = Mapping[str, Sequence[Row]]  # by kind, a key of `TAGS`

# Groups, which are the first parts of tags, are sorted by their names: metrics come first.
TAGS = {
    "val": "metrics/val",
    "test": "metrics/test",
    "train_eval": "metrics/train",
    "distances": "train",
    "train": "train",
    "iterations": "train iterations",
}


def step_column(kind: str) -> str:
    """The column that numbers the rows of a kind."""
    return "Iteration" if kind == "iterations" else "Epochs"


def tagged(kind: str, row: Row) -> dict[str, float]:
    """A row's values by the tags under which mirrors show them."""
    tags = {name: f"{TAGS[kind]}/{name}" for name in row if name not in ("Epochs", "Iteration")}
    if kind != "train" and "Time" in tags:
        tags["Time"] = f"train/Time ({kind})"
    return {tag: row[name] for name, tag in tags.items()}


class TensorBoardAction(SwitchAction):
    """`--tensorboard` and `--no-tensorboard`, which add TensorBoard to --logger, or take it out."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        others = [
            name for name in (parser.get_default(self.dest) if before is UNSET else before) if name != "tensorboard"
        ]
        setattr(namespace, self.dest, ["tensorboard", *others] if option_string == self.option_strings[0] else others)


class Logger:
    """A mirror of a run's records.

    Args:
        folder: the run folder.

    Attributes:
        needs: the packages that it needs.
        place: where it can be looked at, in words.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    place: str

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def check(cls) -> None:
        """Makes sure, before a run begins, that this mirror can be opened.

        Raises:
            UserError: something is missing.
        """

    def open(self, rows: Rows) -> None:
        """Begins, or goes on where the run folder has been mirrored before, and shows all rows so far."""
        raise NotImplementedError

    def add(self, kind: str, rows: Sequence[Row]) -> None:
        """Shows further rows."""
        raise NotImplementedError

    def replace(self, rows: Rows) -> None:
        """Shows all rows, some of which have been replaced."""
        for kind, kind_rows in rows.items():
            self.add(kind, kind_rows)

    def add_picture(self, name: str, path: Path, epoch: int) -> None:
        """Shows a PNG."""
        raise NotImplementedError

    def note_flags(self, epoch: int, flags: Mapping[str, Any], table: str) -> None:
        """Shows the flags that hold from the end of an epoch on, also as a Markdown table."""
        raise NotImplementedError

    def flush(self) -> None:
        """Hands on what is pending."""

    def close(self, failed: bool) -> None:
        """Ends, whether the run failed or not."""
        raise NotImplementedError


# TensorBoard


class TensorBoard(Logger):
    """Event files in the folder tensorboard/, which are rewritten to hold exactly the rows of the run."""

    needs = ("tensorboard",)
    place = "the folder tensorboard"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.writer: Any = None  # a SummaryWriter
        self.flags: Mapping[str, Any] = {}

    def open(self, rows: Rows) -> None:
        """Starts an event file with the rows of now, in place of earlier ones, whose pictures it takes over."""
        from torch.utils.tensorboard import SummaryWriter

        if self.writer:
            self.writer.close()
        folder = self.folder / "tensorboard"
        last_epoch = max((row["Epochs"] for kind_rows in rows.values() for row in kind_rows), default=-1)
        # Earlier versions had a folder for epochs and one for iterations.
        places = [folder, folder / "epochs", folder / "iterations"]
        earlier = [path for place in places for path in sorted(place.glob("events.out.tfevents.*"))]
        times, pictures = _read_events(earlier)
        self.writer = SummaryWriter(str(folder), purge_step=0)
        for kind, kind_rows in rows.items():
            self._add_scalars(kind, kind_rows, times)
        for event in pictures:
            if event.step <= last_epoch:
                self.writer.file_writer.add_event(event, event.step, event.wall_time)
        if self.flags:
            self._add_hyperparameters()
        self.writer.flush()  # only then may the earlier ones go
        for path in earlier:
            path.unlink()
        for place in places[1:]:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()

    replace = open

    def add(self, kind: str, rows: Sequence[Row]) -> None:
        self._add_scalars(kind, rows)

    def add_picture(self, name: str, path: Path, epoch: int) -> None:
        self.writer.add_image(name, _read_pixels(path), epoch, dataformats="HWC")

    def note_flags(self, epoch: int, flags: Mapping[str, Any], table: str) -> None:
        self.flags = flags
        self.writer.add_text("configuration", table, epoch)
        self._add_hyperparameters()

    def flush(self) -> None:
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()

    def _add_scalars(
        self, kind: str, rows: Iterable[Row], times: Mapping[tuple[str, int], float] | None = None
    ) -> None:
        """Writes rows as scalars, all those of a row in one event.

        Args:
            kind: a key of `TAGS`.
            rows: the rows.
            times: when rows were made, where that is not now: what `_read_events` returns.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        column = step_column(kind)
        for row in rows:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in tagged(kind, row).items()]
            made = (times or {}).get((column, row[column]))
            self.writer.file_writer.add_summary(Summary(value=values), row[column], made)

    def _add_hyperparameters(self) -> None:
        """Writes the flags for HPARAMS, which compares runs by them and by their last metrics."""
        from torch.utils.tensorboard.summary import hparams

        plain = {name: value if type(value) in (int, float) else str(value) for name, value in self.flags.items()}
        _, start, _ = hparams(plain, {})
        self.writer.file_writer.add_summary(start)


def _read_events(paths: Iterable[Path]) -> tuple[dict[tuple[str, int], float], list[Event]]:
    """Reads event files as far as they are intact.

    Returns:
        The time of each row of scalars, by the column that numbers it and its number; and the events of pictures and
        texts, the last one of each name and step.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    times: dict[tuple[str, int], float] = {}
    others: dict[tuple[str, int], Event] = {}
    for path in paths:
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    times["Iteration" if "iterations/" in value.tag else "Epochs", event.step] = event.wall_time
                elif value.HasField("image") or value.metadata.plugin_data.plugin_name == "text":
                    others[value.tag, event.step] = event
    return times, [others[key] for key in sorted(others)]


def _read_pixels(path: Path) -> np.ndarray:
    """A picture as `(H, W, 3)` uint8."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def write_picture(folder: Path, name: str, picture: Path) -> None:
    """Writes a PNG to a folder of event files."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        writer.add_image(name, _read_pixels(picture), dataformats="HWC")


def write_table(folder: Path, name: str, table: str) -> None:
    """Writes a Markdown table to a folder of event files."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        writer.add_text(name, table)


# Libraries that can't take back what was sent


class Sender(Logger):
    """A mirror that is sent each row once.

    Which run it is there, and what was sent to it, stands in <name>.json in the run folder: a resumed run goes on with
    the same one, and sends what it lacks. What was sent of an epoch that was interrupted isn't sent again.

    Attributes:
        name: its key in `LOGGERS`.
        run_id: of the run there.
        sent: the epochs sent by kind of rows (or name of pictures), and the last iteration.
    """

    name: ClassVar[str]

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.file = folder / f"{self.name}.json"
        self.run_id = ""
        self.sent: dict[str, list[int]] = {}

    def open(self, rows: Rows) -> None:
        saved = load_json(self.file) if self.file.exists() else {"server": None, "run": "", "sent": {}}
        if not isinstance(saved, dict) or {*saved} != {"server", "run", "sent"}:
            raise UserError(f"{self.file} is damaged: move it away")
        if saved["server"] == self.server():
            self.run_id, self.sent = saved["run"], saved["sent"]
        begun = self.start(self.run_id)
        if begun != self.run_id:
            self.run_id, self.sent = begun, {}
        self._save()
        self.replace(rows)

    def add(self, kind: str, rows: Sequence[Row]) -> None:
        column, done = step_column(kind), self.sent.get(kind, [])
        if kind == "iterations":
            new = [row for row in rows if row[column] > max(done, default=0)]
        else:
            new = [row for row in rows if row[column] not in done]
        if new:
            self.send(kind, new)
            self._note_sent(kind, [row[column] for row in new])

    def add_picture(self, name: str, path: Path, epoch: int) -> None:
        if epoch not in self.sent.get(name, []):
            self.send_picture(name, path, epoch)
            self._note_sent(name, [epoch])

    def _note_sent(self, kind: str, steps: Sequence[int]) -> None:
        self.sent[kind] = [*steps[-1:]] if kind == "iterations" else sorted({*self.sent.get(kind, []), *steps})
        self._save()

    def _save(self) -> None:
        save_json(self.file, {"server": self.server(), "run": self.run_id, "sent": self.sent})

    def titles(self) -> tuple[str, str, str | None]:
        """Names of the project, of the run, and of the group of folds that it belongs to: those of the folders."""
        parent, is_fold = self.folder.absolute().parent, re.fullmatch(r"fold_\d+", self.folder.name)
        project = (parent.parent if is_fold else parent).name
        name = f"{parent.name} {self.folder.name}" if is_fold else self.folder.name
        return re.sub(r"[/\\#?%:]", "-", project) or "runs", name, parent.name if is_fold else None

    def server(self) -> str:
        """Where rows are sent to, except for a place in the run folder."""
        return ""

    def start(self, run_id: str) -> str:
        """Goes on with a run, or without an id begins one; returns the id of the one that is at work."""
        raise NotImplementedError

    def send(self, kind: str, rows: Sequence[Row]) -> None:
        """Sends rows that it doesn't have."""
        raise NotImplementedError

    def send_picture(self, name: str, path: Path, epoch: int) -> None:
        """Sends a PNG that it doesn't have."""
        raise NotImplementedError


class WandB(Sender):
    """Weights & Biases: a project for each dataset; WANDB_MODE=offline writes into the folder wandb/ of the run.

    What was written offline is sent later by `wandb sync RUN/wandb/offline-run-*`.
    """

    name = "wandb"
    needs = ("wandb",)

    @classmethod
    def check(cls) -> None:
        import wandb

        if wandb.setup().settings.mode in ("offline", "disabled"):
            return
        try:
            is_known = wandb.login(prompt=False, verify=False)
        except wandb.errors.Error as error:
            raise UserError(f"--logger wandb: {reason(error)}; log in by `wandb login`, or set {OFFLINE}") from None
        if not is_known:
            raise UserError(f"--logger wandb needs an account: log in by `wandb login`, or set {OFFLINE}")

    def start(self, run_id: str) -> str:
        import wandb

        project, name, group = self.titles()
        settings = wandb.Settings(console="off", silent=True, disable_code=True)
        run_id = run_id or secrets.token_hex(4)
        self.run = wandb.init(
            id=run_id, name=name, group=group, project=os.environ.get("WANDB_PROJECT", project), dir=self.folder,
            resume="allow", reinit="create_new", settings=settings,
        )  # fmt: skip
        self.place = f"{self.folder / 'wandb'} (for `wandb sync`)" if self.run.offline else self.run.url
        self.run.define_metric("*", step_metric="Epochs")
        self.run.define_metric(f"{TAGS['iterations']}/*", step_metric="Iteration")
        return run_id

    def send(self, kind: str, rows: Sequence[Row]) -> None:
        column = step_column(kind)
        for row in rows:
            self.run.log({column: row[column], **tagged(kind, row)})

    def send_picture(self, name: str, path: Path, epoch: int) -> None:
        import wandb

        self.run.log({"Epochs": epoch, name: wandb.Image(str(path))})

    def note_flags(self, epoch: int, flags: Mapping[str, Any], table: str) -> None:
        self.run.config.update(flags, allow_val_change=True)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


OFFLINE = "WANDB_MODE=offline to write into the run folder"
MAX_METRICS, MAX_PARAMS = 1000, 100  # that MLflow takes at once
MAX_PARAM = 500  # characters of a flag's value, which older servers of MLflow take


class MLflow(Sender):
    """MLflow: an experiment for each dataset, in mlflow.db in the run folder unless MLFLOW_TRACKING_URI is set."""

    name = "mlflow"
    needs = ("mlflow", "sqlalchemy", "alembic")

    def server(self) -> str:
        return re.sub(r"(?<=://)[^/]*@", "", os.environ.get("MLFLOW_TRACKING_URI", ""))  # without a password

    def start(self, run_id: str) -> str:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # of 7, which take minutes
        import mlflow

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        folder = self.folder.absolute()
        own = f"sqlite:///{folder}/mlflow.db"
        if not self.server() and {"?", "%"} & {*own}:
            raise UserError(
                f"{folder} has ? or % in its name, which addresses of databases can't: set a tracking server"
            )
        self.place = self.server() or own
        self.client = mlflow.MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or own)
        if run_id:
            try:
                self.client.update_run(run_id, status="RUNNING")
                return run_id
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        project, name, group = self.titles()
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", project)
        found = self.client.get_experiment_by_name(project)
        pictures = None if self.server() else (folder / "mlflow").as_uri()
        experiment = found.experiment_id if found else self.client.create_experiment(project, pictures)
        tags = {"group": group} if group else {}
        return self.client.create_run(experiment, run_name=name, tags=tags).info.run_id

    def send(self, kind: str, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        now, column = round(1000 * time.time()), step_column(kind)
        metrics = [
            Metric(plain_name(tag), value, now, row[column]) for row in rows for tag, value in tagged(kind, row).items()
        ]
        for begin in range(0, len(metrics), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=metrics[begin : begin + MAX_METRICS])

    def send_picture(self, name: str, path: Path, epoch: int) -> None:
        from PIL import Image

        with Image.open(path) as image:
            self.client.log_image(self.run_id, image, artifact_file=f"{name}/epoch {epoch}.png")

    def note_flags(self, epoch: int, flags: Mapping[str, Any], table: str) -> None:
        """Logs flags as parameters; since these can't change, a flag that does becomes a tag."""
        from mlflow.entities import Param

        before = self.client.get_run(self.run_id).data.params
        now = {name: str(value)[:MAX_PARAM] for name, value in flags.items()}
        new = [Param(name, value) for name, value in now.items() if name not in before]
        for begin in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=new[begin : begin + MAX_PARAMS])
        for name in [name for name in now if before.get(name, now[name]) != now[name]]:
            self.client.set_tag(self.run_id, f"{name} after epoch {epoch}", now[name])

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run_id, status="FAILED" if failed else "FINISHED")


def plain_name(tag: str) -> str:
    """A tag as MLflow takes it: `metrics/val/Recall @ 1` -> `metrics/val/Recall at 1`."""
    return re.sub(r"[^\w\-. :/]", "", re.sub(r" ?@ ?", " at ", tag))


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
SENDERS = [f"{name}.json" for name, kind in LOGGERS.items() if issubclass(kind, Sender)]  # their files in a run folder


def check(names: Sequence[str]) -> None:
    """Makes sure, before a run begins, that its mirrors can be opened.

    Raises:
        UserError: a package or an account is missing.
    """
    for name in names:
        missing = [package for package in LOGGERS[name].needs if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"--logger {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}, or drop {name}"
            )
        LOGGERS[name].check()


class Mirrors:
    """The mirrors of one run; one that fails is given up with a notice.

    Args:
        names: keys of `LOGGERS`.
        folder: the run folder.
        rows: all rows so far.
    """

    def __init__(self, names: Sequence[str], folder: Path, rows: Rows):
        self.loggers = {name: LOGGERS[name](folder) for name in names}
        self._tell(lambda logger: logger.open(rows))

    def places(self) -> list[str]:
        """Where they can be looked at, other than in the folder tensorboard/."""
        return [logger.place for name, logger in self.loggers.items() if name != "tensorboard"]

    def add(self, kind: str, rows: Sequence[Row]) -> None:
        """Shows rows that follow all others of their kind."""
        self._tell(lambda logger: logger.add(kind, rows))

    def replace(self, rows: Rows) -> None:
        """Shows all rows, some of which have been replaced."""
        self._tell(lambda logger: logger.replace(rows))

    def add_picture(self, name: str, path: Path, epoch: int) -> None:
        """Shows a PNG."""
        self._tell(lambda logger: logger.add_picture(name, path, epoch))

    def note_flags(self, epoch: int, flags: Mapping[str, Any], table: str) -> None:
        """Shows the flags that hold from the end of an epoch on."""
        self._tell(lambda logger: logger.note_flags(epoch, flags, table))

    def flush(self) -> None:
        """Hands on what is pending."""
        self._tell(lambda logger: logger.flush())

    def close(self, failed: bool) -> None:
        """Ends all of them."""
        self._tell(lambda logger: logger.close(failed))
        self.loggers.clear()

    def _tell(self, do: Callable[[Logger], None]) -> None:
        for name, logger in list(self.loggers.items()):
            try:
                do(logger)
            except Exception as error:  # a library raises anything at all
                del self.loggers[name]
                notice(
                    f"--logger {name} failed ({getattr(error, 'strerror', None) or reason(error)}): the run goes on "
                    "without it; CSV and SQLite hold everything, and --resume_training sends what is missing"
                )

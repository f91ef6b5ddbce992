"""loggers.py: what TensorBoard, Weights & Biases and MLflow hold of a run, through restarts and failures."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from conftest import ROOT, Run
from PIL import Image

import config
import loggers
import runs
from auxiliaries import UserError, load_json
from loggers import Row
from records import Records

sys.path.insert(0, str(ROOT))
History = dict[str, list[Row]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty run folder; nothing leaves this machine."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "results" / "glyphs" / "my run"
    path.mkdir(parents=True)
    Image.new("RGB", (12, 7), "red").save(path / "sample_recoveries.png")
    return path


def train(folder: Path, names: list[str], last: int, history: History | None = None, lr: float = 0.5) -> History:
    """Records epochs after those of the history, up to the last one, as a run does."""
    log = Records(folder, history, names)
    first = len(log.rows["train"]) + 1
    log.note_configuration(first - 1, {"lr": lr, "loss": ["triplet"], "fold": None}, {})
    for epoch in range(first, last + 1):
        for iteration in (2 * epoch - 1, 2 * epoch):
            log.add("iterations", {"Iteration": iteration, "Epochs": epoch, "Loss": iteration / 4})
        log.add("train", {"Epochs": epoch, "Time": 1.5, "Train Loss": 1 / epoch, "Iterations": 2})
        log.add("val", {"Epochs": epoch, "Time": 0.5, "Recall @ 1": epoch / 8})
        log.add_picture("sample recoveries", folder / "sample_recoveries.png", epoch)
        log.flush()
    log.close()
    return log.rows


def until(rows: History, epoch: int) -> History:
    """The history that a checkpoint of that epoch holds."""
    return {kind: [dict(row) for row in kind_rows if row["Epochs"] <= epoch] for kind, kind_rows in rows.items()}


SCALARS = {
    "metrics/val/Recall @ 1": [(epoch, epoch / 8) for epoch in (1, 2, 3)],
    "train/Time (val)": [(epoch, 0.5) for epoch in (1, 2, 3)],
    "train/Train Loss": [(epoch, pytest.approx(1 / epoch)) for epoch in (1, 2, 3)],
    "train/Time": [(epoch, 1.5) for epoch in (1, 2, 3)],
    "train/Iterations": [(epoch, 2) for epoch in (1, 2, 3)],
    "train iterations/Loss": [(iteration, iteration / 4) for iteration in range(1, 7)],
}


# Weights & Biases


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run's file: a LevelDB log of protocol buffers, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # the rest of a block that is too short for a header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def in_wandb(folder: Path) -> dict[str, Any]:
    """What the files of all offline runs of a folder hold: ids, titles, flags, scalars and pictures."""
    import wandb

    wandb.teardown()  # until then its service may not have written everything
    found: dict[str, Any] = {"runs": set(), "flags": {}, "scalars": {}, "pictures": []}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                found["runs"].add(
                    (record.run.run_id, record.run.project, record.run.display_name, record.run.run_group)
                )
            for item in record.config.update:
                found["flags"][item.key] = json.loads(item.value_json)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for tag, value in row.items():
                if tag == "sample recoveries/_type":
                    found["pictures"].append(row["Epochs"])
                elif tag.startswith(("metrics/", "train")):
                    step = row["Iteration" if tag.startswith("train iterations/") else "Epochs"]
                    found["scalars"].setdefault(tag, []).append((step, value))
    return found


def test_wandb_offline_holds_each_row_once_after_a_restart(folder: Path) -> None:
    rows = train(folder, ["wandb"], last=2)
    train(folder, ["wandb"], last=3, history=until(rows, 1), lr=0.25)  # it was stopped before epoch 2 was saved
    found = in_wandb(folder)
    assert found["scalars"] == SCALARS
    assert found["pictures"] == [1, 2, 3]
    assert found["flags"] == {"lr": 0.25, "loss": ["triplet"], "fold": None}
    ((run_id, *titles),) = found["runs"]
    assert titles == ["glyphs", "my run", ""]
    assert load_json(folder / "wandb.json")["run"] == run_id
    assert {path.name for path in folder.iterdir()} > {"wandb", "wandb.json", "log_val_Base.csv", "records.db"}
    assert not (folder / "tensorboard").exists()


def test_a_fold_is_named_after_its_run(folder: Path) -> None:
    (folder / "fold_2").mkdir()
    sender = loggers.WandB(folder / "fold_2")
    assert sender.titles() == ("glyphs", "my run fold_2", "my run")


def test_wandb_without_an_account_is_refused_before_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loggers.check(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads the environment once
    try:
        with pytest.raises(
            UserError, match=r"--logger wandb needs an account: log in by `wandb login`, or set WANDB_M"
        ):
            loggers.check(["wandb"])
    finally:
        wandb.teardown()


# MLflow


def in_mlflow(folder: Path) -> tuple[Any, dict[str, list[tuple[int, float]]]]:
    """The only run of the folder's database, and its scalars as (step, value)."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "glyphs"]
    (run,) = client.search_runs([experiment.experiment_id])
    histories = {tag: client.get_metric_history(run.info.run_id, tag) for tag in run.data.metrics}
    return run, {tag: sorted((one.step, one.value) for one in values) for tag, values in histories.items()}


def test_mlflow_in_the_run_folder_holds_each_row_once_after_a_restart(folder: Path) -> None:
    rows = train(folder, ["mlflow"], last=2)
    run, _ = in_mlflow(folder)
    assert run.info.status == "FINISHED"
    train(folder, ["mlflow"], last=3, history=until(rows, 1), lr=0.25)
    run, scalars = in_mlflow(folder)
    assert scalars == {loggers.plain_name(tag): values for tag, values in SCALARS.items()}
    assert run.info.run_name == "my run"
    assert run.data.params == {"lr": "0.5", "loss": "['triplet']", "fold": "None"}
    assert run.data.tags["lr after epoch 1"] == "0.25"
    pictures = sorted(path.name for path in folder.glob("mlflow/*/artifacts/sample recoveries/*"))
    assert pictures == ["epoch 1.png", "epoch 2.png", "epoch 3.png"]


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"server": ""}'])
def test_a_damaged_note_of_what_was_sent_is_named(
    content: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mlflow.json").write_text(content)
    loggers.Mirrors(["mlflow"], folder, {})
    assert f"notice: --logger mlflow failed ({folder}/mlflow.json is damaged: move it away)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["what?", "100 %"])
def test_folders_that_mlflow_cant_name_are_told_at_once(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place := folder / name).mkdir()
    loggers.Mirrors(["mlflow"], place, {})
    assert f"notice: --logger mlflow failed ({place} has ? or % in its name" in capsys.readouterr().err
    assert not list(place.iterdir())
    assert {path.name for path in folder.iterdir()} == {name, "sample_recoveries.png"}


def test_passwords_of_mlflow_are_used_and_neither_stored_nor_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow, used = pytest.importorskip("mlflow"), list[str]()

    class Client:
        def __init__(self, tracking_uri: str):
            used.append(tracking_uri)

        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(experiment_id="1")

        def create_run(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(info=SimpleNamespace(run_id="2"))

    monkeypatch.setattr(mlflow, "MlflowClient", Client)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:p@ss@tracking.example:5000/a")
    logger = loggers.MLflow(folder)
    logger.open({})
    assert used == ["https://me:p@ss@tracking.example:5000/a"]
    assert logger.place == load_json(folder / "mlflow.json")["server"] == "https://tracking.example:5000/a"


def test_names_for_mlflow() -> None:
    assert loggers.plain_name("metrics/val/Set 0 Recall @ 1") == "metrics/val/Set 0 Recall at 1"
    assert loggers.plain_name("metrics/test/MAP@R") == "metrics/test/MAP at R"
    assert loggers.plain_name("train/Time (val)") == "train/Time val"


def test_a_run_that_went_back_to_its_best_epoch_is_another_one_there(folder: Path) -> None:
    """Rows that were sent can't be taken back."""
    rows = train(folder, ["wandb"], last=3)
    for name in loggers.SENDERS:
        (folder / name).unlink(missing_ok=True)  # as `runs` does
    train(folder, ["wandb"], last=2, history=until(rows, 1))
    assert len(in_wandb(folder)["runs"]) == 2


# All of them


class Failing(loggers.Logger):
    """A mirror whose server goes away after the first row."""

    place = "nowhere"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.seen: list[Any] = []

    def open(self, rows: loggers.Rows) -> None:
        self.seen.append("open")

    def add(self, kind: str, rows: Any) -> None:
        if len(self.seen) > 1:
            raise ConnectionError("the server\nis gone.")
        self.seen.append(kind)

    def note_flags(self, epoch: int, flags: Any, table: str) -> None:
        pass


def test_a_mirror_that_fails_is_a_notice_and_the_others_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(loggers.LOGGERS, "wandb", Failing)
    rows = train(folder, ["wandb", "tensorboard"], last=3)
    assert len(rows["val"]) == 3
    assert capsys.readouterr().err == (
        "notice: --logger wandb failed (the server is gone): the run goes on without it; CSV and SQLite hold "
        "everything, and --resume_training sends what is missing\n"
    )
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for tag, values in SCALARS.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == values


def test_what_a_mirror_lacks_is_sent_when_the_run_goes_on(folder: Path) -> None:
    rows = train(folder, [], last=2)
    assert not (folder / "wandb").exists()
    train(folder, ["wandb"], last=3, history=rows)
    assert in_wandb(folder)["scalars"] == SCALARS


def test_rows_that_are_inserted_between_others_are_sent_once(folder: Path) -> None:
    log = Records(folder, None, ["wandb"])
    for epochs in ((3,), (1, 5), (3,)):  # as final evaluations of the selected and the last network come
        log.add("test", *({"Epochs": epoch, "Recall @ 1": epoch / 8} for epoch in epochs))
    log.close()
    assert in_wandb(folder)["scalars"] == {"metrics/test/Recall @ 1": [(3, 0.375), (1, 0.125), (5, 0.625)]}


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers.MLflow, "needs", ("no_such_package",))
    loggers.check(["tensorboard"])
    with pytest.raises(UserError, match=r"--logger mlflow needs no_such_package: pip install no_such_package, or drop"):
        loggers.check(["tensorboard", "mlflow"])


class Listening(loggers.Logger):
    """A mirror that remembers what it was told."""

    place = "nowhere"
    told: ClassVar[list[Any]] = []

    def open(self, rows: loggers.Rows) -> None:
        self.told.append(("open", sum(map(len, rows.values()))))

    def add(self, kind: str, rows: Any) -> None:
        self.told.append((kind, len(rows)))

    def add_picture(self, name: str, path: Path, epoch: int) -> None:
        self.told.append((name, epoch))

    def note_flags(self, epoch: int, flags: Any, table: str) -> None:
        self.told.append(("flags", epoch, flags["logger"]))

    def close(self, failed: bool) -> None:
        self.told.append(("close", failed))


def test_a_whole_run_is_mirrored(run: Run, go_on: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Listening)
    monkeypatch.setattr(Listening, "told", [])
    epoch = [("iterations", 1), ("iterations", 2), ("train", 1), ("val", 1)]  # of three iterations, read twice
    run("--logger", "wandb", "--eval_metrics", "Recall")
    told = [what for what in Listening.told if what[0] != "sample recoveries"]
    assert told == [("open", 0), ("flags", 0, ["wandb"]), *epoch, *epoch, ("close", False)]
    assert ("sample recoveries", 1) in Listening.told

    Listening.told.clear()

    def fail(run: runs.Run, epoch: int) -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"), runs.watched(fail):
        go_on("--resume_training", "--n_epochs", "3")
    assert Listening.told[0] == ("open", 10)  # two epochs of five rows
    assert Listening.told[-1] == ("close", True)


def test_going_back_to_the_best_epoch_forgets_what_was_sent(run: Run, go_on: Run, tmp_path: Path) -> None:
    run("--no-tensorboard", "--eval_metrics", "Recall")
    folder = tmp_path / "tiny" / "run"
    best = load_json(folder / "summary.json")["selected"]["epoch"]
    (folder / "wandb.json").write_text("{}")
    go_on("--resume_training", "best", "--n_epochs", "3")
    assert (folder / "wandb.json").exists() == (best == 2)  # then there was nothing to go back from
    assert (folder / f"dropped_after_epoch_{best}" / "wandb.json").exists() == (best != 2)


# The flag


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["tensorboard"]),
        (["--logger"], []),
        (["--logger", "wandb", "mlflow"], ["wandb", "mlflow"]),
        (["--no-tensorboard"], []),
        (["--tensorboard"], ["tensorboard"]),
        (["--logger", "wandb", "tensorboard", "--no-tensorboard"], ["wandb"]),
        (["--logger", "wandb", "--tensorboard"], ["tensorboard", "wandb"]),
    ],
)
def test_names_of_loggers(flags: list[str], expected: list[str]) -> None:
    assert config.parse(flags).logger == expected


def test_an_unknown_logger_is_refused() -> None:
    with pytest.raises(UserError, match=r"--logger wandbb is unknown \(did you mean wandb\?\); it takes one of tensor"):
        config.parse(["--logger", "wandbb"])


@pytest.mark.parametrize(("text", "expected"), [("true", ["tensorboard"]), ("false", [])])
def test_a_configuration_of_an_earlier_version_means_what_it_did(
    text: str, expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(f"tensorboard: {text}\nlr: 0.5\n", encoding="utf-8")
    opt = config.parse([], tmp_path / "config.yaml")
    assert opt.logger == expected
    assert not hasattr(opt, "tensorboard")
    assert config.parse(["--logger", "wandb"], tmp_path / "config.yaml").logger == ["wandb"]
    stored = runs.read_configuration(tmp_path)
    assert stored["logger"] == expected
    assert "tensorboard" not in stored
    assert runs.compared_flags(stored).keys().isdisjoint({"logger", "tensorboard"})

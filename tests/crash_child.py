"""Kills a training run at chosen moments, resumes it, and compares it with one that was left alone.

`python tests/crash_child.py FOLDER` is started by test_protocol.py. All imports are done once; every run is a fork of
this process, which computes nothing with torch itself, so that no fork inherits its threads. FOLDER/report.json says
what came of each moment.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import json
import os
import pickle
import random
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from conftest import MACHINE_COLUMNS, SMALL, make_tree, quick_pictures  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import auxiliaries  # noqa: E402
import evaluate  # noqa: E402
import main  # noqa: E402
import records  # noqa: E402

FLAGS = [
    *SMALL,
    *("--kernels", "2", "--embed_dim", "512", "--loss", "marginloss", "--lr", "1e-3", "--tau", "1", "--gamma", "0.5"),
    *("--dataset", "tiny", "--savename", "run", "--n_epochs", "2", "--bs", "8", "--samples_per_class", "2"),
    *("--iterations_per_epoch", "2", "--k_vals", "1", "--grad_measure", "--eval_bs", "16"),
]


class Events:
    """Counts what happens in this process, and ends it as a power cut would at event number `fatal`."""

    def __init__(self, fatal: int | None = None):
        self.fatal = fatal
        self.names: list[str] = []
        self.pid = os.getpid()

    def happen(self, name: str) -> None:
        if os.getpid() != self.pid:  # a data-loading worker
            return
        if len(self.names) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)

    def watch(self) -> None:
        """Patches everything that writes, renames or learns."""
        self._around(os, "replace", lambda source, target: f"replace {Path(target).name}")
        self._around(os, "rename", lambda source, target: f"rename {Path(target).name}")
        self._around(records.Records, "add", lambda self, kind, *rows: f"Records.add {kind}")
        self._around(records.Records, "note_configuration", lambda *_, **__: "note_configuration")
        self._around(records.Records, "_insert", lambda self, kind, rows: f"SQLite insert {kind}")
        self._around(records.Records, "flush", lambda *_: "flush")
        self._around(evaluate, "evaluate", lambda *_: "evaluate")
        register_optimizer_step_post_hook(lambda *_: self.happen("optimizer.step"))
        self._tear_csv()
        self._tear_files()

    def _around(self, owner: Any, name: str, describe: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            what = describe(*args, **kwargs)
            self.happen(f"before {what}")
            value = original(*args, **kwargs)
            self.happen(f"after {what}")
            return value

        setattr(owner, name, watched)

    def _tear_csv(self) -> None:
        events, plain_writer = self, csv.DictWriter

        class TornWriter(plain_writer):  # type: ignore[misc, valid-type]
            def __init__(self, file: Any, *args: Any, **kwargs: Any):
                self.file = file
                super().__init__(file, *args, **kwargs)

            def writerows(self, rows: Any) -> None:
                text = io.StringIO(newline="")
                plain_writer(text, self.fieldnames).writerows(rows)
                whole = text.getvalue()
                self.file.write(whole[: len(whole) // 2])
                self.file.flush()
                if self.file.mode == "a":
                    events.happen(f"in mid-row of {Path(self.file.name).name}")
                self.file.write(whole[len(whole) // 2 :])

        csv.DictWriter = TornWriter  # type: ignore[assignment, misc]

    def _tear_files(self) -> None:
        save, write, save_arrays = torch.save, Path.write_bytes, np.savez

        def torn_save(value: Any, path: Path) -> None:
            self.happen("before torch.save")
            buffer = io.BytesIO()
            save(value, buffer)
            data = buffer.getvalue()
            write(path, data[: len(data) // 2])
            self.happen("half of torch.save")
            write(path, data)
            self.happen("after torch.save")

        def torn_arrays(file: Any, **arrays: Any) -> None:
            save_arrays(file, **arrays)
            file.flush()
            length = file.tell()
            file.truncate(length // 2)
            self.happen("half of savez")
            file.seek(0)
            save_arrays(file, **arrays)

        def torn_write(path: Path, data: bytes) -> int:
            write(path, data[: len(data) // 2])
            self.happen("half of write_bytes")
            return write(path, data)

        def torn_text(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
            write(path, text[: len(text) // 2].encode())
            self.happen("half of write_text")
            return write(path, text.encode())

        torch.save, np.savez = torn_save, torn_arrays  # type: ignore[assignment]
        Path.write_bytes, Path.write_text = torn_write, torn_text  # type: ignore[assignment, method-assign]


def in_fork(action: Callable[[], Any], log: Path) -> tuple[int, Any]:
    """Runs `action` in a child of this process; returns its exit status and its value."""
    result = log.with_suffix(".pkl")
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(2)
            value = action()
            with open(result, "wb") as file:
                file.write(pickle.dumps(value))
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return status, pickle.loads(result.read_bytes()) if result.exists() else None


def train(work: Path, name: str, flags: list[str], fatal: int | None = None) -> list[str]:
    """Runs with events; returns their names."""
    events = Events(fatal)
    events.watch()
    main.command([*FLAGS, "--source_path", str(work / "source"), "--save_path", str(work / name), *flags])
    return events.names


def is_folder(work: Path, name: str) -> bool:
    return (work / name / "tiny" / "run").exists()


def rows_of(folder: Path) -> dict[str, Any]:
    """All rows of CSV files and of the database, without what depends on the clock."""
    rows: dict[str, Any] = {}
    for kind, name in records.LOGS.items():
        if (folder / name).exists():
            with open(folder / name, newline="", encoding="utf-8") as file:
                rows[name] = [{k: row[k] for k in row if k not in MACHINE_COLUMNS} for row in csv.DictReader(file)]
        database = sqlite3.connect(folder / "records.db")
        database.row_factory = sqlite3.Row
        try:
            found = database.execute(f"SELECT * FROM {kind} ORDER BY rowid").fetchall()
            rows[kind] = [{k: row[k] for k in row.keys() if k not in MACHINE_COLUMNS} for row in found]  # noqa: SIM118
        except sqlite3.OperationalError:
            rows[kind] = None
        finally:
            database.close()
    return rows


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, without what depends on the clock: the (step, value) of each tag."""
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not any(name in tag for name in MACHINE_COLUMNS)]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def same(one: Any, other: Any) -> bool:
    """Whether nested values are equal, tensors and arrays bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same_run(folder: Path, other: Path) -> None:
    """Weights, criterion, optimizer and all rows are equal, bit for bit."""
    one, two = (auxiliaries.load_checkpoint(path / "last.pth.tar") for path in (folder, other))
    for key in ("epoch", "best_epoch", "metrics", "state_dict", "criterion", "optimizer"):
        assert same(one[key], two[key]), key
    assert rows_of(folder) == rows_of(other)


def differences(folder: Path, reference: Path) -> list[str]:
    """In what two finished runs differ."""
    found = []
    for name in ("last.pth.tar", "checkpoint.pth.tar"):
        one, other = (auxiliaries.load_checkpoint(path / name) for path in (folder, reference))
        keys = ("epoch", "best_epoch", "metrics", "state_dict", "criterion", "optimizer")
        found += [f"{name}: {key}" for key in keys if not same(one[key], other[key])]
    one_rows, other_rows = rows_of(folder), rows_of(reference)
    found += [f"rows of {kind}" for kind in other_rows | one_rows if one_rows.get(kind) != other_rows.get(kind)]
    if shown(folder) != shown(reference):
        found.append("TensorBoard")
    one, other = (auxiliaries.load_json(path / "summary.json") for path in (folder, reference))
    found += [f"summary: {key}" for key in other if key != "seconds" and one.get(key) != other[key]]
    gradients, expected = (np.load(path / "grad_measure.npz") for path in (folder, reference))
    found += [f"grad_measure: {name}" for name in expected if gradients[name].tobytes() != expected[name].tobytes()]
    found += [f"{path.name} is missing" for path in reference.iterdir() if not (folder / path.name).exists()]
    return found


def resume_and_compare(work: Path, name: str) -> list[str]:
    train(work, name, ["--resume_training", "latest"] if is_folder(work, name) else [])
    return differences(work / name / "tiny" / "run", work / "reference" / "tiny" / "run")


def chosen_moments(names: list[str], rng: random.Random) -> list[int]:
    """One moment before every kind of rename, one after those that matter, and one of every other kind."""
    kinds: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        where, _, what = name.partition(" ")
        verb, _, target = what.partition(" ")
        if verb in ("replace", "rename"):
            is_kind = where == "before" or target in ("last.pth.tar", "checkpoint.pth.tar")
        else:
            is_kind = (
                verb in ("evaluate", "flush") if where == "before" else name not in ("after flush", "after torch.save")
            )
            name = {"in": "torn append", "half": what.split("_")[0]}.get(where, f"{where} {what.split(' ')[0]}")
        if is_kind:
            kinds.setdefault(name, []).append(position)
    return sorted(rng.choice(positions) for positions in kinds.values())


def kill_and_compare(work: Path) -> None:
    make_tree(work / "source" / "tiny" / "images", classes=8, per_class=4)
    quick_pictures()
    gc.freeze()  # forks share what is there already
    status, names = in_fork(lambda: train(work, "reference", []), work / "reference.log")
    assert status == 0, (work / "reference.log").read_text()
    rng = random.Random(0)
    moments: list[tuple[int, int | None]] = [(moment, None) for moment in chosen_moments(names, rng)]
    last = [position for position, name in enumerate(names) if name == "after replace last.pth.tar"]
    moments.append((last[1], rng.randrange(5, 20)))  # killed once more while it goes on
    with ProcessPoolExecutor(2, get_context("fork")) as lanes:  # each forks its own runs
        reports = list(lanes.map(partial(kill_and_resume, work, names), range(len(moments)), *zip(*moments)))
    (work / "report.json").write_text(json.dumps({"events": names, "moments": reports}, indent=1))


def kill_and_resume(work: Path, names: list[str], number: int, moment: int, again: int | None) -> dict[str, Any]:
    """Kills a run at a moment, and perhaps once more while it goes on; reports how it ends and in what it differs."""
    run = f"run_{number}"
    folder, log = work / run / "tiny" / "run", work / f"{run}.log"
    report: dict[str, Any] = {"event": names[moment], "number": moment, "again": again}
    report["killed"] = in_fork(lambda: train(work, run, [], moment), log)[0] == signal.SIGKILL
    if again is not None:
        status, _ = in_fork(lambda: train(work, run, ["--resume_training"], again), log)
        report["killed again"] = status == signal.SIGKILL
    report["had a folder"] = folder.exists()
    if (folder / "records.db").exists():
        database = sqlite3.connect(folder / "records.db")
        report["integrity"] = database.execute("PRAGMA integrity_check").fetchone()[0]
        database.close()
    status, report["differences"] = in_fork(lambda: resume_and_compare(work, run), log)
    report["resumed"] = status == 0
    report["left over"] = sorted(path.name for path in (work / run).rglob(".part-*"))
    if status:
        report["log"] = log.read_text()[-2000:]
    shutil.rmtree(work / run)
    return report


if __name__ == "__main__":
    kill_and_compare(Path(sys.argv[1]))

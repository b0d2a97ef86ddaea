"""Train what has not been trained yet, several runs at a time, each by the command that a user would type."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pretrain.config import load
from pretrain.config.resume import changed_keys
from pretrain.data import open_dataset
from pretrain.errors import RunDirError, UserError
from pretrain.run_dir import CONFIG, PLAN, read_status
from pretrain.studies.questions import Run

_LOOK_SECONDS = 0.2


@dataclass
class _Started:
    run: Run
    process: "subprocess.Popen[bytes]"


def finished(directory: Path) -> Mapping[str, Any] | None:
    """The status of a run that came to its end; none of any other."""
    try:
        status = read_status(directory)
    except RunDirError:
        return None
    return status if status["status"] == "finished" else None


def refuse_others(runs: Sequence[Run], shards: Path) -> None:
    """Raise `UserError` where a finished run was trained with other settings or other data than it would be now: it is
    not trained again, so its scores would stand for what they are not."""
    digests = {f"{split}_digest": open_dataset(str(shards / split)).digest for split in ("train", "val")}
    for run in runs:
        if finished(run.directory) is None:
            continue
        before, now = load(run.directory / CONFIG), load(run.study.config, run.overrides)
        words = [change.words for change in changed_keys(before, now)]
        if before.train.total_steps != now.train.total_steps:
            words.append(f"train.total_steps: {before.train.total_steps} -> {now.train.total_steps}")
        plan = json.loads((run.directory / PLAN).read_text())
        words += [f"other shards ({name})" for name, digest in digests.items() if plan[name] != digest]
        if words:
            raise UserError(
                f"{run.directory} was trained otherwise ({'; '.join(words)}): move {run.folder} away to train anew"
            )


def train_all(runs: Sequence[Run], jobs: int, shards: Path) -> int:
    """Train those of `runs` that are not finished; returns how many there were. A stopped call goes on where it was.

    Raises `UserError` when a run fails, after those beside it have ended.
    """
    waiting = [run for run in runs if finished(run.directory) is None]
    count = len(waiting)
    started: list[_Started] = []
    with tqdm(total=len(runs), initial=len(runs) - count, desc="studies", unit="run", disable=None) as bar:
        try:
            while waiting or started:
                for run in _ready(waiting, jobs - len(started)):
                    waiting.remove(run)
                    started.append(_Started(run, _start(run, shards)))
                time.sleep(_LOOK_SECONDS)
                for one in [one for one in started if one.process.poll() is not None]:
                    started.remove(one)
                    _check(one)
                    bar.update()
        finally:
            _wait(started)
    return count


def log_of(run: Run) -> Path:
    """Where what a run says is kept."""
    return run.directory.with_suffix(".log")


def _ready(waiting: Sequence[Run], free: int) -> list[Run]:
    return [run for run in waiting if run.base is None or finished(run.base) is not None][:free]


def _start(run: Run, shards: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "pretrain.train", str(run.study.config), *run.overrides]
    command += [f"data.{split}.shards={shards / split}" for split in ("train", "val")]
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    with log_of(run).open("ab") as log:
        return subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # runs share the cores, not a run all of them
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _check(one: _Started) -> None:
    code = one.process.returncode
    if code:
        raise UserError(
            f"the run {one.run.directory} ended with exit code {code}; what it said: {log_of(one.run)}. The same command "
            "goes on with the rest once that is mended"
        )


def _wait(started: Sequence[_Started]) -> None:
    """Until the runs under way have ended: a Ctrl-C reached them too, and they save what they have."""
    for one in started:
        while one.process.returncode is None:
            try:
                one.process.wait()
            except KeyboardInterrupt:
                continue

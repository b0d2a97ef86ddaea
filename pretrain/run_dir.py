"""The run directory: what the attempts of one run leave for each other and for people.

config.yaml   the resolved config of the latest attempt; reloads to the same object
plan.json     the resolved plan of the latest attempt
status.json   how the run stands: running, interrupted, finished or failed, at which step, with which scores
heartbeat.json   the last step that was alive, and when; see `pretrain.watchdog`
handoff.json  where `init.from` is set: the checkpoint that was taken, and what became of each weight
metrics.jsonl, tracking/   the journal and its delivery to MLflow
quarantine.jsonl   the bad samples that were replaced, where there are any; see `pretrain.data.quarantine`
logs/         one file per rank, and what each rank set aside
checkpoints/  see `pretrain.checkpoint`
"""

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pretrain.checkpoint.layout import checkpoints, config_of, read_manifest
from pretrain.config import Config, Plan, dump
from pretrain.config.resume import FIXED, Refused, changed_keys, check_allowed, refused
from pretrain.documents import number, read_object, replace_file, whole, write_object
from pretrain.errors import (
    CacheInUseError,
    CheckpointError,
    ConfigError,
    ReplicaError,
    RunDirError,
    UserError,
)
from pretrain.redact import redact_text

CONFIG = "config.yaml"
PLAN = "plan.json"
STATUS = "status.json"
HANDOFF = "handoff.json"
HEARTBEAT = "heartbeat.json"

Status = Literal["running", "interrupted", "finished", "failed"]


def check_writable(run_dir: Path) -> None:
    """Raise `RunDirError` if files cannot be made here."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):  # without a name: the other ranks try at the same moment
            pass
    except OSError as error:
        raise RunDirError(
            f"cannot write in the run directory {run_dir}: {error.strerror or error}. "
            "Set run.dir to a directory that all ranks can write to."
        ) from None


def check_resumable(run_dir: Path, config: Config, allowed: Sequence[str]) -> None:
    """Raise `ConfigError` if the newest checkpoint here was made under settings that this config changes, or if
    `allowed` names a key that there is not.

    allowed: keys that the user says may change, besides those that always may (`pretrain.config.resume`). Reads one
    manifest and verifies nothing: it is here to answer before anything heavy starts. Any rank.
    """
    check_allowed(allowed, config)
    for folder in reversed(checkpoints(run_dir)):
        with contextlib.suppress(CheckpointError):  # a damaged one, which the run will pass over too
            refuse_changes(run_dir, changed_keys(config_of(read_manifest(folder), folder), config), allowed)
            return


def refuse_changes(run_dir: Path, changes: Sequence[Refused], allowed: Sequence[str]) -> None:
    """Raise `ConfigError` for changes that a resume cannot take or was not told to take."""
    words = refused(changes, allowed)
    if words:
        raise ConfigError(
            f"{run_dir} holds a run with other settings:\n  " + "\n  ".join(words) + "\n"
            "Take the old values to resume it, or set run.dir to begin another run. Keys outside of "
            f"{', '.join(FIXED)} can be changed on purpose with --allow-change KEY, and so can init.from and the "
            "shards of a mixture, where they have moved."
        )


def write_config(run_dir: Path, config: Config, plan: Plan) -> None:
    replace_file(run_dir / CONFIG, dump(config))
    write_object(run_dir / PLAN, plan.as_dict())


def write_hand_off(
    run_dir: Path, checkpoint: str, step: int, digest: str, report: Sequence[tuple[str, str, str]]
) -> None:
    """What the first weights were made of. report: (weight, what became of it, how)."""
    rows = [dict(zip(("name", "action", "detail"), row, strict=True)) for row in report]
    facts = {"checkpoint": checkpoint, "step": step, "sha256": digest, "weights": rows}
    write_object(run_dir / HANDOFF, facts)


def write_status(run_dir: Path, status: Status, step: int, **facts: Any) -> None:
    """The truth about how a run stands, replaced atomically."""
    write_object(run_dir / STATUS, {"status": status, "step": step, **facts})


def read_status(run_dir: Path) -> Mapping[str, Any]:
    """What `write_status` wrote last, a `Status` and a step at the least; raises `RunDirError` where there is nothing or
    it cannot be read."""
    try:
        status = read_object(run_dir / STATUS)
        if status.get("status") not in get_args(Status) or whole(status.get("step")) is None:
            raise ValueError(f"{STATUS} does not say how the run stands, and at which step")
    except (OSError, ValueError) as error:
        raise RunDirError(f"{run_dir} is not the directory of a run: {error}") from None
    return status


def write_heartbeat(run_dir: Path, step: int) -> None:
    """A sign of life after `step` updates. One that cannot be written is none, and no reason to stop."""
    beat = {"step": step, "time": time.time(), "node": node(), "pid": os.getpid()}
    aside = run_dir / (HEARTBEAT + ".tmp")
    with contextlib.suppress(OSError):
        aside.write_text(json.dumps(beat) + "\n")
        aside.replace(run_dir / HEARTBEAT)


def read_heartbeat(run_dir: Path) -> Mapping[str, Any] | None:
    """What `write_heartbeat` wrote last; None where there is nothing to read."""
    try:
        beat = read_object(run_dir / HEARTBEAT)
    except (OSError, ValueError):
        return None
    return beat if number(beat.get("time")) is not None else None


def record_failure(run_dir: Path, rank: int, error: BaseException, words: str) -> None:
    """Leave the words of a rank that failed by itself where the other ranks and the batch script find them.

    `retry` says whether the same command may fare better: not after what a user has to mend. `job` says whose words they
    are: somebody may start the same command beside a run that lives, and be refused.
    """
    mend = isinstance(error, UserError) and not isinstance(
        error, RunDirError | ReplicaError | CacheInUseError
    )
    facts = {
        "rank": rank,
        "node": node(),
        "words": redact_text(words),
        "retry": not mend,
        "job": _job(),
        "exit_code": error.exit_code if isinstance(error, UserError) else 1,
    }
    with contextlib.suppress(OSError):  # a full disk may be the very failure: the log has its words
        write_object(_failure(run_dir, rank), facts)


def node() -> str:
    """The name of this machine, as Slurm knows it where Slurm started this process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def read_failure(run_dir: Path, rank: int) -> str | None:
    """The words that `record_failure` left in this attempt, if any."""
    try:
        facts = read_object(_failure(run_dir, rank))
    except (OSError, ValueError):
        return None
    return str(facts.get("words")) if facts.get("job") == _job() else None


def forget_failure(run_dir: Path, rank: int) -> None:
    """Take away what an earlier attempt left. Each rank its own, before it meets the others."""
    _failure(run_dir, rank).unlink(missing_ok=True)


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def _failure(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank_{rank}.failure"

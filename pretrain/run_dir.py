"""The run directory: what the attempts of one run leave for each other and for people.

config.yaml   the resolved config of the latest attempt; reloads to the same object
plan.json     the resolved plan of the latest attempt
status.json   how the run stands: running, interrupted, finished or failed, at which step, with which scores
handoff.json  where `init.from` is set: what became of each weight
metrics.jsonl, tracking/   the journal and its delivery to MLflow
logs/         one file per rank
checkpoints/  see `pretrain.checkpoint`
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pretrain.checkpoint.layout import checkpoints, replace_file
from pretrain.config import Config, Plan, dump, load
from pretrain.config.resume import changed_keys
from pretrain.errors import ConfigError, RunDirError

CONFIG = "config.yaml"
PLAN = "plan.json"
STATUS = "status.json"
HANDOFF = "handoff.json"

FIXED = (
    "run.seed",
    "data.train",
    "data.lanes",
    "data.block_mib",
    "data.window_blocks",
    "model",
    "optim.name",
    "train.global_batch",
    "init",
)
"""Keys that no option lets change within a run: another order of samples, another model, another beginning."""

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
    """Raise `ConfigError` if the run here was started under settings that this config changes.

    allowed: keys that the user says may change, besides those that always may (`pretrain.config.resume`).
    """
    if not checkpoints(run_dir) or not (run_dir / CONFIG).is_file():
        return  # nothing was learnt here yet
    changes = changed_keys(load(run_dir / CONFIG), config)
    refused = [
        c for c in changes if _under(c.partition(":")[0], FIXED) or not _under(c.partition(":")[0], allowed)
    ]
    if refused:
        raise ConfigError(
            f"{run_dir} holds a run with other settings:\n  " + "\n  ".join(refused) + "\n"
            "Take the old values to resume it, or set run.dir to begin another run. Keys outside of "
            f"{', '.join(FIXED)} can be changed on purpose with --allow-change KEY."
        )


def write_config(run_dir: Path, config: Config, plan: Plan) -> None:
    replace_file(run_dir / CONFIG, dump(config))
    replace_file(run_dir / PLAN, json.dumps(plan.as_dict(), indent=1) + "\n")


def write_status(run_dir: Path, status: Status, step: int, **facts: Any) -> None:
    """The truth about how a run stands, replaced atomically."""
    replace_file(run_dir / STATUS, json.dumps({"status": status, "step": step, **facts}, indent=1) + "\n")


def read_status(run_dir: Path) -> Mapping[str, Any]:
    """What `write_status` wrote last; raises `RunDirError` where there is nothing or it cannot be read."""
    try:
        status: Mapping[str, Any] = json.loads((run_dir / STATUS).read_text())
    except (OSError, ValueError) as error:
        raise RunDirError(f"{run_dir} is not the directory of a run: {error}") from None
    return status


def record_failure(run_dir: Path, rank: int, words: str) -> None:
    """Leave the words of a rank that failed where the others find them."""
    _failure(run_dir, rank).write_text(words)


def read_failure(run_dir: Path, rank: int) -> str | None:
    """What `record_failure` wrote in this attempt, if anything."""
    path = _failure(run_dir, rank)
    return path.read_text() if path.is_file() else None


def forget_failure(run_dir: Path, rank: int) -> None:
    """Take away what an earlier attempt left. Each rank its own, before it meets the others."""
    _failure(run_dir, rank).unlink(missing_ok=True)


def _failure(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank_{rank}.failure"


def _under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)

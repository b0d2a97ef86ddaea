"""Slurm's commands, called with lists of arguments and an environment of named variables only."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pretrain.errors import UserError

BASE_ENVIRONMENT = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TERM", "TZ", "SLURM_CONF")
"""What every job takes over from whoever submits it; a profile's `pass_env` names more."""

ALIVE = frozenset(
    [
        "PENDING",
        "CONFIGURING",
        "RUNNING",
        "COMPLETING",
        "SUSPENDED",
        "STOPPED",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "RESV_DEL_HOLD",
        "SPECIAL_EXIT",
        "SIGNALING",
        "STAGE_OUT",
        "RESIZING",
    ]
)
"""States of a job that still has something to come."""

ANSWER_SECONDS = 60.0


class SlurmError(UserError):
    """Slurm is not here, does not answer, or refuses."""

    exit_code = 9


def environment(names: Sequence[str]) -> dict[str, str]:
    """The variables of a job: the base and those named, as far as they are set."""
    return {name: os.environ[name] for name in (*BASE_ENVIRONMENT, *names) if name in os.environ}


def submit(
    script: Path,
    env: Mapping[str, str],
    after: int | str | None = None,
    kind: Literal["afterok", "afterany"] = "afterok",
) -> int:
    """Hand a script to Slurm; returns the job's number. after: a job that must end first, with 0 or however."""
    dependency = [] if after is None else [f"--dependency={kind}:{after}"]
    answer = _call(["sbatch", "--parsable", *dependency, "--", str(script)], env)
    found = re.match(r"(\d+)(;|$)", answer.strip())
    if not found:
        raise SlurmError(f"sbatch did not answer with the number of a job: {answer.strip()!r}")
    return int(found[1])


def test_only(script: str, env: Mapping[str, str]) -> str:
    """What Slurm says of a script without taking it: when it would start, or `SlurmError` with why never."""
    return _call(["sbatch", "--test-only"], env, script).strip()


def cancel(jobs: Sequence[int | str]) -> None:
    """A task of an array is ARRAY_TASK."""
    if jobs:
        _call(["scancel", "--", *map(str, jobs)])


def state(job: int | str) -> str:
    """The job's state in Slurm's words; `UNKNOWN` where Slurm has forgotten it."""
    try:
        text = _call(["scontrol", "-o", "show", "job", str(job)])
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return "UNKNOWN"
        raise
    found = re.search(r"\bJobState=(\w+)", text)
    return found[1] if found else "UNKNOWN"


def _call(command: Sequence[str], env: Mapping[str, str] | None = None, text: str | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            input=text,
            env=None if env is None else dict(env),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(f"there is no {command[0]} here: run this where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} gave no answer in {ANSWER_SECONDS:.0f} s; try again") from None
    if done.returncode:
        raise SlurmError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    # sbatch --test-only answers on stderr
    return done.stdout or done.stderr

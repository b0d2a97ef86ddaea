"""The batch script's questions: `python -m launch.attempt FOLDER ... begin` and `... end CODE`.

begin: may this attempt start? Prints `go`, `finished` or `blocked`. end: srun has exited with CODE, what now? Prints
`finished`, `stop CODE`, or `requeue NODES`, where NODES are to be left out of the next attempt. Reasons go to stderr, and
to `FOLDER/attempts.jsonl`, one line for each attempt that ended under the script's eyes.

Runs on the host, where there may be a plain Python only: nothing but the standard library is imported here.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.verdict import NO_CODE_OF_ITS_OWN, Attempt, Failure, Limits, Verdict, bad_nodes, judge

UNDER_WAY, ATTEMPTS = "attempt.json", "attempts.jsonl"
ASK_SECONDS = 30.0
_STEP = re.compile(r"step_(\d{8,})")


def main(arguments: Sequence[str]) -> int:
    """The exit code is not zero only where this program itself fails."""
    parser = argparse.ArgumentParser(prog="python -m launch.attempt", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, help="run directory of a training; its status decides")
    parser.add_argument("--needs", type=Path, help="run directory that must be finished")
    parser.add_argument("--without-progress", type=int, required=True)
    parser.add_argument("--failures-per-day", type=int, required=True)
    parser.add_argument("--min-nodes", type=int, required=True)
    parser.add_argument("--exclude", default="", help="nodes that are left out already")
    parser.add_argument("question", choices=["begin", "end"])
    parser.add_argument("code", nargs="?", type=int, help="exit code of srun, with end")
    asked = parser.parse_args(arguments)
    if asked.question == "begin":
        print(_begin(asked.folder, asked.run, asked.needs))
        return 0
    verdict, attempts = _end(
        asked.folder, asked.run, asked.code, Limits(asked.without_progress, asked.failures_per_day)
    )
    _say(verdict.reason)
    match verdict.action:
        case "requeue":
            print("requeue", ",".join(_left_out(attempts, asked.exclude, asked.min_nodes)))
        case "stop":
            print("stop", verdict.exit_code)
        case "finished":
            print("finished")
    return 0


def _begin(folder: Path, run: Path | None, needs: Path | None) -> str:
    # afterok on a job that Slurm has forgotten counts as satisfied: the run's own word is asked as well
    if needs is not None and _status(needs) != "finished":
        _say(f"{needs} is not finished (its status is {_status(needs)}): nothing to go on from")
        return "blocked"
    if run is not None and _status(run) == "finished":
        _say(f"{run} is finished already")
        return "finished"
    if run is not None:
        for left in (run / "logs").glob("rank_*.failure"):  # of a larger world than this one, maybe
            left.unlink(missing_ok=True)
    facts = {
        "job": _job(),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "nodes": os.environ.get("SLURM_JOB_NODELIST"),
        "began": time.time(),
        "from_step": _saved_step(run),
    }
    (folder / UNDER_WAY).write_text(json.dumps(facts) + "\n")
    return "go"


def _end(folder: Path, run: Path | None, code: int, limits: Limits) -> tuple[Verdict, list[Attempt]]:
    began = json.loads((folder / UNDER_WAY).read_text())
    status = _status(run) if run is not None else "finished" if code == 0 else "failed"
    now = Attempt(
        ended=time.time(),
        from_step=began["from_step"],
        to_step=_saved_step(run),
        status=status,
        exit_code=code,
        failures=_failures(run),
    )
    before = _attempts(folder / ATTEMPTS, str(began["job"]))
    verdict = judge(now, before, _job_state(), limits)
    line = {**began, **asdict(now), **verdict._asdict(), "exit_code": code}
    with (folder / ATTEMPTS).open("a") as file:
        file.write(json.dumps(line) + "\n")
    return verdict, [*before, now]


def _status(run: Path) -> str | None:
    try:
        status = json.loads((run / "status.json").read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(status)


def _saved_step(run: Path | None) -> int:
    """The step of the newest checkpoint, 0 where there is none. Committed is enough: this only measures progress."""
    if run is None:
        return 0
    names = (manifest.parent.name for manifest in (run / "checkpoints").glob("step_*/manifest.json"))
    return max((int(found[1]) for name in names if (found := _STEP.fullmatch(name))), default=0)


def _failures(run: Path | None) -> tuple[Failure, ...]:
    found = []
    for path in sorted((run / "logs").glob("rank_*.failure")) if run is not None else []:
        try:
            found.append(Failure(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            _say(f"{path} cannot be read; what it says does not count")
    return tuple(found)


def _attempts(path: Path, job: str) -> list[Attempt]:
    """Earlier attempts of this very job that count: one that was submitted anew starts with a clean sheet, and what
    Slurm ended (a job that stopped of its own goes no further) is nobody's fault."""
    names = Attempt.__dataclass_fields__
    attempts = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            facts: dict[str, Any] = json.loads(line)
            failures = tuple(Failure(**failure) for failure in facts["failures"])
            if facts["job"] == job and facts["action"] != "stop":
                known = {name: facts[name] for name in names}
                attempts.append(Attempt(**(known | {"failures": failures})))
        except (ValueError, TypeError, KeyError):
            continue  # a line that a dying node cut short
    return attempts


def _job() -> str:
    """The job as Slurm's commands know it. In an array one task's SLURM_JOB_ID stands for all of the array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _job_state() -> str:
    """What Slurm says of this job; asked again while the controller gives no answer."""
    deadline = time.monotonic() + ASK_SECONDS
    while True:
        text = _ask("scontrol", "-o", "show", "job", _job())
        found = re.search(r"\bJobState=(\w+)", text or "")
        if found or time.monotonic() > deadline:
            return found[1] if found else "UNKNOWN"
        time.sleep(1.0)


def _left_out(attempts: Sequence[Attempt], excluded: str, min_nodes: int) -> list[str]:
    """The exclude list for the next attempt, empty where nothing is to change.

    Nodes are left out only while enough others are there for the job to start at all.
    """
    bad = [node for node in bad_nodes(attempts) if re.fullmatch(r"[\w.-]+", node, re.ASCII)]
    if not bad:
        return []
    words = ["sinfo", "--noheader", "--Node", "--responding", "--format=%N"]
    partition = os.environ.get("SLURM_JOB_PARTITION")
    present = _ask(*words, *([f"--partition={partition}"] if partition else []))
    others = set((present or "").split()) - set(bad)
    if len(others) < min_nodes:
        _say(f"{', '.join(bad)} should be left out, but the job needs {min_nodes} nodes: it is not")
        return []
    _say(f"left out from now on: {', '.join(bad)}")
    return [*([excluded] if excluded else []), *bad]


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _say(words: str) -> None:
    print(f"[batch {time.strftime('%T')}] {words}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:
        _say(f"cannot keep the record of this attempt: {error}")
        sys.exit(NO_CODE_OF_ITS_OWN)

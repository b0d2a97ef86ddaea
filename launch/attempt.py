"""The batch script's questions: `python -m launch.attempt FOLDER ... begin` and `... end CODE`.

begin: may this attempt start? Prints `go`, `finished` or `blocked`. end: srun has exited with CODE, what now? Prints
`finished`, `stop CODE`, or `requeue NODES`, where NODES are to be left out of the next attempt. Reasons go to stderr, and
to `FOLDER/attempts.jsonl`, one line for each attempt that ended under the script's eyes.

Runs on the host, where there may be a plain Python only: nothing but the standard library is imported here. What it
reads was written by processes that were killed: a file or a line that is not what it should be does not count.
"""

import argparse
import contextlib
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
from pretrain.documents import number, parse_object, read_object, whole, write_object

UNDER_WAY, ATTEMPTS, CONFIG = "attempt.json", "attempts.jsonl", "config.yaml"
ASK_SECONDS = 30.0
PATIENCE_SECONDS = 300.0
"""How long a controller may be away (a restart, a failover) before the job gives up on its answer."""

RECORD_BYTES = 2**24
"""The end of the record of attempts that is read: hundreds of them at the least."""

MOST_FAILURES, MOST_WORDS = 16, 300
"""Of an attempt that are kept, and characters of what a rank said: where every rank of thousands fails, they say the same."""

_STEP = re.compile(r"step_(\d{8,})")
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


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
    if run is not None and _status(run) == "finished" and _is_as_asked(folder, run):
        _say(f"{run} is finished already")
        return "finished"
    if run is not None:
        for left in (run / "logs").glob("rank_*.failure"):  # of a larger world than this one, maybe
            left.unlink(missing_ok=True)
    write_object(folder / UNDER_WAY, _beginning(run))
    return "go"


def _is_as_asked(folder: Path, run: Path) -> bool:
    """Whether the run was last trained under the very config of this job. Under another one, such as a longer training, the
    trainer finds out what is left to do."""
    asked, trained = (_content(place / CONFIG) for place in (folder, run))
    return asked == trained


def _content(path: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return None


def _beginning(run: Path | None) -> dict[str, Any]:
    """said_by: the attempt of the run whose word the status is so far."""
    return {
        "said_by": None if run is None else _said(run).get("attempt"),
        "job": _job(),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "nodes": os.environ.get("SLURM_JOB_NODELIST"),
        "began": time.time(),
        "from_step": _saved_step(run),
    }


def _end(folder: Path, run: Path | None, code: int, limits: Limits) -> tuple[Verdict, list[Attempt]]:
    began = _began(folder / UNDER_WAY, run)
    if run is None:
        status: str | None = "finished" if code == 0 else "failed"
    else:
        status = _status(run, but_of=began.get("said_by"))
    now = Attempt(
        ended=time.time(),
        from_step=began["from_step"],
        to_step=_saved_step(run),
        status=status,
        exit_code=code,
        failures=_failures(run),
    )
    before = _attempts(folder / ATTEMPTS)
    verdict = judge(now, before, _job_state(), limits)
    _append(folder / ATTEMPTS, {**began, **asdict(now), **verdict._asdict(), "exit_code": code})
    return verdict, [*before, now]


def _began(path: Path, run: Path | None) -> dict[str, Any]:
    """What `begin` noted of this attempt."""
    try:
        facts = read_object(path)
        if whole(facts.get("from_step")) is None:
            raise ValueError("it does not say from_step")
    except (OSError, ValueError) as error:
        _say(f"{path} cannot be read ({error}): this attempt counts as one without progress")
        return _beginning(run) | {"said_by": None}
    return facts | {"job": _job()}


def _append(path: Path, facts: dict[str, Any]) -> None:
    """Add a line; one that a dying node cut short stays a line of its own."""
    with path.open("ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read() not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(facts).encode() + b"\n")


def _status(run: Path, but_of: object = None) -> str | None:
    """What the run says of itself, if not by the attempt `but_of`."""
    said = _said(run)
    status = said.get("status")
    is_new = but_of is None or said.get("attempt") != but_of
    return status if isinstance(status, str) and is_new else None


def _said(run: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return read_object(run / "status.json")
    return {}


def _saved_step(run: Path | None) -> int:
    """The step of the newest checkpoint, 0 where there is none. Committed is enough: this only measures progress."""
    if run is None:
        return 0
    names = (manifest.parent.name for manifest in (run / "checkpoints").glob("step_*/manifest.json"))
    return max((int(found[1]) for name in names if (found := _STEP.fullmatch(name))), default=0)


def _failures(run: Path | None) -> tuple[Failure, ...]:
    """The words of this job's ranks; who started the run by hand meanwhile, and was refused, does not count."""
    found = []
    for path in sorted((run / "logs").glob("rank_*.failure")) if run is not None else []:
        try:
            facts = read_object(path)
            if facts.get("job") == os.environ.get("SLURM_JOB_ID"):
                found.append(_failure(facts))
        except (OSError, ValueError) as error:
            _say(f"{path} cannot be read ({error}); what it says does not count")
    found.sort(key=lambda failure: (failure.retry, not failure.names_bad_node, failure.rank))
    return tuple(sorted(found[:MOST_FAILURES], key=lambda failure: failure.rank))


def _failure(facts: object) -> Failure:
    """Raises `ValueError` for what no rank writes."""
    match facts:
        case {
            "rank": int(rank), "node": str(node), "words": str(words), "retry": bool(retry), "exit_code": int(code)
        }:  # fmt: skip
            # bash takes a code modulo 256, and 0 says that the stage is finished
            return Failure(
                rank, node, _UNSEEN.sub("?", words[:MOST_WORDS]), retry, code if 0 < code < 256 else 1
            )
    raise ValueError("these are not the words of a rank")


def _attempts(path: Path) -> list[Attempt]:
    """Earlier attempts of this very job that count: one that was submitted anew starts with a clean sheet, and what
    Slurm ended (a job that stopped of its own goes no further) is nobody's fault."""
    lines: list[bytes] = []
    if path.is_file():
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - RECORD_BYTES))
            lines = file.read(RECORD_BYTES).splitlines()
    attempts = []
    for line in lines:
        try:
            facts = parse_object(line)
            if facts.get("job") == _job() and facts.get("action") != "stop":
                attempts.append(_attempt(facts))
        except ValueError:
            continue  # a line that a dying node cut short
    return attempts


def _attempt(facts: dict[str, Any]) -> Attempt:
    """Raises `ValueError` for what is no line of ours."""
    ended = number(facts.get("ended"))
    match facts:
        case {
            "from_step": int(start), "to_step": int(end), "status": None | str() as status, "exit_code": int(code),
            "failures": list(failures),
        } if ended is not None:  # fmt: skip
            return Attempt(ended, start, end, status, code, tuple(map(_failure, failures)))
    raise ValueError("this is no attempt")


def _job() -> str:
    """The job as Slurm's commands know it. In an array one task's SLURM_JOB_ID stands for all of the array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _job_state() -> str:
    """What Slurm says of this job; asked again while the controller gives no answer."""
    deadline = time.monotonic() + PATIENCE_SECONDS
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
    named = _ask("scontrol", "show", "hostnames", excluded) if excluded else None
    others = set((present or "").split()) - set(bad) - set((named or "").split())
    if len(others) < min_nodes:
        _say(f"{', '.join(bad)} should be left out, but the job needs {min_nodes} nodes: it is not")
        return []
    _say(f"left out from now on: {', '.join(bad)}")
    return [*([excluded] if excluded else []), *bad]


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=ASK_SECONDS, check=False
        )
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

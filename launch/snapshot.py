"""What a job leaves in its run directory before it waits in a queue for hours: its config, code state and script.

RUN/slurm/train/ or export/, SWEEP/slurm/sweep/
  config.yaml      the resolved config that the job reads, at its first start and at every later one
  code.json        version, git commit, and whether the clone differs from it
  code.diff        how, where it does; secrets taken out
  stage.sbatch     the batch script
  array.sbatch     of a sweep: the script of the array, which starts each member's own
  job.json         the number that Slurm gave it, and the chain that it is part of
  log-N.txt        what the job N said, all attempts in one file
  attempts.jsonl   how each attempt ended and what was decided
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import queue
from launch.job import CONFIG, SCRIPT, Job
from pretrain.config import Config, dump
from pretrain.documents import read_object, replace_file, whole, write_object
from pretrain.errors import RunDirError
from pretrain.lineage import code_changes, code_facts
from pretrain.redact import redact_text
from pretrain.run_dir import check_writable
from pretrain.tracking.locks import LockFile

RECORD = "job.json"
MAX_RECORD_BYTES = 2**24
"""Each member of a sweep names all of them."""


@dataclass(frozen=True)
class Submitted:
    """A job in Slurm's hands. chain: the folders of the jobs it was submitted with, in order; task: of an array."""

    job_id: int
    name: str
    chain: tuple[str, ...]
    task: int | None = None

    @property
    def number(self) -> str:
        """The job as Slurm's commands know it."""
        return str(self.job_id) if self.task is None else f"{self.job_id}_{self.task}"


@contextlib.contextmanager
def claimed(job: Job) -> Iterator[None]:
    """Hold the job's folder while it is prepared; raises `RunDirError` where it has a job that lives."""
    check_writable(job.folder)
    lock = LockFile(job.folder / "submit.lock")
    if not lock.acquire():
        raise RunDirError(f"somebody else is submitting {job.run_dir} at this moment")
    try:
        before = read(job.folder)
        if before is not None:
            state = queue.state(before.number)
            if state in queue.ALIVE:
                raise RunDirError(
                    f"{job.run_dir} has job {before.number} already, which is {state}. One run has one job: wait "
                    f"for it, or cancel it with python -m launch.slurm cancel {job.run_dir}"
                )
        yield
    finally:
        lock.release()


def write(job: Job, config: Config | None, script: str) -> Path:
    """Write the snapshot; returns the path of the script."""
    if config is not None:
        replace_file(job.folder / CONFIG, dump(config))
    write_object(job.folder / "code.json", code_facts())
    changes = code_changes()
    if changes:
        replace_file(job.folder / "code.diff", redact_text(changes))
    else:
        (job.folder / "code.diff").unlink(missing_ok=True)
    replace_file(job.folder / SCRIPT, script)
    return job.folder / SCRIPT


def record(job: Job, job_id: int, chain: Sequence[Path], task: int | None = None) -> None:
    facts = {"job_id": job_id, "name": job.name, "chain": [str(folder) for folder in chain], "task": task}
    write_object(job.folder / RECORD, facts)


def read(folder: Path) -> Submitted | None:
    """The job that was submitted from a folder last, or None. A record that came along with a copy of a run, or with a run
    that was moved, is of another folder's job."""
    try:
        match {"task": None} | read_object(folder / RECORD, MAX_RECORD_BYTES):
            case {"job_id": job_id, "name": str(name), "chain": list(chain), "task": task} if whole(
                job_id
            ) and (task is None or whole(task) is not None):
                folders = tuple(map(_folder_of_a_job, chain))
                return Submitted(job_id, name, folders, task) if _is_one_of(folder, folders) else None
        raise ValueError("this is no job of ours")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunDirError(
            f"{folder / RECORD} cannot be read: {error}. Look with squeue whether its job lives; if none does, delete "
            "the file"
        ) from None


def _folder_of_a_job(folder: object) -> str:
    """RUN/slurm/KIND, absolute; raises `ValueError` for what is none."""
    match Path(folder).parts if isinstance(folder, str) else ():
        case ("/", _, *_, "slurm", "train" | "export" | "sweep"):
            return str(folder)
    raise ValueError(f"{folder!r} is no folder of a job")


def _is_one_of(folder: Path, folders: Sequence[str]) -> bool:
    """By whatever path."""
    return str(folder) in folders or os.path.realpath(folder) in map(os.path.realpath, folders)

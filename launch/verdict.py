"""What to do after an attempt at a stage: a pure function of what it left behind.

Slurm runs a job again when a node dies or a job of higher priority takes its place; everything else is decided here.
An attempt that made progress may be followed by another; one that did not, only a few times; one that will fail in
the same way again, never.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

DAY_SECONDS = 86_400.0
ENDED_BY_SLURM = 86
NO_CODE_OF_ITS_OWN = 70  # EX_SOFTWARE

USER_CODES = frozenset({2, 3, 4, 8, 9})
"""Exit codes of what a user has to mend (`pretrain.errors`), for where no rank left words that say it better."""

_BAD_NODE = re.compile(
    r"CUDA error|CUDA-capable device|uncorrectable|\bECC\b|\bXid\b|NVML|no CUDA GPUs|sees no device|unhandled system error"
    r"|copy of the weights differs",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """The words of a rank that failed by itself, not because another did. retry: whether another try can help."""

    rank: int
    node: str
    words: str
    retry: bool
    exit_code: int

    @property
    def names_bad_node(self) -> bool:
        """Whether these are the words of broken hardware."""
        return _BAD_NODE.search(self.words) is not None


@dataclass(frozen=True)
class Attempt:
    """From where to where an attempt came, and how it ended. ended: seconds since 1970; exit_code: of srun.

    status: what the run itself says, None where it says nothing; steps are those of the newest checkpoint.
    """

    ended: float
    from_step: int
    to_step: int
    status: str | None
    exit_code: int
    failures: tuple[Failure, ...] = ()

    @property
    def progressed(self) -> bool:
        return self.to_step > self.from_step

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than by a signal that it answered with a checkpoint."""
        return not (self.status == "interrupted" and self.exit_code == 0)


@dataclass(frozen=True)
class Limits:
    without_progress: int
    failures_per_day: int


class Verdict(NamedTuple):
    """action: finished, requeue, or stop with `exit_code`."""

    action: Literal["finished", "requeue", "stop"]
    reason: str
    exit_code: int = 0


def judge(now: Attempt, before: Sequence[Attempt], job_state: str, limits: Limits) -> Verdict:
    """What to do after `now`. before: the attempts ahead of it, oldest first; job_state: what Slurm says of the job."""
    if now.status == "finished":
        return Verdict("finished", f"finished at step {now.to_step}")
    if job_state != "RUNNING":
        return Verdict(
            "stop", f"Slurm is ending this job ({job_state}), at step {now.to_step}", ENDED_BY_SLURM
        )
    final = next((failure for failure in now.failures if not failure.retry), None)
    if final is not None:
        return _stop(now, f"rank {final.rank} on {final.node}: {final.words}; another try cannot help", final)
    if not now.failures and now.exit_code in USER_CODES:
        return _stop(now, f"exit code {now.exit_code}: something is to be mended first, see the log")
    attempts = [*before, now]
    if len(attempts) > 1 and _same_end(attempts[-2], now):
        first = now.failures[0]
        return _stop(now, f"the same failure at the same step {now.to_step} twice: {first.words}", first)
    tries = 0
    for attempt in reversed(attempts):
        if attempt.progressed:
            break
        tries += 1
    if tries > limits.without_progress:
        return _stop(now, f"{tries} attempts in a row without progress, at step {now.to_step}")
    recent = [a for a in attempts if a.failed and a.ended > now.ended - DAY_SECONDS]
    if len(recent) > limits.failures_per_day:
        return _stop(now, f"{len(recent)} attempts failed within 24 hours, the last at step {now.to_step}")
    if now.failed:
        words = (
            now.failures[0].words if now.failures else f"srun exited {now.exit_code} without a word of a rank"
        )
        return Verdict("requeue", f"failed at step {now.to_step} ({words}); again, from there")
    return Verdict("requeue", f"interrupted at step {now.to_step}")


def bad_nodes(attempts: Sequence[Attempt]) -> list[str]:
    """Nodes whose own words are those of broken hardware, by name."""
    failures = (failure for attempt in attempts for failure in attempt.failures)
    return sorted({failure.node for failure in failures if failure.names_bad_node})


def _same_end(one: Attempt, other: Attempt) -> bool:
    """Whether two attempts failed with the same words at the same step: a bug, which would come a third time."""
    if one.to_step != other.to_step or not one.failures or not other.failures:
        return False
    return _shape(one.failures[0]) == _shape(other.failures[0]) and not other.failures[0].names_bad_node


def _shape(failure: Failure) -> str:
    """Words without what differs from one time to the next: numbers and addresses."""
    return re.sub(r"0x[0-9a-fA-F]+|\d+", "#", failure.words)


def _stop(now: Attempt, reason: str, failure: Failure | None = None) -> Verdict:
    code = failure.exit_code if failure is not None else now.exit_code
    return Verdict("stop", reason, code or NO_CODE_OF_ITS_OWN)

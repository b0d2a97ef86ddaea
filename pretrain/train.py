"""Train one stage: `python -m pretrain.train CONFIG [key.sub=value ...]`, under any launcher or none.

The same command starts a run, resumes it, and fine-tunes: a stage is its config. All ranks run this file; rank 0
speaks for all, also for a rank that failed alone. Exit codes: 0 finished; 75 stopped by a signal after a checkpoint (0
under our batch script, which reads status.json); others as in `pretrain.errors`, on every rank.
"""

import os
import re
import time
from contextlib import ExitStack
from pathlib import Path

import click

from pretrain import command, faults, logs, run_dir, stop, world
from pretrain.config import Config, load
from pretrain.errors import PeerError, UserError

INTERRUPTED = 75
"""EX_TEMPFAIL: an unfinished run must not look finished to `train && export`."""

UNDER_BATCH_SCRIPT = "PRETRAIN_BATCH_SCRIPT"
"""Set by a batch script that looks into status.json itself: there, stopping when asked to is no failure."""

CULPRIT_SECONDS = 3.0
"""How long a rank that lost another one looks for that one's own words."""

_LOST_PEER = re.compile(r"gloo|nccl|connection (closed|reset)|timed? ?out|broken pipe", re.IGNORECASE)


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option(
    "--allow-change", multiple=True, metavar="KEY", help="Resume although this key of the config changed."
)
def train(config: Path, overrides: tuple[str, ...], allow_change: tuple[str, ...]) -> int:
    """Train the stage that CONFIG describes, or go on with it where its run directory holds a part of it.

    OVERRIDES are key.sub=value, for instance optim.lr=1e-3.
    """
    place = world.from_environment(os.environ)
    with command.one_speaker(place):
        return _train(place, config, overrides, allow_change)


def _train(place: world.World, path: Path, overrides: tuple[str, ...], allow_change: tuple[str, ...]) -> int:
    """Check what needs no other rank, then train; a failure leaves its words in the run directory."""
    faults.arm(os.environ, place.rank)
    config = load(path, overrides)
    directory = Path(config.run.dir)
    run_dir.check_writable(directory)
    log_file = logs.to_rank_file(directory, place.rank)
    run_dir.forget_failure(directory, place.rank)
    with stop.on_signals() as flag, ExitStack() as afterwards:
        try:
            run_dir.check_resumable(directory, config, allow_change)
            return _join_and_train(place, config, directory, log_file, allow_change, flag, afterwards)
        except Exception as error:
            _leave_words(directory, place, error)
            if isinstance(error, OSError):
                raise UserError(str(error)) from error
            if _is_of_a_lost_peer(place, error):
                logs.to_file_only(log_file, error)
                raise PeerError(f"{_words_of_culprit(directory, place)}\n  {_first_line(error)}") from error
            raise


def _is_of_a_lost_peer(place: world.World, error: Exception) -> bool:
    """As a collective says it that another rank has left."""
    return isinstance(error, RuntimeError) and place.size > 1 and _LOST_PEER.search(str(error)) is not None


def _leave_words(directory: Path, place: world.World, error: Exception) -> None:
    """What this rank failed of, where the others look for it; nothing where it is another one that failed."""
    if isinstance(error, PeerError) or _is_of_a_lost_peer(place, error):
        return
    is_plain = isinstance(error, UserError | OSError)
    words = str(error) if is_plain else f"{type(error).__name__}: {error}"
    run_dir.record_failure(directory, place.rank, error, words)


def _join_and_train(
    place: world.World,
    config: Config,
    directory: Path,
    log_file: Path,
    allow_change: tuple[str, ...],
    flag: stop.StopFlag,
    afterwards: ExitStack,
) -> int:
    # torch, DeepSpeed and their friends take seconds to import: not before the config is known to be right, and with
    # signals in hand, which may come at any moment of it
    from pretrain.distributed import device_of, joined
    from pretrain.hardware import raise_descriptor_limit
    from pretrain.stage import run_stage

    raise_descriptor_limit()
    with (
        logs.quiet_stdout(log_file),
        joined(place, device_of(place), config.engine.timeout_seconds) as ranks,
    ):
        try:
            outcome = run_stage(config, ranks, directory, log_file, flag, afterwards, allow_change)
        except Exception as error:
            _leave_words(directory, place, error)  # here: once this rank has left, the others look for them
            raise
    return 0 if outcome.status == "finished" or UNDER_BATCH_SCRIPT in os.environ else INTERRUPTED


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def _words_of_culprit(directory: Path, place: world.World) -> str:
    """What the rank that failed first wrote down, or where to look if it died without a word."""
    deadline = time.monotonic() + CULPRIT_SECONDS
    while time.monotonic() < deadline:
        for rank in range(place.size):
            words = run_dir.read_failure(directory, rank)
            if words is not None:
                return f"stopped because rank {rank} failed: {words}"
        time.sleep(0.1)
    return (
        "stopped because another rank was lost: it was killed, or hung for longer than engine.timeout_seconds. "
        f"See {directory}/logs/. The same command resumes from the last checkpoint."
    )


if __name__ == "__main__":
    command.run(train, "python -m pretrain.train")

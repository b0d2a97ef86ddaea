"""Run a function on several ranks, each a process forked from one that has torch and DeepSpeed imported already."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from patience import PATIENCE
from ports import free_port
from torch.distributed import distributed_c10d

from pretrain import command
from pretrain.distributed import Ranks, joined
from pretrain.train import train
from pretrain.world import World

_PRELOAD = [
    "deepspeed",
    "pretrain.engine.engine",
    "pretrain.stage",
    "torch._dynamo",
]  # the last: for any optimizer
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


class RankError(AssertionError):
    """Raised with the traceback of the first rank that failed."""


def on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = PATIENCE,
    collective: int = PATIENCE,
    device: str = "cpu",
) -> list[Any]:
    """`function(ranks, *args)` on every rank; returns what each returned. `function` is a module's, not a local one.

    timeout: seconds until a rank without an answer fails the test; collective: until a collective raises.
    device: "cuda" starts fresh processes, since DeepSpeed chose the CPU in the one that the others are forked from.
    """
    os.environ |= {"DS_ACCELERATOR": device, "OMP_NUM_THREADS": "1"}
    context = _context if device == "cpu" else multiprocessing.get_context("spawn")
    port = free_port()
    ends: list[Connection] = []
    processes = []
    for rank in range(world_size):
        world = World(rank, world_size, rank, "127.0.0.1", port, "test")
        mine, theirs = context.Pipe()
        process = context.Process(
            target=_run, args=(theirs, world, collective, device, function, args), daemon=True
        )
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    answers: dict[int, tuple[bool, Any]] = {}
    try:
        while len(answers) < world_size:
            ready = wait([end for rank, end in enumerate(ends) if rank not in answers], timeout)
            if not ready:
                raise RankError(
                    f"ranks {sorted(set(range(world_size)) - answers.keys())} gave no answer in {timeout} s"
                )
            for end in ready:
                rank = ends.index(end)  # type: ignore[arg-type]
                try:
                    answers[rank] = end.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = (False, f"rank {rank} died without a word")
            failed = [text for ok, text in answers.values() if not ok]
            if failed:
                raise RankError("\n".join(failed))
    finally:
        for process in processes:
            process.join(10 if len(answers) == world_size else 0.5)
            if process.is_alive():
                process.kill()
                process.join()
    return [answers[rank][1] for rank in range(world_size)]


def lose_patience(seconds: float) -> None:
    """Called on a rank that is about to be left hanging: from here on its collectives raise after so long. What comes
    before may take its time."""
    for group in list(distributed_c10d._world.pg_map):
        group.set_timeout(timedelta(seconds=seconds))


def _run(
    end: Connection,
    world: World,
    collective: int,
    device: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        with joined(
            world, torch.device(device, 0 if device == "cuda" else None), timeout_seconds=collective
        ) as ranks:
            answer = (True, function(ranks, *args))
    except BaseException:
        answer = (False, f"rank {world.rank}:\n{traceback.format_exc()}")
    end.send(answer)
    end.close()


def launch(
    world_size: int,
    output: Path,
    *arguments: str,
    timeout: float = PATIENCE,
    before: Callable[[int], None] | None = None,
) -> list[tuple[int, str]]:
    """`python -m pretrain.train *arguments` as a launcher starts it, on every rank: (exit code, what it said).

    before: called with the rank in each process first. Of a module's functions, as in `on_ranks`.
    """
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    port = free_port()
    processes = []
    for rank in range(world_size):
        path = output / f"rank_{rank}.txt"
        process = _context.Process(
            target=_command, args=(path, rank, world_size, port, arguments, before), daemon=True
        )
        process.start()
        processes.append((process, path))
    ends = []
    for process, path in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise RankError(f"a rank was left hanging: {arguments}; it said:\n{path.read_text()}")
        ends.append((process.exitcode or 0, path.read_text()))
    return ends


def _command(
    path: Path,
    rank: int,
    world_size: int,
    port: int,
    arguments: tuple[str, ...],
    before: Callable[[int], None] | None = None,
) -> None:
    torch.set_num_threads(1)
    if before is not None:
        before(rank)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["pretrain.train", *arguments]
    World(rank, world_size, rank, "127.0.0.1", port, "test").export(os.environ)
    command.run(train, "python -m pretrain.train")


__all__ = ["RankError", "Ranks", "launch", "lose_patience", "on_ranks"]

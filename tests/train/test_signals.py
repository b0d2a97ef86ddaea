"""A signal at any moment, to any rank: the run saves what it has and the same command goes on, or it had finished.

The signals are real: where a rank comes past a point (those of `pretrain.faults`, and `forward` in an evaluation), it
sends them to itself, or to its process group, decode processes included, as launchers and batch systems do.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, Signals
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from ranks import Ranks, launch, on_ranks
from test_bad_input import write
from test_resume import TOTAL, config, final, journal, many

from pretrain import faults
from pretrain.config import Config
from pretrain.engine import Engine
from pretrain.run_dir import read_status
from pretrain.stage import run_stage
from pretrain.stop import on_signals

MOST_STEPS_MORE = 3
"""After the one in which a signal comes: the ranks agree on it two steps later."""

_forward = Engine.forward


class Sent(NamedTuple):
    """Signals, one after the other, when `rank` comes past `point` at `step` or later, once."""

    point: str
    rank: int
    step: int
    signals: tuple[Signals, ...] = (SIGTERM,)


def to_itself(number: Signals) -> None:
    os.kill(os.getpid(), number)


def send(sent: Sent, rank: int, deliver: Callable[[Signals], None] = to_itself) -> None:
    """Arm this process, if it is that rank."""
    now, passed, left = 0, 0, list(sent.signals) if rank == sent.rank else []

    def at(point: str, step: int | None = None) -> bool:
        nonlocal now
        now = step if point == "step" and step is not None else now
        if left and point == sent.point and (now if step is None else step) >= sent.step:
            for number in [left.pop(0) for _ in sent.signals]:
                deliver(number)
                time.sleep(0.05)  # else two of a kind may be one by the time that the main thread looks
        return False

    def forward(self: Engine, batch: Any) -> torch.Tensor:
        nonlocal passed
        passed += 1
        at("forward", passed)
        return _forward(self, batch)

    faults.at = at  # type: ignore[assignment]
    Engine.forward = forward  # type: ignore[method-assign]


def signalled(ranks: Ranks, jobs: list[tuple[Config, Sent]]) -> list[tuple[str, int]]:
    signal.signal(SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
    ends = []
    for cfg, sent in jobs:
        run = Path(cfg.run.dir)
        (run / "logs").mkdir(parents=True, exist_ok=True)
        with on_signals() as flag, ExitStack() as afterwards:
            send(sent, ranks.rank)
            log_file = run / "logs" / f"rank_{ranks.rank}.log"
            outcome = run_stage(cfg, ranks, run, log_file, flag, afterwards)
        ends.append((outcome.status, outcome.step))
    return ends


def settings(run: Path, shards: Path, **sections: dict[str, Any]) -> Config:
    return config(run, shards, **{"checkpoint": {"every_steps": 3}} | sections)


def assert_same(run: Path, golden: Path) -> None:
    expected = final(golden)
    assert all(torch.equal(value, expected[name]) for name, value in final(run).items()), run
    assert journal(run) == journal(golden), run


INTERRUPTED = [
    Sent("track", 0, 0),  # before the first step
    Sent("step", 1, 0, (SIGINT, SIGHUP)),
    Sent("data", 1, 5, (SIGUSR1, SIGTERM)),  # in a thread that decodes
    Sent("save", 1, 3, (SIGHUP, SIGHUP, SIGTERM)),  # a terminal that closed
    Sent("write", 1, 3, (SIGTERM, SIGTERM)),  # in the thread that writes
    Sent("rename", 0, 3, (SIGINT, SIGTERM, SIGUSR1)),
    Sent("forward", 0, 3, (SIGUSR1, SIGUSR1)),  # in the middle of an evaluation
    Sent("step", 1, TOTAL - 1),  # the last one: the evaluation behind it is left, and owed
]
TOO_LATE = [Sent("save", 1, TOTAL), Sent("latest", 0, TOTAL, (SIGINT, SIGTERM))]
"""All is computed, and the last save is under way: it ends, and so does the run."""


def test_a_signal_at_any_moment_and_those_after_it_cost_nothing(digits: Path, tmp_path: Path) -> None:
    cases = INTERRUPTED + TOO_LATE
    golden = settings(tmp_path / "golden", digits)
    runs = [settings(tmp_path / f"{number}-{sent.point}", digits) for number, sent in enumerate(cases)]
    on_ranks(2, many, [(golden, 10**9)])
    first, second = on_ranks(2, signalled, list(zip(runs, cases, strict=True)))
    assert first == second
    for (status, step), sent, cfg in zip(first, cases, runs, strict=True):
        assert status == ("finished" if sent in TOO_LATE else "interrupted"), sent
        # what goes on beside training, as late as can be: just before the next save
        came_at = 6 if sent.point in ("forward", "write", "rename") else sent.step
        assert step <= came_at + MOST_STEPS_MORE, sent
        assert read_status(Path(cfg.run.dir))["status"] == status
    again = runs[: len(INTERRUPTED)]
    assert on_ranks(2, many, [(cfg, 10**9) for cfg in again])[0] == [("finished", TOTAL)] * len(again)
    for cfg in runs:
        assert_same(Path(cfg.run.dir), tmp_path / "golden")


def test_a_second_ctrl_c_ends_the_run_at_once_and_the_same_command_mends_it(
    digits: Path, tmp_path: Path
) -> None:
    """In a step, and while a checkpoint is published."""
    golden = settings(tmp_path / "golden", digits)
    on_ranks(2, many, [(golden, 10**9)])
    for point, step in (("step", 4), ("rename", 3)):
        folder = tmp_path / point
        folder.mkdir()
        path = write(settings(folder / "run", digits), folder)
        sent = Sent(point, 0, step, (SIGINT, SIGINT))
        (code, words), (other, _) = launch(2, folder, path, before=partial(send, sent))
        assert (code, other) == (130, 6), words
        assert "Traceback" not in words
        assert read_status(folder / "run")["status"] == "failed"
        assert [code for code, _ in launch(2, folder, path)] == [0, 0]
        assert_same(folder / "run", tmp_path / "golden")


def to_its_group(noted: Path, number: Signals) -> None:
    children = [child.pid for child in multiprocessing.active_children()]
    noted.write_text(" ".join(map(str, children)))
    os.killpg(0, number)


def in_a_group(sent: Sent, noted: Path, rank: int) -> None:
    """A group of its own, as torchrun gives it to each rank, and processes of its own, which decode."""
    os.setsid()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    send(sent, rank, partial(to_its_group, noted))


def test_a_signal_to_a_whole_group_is_left_by_its_decode_processes_to_the_rank(
    digits: Path, tmp_path: Path
) -> None:
    golden = settings(tmp_path / "golden", digits)
    cfg = settings(tmp_path / "run", digits, data={"workers": "processes"})
    on_ranks(2, many, [(golden, 10**9)])
    path, noted = write(cfg, tmp_path), tmp_path / "children"
    sent = Sent("step", 1, 4, (SIGTERM, SIGUSR1))
    ends = launch(2, tmp_path, path, before=partial(in_a_group, sent, noted))
    assert [code for code, _ in ends] == [75, 75], ends
    children = list(map(int, noted.read_text().split()))
    assert len(children) == 2  # one decodes for training, one for evaluation
    assert not any(psutil.pid_exists(pid) for pid in children)
    assert on_ranks(2, many, [(golden.model_copy(update={"run": cfg.run}), 10**9)])[0] == [
        ("finished", TOTAL)
    ]
    assert_same(tmp_path / "run", tmp_path / "golden")


def test_handlers_are_those_of_before_once_a_run_is_over() -> None:
    before = [signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGUSR1)]
    with on_signals() as flag:
        os.kill(os.getpid(), SIGUSR1)
        assert flag.signal == SIGUSR1
        os.kill(os.getpid(), SIGTERM)  # after the first a batch system's further ones are nothing
        assert flag.signal == SIGUSR1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), SIGINT)
    assert [signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGUSR1)] == before


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(SIGHUP, signal.SIG_IGN)
    try:
        with on_signals() as flag:
            os.kill(os.getpid(), SIGHUP)
            assert not flag
        assert signal.getsignal(SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(SIGHUP, before)

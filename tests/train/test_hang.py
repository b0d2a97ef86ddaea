"""A rank that stops answering ends the run within the stated time; nobody waits for ever."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import tiny
from engines import STAGES, losses_of, make_engine
from patience import PATIENCE, wait_until
from ranks import Ranks, lose_patience, on_ranks

TIMEOUT = 5


def freeze(ranks: Ranks, folder: Path, stage: int) -> tuple[float, str]:
    """Rank 1 freezes between two steps: how long rank 0 waits for it, and what it then gets."""
    cfg = tiny.config(engine={"zero_stage": stage, "precision": "fp32"})
    engine, plan = make_engine(cfg, ranks, folder)
    losses_of(engine, plan, ranks, 0, 2)
    frozen = ranks.gather(os.getpid())[1]
    if ranks.rank == 1:
        os.kill(frozen, signal.SIGSTOP)
        return 0.0, ""
    wait_until(lambda: psutil.Process(frozen).status() == psutil.STATUS_STOPPED)
    lose_patience(TIMEOUT)
    began = time.monotonic()
    try:
        for step in range(2, 5):
            float(engine.step(tiny.micro_batches(cfg, plan, step, ranks.rank), 1e-3).loss_sum)
    except RuntimeError as error:
        return time.monotonic() - began, str(error)
    finally:
        os.kill(frozen, signal.SIGCONT)
    return time.monotonic() - began, "the steps went through"


def test_a_frozen_rank_is_noticed_at_every_stage(tmp_path: Path) -> None:
    with ThreadPoolExecutor(len(STAGES)) as threads:  # they wait, mostly
        answers = list(threads.map(lambda stage: on_ranks(2, freeze, tmp_path, stage)[0], STAGES))
    for stage, (seconds, words) in zip(STAGES, answers, strict=True):
        assert "timed out" in words.lower(), (stage, words)
        assert seconds < PATIENCE, stage

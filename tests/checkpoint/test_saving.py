"""A save is of the moment in which it began, training goes on beside it, and the clock may ask for it."""

import math
import time
from pathlib import Path

import pytest
import torch
from engines import config, losses_of, make_engine, weights
from ranks import Ranks, on_ranks
from test_checkpoint import content

from pretrain.checkpoint import checkpoints
from pretrain.checkpoint.interval import FIRST_SECONDS, SHORTEST_SECONDS, SaveClock, best_interval
from pretrain.checkpoint.load import Slices, open_weights
from pretrain.checkpoint.save import Saver
from pretrain.config import CheckpointConfig


def save_beside_training(ranks: Ranks, run: Path, stage: int) -> bool:
    engine, plan = make_engine(config(stage, "fp32", None, 0), ranks, run)
    losses_of(engine, plan, ranks, 0, 2)
    saver = Saver(run, ranks)
    saver.begin(content(engine, plan, 2))
    before = weights(engine)
    assert saver.is_pending
    losses_of(engine, plan, ranks, 2, 4)  # changes every weight and moment while the save is under way
    assert checkpoints(run) == []
    folder = saver.commit()
    assert not saver.is_pending
    slices = Slices(folder, open_weights(run).slices.manifest)
    return all(
        torch.equal(slices.read("weight", name, start, start + len(value)), value)
        for (name, start), value in before.items()
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_changes_after_a_save_began_is_not_in_it(stage: int, tmp_path: Path) -> None:
    assert on_ranks(2, save_beside_training, tmp_path, stage) == [True, True]


def test_the_best_interval_is_youngs() -> None:
    assert best_interval(30.0, failures_per_day=4) == pytest.approx(math.sqrt(2 * 30 * 6 * 3600))
    assert best_interval(0.0, failures_per_day=4) == SHORTEST_SECONDS


def clock(monkeypatch: pytest.MonkeyPatch, **settings: object) -> tuple[SaveClock, list[float]]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return SaveClock(CheckpointConfig.model_validate(settings)), now


def test_the_clock_asks_every_so_many_minutes_after_the_last_save(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, now = clock(monkeypatch, every_minutes=2.0)
    now[0] += 119
    assert not ours.is_due()
    ours.restart()  # by the step, say: the minutes count from here
    now[0] += 119
    assert not ours.is_due()
    now[0] += 1
    assert ours.is_due()


def test_auto_follows_the_measured_cost_of_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, now = clock(monkeypatch, every_minutes="auto", failures_per_day=1.0)
    now[0] += FIRST_SECONDS
    assert ours.is_due()
    ours.restart()
    ours.learn(2.0)
    now[0] += best_interval(2.0, 1.0) - 1
    assert not ours.is_due()
    now[0] += 1
    assert ours.is_due()


def test_without_minutes_the_clock_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, now = clock(monkeypatch)
    now[0] += 1e9
    assert not ours.is_due()

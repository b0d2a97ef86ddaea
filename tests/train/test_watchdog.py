"""A hang leaves word of where it is; a slow rank is named; copies that disagree stop the run before they are saved."""

import json
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engines import losses_of, make_engine
from patience import wait_until
from ranks import RankError, Ranks, lose_patience, on_ranks
from test_resume import config, train

from launch.progress import Stage
from pretrain.checkpoint import checkpoints, layout
from pretrain.config import Config
from pretrain.config.idle import idle_settings
from pretrain.engine import Engine
from pretrain.engine.replicas import checksums
from pretrain.errors import PeerError, ReplicaError
from pretrain.logs import log
from pretrain.pace import Pace
from pretrain.replicas import check_replicas
from pretrain.stage import run_stage
from pretrain.stop import StopFlag
from pretrain.trainer import Trainer

TIMEOUT = 5
"""The least that there is of engine.timeout_seconds: stacks are written after four fifths of it without a sign of life."""
GIVES_UP = 10


class HangsAt(StopFlag):
    """Rank 1 hangs when it is asked the fifth time, until rank 0 has given up."""

    def __init__(self, ranks: Ranks, run: Path) -> None:
        super().__init__()
        self.asked, self.hang = 0, hanging(ranks, run)

    def __bool__(self) -> bool:
        self.asked += 1
        if self.asked == 5:
            self.hang()
        return False


def hanging(ranks: Ranks, run: Path) -> Callable[[], None]:
    def sleeps() -> None:
        wait_until((run / "gave_up").exists)

    return sleeps if ranks.rank == 1 else lambda: lose_patience(GIVES_UP)


def hang(ranks: Ranks, cfg: Config, at_the_start: bool) -> str:
    """Rank 1 hangs, at the start or in the fifth step; what the others get."""
    run = Path(cfg.run.dir)
    (run / "logs").mkdir(parents=True, exist_ok=True)
    flag = StopFlag() if at_the_start else HangsAt(ranks, run)
    write = Engine.write

    def hang_and_write(self: Engine, source: Any) -> None:
        if at_the_start:
            hanging(ranks, run)()
        write(self, source)

    Engine.write = hang_and_write  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as caught, ExitStack() as afterwards:
        run_stage(cfg, ranks, run, run / "logs" / f"rank_{ranks.rank}.log", flag, afterwards)
    (run / "gave_up").touch()
    return str(caught.value)


def test_a_hang_leaves_the_stacks_of_all_ranks_and_the_time_of_the_last_step(
    digits: Path, tmp_path: Path
) -> None:
    def hung(at_the_start: bool) -> None:
        """Both wait, mostly."""
        run = tmp_path / f"run-{at_the_start}"
        cfg = config(run, digits, engine={"timeout_seconds": TIMEOUT}, data={"val": None})
        words = on_ranks(2, hang, cfg, at_the_start)
        assert "timeout" in words[0].lower().replace("timed out", "timeout")
        logs = [(run / "logs" / f"rank_{rank}.log").read_text() for rank in (0, 1)]
        for text in logs:
            assert "most recent call first" in text
        assert ("stage.py" if at_the_start else "trainer.py") in logs[0]
        assert ("in sleeps" if at_the_start else "in __bool__") in logs[1]  # the culprit's

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(hung, (False, True)))
    beat = json.loads((tmp_path / "run-False" / "heartbeat.json").read_text())
    assert beat["step"] >= 1
    assert 0 <= time.time() - beat["time"] < 3600


def test_a_run_that_has_been_silent_for_long_is_shown_so() -> None:
    assert Stage("run", "train", 1, "RUNNING", "running", silent_seconds=30.0).says == "running"
    assert (
        Stage("run", "train", 1, "RUNNING", "running", silent_seconds=840.0).says
        == "running, silent for 00:14"
    )
    assert Stage("run", "train", 1, "PENDING", None).says == "-"


def paced(ranks: Ranks) -> tuple[dict[str, float], list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    pace = Pace(ranks)
    assert pace.record(1.0 if ranks.size == 1 else 0.0, 0) == {}
    for _ in range(2):
        metrics = pace.record(4.0 if ranks.rank == 1 else 1.0 + ranks.rank / 10, steps=10)
    return metrics, lines


def test_a_slow_rank_is_named_once_and_measured() -> None:
    (metrics, lines), (others, quiet), _ = on_ranks(3, paced)
    assert (
        metrics
        == others
        == pytest.approx(
            {"perf/rank_seconds_median": 0.12, "perf/rank_seconds_max": 0.4, "perf/slowest_rank": 1.0}
        )
    )
    assert len(lines) == 1
    assert "rank 1 on " in lines[0]
    assert quiet == []
    assert on_ranks(1, paced)[0] == ({}, [])


def train_beside_a_slow_one(ranks: Ranks, cfg: Config) -> None:
    """The loader of rank 1 says that it took an hour for each step: no hiccup of the other one is as long."""
    go_on = Trainer._train_step

    def late(self: Trainer, micro_batches: Any) -> None:
        self.batches.wait_seconds += 3600 * ranks.rank
        go_on(self, micro_batches)

    Trainer._train_step = late  # type: ignore[method-assign]
    train(ranks, cfg)


def test_a_rank_whose_data_come_late_is_the_slowest_of_the_metrics(digits: Path, tmp_path: Path) -> None:
    short = {"total_steps": 4, "log_every_steps": 2}
    cfg = config(tmp_path / "run", digits, data={"val": None}, train=short)
    on_ranks(2, train_beside_a_slow_one, cfg)
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    values = [r["values"] for r in records if r["op"] == "metrics" and "perf/slowest_rank" in r["values"]]
    assert [v["perf/slowest_rank"] for v in values] == [1.0, 1.0]
    for v in values:
        assert v["perf/rank_seconds_max"] > v["perf/rank_seconds_median"]


def flip(engine: object, name: str) -> None:
    """One bit of one weight that the forward pass uses, as broken memory does it."""
    weight = dict(engine._engine.module.named_parameters())[name].data.view(-1)  # type: ignore[attr-defined]
    weight.view(torch.int32)[3] ^= 1 << 17


def disagree(ranks: Ranks, folder: Path) -> list[str]:
    words = []
    for stage in (0, 1, 2, 3):
        engine, plan = make_engine(
            tiny.config(engine={"zero_stage": stage, "precision": "fp32"}), ranks, folder
        )
        losses_of(engine, plan, ranks, 0, 2)
        check_replicas(engine, ranks, 2)  # they agree, to the bit
        if stage == 3:
            continue
        if ranks.rank == ranks.size - 1:
            flip(engine, "blocks.1.mlp.fc1.weight")
        with pytest.raises(ReplicaError if ranks.size < 3 or ranks.rank == 2 else PeerError) as caught:
            check_replicas(engine, ranks, 2)
        words.append(str(caught.value))
    return words


@pytest.mark.parametrize("world", [2, 3])
def test_a_flipped_bit_of_a_replica_is_found_and_the_rank_named(world: int, tmp_path: Path) -> None:
    """Of two ranks nobody knows which is right: both are named."""
    for rank, words in enumerate(on_ranks(world, disagree, tmp_path)):
        assert len(words) == 3
        for text in words:
            assert "blocks.1.mlp.fc1.weight" in text, (rank, text)
            assert ("rank 2: its copy" if world == 3 else "ranks that differ: 0, 1") in text


def flipped(ranks: Ranks, cfg: Config) -> None:
    go_on = Trainer._train_step

    def flip_after(self: Trainer, micro_batches: object) -> None:
        go_on(self, micro_batches)  # type: ignore[arg-type]
        if self.step == 5 and ranks.rank == 1:
            flip(self.engine, "head.weight")

    Trainer._train_step = flip_after  # type: ignore[method-assign]
    train(ranks, cfg)


def test_nothing_is_saved_of_replicas_that_disagree(digits: Path, tmp_path: Path) -> None:
    cfg = config(
        tmp_path / "run", digits, stage=0, data={"val": None},
        checkpoint={"every_steps": 2, "keep": 9}, recovery={"check_replicas_every_steps": 1000},
    )  # fmt: skip
    with pytest.raises(RankError, match="differs at step 6, in"):
        on_ranks(2, flipped, cfg)
    assert [layout.step_of(folder) for folder in checkpoints(tmp_path / "run")] == [2, 4]


def test_any_flipped_bit_changes_the_checksum() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        weight = torch.randn(7, 13, generator=generator).to(dtype)
        before = checksums([weight])
        for bit in range(8 * weight.element_size()):
            for element in (0, 1, 45, 90):
                flat = weight.clone().view(-1)
                mask = torch.tensor(1 << bit).to(bits)
                flat.view(bits)[element] ^= mask
                assert not torch.equal(checksums([flat]), before)
    assert checksums([torch.full((3,), math.nan)]) == checksums([torch.full((3,), math.nan)])


def test_a_check_that_compares_nothing_is_said_to() -> None:
    cfg = tiny.config(engine={"zero_stage": 3}, recovery={"check_replicas_every_steps": 10})
    assert any("no rank holds what another holds" in words for words in idle_settings(cfg))

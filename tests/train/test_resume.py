"""A run that was stopped, killed or moved is the run that was not."""

import json
import os
import random
import shutil
import signal
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import RankError, Ranks, on_ranks

from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.checkpoint.layout import step_of
from pretrain.checkpoint.load import open_weights
from pretrain.config import Config, TrainSourceConfig, resolve
from pretrain.data import facts, open_dataset, open_training
from pretrain.data.loader import EvalLoader
from pretrain.errors import UserError
from pretrain.hardware import detect
from pretrain.run_dir import check_resumable, read_status
from pretrain.stage import agree, run_stage
from pretrain.stop import StopFlag

TOTAL = 12


def config(
    run: Path, shards: Path, stage: int = 1, precision: str = "fp32", **sections: dict[str, Any]
) -> Config:
    base: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run)},
        "data": {
            "train": {"shards": str(shards / "train")},
            "val": {"shards": str(shards / "val")},
            "decode_threads": 1,
        },
        "model": {"in_chans": 1, "num_classes": 10, "drop_path_rate": 0.2},
        "train": {
            "global_batch": 22, "micro_batch": 6, "total_steps": TOTAL, "log_every_steps": 5, "eval_every_steps": 6,
        },
        "engine": {"zero_stage": stage, "precision": precision},
        "tracking": {"uri": None},
    }  # fmt: skip
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return tiny.config(**base)


class StopAfter(StopFlag):
    """A signal that comes while step `step` is computed."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.asked, self.step = 0, step

    def __bool__(self) -> bool:
        self.asked += 1
        return self.asked >= self.step


def train(ranks: Ranks, cfg: Config, stop_after: int = 10**9, allow: tuple[str, ...] = ()) -> tuple[str, int]:
    run = Path(cfg.run.dir)
    (run / "logs").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(os.getpid())  # no result may hang on a generator's state, which a restart would lose
    # Only one rank hears the signal: the others must learn of it.
    flag = StopAfter(stop_after) if ranks.rank == ranks.size - 1 else StopFlag()
    with ExitStack() as afterwards:
        outcome = run_stage(cfg, ranks, run, run / "logs" / f"rank_{ranks.rank}.log", flag, afterwards, allow)
    return outcome.status, outcome.step


def many(ranks: Ranks, jobs: list[tuple[Config, int]]) -> list[tuple[str, int]]:
    return [train(ranks, cfg, stop_after) for cfg, stop_after in jobs]


def final(run: Path) -> dict[str, torch.Tensor]:
    opened = open_weights(run)
    assert opened.step == TOTAL
    return {name: opened.weights[name] for name in opened.weights}


def journal(run: Path) -> dict[tuple[str, int], float]:
    """(metric, step) -> the value that counts; what the clock decides is left out."""
    values = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["op"] == "metrics":
            for name, value in record["values"].items():
                if not name.startswith("perf/"):
                    values[name, record["step"]] = value
    return values


CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]


def test_resume_equals_uninterrupted_bit_for_bit(digits: Path, tmp_path: Path) -> None:
    chance = random.Random(2)
    golden = [(config(tmp_path / f"golden-{s}-{p}", digits, s, p), 10**9) for s, p in CASES]
    stopped = [
        (config(tmp_path / f"stopped-{s}-{p}", digits, s, p), chance.randrange(1, TOTAL - 2))
        for s, p in CASES
    ]
    on_ranks(2, many, golden)  # processes of their own: zero.Init leaves its own F.linear behind in one
    ends = on_ranks(2, many, stopped)
    assert ends[0] == ends[1]
    assert all(status == "interrupted" and step < TOTAL for status, step in ends[0])
    assert on_ranks(2, many, [(cfg, 10**9) for cfg, _ in stopped])[0] == [("finished", TOTAL)] * len(CASES)
    for (whole, _), (parts, _) in zip(golden, stopped, strict=True):
        expected, got = final(Path(whole.run.dir)), final(Path(parts.run.dir))
        for name, value in expected.items():
            assert torch.equal(got[name], value), (parts.run.dir, name)
        assert journal(Path(parts.run.dir)) == journal(Path(whole.run.dir))
        manifests = [read_manifest(open_weights(Path(c.run.dir)).path) for c in (whole, parts)]
        assert manifests[0].data == manifests[1].data
        assert manifests[0].files == manifests[1].files  # moments too: the same bytes


def mixed(run: Path, shards: Path, stage: int = 1) -> Config:
    """Two sources by weight, each sample twice in its batch."""
    sources = zip("ab", ("train-{000000..000001}.tar", "train-000002.tar"), (0.75, 0.25), strict=True)
    mix = [
        {"name": name, "shards": f"{shards}/train/{part}", "weight": weight} for name, part, weight in sources
    ]
    return config(
        run, shards, stage,
        data={
            "train": {"mix": tuple(mix)}, "augment": {"repeats": 2},
            "val": {"shards": str(shards / "val")}, "decode_threads": 1,
        },
    )  # fmt: skip


def test_fewer_or_more_ranks_go_on_with_the_same_samples_and_losses(digits: Path, tmp_path: Path) -> None:
    """Also where sources are mixed and samples repeated."""
    golden = mixed(tmp_path / "golden", digits)
    on_ranks(2, train, golden)
    moved = mixed(tmp_path / "moved", digits, stage=3)
    for world, stop_after, stage in ((2, 3, 3), (1, 2, 1), (3, 10**9, 2)):
        cfg = moved.model_copy(update={"engine": moved.engine.model_copy(update={"zero_stage": stage})})
        on_ranks(world, train, cfg, stop_after)
    expected, got = journal(Path(golden.run.dir)), journal(Path(moved.run.dir))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-5), key
    state = read_manifest(open_weights(Path(moved.run.dir)).path).data
    assert state["samples_seen"] == 22 * TOTAL
    first, second = state["sources"].values()
    assert first + second == 11 * TOTAL
    shards = open_training(moved.data.train).source_samples
    assert got["data/epoch/a", TOTAL] == pytest.approx(first / shards[0])
    assert got["data/epoch/b", TOTAL] == pytest.approx(second / shards[1])


def killed(ranks: Ranks, cfg: Config, step: int) -> None:
    """Rank 0 dies with a signal that nothing can catch while it computes `step`."""
    from pretrain.trainer import Trainer

    go_on = Trainer._train_step

    def die_at(self: Trainer, micro_batches: Any) -> None:
        if self.step == step and ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        go_on(self, micro_batches)

    Trainer._train_step = die_at  # type: ignore[method-assign]
    train(ranks, cfg)


def test_a_killed_run_ends_with_the_same_weights_and_metrics(digits: Path, tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {"checkpoint": {"every_steps": 4}}
    golden, victim = (config(tmp_path / name, digits, **sections) for name in ("golden", "victim"))
    on_ranks(2, train, golden)
    with pytest.raises(RankError):
        on_ranks(2, killed, victim, 10)
    with (tmp_path / "victim" / "metrics.jsonl").open("a") as file:
        file.write('{"op": "metrics", "step": 10, "val')  # a line that the kill cut short
    on_ranks(2, train, victim)
    expected = final(tmp_path / "golden")
    assert all(torch.equal(value, expected[name]) for name, value in final(tmp_path / "victim").items())
    assert journal(tmp_path / "victim") == journal(tmp_path / "golden")


def test_saves_by_the_clock_are_agreed_by_all_ranks_and_change_nothing(digits: Path, tmp_path: Path) -> None:
    golden = config(tmp_path / "golden", digits)
    timed = config(tmp_path / "timed", digits, checkpoint={"every_minutes": 1e-6, "keep": 50})
    at_once = config(tmp_path / "at-once", digits, checkpoint={"every_steps": 3, "background": False})
    on_ranks(2, many, [(cfg, 10**9) for cfg in (golden, timed, at_once)])
    assert len(checkpoints(tmp_path / "timed")) > 2
    expected = final(tmp_path / "golden")
    for run in ("timed", "at-once"):
        assert all(torch.equal(value, expected[name]) for name, value in final(tmp_path / run).items())
        assert journal(tmp_path / run) == journal(tmp_path / "golden")
    logged = (tmp_path / "timed" / "metrics.jsonl").read_text()
    for name in ("perf/save_stall_seconds", "perf/save_stall_share", "perf/save_seconds"):
        assert name in logged


def validation_batches(ranks: Ranks, cfg: Config) -> int:
    data = open_dataset(str(cfg.data.val and cfg.data.val.shards))
    plan = resolve(cfg, ranks.size, facts(open_training(cfg.data.train), data), detect())
    with EvalLoader(data, cfg.data, cfg.model, plan, rank=ranks.rank) as loader:
        return sum(1 for _ in loader)


def test_a_signal_in_an_evaluation_ends_it_and_its_score_is_made_up_for(digits: Path, tmp_path: Path) -> None:
    golden = config(tmp_path / "golden", digits, checkpoint={"every_steps": 5})
    batches, _ = on_ranks(2, validation_batches, golden)
    assert batches > 3
    in_the_middle, at_the_end = 6 + 2, TOTAL + batches + 2  # the flag is asked once a step and once a batch
    stopped = [
        config(tmp_path / f"stopped_{asked}", digits, checkpoint={"every_steps": 5})
        for asked in (in_the_middle, at_the_end)
    ]
    jobs = [(golden, 10**9), (stopped[0], in_the_middle), (stopped[1], at_the_end)]
    ends = on_ranks(2, many, jobs)[0]
    assert ends == [("finished", TOTAL), ("interrupted", 6), ("interrupted", TOTAL)]
    assert ("val/loss", 6) not in journal(tmp_path / f"stopped_{in_the_middle}")
    weights = {
        name: at for name, at in files_of(Path(stopped[1].run.dir)).items() if name.endswith("safetensors")
    }
    assert on_ranks(2, many, [(cfg, 10**9) for cfg in stopped])[0] == [("finished", TOTAL)] * 2
    assert weights.items() <= files_of(Path(stopped[1].run.dir)).items(), (
        "weights are not written again for a score"
    )
    for cfg in stopped:
        assert journal(Path(cfg.run.dir)) == journal(tmp_path / "golden")
        for name, value in final(tmp_path / "golden").items():
            assert torch.equal(final(Path(cfg.run.dir))[name], value)
        assert read_status(Path(cfg.run.dir))["scores"] == read_status(tmp_path / "golden")["scores"]


def test_a_score_that_is_owed_and_can_no_longer_be_made_up_for_does_not_hold_up_the_run(
    digits: Path, tmp_path: Path
) -> None:
    cfg = config(tmp_path / "run", digits)
    assert on_ranks(1, train, cfg, 8) == [("interrupted", 6)]
    without = cfg.model_copy(update={"data": cfg.data.model_copy(update={"val": None})})
    allowed = partial(train, allow=("data.val",))
    assert on_ranks(1, allowed, without) == [("finished", TOTAL)]


def test_a_checkpoint_between_two_evaluations_has_no_score(digits: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", digits, checkpoint={"every_steps": 5, "keep": 9})
    on_ranks(1, train, cfg)
    scored = {step_of(folder): set(read_manifest(folder).metrics) for folder in checkpoints(tmp_path / "run")}
    names = {"val/loss", "val/top1", "val/top5"}
    assert scored == {5: set(), 6: names, 10: set(), 12: names}


def test_shards_may_move_within_a_run(digits: Path, tmp_path: Path) -> None:
    here = shutil.copytree(digits, tmp_path / "here")
    cfg = config(tmp_path / "run", here)
    assert on_ranks(1, train, cfg, 3) == [("interrupted", 5)]  # agreed two steps later
    there = here.rename(tmp_path / "there")
    moved = config(tmp_path / "run", there)
    check_resumable(tmp_path / "run", moved, ())
    assert on_ranks(1, train, moved) == [("finished", TOTAL)]


def test_another_data_set_is_refused_with_both_digests(digits: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", digits)
    on_ranks(1, train, cfg, 3)
    other = cfg.model_copy(
        update={"data": cfg.data.model_copy(update={"train": TrainSourceConfig(shards=str(digits / "val"))})}
    )
    with pytest.raises(RankError, match=r"was trained on the data set [0-9a-f]{64}.* is [0-9a-f]{64}"):
        on_ranks(1, train, other)


def on_other_hardware(ranks: Ranks, cfg: Config) -> str:
    plan = replace(tiny.plan(cfg, ranks.size), precision="bf16" if ranks.rank else "fp32")
    try:
        agree(plan, ranks)
    except UserError as error:
        return str(error)
    return "agreed"


def test_ranks_that_resolve_different_plans_stop_together() -> None:
    words = on_ranks(2, on_other_hardware, tiny.config())
    assert words[0].startswith("stopped because rank 1 failed")
    assert "precision: fp32 on rank 0, bf16 here" in words[1]


def test_a_finished_run_started_again_changes_nothing(digits: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", digits)
    on_ranks(1, train, cfg)
    before = files_of(tmp_path / "run")
    assert on_ranks(1, train, cfg) == [("finished", TOTAL)]
    assert files_of(tmp_path / "run") == before


def files_of(run: Path) -> dict[str, tuple[int, int]]:
    """Of every file of its checkpoints, which one it is and when it was written; pointers are set at each start."""
    found = (run / "checkpoints").glob("step_*/*")
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def test_a_kill_between_the_last_save_and_its_pointer_is_mended_by_the_same_command(
    digits: Path, tmp_path: Path
) -> None:
    cfg = config(tmp_path / "run", digits, checkpoint={"every_steps": 5})
    on_ranks(1, train, cfg)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    latest.write_text("step_00000010\n")
    assert open_weights(tmp_path / "run").step == 10
    assert on_ranks(1, train, cfg) == [("finished", TOTAL)]
    assert open_weights(tmp_path / "run").step == TOTAL

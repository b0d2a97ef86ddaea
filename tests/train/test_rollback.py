"""Bad steps in a row take a run back to a checkpoint and past the batches that led there, the same on every rank."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from ranks import RankError, Ranks, on_ranks
from test_resume import TOTAL, config, final, journal, train

from pretrain import faults, stage
from pretrain.checkpoint import checkpoints, layout, read_manifest
from pretrain.checkpoint.load import open_weights
from pretrain.config import Config, RecoveryConfig
from pretrain.data.loader import TrainLoader
from pretrain.data.skipped import Skipped
from pretrain.distributed import StepFacts
from pretrain.errors import DivergedError
from pretrain.recovery import RECENT_STEPS, BadSteps
from pretrain.shards import shards
from pretrain.tracking import Journal
from pretrain.trainer import Trainer

AT_ONCE = {"after_bad_steps": 1}


def rolled(run: Path, digits: Path, stage: int = 1, **sections: dict[str, Any]) -> Config:
    return config(
        run,
        digits,
        stage,
        **{"checkpoint": {"every_steps": 3}, "recovery": AT_ONCE, "data": {"val": None}} | sections,
    )


def faulty(ranks: Ranks, jobs: list[tuple[Config, str, int]]) -> list[tuple[str, int]]:
    ends = []
    for cfg, fault, stop_after in jobs:
        faults.arm({faults.VARIABLE: fault} if fault else {}, ranks.rank)
        ends.append(train(ranks, cfg, stop_after))
    return ends


def ops(run: Path, op: str) -> list[dict[str, Any]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["op"] == op]


def test_a_rolled_back_run_is_the_run_that_never_saw_those_batches(digits: Path, tmp_path: Path) -> None:
    """Also at every stage, stopped and gone on with, and on another world; bit-identical where world and stage are."""
    nan = "step:1:7:NaN"  # the 8th batch; the checkpoint before is that of step 6
    whole = [rolled(tmp_path / f"whole-{stage}", digits, stage) for stage in (0, 1, 2, 3)]
    parts = rolled(tmp_path / "parts", digits)
    moved = rolled(tmp_path / "moved", digits)
    by_hand = rolled(tmp_path / "by-hand", digits)
    on_ranks(2, faulty, [(cfg, nan, 10**9) for cfg in whole])
    ends = on_ranks(2, faulty, [(parts, nan, 11), (moved, nan, 11), (by_hand, "", 6)])
    assert ends[0][0] == ends[1][1]
    assert ends[0][0][0] == "interrupted"
    assert 6 < ends[0][0][1] < TOTAL  # after the rollback, before the end
    folder = layout.folder_of(tmp_path / "by-hand", ends[0][2][1])
    manifest = read_manifest(folder)
    assert manifest.step == 6
    layout.write_manifest(folder, replace(manifest, data=dict(manifest.data) | {"skipped": 2}))
    on_ranks(2, faulty, [(parts, "", 10**9), (by_hand, "", 10**9)])
    on_ranks(3, faulty, [(moved, "", 10**9)])
    expected, values = final(tmp_path / "whole-1"), journal(tmp_path / "whole-1")
    for run in ("by-hand", "parts"):
        assert all(torch.equal(value, expected[name]) for name, value in final(tmp_path / run).items()), run
    for run in ("parts", "moved", "whole-0", "whole-2", "whole-3"):
        got = journal(tmp_path / run)
        assert got.keys() == values.keys(), run
        for key, value in values.items():
            tolerance = 1e-3 if key[0] == "train/grad_norm" else 1e-5
            assert got[key] == pytest.approx(value, abs=tolerance), (run, key)
    for run in ("whole-1", "by-hand", "parts", "moved"):
        state = read_manifest(open_weights(tmp_path / run).path).data
        assert state["skipped"] == 2
        assert state["samples_seen"] == state["sources"]["train 1"] == 22 * TOTAL


def poisoned(ranks: Ranks, cfg: Config, batches: set[int]) -> tuple[tuple[str, int], int]:
    """The loss of these batches is not finite, whenever they come. Returns loaders made as well."""
    go_on, loaders = Trainer._train_step, []

    def counted(*args: Any, **kwargs: Any) -> TrainLoader:
        loaders.append(TrainLoader(*args, **kwargs))
        return loaders[-1]

    def with_nan(self: Trainer, micro_batches: Any) -> None:
        for batch in micro_batches:
            if batches & set((batch.positions // self.plan.global_batch).tolist()):
                batch.weights[0] = float("nan")
        go_on(self, micro_batches)

    Trainer._train_step = with_nan  # type: ignore[method-assign]
    stage.TrainLoader = counted  # type: ignore[assignment, misc]
    return train(ranks, cfg), len(loaders)


def test_the_journal_and_the_status_tell_of_rollbacks_and_the_second_goes_further_back(
    digits: Path, tmp_path: Path
) -> None:
    cfg = rolled(tmp_path / "run", digits, train={"log_every_steps": 2})
    loaders = 1  # for all attempts: what one holds of a node's cache is not let go of meanwhile
    assert on_ranks(2, poisoned, cfg, {7, 9}) == [(("finished", TOTAL), loaders)] * 2
    run = tmp_path / "run"
    assert [(a["attempt"], a["from_step"]) for a in ops(run, "attempt")] == [(1, 0), (2, 6), (3, 3)]
    status = json.loads((run / "status.json").read_text())
    first, second = status["rollbacks"]
    assert (first["to_step"], first["batches"]) == (6, [6, 7])
    assert (second["to_step"], second["batches"], status["attempt"]) == (3, [3, 9], 3)
    assert "not finite" in first["why"]
    assert read_manifest(open_weights(run).path).data["skipped"] == 7
    last = [r for r in ops(run, "metrics") if "train/rollbacks" in r["values"]][-1]
    assert last["values"]["train/rollbacks"] == 2
    assert 0 < last["values"]["perf/rank_seconds_median"] <= last["values"]["perf/rank_seconds_max"]
    assert last["values"]["perf/slowest_rank"] in (0, 1)
    assert not any("resume/diverged" in r["values"] for r in ops(run, "metrics"))


def test_values_of_other_samples_are_not_compared_with_before_also_after_a_restart(tmp_path: Path) -> None:
    def opened(from_step: int) -> Journal:
        return Journal.open(tmp_path, experiment="e", name="n", from_step=from_step)

    first = opened(0)
    first.metrics(6, {"train/loss": 1.0})
    first.metrics(8, {"train/loss": 2.0})
    first.go_back(6)
    first.metrics(7, {"train/loss": 3.0})
    first.close("FAILED")
    again = opened(6)
    again.metrics(7, {"train/loss": 3.0})
    again.metrics(8, {"train/loss": 4.0})
    again.close("FINISHED")
    *_, seventh, eighth = ops(tmp_path, "metrics")
    assert seventh["known"]["train/loss"][0] == 3.0
    assert eighth["values"] == {"train/loss": 4.0}
    assert "known" not in eighth
    assert [a["attempt"] for a in ops(tmp_path, "attempt")] == [1, 2, 3]


def diverging(ranks: Ranks, cfg: Config) -> str:
    with pytest.raises(DivergedError) as caught:
        train(ranks, cfg)
    return str(caught.value)


def test_a_run_that_always_diverges_stops_with_a_named_error_on_all_ranks(
    digits: Path, tmp_path: Path
) -> None:
    """For real: with this learning rate nothing stays finite, whichever the batches."""
    cfg = rolled(
        tmp_path / "run", digits, optim={"lr": 1e30, "warmup_steps": 0, "clip_grad_norm": None},
        checkpoint={"every_steps": 1}, recovery={"after_bad_steps": 2, "max_rollbacks": 2},
    )  # fmt: skip
    words = on_ranks(2, diverging, cfg)
    assert words[0] == words[1]
    assert "The run went back 2 times; recovery.max_rollbacks allows no more" in words[0]
    assert [a["attempt"] for a in ops(tmp_path / "run", "attempt")] == [1, 2, 3]
    assert len(checkpoints(tmp_path / "run")) == 1  # none of weights that led to nothing
    assert on_ranks(2, diverging, cfg)[0] == words[0]  # the same command: not for ever


def test_without_a_checkpoint_before_the_trouble_the_run_stops_and_says_so(
    digits: Path, tmp_path: Path
) -> None:
    cfg = rolled(tmp_path / "run", digits)
    with pytest.raises(RankError, match="there is no checkpoint from before to go back to"):
        on_ranks(2, faulty, [(cfg, "step:1:1:NaN", 10**9)])


def test_a_checkpoint_made_among_bad_steps_does_not_take_the_place_of_the_one_before_them(
    digits: Path, tmp_path: Path
) -> None:
    """As a signal makes it: the run may have to go back further."""
    settings = {"checkpoint": {"every_steps": 3, "keep": 1}, "recovery": {"after_bad_steps": 2}, "data": {}}
    cfg = rolled(tmp_path / "run", digits, **settings)
    assert on_ranks(2, faulty, [(cfg, "step:1:5:NaN", 6)])[0] == [("interrupted", 6)]
    assert [layout.step_of(folder) for folder in checkpoints(tmp_path / "run")] == [3, 6]
    assert on_ranks(2, faulty, [(cfg, "step:1:6:NaN", 10**9)])[0] == [("finished", TOTAL)]
    state = read_manifest(open_weights(tmp_path / "run").path)
    assert state.data["skipped"] == 7 - 3
    assert [back["batches"] for back in state.progress["rollbacks"]] == [[3, 6]]


def facts(*losses: float) -> list[StepFacts]:
    """Of steps 1, 2, ... with a batch of one sample; a NaN is a step that all ranks skipped."""
    return [
        StepFacts(step, loss, 2.0 if loss != loss else 0.0, 0, 0, 0, 0, 0)
        for step, loss in enumerate(losses, start=1)
    ]


def test_bad_steps_count_in_a_row_only_also_over_a_restart() -> None:
    settings = RecoveryConfig(after_bad_steps=3)
    nan = float("nan")
    steps = BadSteps(settings, 1, {})
    steps.add(facts(1.0, nan, nan, 1.0, nan, nan))
    assert (steps.in_a_row, steps.is_trouble) == (2, False)
    again = BadSteps(settings, 1, json.loads(json.dumps(steps.state())))
    [*_, last] = facts(*[nan] * 7)
    again.add([last])
    assert again.is_trouble
    trouble = again.trouble(Skipped(), 0)
    assert (trouble.first, trouble.last) == (5, 7)


@pytest.mark.parametrize(("factor", "bad"), [(None, 0), (3.0, 2), (30.0, 0)])
def test_a_loss_far_above_its_recent_mean_is_bad_where_that_is_asked_for(
    factor: float | None, bad: int
) -> None:
    steps = BadSteps(RecoveryConfig(spike_factor=factor), 1, {})
    steps.add(facts(*[9.0] * 10))  # too early to know what is usual
    assert steps.in_a_row == 0
    lines = steps.add(facts(*[1.0] * 5 * RECENT_STEPS, 4.0, 4.0))
    assert steps.in_a_row == len(lines) == bad


@pytest.fixture
def shades(tmp_path: Path) -> Path:
    """Dark and bright squares: two classes that are learnt in twenty steps, so that a wrong label stands out."""
    for number in range(60):
        path = tmp_path / "images" / f"{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 + 150 * (number % 2) + number // 2).save(path)
    arguments = ["pack", str(tmp_path / "images"), str(tmp_path / "shades"), "--shards", "2"]
    assert CliRunner().invoke(shards, arguments).exit_code == 0
    return tmp_path / "shades" / "train"


SPOILT, LAST = 110, 120
"""The batch whose labels are wrong, and the length of that run."""


def spoilt(ranks: Ranks, jobs: list[tuple[Config, int]]) -> list[tuple[str, int]]:
    go_on = Trainer._train_step

    def with_wrong_labels(self: Trainer, micro_batches: Any) -> None:
        for batch in micro_batches:
            wrong = batch.positions // self.plan.global_batch == SPOILT
            batch.labels[wrong] = 1 - batch.labels[wrong]
        go_on(self, micro_batches)

    Trainer._train_step = with_wrong_labels  # type: ignore[method-assign]
    return [train(ranks, cfg, stop_after) for cfg, stop_after in jobs]


def test_a_spike_of_the_loss_takes_all_ranks_back_and_past_the_batch_that_made_it(
    shades: Path, tmp_path: Path
) -> None:
    """To the bit the run that passed over these batches from the beginning; and only where it is asked for."""

    def spiky(name: str, factor: float | None) -> Config:
        return config(
            tmp_path / name, shades.parent, data={"val": None}, model={"in_chans": 1, "num_classes": 2},
            train={"global_batch": 6, "micro_batch": None, "total_steps": LAST, "log_every_steps": 1, "eval_every_steps": None},
            checkpoint={"every_steps": 25}, recovery={"after_bad_steps": 1, "spike_factor": factor},
        )  # fmt: skip

    asked, not_asked, by_hand = spiky("asked", 10.0), spiky("not", None), spiky("by-hand", 10.0)
    ends = on_ranks(2, spoilt, [(asked, 10**9), (not_asked, 10**9), (by_hand, 100)])
    assert ends[0] == ends[1] == [("finished", LAST), ("finished", LAST), ("interrupted", 100)]
    folder = layout.folder_of(tmp_path / "by-hand", 100)
    manifest = read_manifest(folder)
    passed_over = SPOILT + 1 - 100
    layout.write_manifest(folder, replace(manifest, data=dict(manifest.data) | {"skipped": passed_over}))
    on_ranks(2, spoilt, [(by_hand, 10**9)])
    losses = {name: journal(tmp_path / name) for name in ("asked", "not", "by-hand")}
    assert losses["not"]["train/loss", SPOILT + 1] > 1 > 10 * losses["not"]["train/loss", SPOILT]
    assert max(losses["asked"]["train/loss", step] for step in range(101, LAST + 1)) < 1
    ours, theirs = (open_weights(tmp_path / name) for name in ("asked", "by-hand"))
    assert ours.step == LAST
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in ours.weights)
    for opened, rollbacks in ((ours, [[100, SPOILT]]), (theirs, [])):
        manifest = read_manifest(opened.path)
        assert manifest.data["skipped"] == passed_over
        assert [back["batches"] for back in manifest.progress["rollbacks"]] == rollbacks
    assert [(a["attempt"], a["from_step"]) for a in ops(tmp_path / "asked", "attempt")] == [(1, 0), (2, 100)]
    assert len(ops(tmp_path / "not", "attempt")) == 1


def test_a_run_that_went_back_twice_takes_later_batches_by_all_that_it_passed_over() -> None:
    skipped = Skipped(step=4).up_to(6)
    assert [skipped.batch(step) for step in (4, 5, 6)] == [6, 7, 8]
    again = Skipped(skipped.batches, step=7).up_to(10)
    assert [again.batch(step) for step in (7, 8)] == [10, 11]
    assert again.batches == 3

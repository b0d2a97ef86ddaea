"""A training that went back, and what MLflow shows of it: the values of the attempt that counts."""

import json
from pathlib import Path

from digits import digits
from mlflow import MlflowClient
from mlflow_server import Server, Stored
from patience import let_runs_deliver, wait_until
from ranks import Ranks, on_ranks
from test_resume import TOTAL, config, journal
from test_rollback import faulty

from pretrain.config import Config
from pretrain.tracking import progress
from pretrain.trainer import Trainer

__all__ = ["digits"]

BAD = 9
"""The step with the NaN; the checkpoint before it is that of step 6."""


def train_with_a_nan(ranks: Ranks, cfg: Config, database: Path) -> list[tuple[str, int]]:
    """Rank 0 computes the bad step once all before it has reached MLflow."""
    let_runs_deliver()
    go_on = Trainer._train_step
    run = Path(cfg.run.dir)

    def wait_before(self: Trainer, micro_batches: object) -> None:
        if self.step == BAD - 1 and not self.rollbacks and ranks.is_main:
            stored = Stored(database, run)
            wait_until(lambda: stored.run_ids and len(stored.points("train/loss")) == BAD - 1)
        go_on(self, micro_batches)  # type: ignore[arg-type]

    Trainer._train_step = wait_before  # type: ignore[method-assign]
    return faulty(ranks, [(cfg, f"step:1:{BAD - 1}:NaN", 10**9)])


def test_mlflow_shows_of_each_step_the_attempt_that_counts(
    server: Server, digits: Path, tmp_path: Path
) -> None:
    server.start()
    run = tmp_path / "run"
    cfg = config(
        run, digits, data={"val": None}, train={"log_every_steps": 1},
        checkpoint={"every_steps": 3}, recovery={"after_bad_steps": 1}, tracking={"uri": server.uri},
    )  # fmt: skip
    ends = on_ranks(2, train_with_a_nan, cfg, server.database)
    assert ends == [[("finished", TOTAL)]] * 2
    stored, counts = Stored(server.database, run), journal(run)
    points = stored.points("train/loss")
    assert [step for step, _ in points] == [*range(1, 7), 7, 7, 8, 8, *range(9, TOTAL + 1)]
    newest = dict(points)  # the last of a step is the newest
    assert newest == {step: counts["train/loss", step] for step in range(1, TOTAL + 1)}
    old = dict(reversed(points))
    assert all(old[step] != newest[step] for step in (7, 8))  # of other samples
    history = MlflowClient(server.uri).get_metric_history(stored.run_id, "train/loss")
    shown = {m.step: m.value for m in sorted(history, key=lambda metric: metric.timestamp)}
    assert shown == newest
    assert dict(stored.points("train/rollbacks"))[TOTAL] == 1
    assert stored.points("resume/diverged") == []
    assert stored.tags()["attempt"] == "2"
    [back] = json.loads(stored.tags()["rollbacks"])
    assert (back["to_step"], back["batches"]) == (6, [6, BAD - 1])
    assert stored.status == "FINISHED"
    assert progress.count_unsent(run) == 0

"""A run whose disk was lost goes on from its mirror, and training does not mind one that fails."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from patience import PATIENCE, wait_until
from ranks import Ranks, on_ranks
from test_resume import TOTAL, config, final, many, train

from pretrain.checkpoint import checkpoints
from pretrain.config import Config
from pretrain.stage import MIRROR_SECONDS
from pretrain.trainer import Trainer


def mirrored(run: Path, digits: Path, url: str) -> Config:
    return config(run, digits, checkpoint={"every_steps": 3, "mirror": url}, data={"val": None})


def logged(run: Path, name: str) -> list[Any]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [r["values"][name] for r in records if r["op"] == "metrics" and name in r["values"]]


def many_patiently(ranks: Ranks, jobs: list[tuple[Config, int]]) -> list[tuple[str, int]]:
    """The end of a run waits for its mirror, and the last step for the first failure of one that fails."""
    MIRROR_SECONDS["interrupted"] = float(PATIENCE)
    go_on = Trainer._train_step

    def wait_before(self: Trainer, micro_batches: Any) -> None:
        mirror = self._saves._mirror
        if mirror is not None and self.run_dir.name == "failing" and self.step == TOTAL - 1:
            wait_until(lambda: mirror.failures)
        go_on(self, micro_batches)

    Trainer._train_step = wait_before  # type: ignore[method-assign]
    return many(ranks, jobs)


def test_a_run_on_a_wiped_disk_ends_with_the_same_weights(digits: Path, tmp_path: Path) -> None:
    whole = config(tmp_path / "whole", digits, checkpoint={"every_steps": 3}, data={"val": None})
    cfg = mirrored(tmp_path / "run", digits, str(tmp_path / "mirror"))
    (tmp_path / "others").mkdir()
    for name, word in (("owner", "0" * 32), ("latest", "step_00000003")):
        (tmp_path / "others" / name).write_text(word)  # every update fails
    failing = mirrored(tmp_path / "failing", digits, str(tmp_path / "others"))
    ends = on_ranks(2, many_patiently, [(whole, 10**9), (cfg, 7), (failing, 10**9)])
    stopped = ends[0][1][1]
    assert 7 <= stopped < TOTAL
    names = [folder.name for folder in checkpoints(tmp_path / "run")]
    shutil.rmtree(tmp_path / "run")
    assert on_ranks(2, train, cfg)[0] == ("finished", TOTAL)
    assert len(names) == 2
    expected = final(tmp_path / "whole")
    for run in ("run", "failing"):
        assert all(torch.equal(value, expected[name]) for name, value in final(tmp_path / run).items()), run
    assert max(logged(tmp_path / "failing", "checkpoint/mirror_failures")) > 0
    assert max(logged(tmp_path / "failing", "checkpoint/mirror_lag_steps")) >= 3
    assert {path.name for path in (tmp_path / "others").iterdir()} == {"owner", "latest"}
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["op"] for r in records if r["op"] in ("run", "attempt", "gap")] == [
        "run",
        "attempt",
        "gap",
        "attempt",
    ]
    attempts = [r for r in records if r["op"] == "attempt"]
    assert [attempt["attempt"] for attempt in attempts] == [1, 2]
    assert attempts[1]["from_step"] == stopped  # the last one sent before the run ended
    assert [record["step"] for record in records if "train/loss" in record.get("values", {})][-1] == TOTAL

"""A profile names where a step's time goes, on every rank, and leaves traces that can be opened."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from test_resume import config, journal, many

from pretrain.config import ProfileConfig
from pretrain.distributed import Ranks
from pretrain.logs import log
from pretrain.profiling import PARTS, StepProfile
from pretrain.world import World


def test_chosen_steps_are_traced_and_split_on_every_rank_and_change_nothing(
    digits: Path, tmp_path: Path
) -> None:
    plain = config(tmp_path / "plain", digits, stage=3)
    profiled = config(tmp_path / "profiled", digits, stage=3, profile={"steps": (4, 6)})
    assert on_ranks(2, many, [(cfg, 10**9) for cfg in (plain, profiled)])[0] == [("finished", 12)] * 2
    assert journal(tmp_path / "profiled") == journal(tmp_path / "plain")
    folder = tmp_path / "profiled" / "profile" / "steps_4_6"
    split = json.loads((folder / "split.json").read_text())
    assert split["steps"] == [4, 5, 6]
    assert len(split["milliseconds_by_rank"]) == 2
    for rank, parts in enumerate(split["milliseconds_by_rank"]):
        assert parts["forward"] > 0
        assert parts["communication"] > 0
        assert parts["step"] == pytest.approx(sum(parts[name] for name in (*PARTS, "rest")))
        trace = json.loads(gzip.decompress((folder / f"rank_{rank}.json.gz").read_bytes()))
        names = {event.get("name") for event in trace["traceEvents"]}
        assert {"step 4", "step 6", "forward", "backward", "optimizer"} <= names
        assert "step 7" not in names


def words_at_the_end(steps: tuple[int, int], run: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Of a start that trained none of these steps."""
    log.addHandler(caplog.handler)
    try:
        StepProfile(ProfileConfig(steps=steps), alone(), run).finish()
    finally:
        log.removeHandler(caplog.handler)
    return caplog.text


def test_steps_that_never_came_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile" / "steps_20_25").mkdir(parents=True)
    said = words_at_the_end((90, 91), tmp_path, caplog)
    assert "profile.steps [90, 91]: none of them was trained" in said


@pytest.mark.parametrize("profiled", ["steps_4_6", "steps_4_4", "steps_6_6", "steps_1_9"])
def test_steps_profiled_before_a_restart_or_a_rollback_are_not_said_to_be_missing(
    profiled: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile" / profiled).mkdir(parents=True)
    assert words_at_the_end((4, 6), tmp_path, caplog) == ""


def alone() -> Ranks:
    group = None  # nothing is asked of others
    return Ranks(World(0, 1, 0, "127.0.0.1", 0, "test"), torch.device("cpu"), group)  # type: ignore[arg-type]

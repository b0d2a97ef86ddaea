"""Training over bad samples: the same losses on any ranks and after a stop, a count in the journal, an end in time."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from ranks import Ranks, launch, on_ranks
from test_bad_input import fails, write
from test_resume import config, journal, train

from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.config import Config
from pretrain.data.quarantine import BadSample
from pretrain.data.scan import index_folder

BAD = 14
"""Bad training samples of 485: more than the floor of ten, fewer than the share of 0.05 allows."""


@pytest.fixture(scope="session")
def spoilt(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with the pictures of `BAD` training samples replaced by what a web server says of a missing page."""
    out = tmp_path_factory.mktemp("spoilt")
    for split in ("train", "val"):
        left = BAD if split == "train" else 0
        for tar in sorted((digits / split).glob("*.tar")):
            (out / split).mkdir(exist_ok=True)
            left -= _copy(tar, out / split / tar.name, min(left, 5))
        index_folder(out / split)
    return out


def _copy(source: Path, target: Path, count: int) -> int:
    """Copy a tar, spoiling every seventh picture until `count` are; returns how many were."""
    spoiled = number = 0
    with tarfile.open(source) as old, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            content = file.read()
            if member.name.endswith(".png"):
                number += 1
                if spoiled < count and number % 7 == 0:
                    content, spoiled = b"<html>404 Not Found</html>", spoiled + 1
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return spoiled


def settings(run: Path, shards: Path, share: float = 0.05, steps: int = 33) -> Config:
    """33 steps of 22 are one epoch and a half."""
    return config(
        run,
        shards,
        data={
            "train": {"shards": str(shards / "train")},
            "val": {"shards": str(shards / "val")},
            "max_bad_share": share,
        },
        train={
            "global_batch": 22,
            "micro_batch": 6,
            "total_steps": steps,
            "log_every_steps": 1,
            "eval_every_steps": None,
        },
    )


def counts(run: Path) -> list[float]:
    """`data/bad_samples` at each step."""
    values = {step: value for (name, step), value in journal(run).items() if name == "data/bad_samples"}
    return [values[step] for step in sorted(values)]


def test_losses_and_counts_are_the_same_on_other_ranks_and_after_stops(spoilt: Path, tmp_path: Path) -> None:
    whole, moved = settings(tmp_path / "whole", spoilt), settings(tmp_path / "moved", spoilt)
    on_ranks(2, train, whole)
    for world, stop_after in ((1, 9), (3, 10**9)):
        on_ranks(world, train, moved, stop_after)
    expected, got = journal(tmp_path / "whole"), journal(tmp_path / "moved")
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-5), key
    series = counts(tmp_path / "whole")
    assert len(series) == 33
    assert series == sorted(series)
    assert 0 < series[8] < series[-1] == BAD  # each once, although half of them come again
    assert read_manifest(checkpoints(tmp_path / "moved")[-1]).progress["bad_samples"] == BAD
    assert report(tmp_path / "moved") == report(tmp_path / "whole")
    assert len(report(tmp_path / "whole")) == BAD
    assert all("not decodable" in str(line["reason"]) for line in report(tmp_path / "whole"))


def report(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


def test_past_the_budget_all_ranks_stop_behind_a_checkpoint_and_go_on_with_a_wider_one(
    spoilt: Path, tmp_path: Path
) -> None:
    path = write(settings(tmp_path / "run", spoilt, share=1e-4), tmp_path)
    error = fails(2, tmp_path, path, code=3)
    assert "data.max_bad_share 0.0001 allows 10" in error
    assert "quarantine.jsonl names each with its reason" in error
    assert len(report(tmp_path / "run")) > 10
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    assert 0 < status["step"] < 33
    again = fails(1, tmp_path, path, code=3)
    assert "data.max_bad_share 0.0001 allows 10" in again
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == status["step"]
    assert [code for code, _ in launch(1, tmp_path, path, "data.max_bad_share=0.1")] == [0]
    assert counts(tmp_path / "run")[-1] == BAD


def test_a_report_too_large_for_mlflow_stays_in_the_run_directory(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    with (run / "logs" / "quarantine.rank_0.jsonl").open("w") as file:  # of an earlier attempt
        for number in range(9000):
            bad = BadSample("shard.tar", number, "key", "x" * 2000, 1, number, 0)
            file.write(json.dumps(bad._asdict()) + "\n")
    ((code, words),) = launch(1, tmp_path, write(settings(run, digits, steps=2), tmp_path))
    assert code == 0, words
    assert "and is not sent to MLflow" in words
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["status"] == "FINISHED"
    assert len(report(run)) == 9000


def evaluated(ranks: Ranks, cfg: Config) -> str:
    try:
        train(ranks, cfg)
    except Exception as error:
        return str(error)
    return ""


def test_a_bad_validation_sample_is_named_and_nothing_is_reported_without_it(
    spoilt: Path, tmp_path: Path
) -> None:
    cfg = settings(tmp_path / "run", spoilt, steps=2)
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"val": cfg.data.train})})
    [words] = on_ranks(1, evaluated, cfg)
    assert "not decodable" in words
    assert "Nothing stands in for a bad sample in an evaluation" in words
    assert not any(name.startswith("val/") for name, _ in journal(tmp_path / "run"))

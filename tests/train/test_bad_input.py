"""What goes wrong at a user's desk: one clear message, a non-zero exit on every rank, nothing lost, nobody hanging."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import launch
from test_resume import config

from pretrain.checkpoint import checkpoints
from pretrain.config import Config, dump


@pytest.fixture
def shards(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits that a test may damage."""
    return Path(shutil.copytree(digits, tmp_path / "shards"))


def write(cfg: Config, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(dump(cfg))
    return str(path)


def fails(
    world_size: int,
    folder: Path,
    *arguments: str,
    code: int | None,
    before: Callable[[int], None] | None = None,
) -> str:
    """Launch, see that every rank exits non-zero and only rank 0 speaks; returns rank 0's words."""
    (main, words), *others = launch(world_size, folder, *arguments, before=before)
    assert main != 0 if code is None else main == code, words
    assert "Traceback" not in words
    for exit_code, text in others:
        assert exit_code != 0
        assert "Error" not in text
    error = words[words.index("Error: ") :]
    assert len(error.splitlines()) <= 20, "an error fits a screen"
    return error


TEN_MISTAKES = """\
run: {dir: no, sed: 1}
data:
  train: {shard: data/train}
  augment: {crop: none}
model: {size: XL, img_size: 224, patch_size: [16, 16], num_classes: ten}
optim: {lr: -1e-3, warmup_steps: 2.5}
train: {global_batch: 0}
"""


def test_ten_mistakes_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(TEN_MISTAKES)
    error = fails(2, tmp_path, str(path), code=2)
    for line, key in ((1, "run.dir"), (1, "run.sed"), (3, "data.train.shard"),
                      (4, "data.augment.crop"), (5, "model.size"), (5, "model.img_size"), (5, "model.num_classes"),
                      (6, "optim.lr"), (6, "optim.warmup_steps"), (7, "train.global_batch")):  # fmt: skip
        assert f"bad.yaml:{line}: {key}" in error
    assert "did you mean seed?" in error


def note_what_is_there_when_it_leaves(run: Path, rank: int) -> None:
    """When a rank leaves the others, they begin to look for its words."""
    leave = dist.destroy_process_group

    def noted() -> None:
        (run / f"left_{rank}").write_text(f"{(run / 'logs' / f'rank_{rank}.failure').is_file()}")
        leave()

    dist.destroy_process_group = noted


def test_missing_shard(shards: Path, tmp_path: Path) -> None:
    (shards / "train" / "train-000001.tar").unlink()
    run = tmp_path / "run"
    noted = partial(note_what_is_there_when_it_leaves, run)
    error = fails(2, tmp_path, write(config(run, shards), tmp_path), code=3, before=noted)
    assert "train-000001.tar" in error
    assert "pretrain shards index" in error
    assert (run / "left_0").read_text() == "True"


def test_index_of_another_tar(shards: Path, tmp_path: Path) -> None:
    shutil.copy(shards / "train" / "train-000001.tar.idx", shards / "train" / "train-000000.tar.idx")
    error = fails(2, tmp_path, write(config(tmp_path / "run", shards), tmp_path), code=3)
    assert "train-000000.tar.idx" in error


def test_label_out_of_range(shards: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", shards, model={"in_chans": 1, "num_classes": 9})
    error = fails(2, tmp_path, write(cfg, tmp_path), code=3)
    assert "labels go up to 9" in error
    assert "model.num_classes is 9" in error


def test_damaged_bytes_met_in_the_middle_of_training_stop_every_rank(shards: Path, tmp_path: Path) -> None:
    tar = shards / "train" / "train-000002.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    cfg = config(
        tmp_path / "run", shards, train={"total_steps": 40}, checkpoint={"every_steps": 1, "keep": 40}
    )
    error = fails(2, tmp_path, write(cfg, tmp_path), code=None)  # 3 if rank 0 met them, else 6
    assert "train-000002.tar" in error
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    assert status["step"] == len(checkpoints(tmp_path / "run")) > 0


def test_global_batch_smaller_than_the_world(shards: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", shards, train={"global_batch": 1, "micro_batch": 1})
    error = fails(2, tmp_path, write(cfg, tmp_path), code=2)
    assert "train.global_batch 1 is smaller than the world of 2 ranks" in error


def test_unwritable_run_directory(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = fails(2, tmp_path, write(config(tmp_path / "file" / "run", shards), tmp_path), code=5)
    assert "cannot write in the run directory" in error


def test_run_directory_in_use(shards: Path, tmp_path: Path) -> None:
    from pretrain.tracking import Journal

    (tmp_path / "run").mkdir()
    journal = Journal.open(tmp_path / "run", experiment="e", name="n")
    error = fails(2, tmp_path, write(config(tmp_path / "run", shards), tmp_path), code=5)
    assert "another process is writing" in error
    assert str(tmp_path / "run") in error
    journal.close("KILLED")


def test_checkpoint_cut_in_half_falls_back_and_a_run_without_a_whole_one_keeps_its_files(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    path = write(config(run, shards, checkpoint={"every_steps": 4}), tmp_path)
    assert [code for code, _ in launch(2, tmp_path, path, "train.total_steps=8")] == [0, 0]
    older, newest = checkpoints(run)
    os.truncate(newest / "rank_00000.safetensors", 1000)
    (code, words), _ = launch(2, tmp_path, path, "train.total_steps=8")
    assert code == 0
    assert "damaged checkpoint passed over" in words
    assert f"resuming at step {int(older.name.removeprefix('step_'))}" in words
    for folder in checkpoints(run):
        os.truncate(folder / "rank_00001.safetensors", 1000)
    before = sorted(checkpoints(run))
    error = fails(2, tmp_path, path, "train.total_steps=8", code=4)
    assert "none of the run's checkpoints can be loaded" in error
    assert sorted(checkpoints(run)) == before


def test_a_changed_setting_is_refused_unless_told(shards: Path, tmp_path: Path) -> None:
    path = write(config(tmp_path / "run", shards), tmp_path)
    assert launch(1, tmp_path, path, "train.total_steps=4")[0][0] == 0
    error = fails(1, tmp_path, path, "train.total_steps=6", "optim.lr=0.5", code=2)
    assert "optim.lr: 0.01 -> 0.5" in error
    assert "--allow-change" in error
    told = ("train.total_steps=6", "optim.lr=0.5", "--allow-change", "optim.lr")
    assert launch(1, tmp_path, path, *told)[0][0] == 0
    error = fails(1, tmp_path, path, "run.seed=3", "--allow-change", "run.seed", code=2)
    assert "run.seed: 0 -> 3" in error
    error = fails(1, tmp_path, path, "--allow-change", "optim.rl", code=2)
    assert "--allow-change optim.rl: there is no such key; did you mean optim.lr?" in error
    (tmp_path / "run" / "config.yaml").unlink()  # the checkpoint says what it was trained with
    error = fails(1, tmp_path, path, "optim.lr=0.1", code=2)
    assert "optim.lr: 0.5 -> 0.1" in error


def test_another_precision_than_the_run_was_trained_in_is_refused_unless_told(
    shards: Path, tmp_path: Path
) -> None:
    """Stage 0 in bf16 keeps fp32 weights, stage 1 does not: the config says the same and the plan does not."""
    path = write(config(tmp_path / "run", shards, stage=0, precision="bf16"), tmp_path)
    assert launch(1, tmp_path, path, "train.total_steps=3")[0][0] == 0
    moved = ("train.total_steps=4", "engine.zero_stage=1")
    error = fails(2, tmp_path, path, *moved, code=2)
    assert "the plan has precision bf16, the run was trained with bf16_autocast" in error
    (code, words), _ = launch(2, tmp_path, path, *moved, "--allow-change", "engine.precision")
    assert code == 0
    assert "resuming at step 3" in words
    for change in ("world_size 1 -> 2", "zero_stage 0 -> 1", "total_steps 3 -> 4"):
        assert change in words


def test_a_hand_off_that_does_not_fit_loads_nothing(shards: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    assert launch(1, tmp_path, write(config(source, shards), tmp_path), "train.total_steps=2")[0][0] == 0
    cfg = config(tmp_path / "run", shards, model={"in_chans": 1, "num_classes": 10, "depth": 3, "patch_size": (2, 2)},
                 init={"from": str(source)})  # fmt: skip
    error = fails(2, tmp_path, write(cfg, tmp_path), code=4)
    assert "depth" in error
    assert "patch_size" in error
    error = fails(2, tmp_path, write(cfg, tmp_path), f"init.from={tmp_path / 'nowhere'}", code=None)
    assert "nowhere" in error
    os.truncate(checkpoints(source)[-1] / "rank_00000.safetensors", 1000)
    error = fails(
        2, tmp_path, write(config(tmp_path / "run", shards, init={"from": str(source)}), tmp_path), code=4
    )
    assert "is damaged and was not loaded: rank_00000.safetensors has 1000 bytes" in error

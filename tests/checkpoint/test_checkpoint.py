"""Checkpoints: the same bits back at the same world and stage, the same training at another, never a damaged one."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engines import STAGES, config, losses_of, make_engine, weights
from ranks import RankError, Ranks, on_ranks
from saves import save

from pretrain.checkpoint import checkpoints
from pretrain.checkpoint.layout import (
    BEST,
    LATEST,
    MANIFEST,
    folder_of,
    point,
    pointer,
    read_manifest,
    step_of,
)
from pretrain.checkpoint.load import newest_valid, open_weights, open_weights_together
from pretrain.checkpoint.save import Content, mark_best, prune
from pretrain.config import Plan
from pretrain.engine import Engine
from pretrain.errors import CheckpointError, RunDirError

SAVED, TOTAL = 3, 7


def content(engine: Engine, plan: Plan, step: int, **metrics: float) -> Content:
    return Content(
        step=step,
        config=engine.config,
        plan=plan,
        data={"samples_seen": step * plan.global_batch},
        progress={},
        metrics=metrics,
        optimizer_steps=engine.steps_taken,
        shapes=engine.shapes,
        slices=engine.slices(),
    )


def train_and_save(ranks: Ranks, stage: int, precision: str, run: Path, optimizer: str) -> tuple[Any, ...]:
    """Train to the end without a stop, saving on the way: (losses after the save, final weights)."""
    cfg = config(stage, precision, 2, 0, optim={"name": optimizer, "layer_decay": 0.8})
    engine, plan = make_engine(cfg, ranks, run)
    losses_of(engine, plan, ranks, 0, SAVED)
    save(run, content(engine, plan, SAVED), ranks)
    losses = losses_of(engine, plan, ranks, SAVED, TOTAL)
    return losses, weights(engine), states(engine)


def load_and_train(ranks: Ranks, stage: int, precision: str, run: Path, optimizer: str) -> tuple[Any, ...]:
    cfg = config(stage, precision, 2, 0, optim={"name": optimizer, "layer_decay": 0.8})
    engine, plan = make_engine(cfg, ranks, run)
    found = newest_valid(run, ranks)
    assert found is not None
    engine.restore(found.read, found.manifest.optimizer_steps)
    assert engine.steps_taken == found.manifest.optimizer_steps
    losses = losses_of(engine, plan, ranks, found.manifest.step, TOTAL)
    return losses, weights(engine), states(engine)


def states(engine: Engine) -> dict[tuple[str, int, str], torch.Tensor]:
    return {(n, a, k): t.clone() for n, a, _, kinds in engine.slices() for k, t in kinds.items()}


def same_world(ranks: Ranks, folder: Path) -> None:
    # SGD here; AdamW in both precisions goes through whole runs in tests/train/test_resume.py
    for optimizer, precision in (("sgd", "fp32"), ("sgd", "bf16")):
        for stage in STAGES:
            run = folder / f"{optimizer}-{precision}-{stage}"
            run.mkdir(exist_ok=True)
            losses, bits, moments = train_and_save(ranks, stage, precision, run, optimizer)
            again, bits_again, moments_again = load_and_train(ranks, stage, precision, run, optimizer)
            assert again == losses, (optimizer, precision, stage)
            for before, after in ((bits, bits_again), (moments, moments_again)):
                assert before.keys() == after.keys()
                for key, value in before.items():
                    assert torch.equal(value, after[key]), (optimizer, precision, stage, key)


def test_same_world_and_stage_continue_bit_for_bit(tmp_path: Path) -> None:
    on_ranks(2, same_world, tmp_path)


def save_all(ranks: Ranks, folder: Path) -> dict[int, list[float]]:
    losses = {}
    for stage in (1, 3):
        (folder / str(stage)).mkdir(exist_ok=True)
        losses[stage] = train_and_save(ranks, stage, "fp32", folder / str(stage), "adamw")[0]
    return losses


def load_all(ranks: Ranks, folder: Path, pairs: list[tuple[int, int]]) -> dict[tuple[int, int], list[float]]:
    return {
        (saved, stage): load_and_train(ranks, stage, "fp32", folder / str(saved), "adamw")[0]
        for saved, stage in pairs
    }


@pytest.mark.parametrize("world", [1, 3])
def test_another_world_or_stage_continues_with_the_same_losses(world: int, tmp_path: Path) -> None:
    expected = on_ranks(2, save_all, tmp_path)[0]
    for (saved, stage), losses in on_ranks(world, load_all, tmp_path, [(1, 1), (3, 3), (1, 0), (3, 2)])[
        0
    ].items():
        assert losses == pytest.approx(expected[saved], abs=1e-5), (
            f"stage {saved} on 2 ranks -> stage {stage} on {world}"
        )


def write_three(ranks: Ranks, run: Path) -> None:
    engine, plan = make_engine(config(1, "fp32", None, 0), ranks, run)
    for step in (1, 2, 3):
        losses_of(engine, plan, ranks, step - 1, step)
        save(run, content(engine, plan, step, **{"val/top1": step / 10}), ranks)


def which_loads(ranks: Ranks, run: Path) -> int | None:
    found = newest_valid(run, ranks)
    return None if found is None else found.manifest.step


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _unreadable(path: Path) -> None:
    """Reading it is an I/O error, as that of a bad sector."""
    path.unlink()
    path.mkdir()


def _edit_manifest(path: Path) -> None:
    document = json.loads(path.read_text())
    document["body"]["step"] += 1
    path.write_text(json.dumps(document))


DAMAGE = {
    "a rank's file cut in half": ("rank_00001.safetensors", _cut),
    "one bit flipped": ("rank_00000.safetensors", _flip),
    "a rank's file deleted": ("rank_00001.safetensors", Path.unlink),
    "a rank's file that cannot be read": ("rank_00001.safetensors", _unreadable),
    "the manifest cut in half": (MANIFEST, _cut),
    "the manifest edited": (MANIFEST, _edit_manifest),
}


def test_a_damaged_checkpoint_is_never_loaded_and_the_newest_whole_one_is(tmp_path: Path) -> None:
    on_ranks(2, write_three, tmp_path)
    newest = folder_of(tmp_path, 3)
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}
    for what, (name, damage) in DAMAGE.items():
        damage(newest / name)
        assert on_ranks(2, which_loads, tmp_path) == [2, 2], what
        with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
            open_weights(newest)
        for file, data in whole.items():
            if (newest / file).is_dir():
                (newest / file).rmdir()
            (newest / file).write_bytes(data)
    for step in (1, 2, 3):
        _cut(folder_of(tmp_path, step) / "rank_00000.safetensors")
    with pytest.raises(RankError, match="none of the run's checkpoints can be loaded"):
        on_ranks(2, which_loads, tmp_path)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert on_ranks(1, which_loads, tmp_path) == [None]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    on_ranks(1, write_three, tmp_path)
    mark_best(tmp_path, folder_of(tmp_path, 1))
    folder_of(tmp_path, 4).with_suffix(".tmp").mkdir()
    prune(tmp_path, keep=1, step=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]
    assert pointer(tmp_path, BEST) == folder_of(tmp_path, 1)
    assert not folder_of(tmp_path, 4).with_suffix(".tmp").exists()
    assert open_weights(tmp_path, "best").metrics == {"val/top1": 0.1}
    assert open_weights(tmp_path).step == 3


def fall_back_and_save(ranks: Ranks, run: Path) -> None:
    """Steps 2 and 3 are damaged: go on from step 1, but save half-way to them, at step 2, and prune to one."""
    engine, plan = make_engine(config(1, "fp32", None, 0), ranks, run)
    found = newest_valid(run, ranks)
    assert found is not None
    assert found.manifest.step == 1
    engine.restore(found.read, found.manifest.optimizer_steps)
    losses_of(engine, plan, ranks, 1, 2)
    save(run, content(engine, plan, 2), ranks)
    prune(run, keep=1, step=2)


def test_what_is_saved_after_a_fallback_is_kept_and_is_the_last(tmp_path: Path) -> None:
    on_ranks(1, write_three, tmp_path)
    for step in (2, 3):
        _cut(folder_of(tmp_path, step) / "rank_00000.safetensors")
    on_ranks(1, fall_back_and_save, tmp_path)
    assert on_ranks(1, which_loads, tmp_path) == [2]
    assert open_weights(tmp_path).step == 2


def test_a_checkpoint_that_goes_while_it_is_read_is_named(tmp_path: Path) -> None:
    """As that of a living run, which keeps only the newest ones."""
    on_ranks(1, write_three, tmp_path)
    opened = open_weights(tmp_path)
    shutil.rmtree(opened.path)
    with pytest.raises(CheckpointError, match="was deleted while it was read"):
        dict(opened.weights)


def killed_in_save(ranks: Ranks, run: Path) -> None:
    engine, plan = make_engine(config(2, "fp32", None, 0), ranks, run)
    losses_of(engine, plan, ranks, 0, 1)
    save(run, content(engine, plan, 1), ranks)
    losses_of(engine, plan, ranks, 1, 2)
    if ranks.rank == 1:
        module = __import__("pretrain.checkpoint.save", fromlist=["save_file"])
        write = module.save_file

        def half_then_die(tensors: Any, path: Path) -> None:
            write(tensors, path)
            _cut(path)
            os.kill(os.getpid(), signal.SIGKILL)

        module.save_file = half_then_die
    save(run, content(engine, plan, 2), ranks)


def test_a_kill_during_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(RankError):
        on_ranks(2, killed_in_save, tmp_path)
    assert folder_of(tmp_path, 2).with_suffix(".tmp").is_dir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]
    assert on_ranks(2, which_loads, tmp_path) == [1, 1]


def full_disk(ranks: Ranks, run: Path) -> str:
    engine, plan = make_engine(config(1, "fp32", None, 0), ranks, run)
    losses_of(engine, plan, ranks, 0, 1)
    save(run, content(engine, plan, 1), ranks)
    if ranks.rank == 1:  # a limit on the size of files stands for a full disk: writes fail half-way
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        save(run, content(engine, plan, 2), ranks)
    except RunDirError as error:
        return str(error)
    return "saved"


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_harms_nothing(tmp_path: Path) -> None:
    for words in on_ranks(2, full_disk, tmp_path):
        assert "step 2 could not be written (rank 1: " in words
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def out_of_memory(ranks: Ranks, run: Path) -> list[str]:
    engine, plan = make_engine(config(1, "fp32", None, 0), ranks, run)
    losses_of(engine, plan, ranks, 0, 1)
    save(run, content(engine, plan, 1), ranks)
    if ranks.rank == 1:
        module = __import__("pretrain.checkpoint.save", fromlist=["save_file"])

        def fail(*_: object) -> None:
            raise MemoryError("cannot allocate 4 GiB")

        module.save_file = fail
    words = []
    for gone in (False, True):
        if gone and ranks.is_main:
            assert [path.name for path in checkpoints(run)] == ["step_00000001"]
            shutil.rmtree(run)
        with pytest.raises(RunDirError) as caught:
            save(run, content(engine, plan, 2), ranks)
        words.append(str(caught.value))
    return words


def test_whatever_ends_a_writer_is_told_to_all_ranks_and_no_run_directory_is_made_anew(
    tmp_path: Path,
) -> None:
    (run := tmp_path / "run").mkdir()
    for first, gone in on_ranks(2, out_of_memory, run):
        assert "(rank 1: MemoryError: cannot allocate 4 GiB)" in first
        assert "rank 0: [Errno 2] No such file or directory" in gone
    assert not run.exists()


def test_what_cannot_be_deleted_stops_no_run_and_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ranks(1, write_three, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", _refuse)
        prune(tmp_path, 1, 3)
        assert [step_of(path) for path in checkpoints(tmp_path)][-1] == 3
        assert list((tmp_path / "checkpoints").glob("*.old"))
    prune(tmp_path, 1, 3)
    assert not list((tmp_path / "checkpoints").glob("*.old"))


def _refuse(*_: object, **__: object) -> None:
    raise OSError("Device or resource busy")


def open_while_saving(ranks: Ranks, run: Path) -> tuple[int, str]:
    """The run saves step 3 after rank 0 has looked for its last checkpoint, and before the others have."""
    hidden, newest = folder_of(run, 3).with_suffix(".tmp"), folder_of(run, 3)
    if ranks.is_main:
        newest.rename(hidden)
        point(run, LATEST, folder_of(run, 2))
    ranks.barrier()
    if not ranks.is_main:
        hidden.rename(newest)
        point(run, LATEST, newest)
    opened = open_weights_together(run, "last", ranks)
    return opened.step, opened.digest


def test_all_ranks_open_the_checkpoint_that_rank_0_chose(tmp_path: Path) -> None:
    on_ranks(1, write_three, tmp_path)
    first, second = on_ranks(2, open_while_saving, tmp_path)
    assert first == second
    assert first[1] == json.loads((folder_of(tmp_path, first[0]) / MANIFEST).read_text())["sha256"]


def test_what_is_saved_reads_back_by_name_in_one_process(tmp_path: Path) -> None:
    on_ranks(2, write_three, tmp_path)
    opened = open_weights(tmp_path)
    cfg = tiny.config()
    assert opened.model == cfg.model
    assert {name: list(opened.weights[name].shape) for name in opened.weights} == read_manifest(
        opened.path
    ).shapes
    assert len(json.dumps(read_manifest(opened.path).data)) < 1024

"""A checkpoint damaged anywhere, in any way, is never loaded, and the one before it is."""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from engines import config, losses_of, make_engine
from ranks import Ranks, on_ranks
from saves import save
from test_checkpoint import content

from pretrain.checkpoint.layout import MANIFEST, folder_of
from pretrain.checkpoint.load import newest_valid

PAGE = 4096


def write_two(ranks: Ranks, run: Path) -> None:
    engine, plan = make_engine(config(1, "fp32", None, 0), ranks, run)
    for step in (1, 2):
        losses_of(engine, plan, ranks, step - 1, step)
        save(run, content(engine, plan, step), ranks)


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def zero(path: Path, chance: random.Random) -> None:
    """A page, or as much of one as makes a difference."""
    data = bytearray(path.read_bytes())
    start = chance.randrange(0, len(data), PAGE)
    data[start : start + PAGE] = bytes(len(data[start : start + PAGE]))
    path.write_bytes(data)


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def swap(path: Path, chance: random.Random) -> None:
    """Another file of the checkpoint, or the file of that name in the one before."""
    others = [p for p in path.parent.iterdir() if p != path] + [folder_of(path.parents[2], 1) / path.name]
    shutil.copyfile(chance.choice(others), path)


DAMAGE = (cut, flip, zero, delete, swap)


def fuzz(ranks: Ranks, run: Path, seed: int, rounds: int) -> dict[str, int]:
    """Damage the newest checkpoint `rounds` times and look which one loads; counts by kind of damage."""
    chance, newest = random.Random(seed), folder_of(run, 2)
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}
    counts: Counter[str] = Counter()
    for _ in range(rounds):
        name, damage = chance.choice(sorted(whole)), chance.choice(DAMAGE)
        damage(newest / name, chance)
        counts[damage.__name__] += 1
        path = newest / name
        intact = path.is_file() and path.read_bytes() == whole[name]  # a page of zeros was zeroed
        found = newest_valid(run, ranks)
        assert found is not None
        assert found.manifest.step == (2 if intact else 1), (damage.__name__, name)
        path.write_bytes(whole[name])
    return dict(counts)


def rounds_of(run: Path, seed: int, rounds: int) -> dict[str, int]:
    on_ranks(2, write_two, run)
    assert {path.name for path in folder_of(run, 2).iterdir()} >= {MANIFEST, "rank_00001.safetensors"}
    counts: dict[str, int] = on_ranks(1, fuzz, run, seed, rounds, timeout=600)[0]
    assert set(counts) == {damage.__name__ for damage in DAMAGE}
    return counts


def test_damage_anywhere_is_detected_and_the_checkpoint_before_it_loads(tmp_path: Path) -> None:
    assert sum(rounds_of(tmp_path, seed=1, rounds=1000).values()) == 1000


@pytest.mark.slow
def test_damage_anywhere_is_detected_and_the_checkpoint_before_it_loads_long(tmp_path: Path) -> None:
    assert sum(rounds_of(tmp_path, seed=2, rounds=10_000).values()) == 10_000

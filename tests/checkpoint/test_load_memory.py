"""What a load keeps mapped is bounded, however large the files are."""

from pathlib import Path

import pytest
import torch
from engines import config, make_engine
from ranks import Ranks, on_ranks
from saves import save
from test_checkpoint import content

from pretrain.checkpoint import load
from pretrain.checkpoint.load import open_weights


def write(ranks: Ranks, run: Path) -> None:
    engine, plan = make_engine(config(1, "fp32", None, 0), ranks, run)
    save(run, content(engine, plan, 1), ranks)


def mapped(path: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]


def test_files_are_let_go_of_while_a_checkpoint_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ranks(1, write, tmp_path)
    opened = open_weights(tmp_path)
    whole = {name: opened.weights[name].clone() for name in opened.weights}
    assert mapped(opened.path)
    opened.close()
    assert not mapped(opened.path)
    monkeypatch.setattr(load, "MOST_MAPPED", 0)
    for name, value in whole.items():
        assert torch.equal(opened.weights[name], value)
        assert not mapped(opened.path)

"""A stage starts from weights of another library as it does from a run, on all ranks or on none."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from ranks import RankError, Ranks, on_ranks
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from pretrain.checkpoint import checkpoints
from pretrain.config import Config
from pretrain.export import export
from pretrain.formats.files import read_provenance
from pretrain.importing import import_
from pretrain.stage import run_stage
from pretrain.stop import StopFlag

SETTINGS = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "in_chans": 1}
SAID = ["--img-size", "8", "8", "--num-heads", "2", "--mean", "0.5", "--std", "0.5"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pretrain import` made of a timm state dict, for 8x8 images of 4x4 patches."""
    folder = tmp_path_factory.mktemp("peer")
    net = VisionTransformer(img_size=8, patch_size=4, num_classes=3, **SETTINGS)
    torch.nn.init.normal_(net.pos_embed)
    save_file(net.state_dict(), folder / "w.safetensors")
    out = folder / "imported"
    done = CliRunner().invoke(
        import_, [str(folder / "w.safetensors"), "--out", str(out), *SAID], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return out


def config(run: Path, source: Path, shards: Path, stage: int = 1) -> Config:
    """Twice the grid, other classes."""
    return tiny.config(
        run={"dir": str(run)},
        data={"train": {"shards": str(shards / "train")}, "val": {"shards": str(shards / "val")}, "decode_threads": 1},
        model={"in_chans": 1, "num_classes": 10, "img_size": (16, 8)},
        init={"from": str(source)},
        train={"global_batch": 8, "total_steps": 2},
        engine={"zero_stage": stage, "precision": "fp32"},
        tracking={"uri": None},
    )  # fmt: skip


def train(ranks: Ranks, configs: list[Config]) -> list[str]:
    ends = []
    for cfg in configs:
        run = Path(cfg.run.dir)
        (run / "logs").mkdir(parents=True, exist_ok=True)
        with ExitStack() as afterwards:
            log = run / "logs" / f"rank_{ranks.rank}.log"
            ends.append(run_stage(cfg, ranks, run, log, StopFlag(), afterwards).status)
    return ends


def test_a_stage_starts_from_an_import_and_its_export_says_so(
    digits: Path, imported: Path, tmp_path: Path
) -> None:
    configs = [config(tmp_path / f"run{stage}", imported, digits, stage) for stage in (1, 3)]
    configs.append(config(tmp_path / "next", tmp_path / "run3", digits, 3))
    assert on_ranks(2, train, configs)[0] == ["finished"] * 3
    run = tmp_path / "run3"
    handed = json.loads((run / "handoff.json").read_text())
    assert handed["checkpoint"] == str(imported)
    rows = {row["name"]: row for row in handed["weights"]}
    assert rows["pos_embed"]["detail"] == "2x2 -> 4x2 bicubic_antialias"
    last = tmp_path / "next"
    done = CliRunner().invoke(export, [str(last), "--format", "timm"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = read_provenance(last / "export" / "timm")
    into_last, into_run, source = found.lineage["hand_offs"]
    assert (into_last["run"], into_run["run"]) == (str(last), str(run))
    assert into_run["sha256"] == handed["sha256"]
    assert source["lineage"]["imported_from"] == "w.safetensors"
    card = (last / "export" / "timm" / "README.md").read_text()
    assert f"## Hand-off into {run}" in card
    assert "2x2 -> 4x2 bicubic_antialias" in card
    assert "| imported_from | w.safetensors |" in card
    assert found.class_names == tuple("0123456789")


def test_a_damaged_import_stops_all_ranks_before_the_first_step(
    digits: Path, imported: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in imported.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (source / "model.safetensors").write_bytes(data)
    with pytest.raises(RankError, match="is damaged or was replaced"):
        on_ranks(2, train, [config(tmp_path / "run", source, digits)])
    assert checkpoints(tmp_path / "run") == []

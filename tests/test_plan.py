"""`pretrain plan`: the numbers of a world that is not here, and whether the model states fit into its memory."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import ranks
import tiny
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pretrain.data.pack import ShardSize, open_source, pack
from pretrain.engine import Engine
from pretrain.engine.fragments import STATES
from pretrain.errors import ConfigError, DataError
from pretrain.model import num_parameters
from pretrain.plan import ModelStates, model_states, plan

CONFIG = """\
run: {{dir: {folder}/run}}
data: {{train: {{shards: {folder}/shards/train}}, val: {{shards: {folder}/shards/val}}}}
model: {{size: B, img_size: [224, 224], patch_size: [16, 16], num_classes: 1000}}
optim: {{lr: 1e-3}}
train: {{global_batch: 1024, total_epochs: 300}}
engine: {{zero_stage: 1}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config beside twelve packed images of three classes."""
    folder = tmp_path_factory.mktemp("plan")
    for number in range(12):
        path = folder / "images" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), number, dtype=np.uint8)).save(path)
    pack(
        open_source(folder / "images"),
        folder / "shards",
        val_share=0.3,
        size=ShardSize(2, 2**20),
        seed=0,
        overwrite=False,
    )
    path = folder / "x.yaml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(plan, [str(argument) for argument in arguments])


def test_the_plan_is_of_the_world_that_was_asked_for(config: Path) -> None:
    done = run(config, "--nodes", "4", "--gpus-per-node", "8")
    assert done.exit_code == 0, done.output
    for pattern in (
        r"device .* 32 x GPU",
        r"global batch .* 1,024 samples",
        r"per rank .* 32 ",
        r"precision .* bf16 ",
        r"parameters .* 86,567,656 ",
        # 2, 4 and 12 / 32 bytes for each of the parameters
        r"0\.173 GB weights \+ 0\.346 GB gradients \+ 0\.0325 GB optimizer = 0\.552 GB",
    ):
        assert re.search(pattern, done.output), (pattern, done.output)


def test_without_a_world_the_plan_is_of_one_rank_on_this_machine(config: Path) -> None:
    done = run(config)
    assert done.exit_code == 0, done.output
    assert re.search(r"device .* 1 x ", done.output)


def test_overrides_reach_the_plan(config: Path) -> None:
    done = run(config, "train.global_batch=96", "--world-size", "5")
    assert re.search(r"per rank .* 19 to 20 \(uneven", done.output)


def test_model_states_that_fit_say_what_is_left(config: Path) -> None:
    done = run(config, "--gpus-per-node", "8", "--gpu-memory", "80")
    assert done.exit_code == 0
    assert "The model states take 0.8% of 80 GB; 79.4 GB are left" in done.output


def test_model_states_that_do_not_fit_are_an_error_that_says_what_would_do(config: Path) -> None:
    done = run(config, "--gpus-per-node", "8", "--gpu-memory", "0.5")
    assert isinstance(done.exception, ConfigError)
    assert "need 0.649 GB on each rank; --gpu-memory is 0.5 GB" in str(done.exception)
    assert "engine.zero_stage=3, where they need 0.195 GB" in str(done.exception)
    done = run(config, "engine.zero_stage=3", "--gpus-per-node", "8", "--gpu-memory", "0.1")
    assert "Use more ranks, or a smaller model" in str(done.exception)


@pytest.mark.parametrize("world", [["--nodes", "2"], ["--world-size", "2", "--gpus-per-node", "8"]])
def test_a_world_stated_by_halves_or_twice_is_refused(config: Path, world: list[str]) -> None:
    assert run(config, *world).exit_code == 2


def test_bad_data_and_bad_settings_are_errors_of_the_plan_already(config: Path) -> None:
    assert isinstance(run(config, "data.val.shards=/nowhere").exception, DataError)
    assert isinstance(run(config, "model.num_classes=2").exception, DataError)
    assert isinstance(run(config, "--world-size", "2000").exception, ConfigError)


CASES = [(0, "fp32", "adamw"), (1, "bf16", "adamw"), (2, "fp32", "sgd"), (3, "bf16", "adamw")]


def _held(
    ranks_: ranks.Ranks, stage: int, precision: str, optimizer: str, folder: str
) -> tuple[ModelStates, ModelStates]:
    """The estimate, and the bytes that the real engine holds on this rank; gradients are gone between steps."""
    cfg = tiny.config(
        engine={"zero_stage": stage, "precision": precision}, optim={"name": optimizer, "lr": 1e-3}
    )
    pln = tiny.plan(cfg, ranks_.size)
    engine = Engine(cfg, pln, ranks_, Path(folder) / f"rank_{ranks_.rank}.log")
    engine.write({name: torch.zeros(shape) for name, shape in engine.shapes.items()})
    engine.step(tiny.micro_batches(cfg, pln, 0, ranks_.rank), lr=1e-3)
    weights = sum(getattr(p, "ds_tensor", p).nbytes for p in engine._engine.module.parameters())
    flats = {id(part.flat): part.flat for part in engine._held}.values()
    moments = sum(engine._optimizer.state[flat][kind].nbytes for flat in flats for kind in STATES[optimizer])
    masters = sum(flat.nbytes for flat in flats) if stage > 0 else 0
    return model_states(num_parameters(cfg.model), pln), ModelStates(weights, 0, masters + moments)


def _all_held(ranks_: ranks.Ranks, folder: str) -> list[tuple[ModelStates, ModelStates]]:
    return [_held(ranks_, *case, folder) for case in CASES]


def test_the_estimate_is_what_the_engine_holds(tmp_path: Path) -> None:
    for of_one_rank in ranks.on_ranks(2, _all_held, str(tmp_path)):
        for case, (estimate, held) in zip(CASES, of_one_rank, strict=True):
            # Shares are padded so that they come out even; on a model this small that shows.
            assert held.weights == pytest.approx(estimate.weights, rel=0.02), case
            assert held.optimizer == pytest.approx(estimate.optimizer, rel=0.02), case


def test_each_zero_stage_shares_out_more() -> None:
    cfg = tiny.config(engine={"precision": "bf16", "zero_stage": 1})
    one = tiny.plan(cfg, 8)
    stages = [model_states(8000, dataclasses.replace(one, zero_stage=stage)) for stage in (1, 2, 3)]
    assert stages == [
        ModelStates(16_000, 32_000, 12_000),
        ModelStates(16_000, 4_000, 12_000),
        ModelStates(2_000, 4_000, 12_000),
    ]

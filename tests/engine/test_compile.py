"""`engine.compile` changes how a step is computed and not what."""

from pathlib import Path

import pytest
from engines import config, losses_of, make_engine
from ranks import Ranks, on_ranks

CHANCE = {"drop_path_rate": 0.2, "dropout_rate": 0.2, "depth": 3}
POSITIONS = {
    "rotary": {"pos_embed": "rope_2d"},
    "relative": {"pos_embed": "relative", "pos_embed_at": "every_layer"},
}


def eager_and_compiled(
    ranks: Ranks, folder: Path, model: dict[str, object]
) -> list[tuple[list[float], list[float]]]:
    results = []
    for stage, precision, every in ((0, "fp32", 0), (1, "fp32", 2)):
        pair = []
        for compiled in (False, True):
            cfg = config(stage, precision, 4, every, model=model)
            cfg = cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"compile": compiled})})
            engine, plan = make_engine(cfg, ranks, folder)
            losses = losses_of(engine, plan, ranks, 0, 3)
            pair.append(losses)
        results.append((pair[0], pair[1]))
    return results


@pytest.mark.parametrize("position", POSITIONS)
def test_compiled_blocks_train_as_eager_ones_do(position: str, tmp_path: Path) -> None:
    for eager, compiled in on_ranks(
        1, eager_and_compiled, tmp_path, CHANCE | POSITIONS[position], timeout=240
    )[0]:
        assert compiled == pytest.approx(eager, abs=1e-5)

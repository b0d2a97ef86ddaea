"""`engine.compile` changes how a step is computed and not what."""

from pathlib import Path
from typing import Any

import pytest
from engines import config, losses_of, make_engine
from ranks import Ranks, on_ranks

from pretrain.engine.engine import _require_compiler
from pretrain.errors import ConfigError

CHANCE = {"drop_path_rate": 0.2, "dropout_rate": 0.2}
MODELS = {
    "plain": CHANCE,
    "rotary": CHANCE | {"pos_embed": "rope_2d", "act": "swiglu", "qk_norm": True},
    "relative": CHANCE | {"pos_embed": "relative", "pos_embed_at": "every_layer", "layer_scale": 0.1},
    "tables": CHANCE | {"pos_embed": "learned_2d", "pos_embed_at": "every_layer_shared", "num_registers": 1},
}


def eager_and_compiled(
    ranks: Ranks, folder: Path, model: dict[str, Any], stage: int, every: int
) -> list[list[float]]:
    results = []
    for compiled in (False, True):
        cfg = config(stage, "fp32", 4, every, model=model)
        cfg = cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"compile": compiled})})
        engine, plan = make_engine(cfg, ranks, folder)
        results.append(losses_of(engine, plan, ranks, 0, 3))
    return results


def test_compiled_blocks_train_as_eager_ones_do(tmp_path: Path) -> None:
    """Dropout and drop path included, one of the two blocks recomputed."""
    eager, compiled = on_ranks(1, eager_and_compiled, tmp_path, CHANCE, 1, 2)[0]
    assert compiled == pytest.approx(eager, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_every_position_and_stage_compiles(model: str, stage: int, tmp_path: Path) -> None:
    eager, compiled = on_ranks(1, eager_and_compiled, tmp_path, MODELS[model], stage, 1)[0]
    assert compiled == pytest.approx(eager, abs=1e-5)


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-here")
    with pytest.raises(ConfigError, match="no a-compiler-that-is-not-here here: install one"):
        _require_compiler()

"""Position embeddings before and after the hand-off: the figures of `pretrain show`, of the page's own runs."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.studies.questions import BASE, directory

SIMILARITY = "position_similarity.png"


def hand_off_figures(folder: Path, out: Path) -> list[Path]:
    """Draw the similarity of position embeddings of the runs in `folder`, first seed: pretrained, right after each kind of
    hand-off, after fine-tuning. Returns the files written to `out`."""
    from pretrain.checkpoint.load import open_weights
    from pretrain.transfer import transfer

    base = open_weights(directory(folder, BASE, 0))
    drawn = [_draw(base.model, base.weights, "pretrained, 7x7 patches", out / "pretrained.png")]
    for name in ("resize, bicubic_antialias", "reset"):
        tuned = open_weights(directory(folder, f"handoff/{name}", 0))
        init = tuned.config.init
        assert init is not None
        handed = transfer(base.weights, base.model, tuned.model, init, tuned.config.run.seed).weights
        stem = name.partition(",")[0]
        drawn.append(_draw(tuned.model, handed, f"{stem}, nothing learnt yet", out / f"{stem}-before.png"))
        drawn.append(_draw(tuned.model, tuned.weights, f"{stem}, fine-tuned", out / f"{stem}-after.png"))
    return drawn


def _draw(model: ModelConfig, weights: Mapping[str, Tensor], title: str, path: Path) -> Path:
    from pretrain.figures import draw, look, needed_weights

    seen = look(model, {name: weights[name] for name in needed_weights(model)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as aside:
        draw(seen, title, Path(aside))
        shutil.copyfile(Path(aside) / SIMILARITY, path)
    return path

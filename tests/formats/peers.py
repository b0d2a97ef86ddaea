"""Models of ours and of our peers with random weights, for every way in and out. Nothing is fetched."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import vits
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.formats.files import About
from pretrain.formats.write import Exported, write_export

ABOUT = About({"run": "runs/a", "step": 7, "metrics": {"val/top1": 0.5}})
SQUARE = {"img_size": (16, 16), "patch_size": (4, 4)}
WIDE = {"img_size": (8, 24), "patch_size": (4, 2)}


def model(**changes: Any) -> ModelConfig:
    """Small, with nothing that could be taken for something else: 2 heads of 16, an MLP of no round ratio."""
    settings = {
        "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 51, "num_classes": 5, "act": "gelu_tanh", **SQUARE,
    }  # fmt: skip
    return vits.tiny(**settings | changes)


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Every parameter matters to the logits: no zero head, no unit norm; branches of the size that training gives."""
    return {name: _as_trained(name, value) for name, value in vits.random_weights(config, std=0.25).items()}


def _as_trained(name: str, value: Tensor) -> Tensor:
    """Wide layers have smaller weights, and a wide norm, about one, does not mute its branch."""
    if max(value.shape) <= 128:
        return value
    return value / 5 + (value.ndim == 1 and name.endswith("weight"))


def photographs(config: ModelConfig, count: int = 4) -> Tensor:
    """uint8 [count, H, W, C]: parts of scikit-learn's two photographs at the model's size."""
    height, width = config.img_size
    parts = []
    for number in range(count):
        picture = Image.fromarray(load_sample_images().images[number % 2])
        side = 180 + 20 * number
        box = (20 * number, 10 * number, 20 * number + side, 10 * number + side)
        picture = picture.convert("L" if config.in_chans == 1 else "RGB").resize((width, height), box=box)
        parts.append(np.asarray(picture).reshape(height, width, config.in_chans))
    return torch.from_numpy(np.stack(parts))


def write(out: Path, form: str, config: ModelConfig, about: About = ABOUT, **options: Any) -> Exported:
    options.setdefault("images", photographs(config))
    return write_export(random_weights(config), config, about, out, form, **options)


@torch.no_grad()
def randomise(net: torch.nn.Module) -> torch.nn.Module:
    """A peer's network with weights that all matter."""
    generator = torch.Generator().manual_seed(3)
    for value in net.parameters():
        value.copy_(
            torch.randn(value.shape, generator=generator) * (0.05 if max(value.shape) > 128 else 0.25)
        )
    return net.eval()

"""Real images in real shards: scikit-learn's digits as PNGs, packed by our own command."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_digits

from pretrain.shards import shards


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/ shards of 8x8 greyscale digits: 600 images, ten classes."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for number, (image, label) in enumerate(zip(data.images[:600], data.target, strict=False)):
        path = folder / "images" / f"{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).save(path)
    packed = CliRunner().invoke(
        shards,
        ["pack", str(folder / "images"), str(folder / "shards"), "--val-share", "0.2", "--shards", "3"],
    )
    assert packed.exit_code == 0, packed.output
    return folder / "shards"

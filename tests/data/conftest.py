"""A small data set of real images, scikit-learn's digits, as a folder and as shards."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pretrain.data import Dataset, open_dataset
from pretrain.data.pack import ShardSize, open_source, pack


@pytest.fixture(scope="session")
def digits_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 handwritten digits as `label/number.png`."""
    folder = tmp_path_factory.mktemp("digits") / "images"
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:300], digits.target[:300], strict=True)):
        path = folder / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def digits(digits_source: Path) -> Path:
    """The digits as shards: train in 5, val in 5, about one fifth of them."""
    out = digits_source.parent / "shards"
    pack(open_source(digits_source), out, val_share=0.2, size=ShardSize(5, 0), seed=0)
    return out


@pytest.fixture(scope="session")
def train_set(digits: Path) -> Dataset:
    return open_dataset(str(digits / "train"))


@pytest.fixture(scope="session")
def val_set(digits: Path) -> Dataset:
    return open_dataset(str(digits / "val"))


@pytest.fixture
def copied(digits: Path, tmp_path: Path) -> Callable[[], Path]:
    """A copy of the training shards that a test may damage."""

    def copy() -> Path:
        folder = tmp_path / "train"
        folder.mkdir()
        for file in (digits / "train").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return copy

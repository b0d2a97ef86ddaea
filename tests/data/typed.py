"""`pretrain shards` as it is typed, and what it wrote."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from made import picture

from pretrain.data import open_dataset
from pretrain.data.read import LocalReader
from pretrain.errors import DataError
from pretrain.shards import shards


def run(*arguments: object) -> Result:
    return CliRunner().invoke(shards, [str(a) for a in arguments])


def done(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(match: str, *arguments: object) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, DataError), (result.output, result.exception)
    with pytest.raises(DataError, match=match):
        raise result.exception


def contents(folder: Path) -> dict[str, str]:
    """sha256 of each file by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def samples(folder: Path) -> list[tuple[str, bytes, int]]:
    """(key, image file, label) of each, as training reads them."""
    dataset = open_dataset(str(folder))
    reader = LocalReader(dataset, 100)
    return [(s.key, bytes(s.image), s.label) for s in reader.read(*dataset.locate(np.arange(len(dataset))))]


def image_folder(root: Path, per_class: int = 6, names: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    for label, name in enumerate(names):
        for i in range(per_class):
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(100 * label + i, 6, 6))
    return root

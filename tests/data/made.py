"""Makes what the data tests need: pictures, tars, a config resolved for a data set. And looks at what they leave open."""

import io
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.config import Config, Plan, resolve
from pretrain.config.plan import Hardware
from pretrain.data import Dataset, facts

Member = tuple[str, bytes]


def picture(seed: int, height: int = 24, width: int = 32, kind: str = "PNG", **options: object) -> bytes:
    """A smooth coloured picture as the bytes of a file."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(coarse).resize((width, height)).save(file, kind, **options)
        return file.getvalue()


def sample_members(key: str, label: object, image: bytes | None = None) -> list[Member]:
    return [(f"{key}.cls", str(label).encode()), (f"{key}.png", image or picture(len(key)))]


def write_tar(
    path: Path, members: Iterable[Member | tarfile.TarInfo], form: int = tarfile.USTAR_FORMAT
) -> Path:
    """A tar by Python's own writer: (name, content) are files, a `TarInfo` is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


@dataclass(frozen=True)
class Setting:
    """A config on a data set, resolved for a world."""

    config: Config
    plan: Plan


def setting(dataset: Dataset, world_size: int = 1, val: Dataset | None = None, **data: object) -> Setting:
    """`batch`, `micro_batch`, `img_size`, `in_chans`, `num_classes` are settings of other sections."""
    img_size = data.pop("img_size", (8, 8))
    model = {
        "size": "Ti",
        "img_size": img_size,
        "patch_size": (4, 4),
        "num_classes": data.pop("num_classes", 10),
        "in_chans": data.pop("in_chans", 1),
    }
    train = {
        "global_batch": data.pop("batch", 12),
        "total_steps": 100,
        "micro_batch": data.pop("micro_batch", None),
    }
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"train": {"shards": dataset.source}, "block_mib": 0.01, "window_blocks": 2, **data},
            "model": model,
            "optim": {"lr": 1e-3},
            "train": train,
        }
    )
    return Setting(config, resolve(config, world_size, facts(dataset, val), Hardware("cpu", "test", False)))


def open_files(folder: Path) -> list[str]:
    """Descriptors of this process that lead to a file of a folder; those of other tests' threads are not counted."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            found.append(str(descriptor.readlink()))
    return [path for path in found if path.startswith(f"{folder}/")]

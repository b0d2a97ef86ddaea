"""Reading weights of strangers: what a file may be, before anything in it is believed.

No pickle is executed (`torch.load` restricted to tensors), nothing is decompressed or allocated beyond what the file's
own size warrants, no name in an index leads out of its folder, and no code that a folder brings along is loaded.
"""

import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError
from pretrain.formats.files import AS_IT_IS, WEIGHTS, Preprocess, in_a_line, read_json
from pretrain.formats.names import complain
from pretrain.transfer.fits import wrong_weights

INDEX = f"{WEIGHTS}.index.json"
MAX_GROWTH = 16
"""How many times its size a compressed .npz may grow: trained weights hardly compress at all."""

BELOW = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where a training's file has its state dict: the first of these that there is, averaged weights first, as timm takes it."""

LARGEST = 2**20
"""No size of a network is larger; a config that says so is answered before anything is built."""

SMALL = 2**24
"""Bytes up to which nobody counts: a small file of zeros is no bomb."""

_SAFE_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Hints:
    """What a user says of a source that does not say it itself; None: not said."""

    timm_model: str | None = None
    img_size: tuple[int, int] | None = None
    num_heads: int | None = None
    act: Literal["gelu", "gelu_tanh", "relu", "elu", "silu"] | None = None
    norm_eps: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Imported:
    """A source as we say it."""

    weights: Mapping[str, Tensor]
    """By our names, float32."""

    model: ModelConfig
    has_head: bool = True
    """Whether the source has a classifier; where not, ours is all zeros."""

    preprocess: Preprocess = AS_IT_IS
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    """What was assumed or said otherwise, for people."""

    peer: Any = None
    """Whatever the module wants to remember for `judge`."""


def checked(imported: Imported, where: str) -> Imported:
    """The same, once every weight has its place, its shape and finite numbers; raises `CheckpointError`."""
    complain(where, wrong_weights(imported.weights, imported.model))
    return imported


def cannot_be_ours(source: Path, reasons: Iterable[str]) -> None:
    """Raise `CheckpointError` with all reasons why our model cannot say what the source's does, if there is one."""
    if reasons := list(reasons):
        raise CheckpointError(
            f"{source} is a model that ours cannot express; nothing was imported:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
        )


def model_config(settings: Mapping[str, Any], where: str) -> ModelConfig:
    """Our config; raises `CheckpointError` with the first reason against it."""
    for key, value in settings.items():
        if any(isinstance(v, int) and v > LARGEST for v in (value if isinstance(value, tuple) else (value,))):
            raise CheckpointError(f"{where} has {key} {value}, which is larger than any network")
    try:
        return ModelConfig.model_validate(settings)
    except ValidationError as error:
        raise CheckpointError(f"{where} describes a model that cannot be: {in_a_line(error)}") from None


def zero_head(weights: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """With a head of one class, all zeros, for a source that has none."""
    return {**weights, "head.weight": torch.zeros(1, width), "head.bias": torch.zeros(1)}


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder: model.safetensors, or the files that its index names."""
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} has no {WEIGHTS} (there is {there}); pickled weights are not read: where you trust "
            "them, save them as safetensors"
        )
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of names to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(names.values())):
        if not _SAFE_NAME.fullmatch(name):
            raise CheckpointError(f"{folder / INDEX} names {name!r}, which is no .safetensors file beside it")
        tensors |= read_safetensors(folder / name)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """float32 tensors by name; the library bounds the header and holds offsets against the size of the file."""
    _refuse_odd(path)
    try:
        return _floats(load_file(path), path)
    except (OSError, SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a safetensors file that can be read: {error}") from None


def read_pth(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """A state dict that torch saved, bare or below one of `BELOW`, and below which; tensors only, nothing is executed."""
    _refuse_odd(path)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is no file of torch.save since PyTorch 1.6; load it where you trust it, and save the state dict "
            "as safetensors"
        )
    with _zip(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise CheckpointError(f"{path} is compressed, which torch.save never does: it was not read")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler raises a dozen kinds
        words = str(error).splitlines()[0][:200]
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged; it was not loaded: {words}. If it is whole, load it where "
            "you trust it, and save the state dict alone"
        ) from None
    below = None
    if isinstance(document, dict):
        below = next((key for key in BELOW if isinstance(document.get(key), dict)), None)
        document = document if below is None else document[below]
    if not isinstance(document, dict) or not all(isinstance(v, Tensor) for v in document.values()):
        held = (
            f"; there is {', '.join(map(repr, list(document)[:8]))[:200]}"
            if isinstance(document, dict)
            else ""
        )
        raise CheckpointError(
            f"{path} holds no state dict, a mapping of names to tensors, bare or below {', '.join(BELOW)}{held}: "
            "save the one that is meant alone"
        )
    size = path.stat().st_size
    for name, value in document.items():
        if value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is no plain tensor ({value.layout}, {value.device})")
        if value.numel() * value.element_size() > min(size, value.untyped_storage().nbytes()):
            raise CheckpointError(f"{path}: {name} claims more numbers than there are in the file")
    return _floats({str(name): value for name, value in document.items()}, path), below


def read_npz(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """float32 tensors of the members whose name is `wanted`; bfloat16 that numpy stored as raw bytes is read as such."""
    _refuse_odd(path)
    tensors = {}
    with _zip(path) as archive:
        members = [info for info in archive.infolist() if wanted(info.filename.removesuffix(".npy"))]
        total = sum(info.file_size for info in members)
        if total > max(SMALL, MAX_GROWTH * path.stat().st_size):
            raise CheckpointError(
                f"{path} would grow to {total:,} bytes from {path.stat().st_size:,}: it was not read"
            )
        for info in members:
            try:
                array = _member(archive, info)
            except (
                OSError,
                ValueError,
                EOFError,
                zipfile.BadZipFile,
                NotImplementedError,
                RuntimeError,
            ) as error:
                raise CheckpointError(f"{path}: {info.filename} cannot be read: {error}") from None
            tensors[info.filename.removesuffix(".npy")] = array
    return tensors


def names_in_npz(path: Path) -> list[str]:
    """Names of the arrays of an .npz."""
    with _zip(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    """One array: its header is held against the member's size before a byte of it is allocated."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in read_header:
            raise ValueError(f"an array of version {version}")
        shape, fortran, dtype = read_header[version](file)
        if dtype.hasobject or dtype.kind not in "fV" or dtype.itemsize not in (2, 4, 8) or dtype.names:
            raise ValueError(f"an array of {dtype}, which is no weight; objects are pickles and not read")
        if min(shape, default=1) < 0 or file.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"its header claims {list(shape)} of {dtype}, its size says otherwise")
        data = bytearray(file.read())
    flat: npt.NDArray[Any] = np.frombuffer(data, dtype)
    if dtype.kind == "V":
        if dtype.itemsize != 2:
            raise ValueError(f"an array of {dtype}, which is no weight")
        value = torch.from_numpy(flat.view(np.int16)).view(torch.bfloat16).float()
    else:
        value = torch.from_numpy(flat.astype(np.float32))
    if fortran and len(shape) > 1:
        return value.reshape(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()
    return value.reshape(shape)


def _floats(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    if odd := sorted(name for name, value in tensors.items() if not value.is_floating_point()):
        raise CheckpointError(
            f"{path}: {odd[0]} is {tensors[odd[0]].dtype}; weights are floating-point numbers"
        )
    if odd := sorted(name for name, value in tensors.items() if 0 in value.shape or not value.dim()):
        raise CheckpointError(
            f"{path}: {odd[0]} has shape {list(tensors[odd[0]].shape)}, which no weight has"
        )
    return {name: value.to(torch.float32, copy=True).contiguous() for name, value in tensors.items()}


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"{path} is not an archive that can be read: {error}") from None


def _refuse_odd(path: Path) -> None:
    """Only regular files: a pipe would wait for ever."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file" if not path.exists() else f"{path} is no file")


def numbers(value: Any, count: Iterable[int], what: str) -> tuple[float, ...]:
    """A list of numbers from a config; raises `CheckpointError`."""
    if not isinstance(value, list | tuple) or len(value) not in tuple(count):
        raise CheckpointError(f"{what} is {value!r}; that is not one number for each channel")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < LARGEST for v in value):
        raise CheckpointError(f"{what} is {str(value)[:200]}; that is not one number for each channel")
    return tuple(float(v) for v in value)


def pair_of(value: Any, what: str) -> tuple[int, int]:
    """(height, width) from a config that gives one number or two; raises `CheckpointError`."""
    both = value if isinstance(value, list | tuple) else (value, value)
    if len(both) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in both):
        raise CheckpointError(f"{what} is {value!r}; that is no size in pixels")
    return both[0], both[1]

"""An ONNX file of the whole model: uint8 images [batch, H, W, C] in, normalised inside, float32 logits out."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError, ExportError
from pretrain.formats.files import CONFIG, About
from pretrain.model import build, num_parameters

HOW_TO_LOAD = "onnxruntime.InferenceSession('{folder}/model.onnx').run(['logits'], {{'images': images}})"
FILE = "model.onnx"
OPSET = 20
"""The first with Gelu; onnxruntime reads it since 1.17."""

_LARGEST_MESSAGE = 2**31 - 2**24
"""Bytes that a protobuf file may hold; larger weights go into a file beside it."""


def inexpressible(model: ModelConfig) -> Iterator[str]:
    """Nothing: the file holds the network itself."""
    yield from ()


def adapt(weights: Mapping[str, Tensor], model: ModelConfig) -> tuple[Mapping[str, Tensor], ModelConfig]:
    return weights, model


def write(folder: Path, weights: Mapping[str, Tensor], model: ModelConfig, about: About) -> None:
    _library("onnxscript")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    net = build(model, weights).eval()
    images = torch.zeros(2, *model.img_size, model.in_chans, dtype=torch.uint8)
    # Attention is taken apart while it is traced: how the fused one lays out what it gives is the machine's business.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (images,),
            folder / FILE,
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            external_data=4 * num_parameters(model) > _LARGEST_MESSAGE,
            verbose=False,
        )
    (folder / CONFIG).write_text("{}")


def load(folder: Path) -> Callable[[Tensor], Tensor]:
    runtime = _library("onnxruntime")
    try:
        session = runtime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime's own dozen kinds
        raise CheckpointError(f"{folder / FILE} cannot be loaded: {str(error)[:300]}") from None

    def answer(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        except Exception as error:
            raise CheckpointError(f"{folder / FILE} cannot be run: {str(error)[:300]}") from None

    return answer


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ExportError(
            f"{name} is not installed: pip install 'pretrain[onnx]', which brings onnx, onnxscript and onnxruntime"
        ) from None

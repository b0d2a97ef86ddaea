"""An MLflow model: the network as torch.export saves it (pt2), which is no pickle; `mlflow models serve` answers for it.

uint8 images [batch, H, W, C] in, float32 logits out, normalised inside. This is the one place besides tracking that
imports mlflow: a model is a folder, no run is touched.
"""

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.environment import variable
from pretrain.formats.files import CONFIG, About
from pretrain.model import build

HOW_TO_LOAD = "mlflow models serve -m {folder} --env-manager local"


def inexpressible(model: ModelConfig) -> Iterator[str]:
    """Nothing: the file holds the network itself."""
    yield from ()


def adapt(weights: Mapping[str, Tensor], model: ModelConfig) -> tuple[Mapping[str, Tensor], ModelConfig]:
    return weights, model


def write(folder: Path, weights: Mapping[str, Tensor], model: ModelConfig, about: About) -> None:
    with _quiet():
        import mlflow.pytorch
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        shape = (*model.img_size, model.in_chans)
        signature = ModelSignature(
            Schema([TensorSpec(np.dtype(np.uint8), (-1, *shape))]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, model.num_classes))]),
        )
        mlflow.pytorch.save_model(
            build(model, weights).eval(),
            folder / "model",  # where nothing is yet; moved up below
            serialization_format="pt2",
            input_example=np.zeros((2, *shape), np.uint8),  # one image would fix the batch at one
            signature=signature,
            pip_requirements=[f"{name}=={metadata.version(name)}" for name in ("mlflow", "torch", "numpy")],
        )
    for path in (folder / "model").iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "model")
    (folder / CONFIG).write_text("{}")


def load(folder: Path) -> Callable[[Tensor], Tensor]:
    """As a server would, with pickles forbidden."""
    with _quiet(), variable("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false"):
        import mlflow.pyfunc

        model = mlflow.pyfunc.load_model(str(folder))
    return lambda images: torch.from_numpy(np.array(model.predict(images.numpy())))


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow and torch.export speak of what is as it should be."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "torch.export", "torch._export")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

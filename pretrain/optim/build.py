"""torch's own optimizers, in their fused form."""

from collections.abc import Iterable
from typing import Any

import torch

from pretrain.config import OptimConfig
from pretrain.optim.groups import ParamGroup


def build_optimizer(groups: list[ParamGroup], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) or SGD with momentum, one kernel a group on CPU and CUDA."""
    params: list[dict[str, Any]] = [dict(group) for group in groups]
    if config.name == "sgd":
        return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(params, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Give every group of an optimizer its share of the step's learning rate. Before every update."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]

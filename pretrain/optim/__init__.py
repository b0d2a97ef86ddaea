"""How weights are moved: parameter groups, the learning rate of each step, torch's optimizers."""

from pretrain.optim.build import build_optimizer, set_lr
from pretrain.optim.groups import ParamGroup, parameter_groups
from pretrain.optim.schedule import lr_at

__all__ = ["ParamGroup", "build_optimizer", "lr_at", "parameter_groups", "set_lr"]

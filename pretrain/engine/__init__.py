"""The only room that knows DeepSpeed: build the engine from the plan, take a step, reach the fp32 masters."""

from pretrain.engine.engine import Engine, StepOutput
from pretrain.engine.fragments import Fragment

__all__ = ["Engine", "Fragment", "StepOutput"]

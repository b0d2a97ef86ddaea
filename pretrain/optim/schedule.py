"""The learning rate as a pure function of the step."""

import math

from pretrain.config import Plan


def lr_at(step: int, plan: Plan) -> float:
    """The learning rate of update number `step`, counted from 0, before any layer's own factor.

    With W warm-up steps and T steps in all:
        step < W          lr * step / W: exactly 0 at step 0, as in the paper's code and big_vision
        W <= step < T     from lr at W to min_lr at T - 1, the last step, by a half cosine or a line; or lr throughout
        T <= step         as at T - 1
    Where warm-up leaves a single step (W = T - 1) that step has lr; where it leaves none, lr is never reached.
    """
    if step < plan.warmup_steps:
        return plan.lr * step / plan.warmup_steps
    if plan.schedule == "constant":
        return plan.lr
    span = max(1, plan.total_steps - 1 - plan.warmup_steps)
    progress = min(1.0, (step - plan.warmup_steps) / span)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if plan.schedule == "cosine" else 1 - progress
    return plan.min_lr + (plan.lr - plan.min_lr) * remaining

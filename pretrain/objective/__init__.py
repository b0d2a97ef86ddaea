"""What is minimised, and what is counted."""

from pretrain.objective.classification import Correct, Objective, correct
from pretrain.objective.mix import Mix, draw_mix

__all__ = ["Correct", "Mix", "Objective", "correct", "draw_mix"]

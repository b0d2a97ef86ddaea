"""What is minimised, and what is counted."""

from pretrain.objective.classification import Correct, Objective, correct

__all__ = ["Correct", "Objective", "correct"]

"""The paper's looks into a model: position embeddings, patch filters, attention distance, attention rollout.

`numbers` are pure functions of weights and attention, `attention` listens to a forward pass, `draw` makes pictures of
what `look` found, and `during` does it all for a run in training.
"""

from pretrain.figures.attention import attention_of
from pretrain.figures.draw import draw
from pretrain.figures.look import Look, look, needed_weights

__all__ = ["Look", "attention_of", "draw", "look", "needed_weights"]

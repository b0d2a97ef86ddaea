"""The hand-off: one stage's weights made into the first weights of the next (section 3.2 of the ViT paper).

A pure function over weights and configs. What may differ between the two: the image size and with it the grid, the
patch size where `init.patch` says so, the classes, the order of prefix tokens and position embedding (PE), the kind of
PE where the change is exact or `init.position` gives the old one up, LayerScale, more registers, the tanh layer, and
the pooling where the target needs no parameter that the source lacks. Everything else stops the hand-off, with all
reasons at once, before any weight is made. docs/model.md has the table of rules.
"""

from collections.abc import Mapping

from torch import Tensor

from pretrain.config import InitConfig, ModelConfig
from pretrain.errors import CheckpointError
from pretrain.model import LazyWeights, parameter_shapes
from pretrain.transfer.fits import misfits
from pretrain.transfer.heirs import Heirs, Recipe
from pretrain.transfer.report import Row, Transfer

__all__ = ["Row", "Transfer", "transfer"]


def transfer(
    source: Mapping[str, Tensor],
    source_config: ModelConfig,
    target: ModelConfig,
    init: InitConfig,
    seed: int,
) -> Transfer:
    """Make the target's weights from `source`, by timm's names, as `source_config` describes them.

    `seed` is the target run's, for what is drawn anew. Reads every source tensor once to check it, and again when its
    heir is asked for; heirs are float32. Raises `CheckpointError` with everything that does not fit.
    """
    if problems := misfits(source, source_config, target, init):
        raise CheckpointError(
            "the weights named by init.from do not fit this model; nothing was loaded:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    heirs = Heirs(source, source_config, target, init, seed)
    recipes: dict[str, Recipe] = {}
    report: list[Row] = []
    for name, shape in parameter_shapes(target).items():
        recipes[name], rows = heirs.heir(name, shape)
        report += rows
    return Transfer(LazyWeights(recipes), (*report, *heirs.without_heir(recipes)))

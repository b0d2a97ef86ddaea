"""First weights as a pure function of (seed, parameter name, shape): the same fp32 numbers whatever the world,
the ZeRO stage, the precision and the order of construction.

The paper's own code (google-research/vision_transformer) is followed: Xavier uniform for the linear maps, LeCun
normal for the patch projection and the tanh layer, N(0, 0.02) for position tables, zeros for cls token, biases and
head. Offset embeddings of `relative` are N(0, 1): they stand beside keys, and a key is of that size at first (a normalised
token through a Xavier map). Drawn as small as a table that is added to tokens, they take hundreds of steps to be noticed.
Query, key and value are drawn as the three square maps they are: as one [3D, D] matrix, as timm does, Xavier
would see a fan of 3D and draw them a factor sqrt(2) too small. Registers are N(0, 0.02): alike they would stay alike.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model.vit import VisionTransformer

Shape = tuple[int, ...]

_TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a unit normal cut off at -2 and 2; JAX divides by it, and so do we."""


class LazyWeights(Mapping[str, Tensor]):
    """Parameters by name, each made when it is asked for and not kept: the whole model is never held twice."""

    def __init__(self, recipes: Mapping[str, Callable[[], Tensor]]) -> None:
        self._recipes = dict(recipes)

    def __getitem__(self, name: str) -> Tensor:
        return self._recipes[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)


class InitialWeights(LazyWeights):
    """The fp32 weights that a run with this config and seed starts from."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        def recipe(name: str, shape: Shape) -> Callable[[], Tensor]:
            return lambda: initial_value(name, shape, config, seed)

        super().__init__({name: recipe(name, shape) for name, shape in parameter_shapes(config).items()})


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter's name and shape in the module's order; allocates nothing. Not inside `zero.Init`."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in VisionTransformer(config).named_parameters()}


def initial_value(name: str, shape: Shape, config: ModelConfig, seed: int) -> Tensor:
    """The first value of a parameter of that model: float32 of `shape`, on the host."""
    value = torch.zeros(shape, dtype=torch.float32, device="cpu")
    generator = _generator(name, seed)
    leaf = name.rpartition(".")[2]
    if leaf.startswith(("pos_embed", "reg_token")):
        return value.normal_(std=0.02, generator=generator)
    if leaf == "rel_pos":
        return value.normal_(std=1.0, generator=generator)
    if name == "attn_pool.latent":
        return _xavier_uniform(value, 1, shape[-1], generator)
    if leaf == "gamma":
        return value.fill_(config.layer_scale or 0.0)
    if name == "head.bias":
        return value.fill_(config.head_bias)
    if name.startswith("head.") or leaf != "weight":
        return value
    if len(shape) == 1:  # LayerNorm
        return value.fill_(1.0)
    if name in ("patch_embed.proj.weight", "pre_logits.weight"):
        std = (value[0].numel() ** -0.5) / _TRUNCATED_STD
        nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)
        return value
    return _xavier_uniform(value, shape[1], shape[0] // _stacked_maps(name, config), generator)


def _stacked_maps(name: str, config: ModelConfig) -> int:
    """How many linear maps a weight matrix holds one below the other."""
    if name.endswith("mlp.fc1.weight") and config.act == "swiglu":
        return 2
    return 3 if name.endswith(".qkv.weight") else 2 if name.endswith(".kv.weight") else 1


def _xavier_uniform(value: Tensor, fan_in: int, fan_out: int, generator: torch.Generator) -> Tensor:
    bound = (6 / (fan_in + fan_out)) ** 0.5
    return value.uniform_(-bound, bound, generator=generator)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))

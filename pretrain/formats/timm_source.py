"""timm's models as sources: a folder with its config.json, or a state dict and what the user says of it.

What a model is made of is read off the network that timm itself builds from its name and arguments (on the meta device,
without memory), never guessed from a name. Where timm has a cls token that the head does not read, it is a register.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import CheckpointError
from pretrain.formats.files import CONFIG, Preprocess, per_channel, read_json
from pretrain.formats.names import complain
from pretrain.formats.source import (
    LARGEST,
    Hints,
    Imported,
    cannot_be_ours,
    checked,
    model_config,
    numbers,
    pair_of,
    read_folder,
    read_pth,
    read_safetensors,
    zero_head,
)
from pretrain.formats.timm_models import library, run
from pretrain.transfer.fits import listed

HINTS = {"timm_model", "img_size", "num_heads", "act", "norm_eps", "mean", "std"}
Tensors = dict[str, Tensor]

_ARGUMENTS = {
    "img_size": (int, list), "patch_size": (int, list), "in_chans": (int,), "num_classes": (int,), "embed_dim": (int,),
    "depth": (int,), "num_heads": (int,), "mlp_ratio": (int, float), "qkv_bias": (bool,), "proj_bias": (bool,),
    "qk_norm": (bool,), "init_values": (int, float, type(None)), "class_token": (bool,), "pos_embed": (str,),
    "no_embed_class": (bool,), "reg_tokens": (int,), "global_pool": (str,), "fc_norm": (bool, type(None)),
    "act_layer": (str,), "pre_norm": (bool,), "final_norm": (bool,), "pool_include_prefix": (bool,),
    "dynamic_img_size": (bool,), "dynamic_img_pad": (bool,), "scale_attn_norm": (bool,), "scale_mlp_norm": (bool,),
    "drop_rate": (int, float), "pos_drop_rate": (int, float), "proj_drop_rate": (int, float),
    "attn_drop_rate": (int, float), "drop_path_rate": (int, float), "weight_init": (str,),
}  # fmt: skip
"""Arguments that a config.json may give to timm's constructor: numbers and names, nothing that it would load or call."""

_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")
"""What torch.compile and DistributedDataParallel, in either order, put before every name."""


@dataclass(frozen=True)
class _Kind:
    """A model of timm's, without weights."""

    name: str | None
    """Registered; None: a plain `VisionTransformer` of these arguments."""

    arguments: dict[str, Any]
    config: dict[str, Any]
    """config.json's pretrained_cfg, where there is one."""

    def build(self, device: str) -> Any:
        timm = library()
        try:
            if self.name is None:
                from timm.models.vision_transformer import VisionTransformer

                return VisionTransformer(**self.arguments, device=device)
            if not timm.is_model(self.name):
                raise CheckpointError(f"timm {timm.__version__} has no model {self.name!r}")
            return timm.create_model(self.name, pretrained=False, device=device, **self.arguments)
        except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
            raise CheckpointError(f"timm cannot build {self.name or 'this ViT'}: {error!r}") from None


@dataclass(frozen=True)
class _Peer:
    kind: _Kind
    tensors: Tensors


def recognises(source: Path) -> bool:
    if source.is_dir():
        return (source / CONFIG).is_file() and "architecture" in read_json(source / CONFIG)
    return source.suffix in (".safetensors", ".pth", ".pt", ".bin")


def read(source: Path, hints: Hints) -> Imported:
    tensors, below = _tensors(source)
    kind = _kind(source, tensors, hints)
    net = kind.build("meta")
    cannot_be_ours(source, _inexpressible(net))
    _compare(net, tensors, str(source))
    weights = _renamed(net, tensors)
    settings = _settings(net, weights)
    own = _own(kind, net)
    mean, std = _normalisation(own, hints, settings["in_chans"])
    model = model_config({**settings, "mean": mean, "std": std}, str(source))
    has_head = "head.weight" in weights
    imported = Imported(
        weights if has_head else zero_head(weights, model.width),
        model,
        has_head,
        _preprocess(own),
        _class_names(source) if has_head else None,
        notes=tuple(_notes(kind, net, own, has_head, below)),
        peer=_Peer(kind, tensors),
    )
    return checked(imported, str(source))


def judge(source: Path, imported: Imported) -> Callable[[Tensor], Tensor]:
    net = imported.peer.kind.build("cpu").eval()
    net.load_state_dict(imported.peer.tensors)
    return lambda images: run(net, images, *per_channel(imported.model))


def _tensors(source: Path) -> tuple[Tensors, str | None]:
    """By timm's names, and below which key of the file they were."""
    if source.is_dir():
        return read_folder(source), None
    tensors, below = (read_safetensors(source), None) if source.suffix == ".safetensors" else read_pth(source)
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors, below


def _kind(source: Path, tensors: Tensors, hints: Hints) -> _Kind:
    document = read_json(source / CONFIG) if source.is_dir() else {}
    given = document.get("model_args", {})
    arguments = _vetted(given, f"{source / CONFIG}: model_args")
    if document and "num_classes" not in arguments:
        arguments["num_classes"] = document.get("num_classes", 0)
    if hints.img_size is not None:
        arguments["img_size"] = hints.img_size
    if arguments.get("depth", 0) > len(tensors):
        raise CheckpointError(
            f"{source / CONFIG} says depth {arguments['depth']}, with {len(tensors)} tensors"
        )
    config = document.get("pretrained_cfg", document)  # timm before 0.8 wrote it all on one level
    name = hints.timm_model or document.get("architecture")
    if name is not None:
        if not isinstance(name, str) or not isinstance(config, dict):
            raise CheckpointError(f"{source / CONFIG} does not describe a model of timm's")
        if not document:
            head, patch = tensors.get("head.weight"), tensors.get("patch_embed.proj.weight")
            arguments["num_classes"] = 0 if head is None else len(head)
            if patch is not None and patch.dim() == 4:
                arguments["in_chans"] = patch.shape[1]
        if hints.num_heads or hints.act or hints.norm_eps:
            raise CheckpointError("--num-heads, --act and --norm-eps are for a source that names no model")
        return _Kind(name, arguments, config)
    return _Kind(None, _from_shapes(tensors, hints, source), {})


def _vetted(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise CheckpointError(f"{where} is no JSON object")
    for key, value in given.items():
        if key not in _ARGUMENTS or not isinstance(value, _ARGUMENTS[key]):
            raise CheckpointError(f"{where} has {key}: {value!r}, which is not taken from a file")
        numbers_in = value if isinstance(value, list) else [value]
        if any(isinstance(v, int | float) and abs(v) > LARGEST for v in numbers_in):
            raise CheckpointError(f"{where} has {key}: {value!r}, which is larger than any network")
    # timm drops arguments that are None; of LayerScale it takes 0 for none as well.
    return {key: 0.0 if key == "init_values" and value is None else value for key, value in given.items()}


def _from_shapes(tensors: Tensors, hints: Hints, source: Path) -> dict[str, Any]:
    """Arguments of a bare state dict: what its shapes say, and what they cannot say by the user's word."""
    if hints.img_size is None or hints.num_heads is None:
        raise CheckpointError(
            f"{source} says neither its image size nor its heads: name timm's model with --timm-model, "
            "or give --img-size HEIGHT WIDTH and --num-heads"
        )
    patch, fc1 = tensors.get("patch_embed.proj.weight"), tensors.get("blocks.0.mlp.fc1.weight")
    head, table, registers = (tensors.get(name) for name in ("head.weight", "pos_embed", "reg_token"))
    odd_registers = registers is not None and registers.dim() != 3
    if patch is None or patch.dim() != 4 or fc1 is None or fc1.dim() != 2 or odd_registers:
        raise CheckpointError(
            f"{source} is not a ViT's state dict in timm's names: there are {listed(tensors)}"
        )
    pool = "map" if "attn_pool.latent" in tensors else "avg" if "fc_norm.weight" in tensors else "token"
    has_cls, num_registers = "cls_token" in tensors, 0 if registers is None else registers.shape[1]
    if pool == "token" and not has_cls:
        pool = "avg"
    tokens = (hints.img_size[0] // patch.shape[2]) * (hints.img_size[1] // patch.shape[3])
    return {
        "img_size": hints.img_size,
        "patch_size": tuple(patch.shape[2:]),
        "in_chans": patch.shape[1],
        "num_classes": 0 if head is None else len(head),
        "embed_dim": len(patch),
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "num_heads": hints.num_heads,
        "mlp_ratio": (len(fc1) + 0.5) / len(patch),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in tensors else None,
        "class_token": has_cls,
        "reg_tokens": num_registers,
        "pos_embed": "none" if table is None else "learn",
        "no_embed_class": table is not None and table.dim() == 3 and table.shape[1] == tokens,
        "global_pool": pool,
        "fc_norm": "fc_norm.weight" in tensors,
        "act_layer": hints.act or "gelu",
        "norm_layer": partial(nn.LayerNorm, eps=hints.norm_eps or 1e-6),
    }


def _inexpressible(net: Any) -> Iterator[str]:
    """All that our model cannot say of a network of timm's."""
    from timm.layers import AttentionPoolLatent, PatchEmbed
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(net) is not VisionTransformer:
        yield f"it is a {type(net).__name__}, not timm's plain VisionTransformer"
        return
    for name in ("norm_pre", "patch_drop"):
        if not isinstance(getattr(net, name), nn.Identity):
            yield f"{name}: there is no such layer"
    if type(net.patch_embed) is not PatchEmbed or not isinstance(net.patch_embed.norm, nn.Identity):
        yield f"patch_embed: a {type(net.patch_embed).__name__} that is more than a linear map of patches"
    if net.global_pool not in ("token", "avg", "map"):
        yield f"global_pool {net.global_pool!r}: there are token, avg and map"
    if net.global_pool == "avg" and net.pool_include_prefix and net.num_prefix_tokens:
        yield "pool_include_prefix: the mean is over patches alone"
    if isinstance(net.norm, nn.Identity) and isinstance(net.fc_norm, nn.Identity):
        yield "final_norm: there is always one"
    if net.global_pool == "map" and not isinstance(net.fc_norm, nn.Identity):
        yield "fc_norm behind attention pooling: the norm is before it"
    if net.attn_pool is not None:
        pool = net.attn_pool
        plain = type(pool) is AttentionPoolLatent and pool.latent_len == 1 and pool.pos_embed is None
        if (
            not plain
            or not isinstance(pool.q_norm, nn.Identity)
            or pool.num_heads != net.blocks[0].attn.num_heads
        ):
            yield "attn_pool: another kind than one learned query with the blocks' heads"
    for block in net.blocks:
        attn = block.attn
        if type(block) is not Block or type(attn) is not Attention:
            yield f"blocks of {type(block).__name__} and {type(attn).__name__}"
            break
        if not isinstance(attn.norm, nn.Identity) or not isinstance(block.mlp.norm, nn.Identity):
            yield "norms inside of attention or MLP"
            break
        if attn.gate is not None or attn.attn_dim != net.embed_dim:
            yield "attention that is gated, or of another width than the tokens"
            break
    if _act(net) is None:
        yield f"activation {net.blocks[0].mlp.act}"
    if len(found := {layer.eps for layer in net.modules() if isinstance(layer, nn.LayerNorm)}) != 1:
        yield f"norms with several epsilons ({', '.join(map(str, sorted(found)))}), or that are no LayerNorms"


def _act(net: Any) -> str | None:
    """Our name of the blocks' activation; None: we have none, or the pool's is another."""
    from timm.layers import GluMlp, Mlp

    mlps = [block.mlp for block in net.blocks]
    if all(type(mlp) is GluMlp and not mlp.gate_last and isinstance(mlp.act, nn.SiLU) for mlp in mlps):
        return "swiglu" if net.attn_pool is None else None
    mlps += [net.attn_pool.mlp] if net.attn_pool is not None else []
    probe = torch.linspace(-4, 4, 257)
    for name, function in _FUNCTIONS.items():
        if all(type(mlp) is Mlp and torch.equal(mlp.act(probe), function(probe)) for mlp in mlps):
            return name
    return None


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "relu": nn.functional.relu,
    "elu": nn.functional.elu,
    "silu": nn.functional.silu,
}


def _compare(net: Any, tensors: Tensors, where: str) -> None:
    """Names and shapes of the file against those of the network."""
    expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    problems = []
    if missing := expected.keys() - tensors.keys():
        problems.append(f"missing: {listed(missing)}")
    if extra := tensors.keys() - expected.keys():
        problems.append(f"not part of the model: {listed(extra)}")
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(expected[name])}"
        for name in expected.keys() & tensors.keys()
        if tuple(tensors[name].shape) != expected[name]
    ]
    complain(where, problems + ([f"of another shape: {listed(shapes)}"] if shapes else []))


def _renamed(net: Any, tensors: Tensors) -> Tensors:
    """timm's weights by our names: a cls token that nothing reads is the first register, biases that are not there are
    zeros, the last norm is called by its place."""
    weights = dict(tensors)
    if "cls_token" in weights and net.global_pool != "token":
        parts = [weights.pop("cls_token"), *([weights.pop("reg_token")] if "reg_token" in weights else [])]
        weights["reg_token"] = torch.cat(parts, dim=1)
    if net.global_pool != "avg" and "fc_norm.weight" in weights:
        weights |= {f"norm.{leaf}": weights.pop(f"fc_norm.{leaf}") for leaf in ("weight", "bias")}
    for name in [name for name in weights if name.endswith((".qkv.weight", ".kv.weight", ".q.weight"))]:
        weights.setdefault(name.replace(".weight", ".bias"), torch.zeros(len(weights[name])))
    for name in [name for name in weights if name.endswith((".proj.weight", ".fc1.weight", ".fc2.weight"))]:
        weights.setdefault(name.replace(".weight", ".bias"), torch.zeros(len(weights[name])))
    return weights


def _settings(net: Any, weights: Tensors) -> dict[str, Any]:
    block, fc1 = net.blocks[0], net.blocks[0].mlp.fc1
    act = _act(net)
    pool = net.global_pool
    if pool == "avg" and isinstance(net.fc_norm, nn.Identity):
        pool = "norm_avg"
    registers = weights.get("reg_token")
    return {
        "embed_dim": net.embed_dim,
        "depth": len(net.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_dim": fc1.out_features // (2 if act == "swiglu" else 1),
        "img_size": pair_of(tuple(net.patch_embed.img_size), "img_size"),
        "patch_size": pair_of(tuple(net.patch_embed.patch_size), "patch_size"),
        "in_chans": net.patch_embed.proj.in_channels,
        "num_classes": net.num_classes or 1,
        "global_pool": pool,
        "num_registers": 0 if registers is None else registers.shape[1],
        "pos_embed": "none" if net.pos_embed is None else "learned_1d",
        "pos_embed_order": "pe_then_cls" if net.no_embed_class else "cls_then_pe",
        "act": act,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "layer_scale": None if isinstance(block.ls1, nn.Identity) else 1e-5,
        "norm_eps": _norm_eps(net),
    }


def _norm_eps(net: Any) -> float:
    return float(next(layer.eps for layer in net.modules() if isinstance(layer, nn.LayerNorm)))


def _own(kind: _Kind, net: Any) -> dict[str, Any]:
    """What timm knows of a registered model's input, and what the folder says otherwise."""
    return {**(getattr(net, "pretrained_cfg", None) or {}), **kind.config}


def _normalisation(
    own: dict[str, Any], hints: Hints, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    given = (hints.mean or own.get("mean"), hints.std or own.get("std"))
    if None in given:
        raise CheckpointError("the source does not say how its input is normalised: give --mean and --std")
    mean, std = (
        numbers(v, (1, channels), f"--{what}, or the source's {what},")
        for v, what in zip(given, ("mean", "std"), strict=True)
    )
    return mean, std


def _preprocess(own: dict[str, Any]) -> Preprocess:
    crop, interpolation = own.get("crop_pct"), own.get("interpolation")
    return Preprocess(
        float(crop) if isinstance(crop, int | float) and 0 < crop <= 1 else 1.0,
        "bicubic" if interpolation == "bicubic" else "bilinear",
    )


def _class_names(source: Path) -> tuple[str, ...] | None:
    if not source.is_dir():
        return None
    document = read_json(source / CONFIG)
    names, count = document.get("label_names"), document.get("num_classes")
    if not isinstance(names, list) or len(names) != count or not all(isinstance(n, str) for n in names):
        return None
    return tuple(names)


def _notes(kind: _Kind, net: Any, own: dict[str, Any], has_head: bool, below: str | None) -> Iterator[str]:
    if below is not None:
        yield f"its weights are those below {below}"
    if kind.name is None:
        yield (
            f"taken, since shapes do not say it: act {_act(net)}, norm_eps {_norm_eps(net):g}, "
            f"global_pool {net.global_pool}"
        )
    if net.has_class_token and net.global_pool != "token":
        yield "its cls token, which the head does not read, is the first register"
    if net.blocks[0].attn.qkv.bias is None:
        yield "it has no bias of queries, keys and values: ours are zeros"
    if own.get("crop_mode") in ("squash", "border"):
        yield f"its crop_mode is {own['crop_mode']}; ours is center: images keep their shape, and the middle is taken"
    if not has_head:
        yield "it has no head: ours is one class of zeros"

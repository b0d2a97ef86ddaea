"""The .npz of the paper's code (google-research/vision_transformer) and of big_vision: both are read, big_vision's is
written, and timm's loader of them is the judge.

Three layouts differ in names alone: the paper's ("old"), big_vision's ("new"), and big_vision's with all blocks stacked
in one array ("scan"). All compute GELU by its tanh approximation, which is flax's default, and take pixels in [-1, 1].
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError
from pretrain.formats.adapt import as_table, renormalised
from pretrain.formats.files import CONFIG, About, per_channel, read_provenance
from pretrain.formats.names import (
    HEADS_BIAS,
    INTO_HEADS,
    MATRIX,
    OUT_OF_HEADS,
    PATCHES,
    SAME,
    Layout,
    Rule,
    restored,
    stored,
)
from pretrain.formats.source import Hints, Imported, checked, model_config, names_in_npz, read_npz, zero_head
from pretrain.formats.timm_models import library, run, settings
from pretrain.model import parameter_shapes
from pretrain.transfer.fits import listed

FILE = "model.npz"
HOW_TO_LOAD = "timm's VisionTransformer.load_pretrained('{folder}/model.npz'), or big_vision's model.load"
HINTS = {"img_size", "act", "mean", "std"}
NORM_EPS = 1e-6
"""flax's LayerNorm; a file cannot say another."""

PREFIXES = ("opt/target/", "params/img/", "params/", "")
"""Below which the weights lie: an optimizer's state, two towers, one model, or nothing else."""


def _dense(ours: str, theirs: str, kernel: Layout = MATRIX, bias: Layout = SAME) -> list[Rule]:
    return [
        Rule(f"{ours}.weight", (f"{theirs}/kernel",), kernel),
        Rule(f"{ours}.bias", (f"{theirs}/bias",), bias),
    ]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}.weight", (f"{theirs}/scale",)), Rule(f"{ours}.bias", (f"{theirs}/bias",))]


def _heads(ours: str, attention: str, parts: tuple[str, ...]) -> list[Rule]:
    """The maps of queries, keys, values, stacked as ours are."""
    kernels, biases = (tuple(f"{attention}/{part}/{leaf}" for part in parts) for leaf in ("kernel", "bias"))
    return [Rule(f"{ours}.weight", kernels, INTO_HEADS), Rule(f"{ours}.bias", biases, HEADS_BIAS)]


def rules(old: bool) -> list[Rule]:
    """Names below the prefix, of the paper's code or of big_vision."""
    attention, mlp, norm2 = (1, 3, 2) if old else (0, 0, 1)
    block, pool = "Transformer/encoderblock_{i}", "MAPHead_0"
    heads = f"{block}/MultiHeadDotProductAttention_{attention}"
    pool_heads = f"{pool}/MultiHeadDotProductAttention_0"
    return [
        *_dense("patch_embed.proj", "embedding", PATCHES),
        Rule("cls_token", ("cls",)),
        Rule("pos_embed", ("Transformer/posembed_input/pos_embedding" if old else "pos_embedding",)),
        *_norm("blocks.{i}.norm1", f"{block}/LayerNorm_0"),
        *_heads("blocks.{i}.attn.qkv", heads, ("query", "key", "value")),
        *_dense("blocks.{i}.attn.proj", f"{heads}/out", OUT_OF_HEADS),
        *_norm("blocks.{i}.norm2", f"{block}/LayerNorm_{norm2}"),
        *_dense("blocks.{i}.mlp.fc1", f"{block}/MlpBlock_{mlp}/Dense_0"),
        *_dense("blocks.{i}.mlp.fc2", f"{block}/MlpBlock_{mlp}/Dense_1"),
        *_norm("norm", "Transformer/encoder_norm"),
        Rule("attn_pool.latent", (f"{pool}/probe",)),
        *_heads("attn_pool.q", pool_heads, ("query",)),
        *_heads("attn_pool.kv", pool_heads, ("key", "value")),
        *_dense("attn_pool.proj", f"{pool_heads}/out", OUT_OF_HEADS),
        *_norm("attn_pool.norm", f"{pool}/LayerNorm_0"),
        *_dense("attn_pool.mlp.fc1", f"{pool}/MlpBlock_0/Dense_0"),
        *_dense("attn_pool.mlp.fc2", f"{pool}/MlpBlock_0/Dense_1"),
        *_dense("pre_logits", "pre_logits"),
        *_dense("head", "head"),
    ]


def inexpressible(model: ModelConfig) -> Iterator[str]:
    if model.act != "gelu_tanh":
        yield f"model.act {model.act}: big_vision's MLP has flax's GELU, which is gelu_tanh"
    if model.norm_eps != NORM_EPS:
        yield f"model.norm_eps {model.norm_eps:g}: flax's own is {NORM_EPS:g}"
    if model.global_pool == "avg":
        yield "model.global_pool avg: its gap normalises patches before their mean (norm_avg)"
    if model.pos_embed in ("relative", "rope_2d"):
        yield f"model.pos_embed {model.pos_embed}: there are only positions that are added to patches"
    elif model.pos_embed_at != "stem":
        yield f"model.pos_embed_at {model.pos_embed_at}: positions are added at the stem alone"
    if model.num_registers:
        yield f"model.num_registers {model.num_registers}: there are none"
    if model.qk_norm:
        yield "model.qk_norm: queries and keys are not normalised"


def adapt(weights: Mapping[str, Tensor], model: ModelConfig) -> tuple[Mapping[str, Tensor], ModelConfig]:
    """Positions for patches alone, LayerScale folded, and pixels in [-1, 1]."""
    weights, model = as_table(weights, model, pos_embed_order="pe_then_cls", layer_scale=None)
    return renormalised(weights, model, (0.5,), (0.5,))


def write(folder: Path, weights: Mapping[str, Tensor], model: ModelConfig, about: About) -> None:
    tensors = stored(weights, model, rules(old=False))
    np.savez(folder / FILE, **{f"params/{name}": value.numpy() for name, value in tensors.items()})  # type: ignore[arg-type]
    (folder / CONFIG).write_text("{}")


def load(folder: Path) -> Callable[[Tensor], Tensor]:
    found = read(folder / FILE, Hints(img_size=read_provenance(folder).config.img_size))
    return judge(folder / FILE, found)


@dataclass(frozen=True)
class _Layout:
    """How the names of a file are to be read."""

    prefix: str
    old: bool
    scan: bool


def recognises(source: Path) -> bool:
    return source.suffix == ".npz"


def read(source: Path, hints: Hints) -> Imported:
    layout = _layout(source)
    tensors = read_npz(source, lambda name: name.startswith(layout.prefix))
    tensors = {name.removeprefix(layout.prefix): value for name, value in tensors.items()}
    tensors = _unstacked(tensors, source) if layout.scan else tensors
    model = model_config(_described(tensors, layout, hints, source), str(source))
    has_head = "head/kernel" in tensors
    wanted = [name for name in parameter_shapes(model) if has_head or not name.startswith("head.")]
    weights = restored(tensors, wanted, model, rules(layout.old), str(source))
    imported = Imported(
        weights if has_head else zero_head(weights, model.representation_size or model.width),
        model,
        has_head,
        notes=tuple(_notes(layout, has_head, hints)),
        peer=tensors,
    )
    return checked(imported, str(source))


def judge(source: Path, imported: Imported) -> Callable[[Tensor], Tensor]:
    """timm's own reading of the very file; what timm drops, the tanh layer and the head behind it, in plain numbers."""
    library()
    from timm.models.vision_transformer import VisionTransformer

    model, tensors = imported.model, imported.peer
    whole = imported.has_head and model.representation_size is None
    net = VisionTransformer(**settings(model) | ({} if whole else {"num_classes": 0})).eval()
    with _plain(source, tensors) as file:
        net.load_pretrained(str(file))

    def answer(images: Tensor) -> Tensor:
        seen = run(net, images, *per_channel(model))
        if model.representation_size is None:
            return seen
        hidden = torch.tanh(seen @ tensors["pre_logits/kernel"] + tensors["pre_logits/bias"])
        return hidden @ tensors["head/kernel"] + tensors["head/bias"] if imported.has_head else hidden

    return answer


@contextmanager
def _plain(source: Path, tensors: Mapping[str, Tensor]) -> Iterator[Path]:
    """The file itself, or where it holds raw bfloat16, which timm reads with JAX only, one of the same in float32."""
    with np.load(source) as archive:
        raw = next(name for name in archive.files if name.endswith("embedding/kernel"))
        as_it_is = archive[raw].dtype.kind == "f"
    if as_it_is:
        yield source
        return
    old = "Transformer/posembed_input/pos_embedding" in tensors
    with tempfile.TemporaryDirectory() as aside:
        file = Path(aside) / FILE
        prefix = "" if old else "params/"
        np.savez(file, **{prefix + name: value.numpy() for name, value in tensors.items()})  # type: ignore[arg-type]
        yield file


def _layout(source: Path) -> _Layout:
    names = set(names_in_npz(source))
    for prefix in PREFIXES:
        if f"{prefix}embedding/kernel" in names:
            old = f"{prefix}Transformer/posembed_input/pos_embedding" in names
            return _Layout(prefix, old, f"{prefix}Transformer/encoderblock/LayerNorm_0/scale" in names)
    raise CheckpointError(
        f"{source} is no ViT of vision_transformer or big_vision: there is no embedding/kernel among {listed(names)}"
    )


def _unstacked(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Blocks that are stacked in one array [L, ...] as arrays of their own."""
    top = "Transformer/encoderblock/"
    stacks = {name: value for name, value in tensors.items() if name.startswith(top)}
    lengths = {len(value) if value.dim() else 0 for value in stacks.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise CheckpointError(f"{source}: the stacked blocks differ in number, or there are none")
    alone = {name: value for name, value in tensors.items() if name not in stacks}
    for name, value in stacks.items():
        for i, part in enumerate(value):
            alone[name.replace(top, f"Transformer/encoderblock_{i}/")] = part
    return alone


def _described(tensors: Mapping[str, Tensor], layout: _Layout, hints: Hints, source: Path) -> dict[str, Any]:
    """Settings of our model: shapes say all but the image size, which no square root is asked for."""
    attention, mlp = ("1", "3") if layout.old else ("0", "0")
    block = "Transformer/encoderblock_0"
    patch = _shaped(tensors, "embedding/kernel", 4, source)
    query = _shaped(tensors, f"{block}/MultiHeadDotProductAttention_{attention}/query/kernel", 3, source)
    hidden = _shaped(tensors, f"{block}/MlpBlock_{mlp}/Dense_0/kernel", 2, source)
    if hints.img_size is None:
        raise CheckpointError(
            f"{source} does not say its image size: give --img-size HEIGHT WIDTH, multiples of its patches of "
            f"{patch[0]} x {patch[1]} pixels"
        )
    pool = "map" if "MAPHead_0/probe" in tensors else "token" if "cls" in tensors else "norm_avg"
    blocks = {name.split("/")[1] for name in tensors if name.startswith("Transformer/encoderblock_")}
    head, rep = (
        _shaped(tensors, name, 2, source) if name in tensors else None
        for name in ("head/kernel", "pre_logits/kernel")
    )
    return {
        "embed_dim": patch[3],
        "depth": len(blocks),
        "num_heads": query[1],
        "mlp_dim": hidden[1],
        "img_size": hints.img_size,
        "patch_size": (patch[0], patch[1]),
        "in_chans": patch[2],
        "num_classes": 1 if head is None else head[1],
        "global_pool": pool,
        "pos_embed": "learned_1d" if layout.old or "pos_embedding" in tensors else "none",
        "pos_embed_order": "cls_then_pe" if layout.old else "pe_then_cls",
        "act": hints.act or "gelu_tanh",
        "norm_eps": NORM_EPS,
        "representation_size": None if rep is None else rep[1],
        "mean": hints.mean or (0.5,),
        "std": hints.std or (0.5,),
    }


def _shaped(tensors: Mapping[str, Tensor], name: str, dims: int, source: Path) -> tuple[int, ...]:
    if name not in tensors or tensors[name].dim() != dims or not tensors[name].numel():
        raise CheckpointError(f"{source} is of another architecture: it has no {name} of {dims} axes")
    return tuple(tensors[name].shape)


def _notes(layout: _Layout, has_head: bool, hints: Hints) -> Iterator[str]:
    if hints.act is None:
        yield "its GELU is taken for flax's, the tanh approximation; timm's models of these files compute the exact one: --act gelu"
    if not has_head:
        yield "it has no head: ours is one class of zeros"

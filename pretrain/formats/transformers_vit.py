"""transformers' ViT: `ViTForImageClassification` is written by the installed class's own save; it and `ViTModel` are read.

The names on disk are those of transformers 4, which version 5 still saves and converts when it loads.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError, ExportError
from pretrain.formats.adapt import as_table
from pretrain.formats.files import CONFIG, About, Preprocess, per_channel, read_json
from pretrain.formats.names import Rule, pair, restored, stored
from pretrain.formats.source import (
    Hints,
    Imported,
    cannot_be_ours,
    checked,
    model_config,
    numbers,
    pair_of,
    read_folder,
    zero_head,
)
from pretrain.formats.timm_models import run
from pretrain.model import parameter_shapes

HOW_TO_LOAD = "transformers.ViTForImageClassification.from_pretrained('{folder}')"
HINTS = {"mean", "std"}
PREPROCESSOR = "preprocessor_config.json"

_BLOCK = "vit.encoder.layer.{i}"
_QKV = tuple(f"{_BLOCK}.attention.attention.{part}" for part in ("query", "key", "value"))

RULES = [
    Rule("cls_token", ("vit.embeddings.cls_token",)),
    Rule("pos_embed", ("vit.embeddings.position_embeddings",)),
    *pair("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
    *pair("blocks.{i}.norm1", f"{_BLOCK}.layernorm_before"),
    *(
        Rule(f"blocks.{{i}}.attn.qkv.{leaf}", tuple(f"{name}.{leaf}" for name in _QKV))
        for leaf in ("weight", "bias")
    ),
    *pair("blocks.{i}.attn.proj", f"{_BLOCK}.attention.output.dense"),
    *pair("blocks.{i}.norm2", f"{_BLOCK}.layernorm_after"),
    *pair("blocks.{i}.mlp.fc1", f"{_BLOCK}.intermediate.dense"),
    *pair("blocks.{i}.mlp.fc2", f"{_BLOCK}.output.dense"),
    *pair("norm", "vit.layernorm"),
    *pair("pre_logits", "vit.pooler.dense"),
    *pair("head", "classifier"),
]

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
"""Ours to the first of theirs; more of theirs that are the same function follow."""

_SAME_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_python": "gelu", "swish": "silu"}

_RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers of the kernels."""


def inexpressible(model: ModelConfig) -> Iterator[str]:
    if model.global_pool != "token":
        yield f"model.global_pool {model.global_pool}: its classifier reads the cls token"
    if model.pos_embed in ("relative", "rope_2d"):
        yield f"model.pos_embed {model.pos_embed}: there are only positions that are added to tokens"
    elif model.pos_embed_at != "stem":
        yield f"model.pos_embed_at {model.pos_embed_at}: positions are added at the stem alone"
    if model.num_registers:
        yield f"model.num_registers {model.num_registers}: there are none"
    if model.act == "swiglu":
        yield "model.act swiglu: its MLP is not gated"
    elif model.act not in ACTIVATIONS:
        yield f"model.act {model.act}: there is no such activation"
    if model.qk_norm:
        yield "model.qk_norm: queries and keys are not normalised"
    if model.representation_size is not None:
        yield f"model.representation_size {model.representation_size}: its classifier is one linear map"


def adapt(weights: Mapping[str, Tensor], model: ModelConfig) -> tuple[Mapping[str, Tensor], ModelConfig]:
    """A row of positions for the cls token too; LayerScale folded into the layers before it."""
    return as_table(weights, model, pos_embed_order="cls_then_pe", layer_scale=None)


def write(folder: Path, weights: Mapping[str, Tensor], model: ModelConfig, about: About) -> None:
    transformers = _library()
    names = about.class_names or [f"class_{number}" for number in range(model.num_classes)]
    net = _loaded(
        transformers.ViTForImageClassification,
        transformers.ViTConfig(
            **_settings(model),
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        ),
        stored(weights, model, RULES),
    )
    with _quietly():
        net.save_pretrained(folder)
        _processor(transformers, model, about.preprocess).save_pretrained(folder)


def load(folder: Path) -> Callable[[Tensor], Tensor]:
    transformers = _library()
    with _quietly():
        net = transformers.ViTForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()
    processor = transformers.ViTImageProcessor.from_pretrained(folder, local_files_only=True)
    mean, std = processor.image_mean, processor.image_std
    return lambda images: run(lambda pixels: net(pixels).logits, images, mean, std)


def recognises(source: Path) -> bool:
    return source.is_dir() and (source / CONFIG).is_file() and "model_type" in read_json(source / CONFIG)


def read(source: Path, hints: Hints) -> Imported:
    document, how = read_json(source / CONFIG), _normalisation(source, hints)
    cannot_be_ours(source, _refused(document))
    tensors = read_folder(source)
    tensors = {
        name if name.startswith(("vit.", "classifier.")) else f"vit.{name}": v for name, v in tensors.items()
    }
    has_head = "classifier.weight" in tensors
    preprocess, stretches = _preprocess(source)
    model = model_config(_described(document, tensors, how), str(source))
    wanted = [name for name in parameter_shapes(model) if has_head or not name.startswith("head.")]
    weights = restored(_with_biases(tensors, model), wanted, model, RULES, str(source))
    imported = Imported(
        weights if has_head else zero_head(weights, model.representation_size or model.width),
        model,
        has_head,
        preprocess,
        _class_names(document, model) if has_head else None,
        notes=tuple(_notes(has_head, stretches)),
        peer=tensors,
    )
    return checked(imported, str(source))


def judge(source: Path, imported: Imported) -> Callable[[Tensor], Tensor]:
    """The folder's own code and settings are not used: the installed class is built from what was read and checked."""
    transformers, model = _library(), imported.model
    tensors, mean_std = dict(imported.peer), per_channel(model)
    biased = "vit.encoder.layer.0.attention.attention.query.bias" in tensors
    config = transformers.ViTConfig(**_settings(model), qkv_bias=biased)
    if imported.has_head:
        net = _loaded(transformers.ViTForImageClassification, config, tensors)
        return lambda images: run(lambda pixels: net(pixels).logits, images, *mean_std)
    config.pooler_output_size = model.representation_size or model.width
    bare = {name.removeprefix("vit."): value for name, value in tensors.items()}
    pooled = model.representation_size is not None
    net = _loaded(transformers.ViTModel, config, bare, add_pooling_layer=pooled)
    if pooled:
        return lambda images: run(lambda pixels: net(pixels).pooler_output, images, *mean_std)
    return lambda images: run(lambda pixels: net(pixels).last_hidden_state[:, 0], images, *mean_std)


def _settings(model: ModelConfig) -> dict[str, Any]:
    """Arguments of ViTConfig."""
    square = model.img_size[0] == model.img_size[1], model.patch_size[0] == model.patch_size[1]
    return {
        "hidden_size": model.width,
        "num_hidden_layers": model.num_blocks,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_width,
        "hidden_act": ACTIVATIONS[model.act],
        "layer_norm_eps": model.norm_eps,
        "image_size": model.img_size[0] if square[0] else list(model.img_size),
        "patch_size": model.patch_size[0] if square[1] else list(model.patch_size),
        "num_channels": model.in_chans,
        "num_labels": model.num_classes,
    }


def _loaded(kind: Any, config: Any, tensors: Mapping[str, Tensor], **options: Any) -> Any:
    """A network of transformers' own class, from tensors by the names on disk, every one of them used."""
    with _quietly():
        net, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            output_loading_info=True,
            dtype=torch.float32,
            **options,
        )
    odd = [name for kinds in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[kinds]]
    if odd:
        raise ExportError(f"the installed transformers does not take these weights by their names: {odd[:6]}")
    return net.eval()


def _processor(transformers: Any, model: ModelConfig, preprocess: Preprocess) -> Any:
    """Resizes so that the shorter side keeps `crop`, and crops the middle, where the image is square; else it stretches,
    which is all that it can do."""
    mean, std = per_channel(model)
    height, width = model.img_size
    options: dict[str, Any] = {"size": {"height": height, "width": width}}
    if height == width:
        options = {
            "size": {"shortest_edge": int(height / preprocess.crop)},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    return transformers.ViTImageProcessor(
        image_mean=mean, image_std=std, resample=_RESAMPLE[preprocess.interpolation], **options
    )


def _refused(document: Mapping[str, Any]) -> Iterator[str]:
    """What config.json says that our model cannot."""
    if document.get("auto_map") or document.get("custom_pipelines"):
        yield "config.json asks for code of its own (auto_map); only the classes of transformers itself are read"
    if document.get("quantization_config"):
        yield "its weights are quantised (quantization_config)"
    kind = document.get("model_type")
    if kind != "vit":
        yield f"model_type {kind!r}: vit is read (ViTForImageClassification, ViTModel)"
    classes = document.get("architectures") or ["ViTModel"]
    if kind == "vit" and (
        not isinstance(classes, list) or classes[0] not in ("ViTForImageClassification", "ViTModel")
    ):
        yield f"architectures {classes!r}: ViTForImageClassification and ViTModel are read"
    act = document.get("hidden_act", "gelu")
    if _act(act) is None:
        yield f"hidden_act {act!r}: there are {', '.join([*ACTIVATIONS.values(), *_SAME_ACTIVATIONS])}"
    if document.get("pooler_act", "tanh") != "tanh":
        yield f"pooler_act {document.get('pooler_act')!r}: there is tanh"


def _act(theirs: Any) -> str | None:
    if not isinstance(theirs, str):
        return None
    by_theirs = {value: key for key, value in ACTIVATIONS.items()} | _SAME_ACTIVATIONS
    return by_theirs.get(theirs)


def _described(
    document: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    how: tuple[tuple[float, ...], tuple[float, ...]],
) -> dict[str, Any]:
    """Settings of our model. What config.json leaves out has the value of transformers' own default."""
    head, pooler = tensors.get("classifier.weight"), tensors.get("vit.pooler.dense.weight")
    depth = document.get("num_hidden_layers", 12)
    blocks = len({name.split(".")[3] for name in tensors if name.startswith("vit.encoder.layer.")})
    if depth != blocks:
        raise CheckpointError(
            f"config.json says num_hidden_layers {depth!r}, the weights are those of {blocks}"
        )
    return {
        "embed_dim": document.get("hidden_size", 768),
        "depth": depth,
        "num_heads": document.get("num_attention_heads", 12),
        "mlp_dim": document.get("intermediate_size", 3072),
        "img_size": pair_of(document.get("image_size", 224), "image_size"),
        "patch_size": pair_of(document.get("patch_size", 16), "patch_size"),
        "in_chans": document.get("num_channels", 3),
        "num_classes": 1 if head is None else len(head),
        "act": _act(document.get("hidden_act", "gelu")),
        "norm_eps": document.get("layer_norm_eps", 1e-12),
        # ViTForImageClassification has no pooler: one in its file is left over, and `restored` says so.
        "representation_size": None if pooler is None or head is not None else len(pooler),
        "mean": how[0],
        "std": how[1],
    }


def _with_biases(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Zeros for the biases of queries, keys and values where the source has none (qkv_bias false)."""
    zero = torch.zeros(model.width)
    names = [f"{name}.bias".format(i=i) for i in range(model.num_blocks) for name in _QKV]
    return (
        {**tensors, **dict.fromkeys(names, zero)}
        if not any(name in tensors for name in names)
        else dict(tensors)
    )


def _normalisation(source: Path, hints: Hints) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the preprocessor, or the user's."""
    if hints.mean and hints.std:
        return hints.mean, hints.std
    if not (source / PREPROCESSOR).is_file():
        raise CheckpointError(f"{source} has no {PREPROCESSOR}, so give --mean and --std of its input")
    document = read_json(source / PREPROCESSOR)
    factor = document.get("rescale_factor", 1 / 255)
    if not document.get("do_rescale", True) or not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise CheckpointError(
            f"{source / PREPROCESSOR} does not bring pixels to [0, 1]; give --mean and --std"
        )
    if not document.get("do_normalize", True):
        return (0.0,), (1.0,)
    found = [
        numbers(document.get(key, [0.5]), (1, 3), f"{source / PREPROCESSOR}: {key}")
        for key in ("image_mean", "image_std")
    ]
    return found[0], found[1]


def _preprocess(source: Path) -> tuple[Preprocess, bool]:
    """How it resizes and crops, and whether it stretches images to a shape, which ours never does. Sizes are numbers, as
    old processors have them, or objects."""
    document = read_json(source / PREPROCESSOR) if (source / PREPROCESSOR).is_file() else {}
    size, window = document.get("size"), document.get("crop_size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    whole = shortest or (size.get("height") if isinstance(size, dict) else size)
    part = window.get("height") if isinstance(window, dict) else window
    crop = 1.0
    if (
        document.get("do_center_crop")
        and isinstance(whole, int)
        and isinstance(part, int)
        and 0 < part <= whole
    ):
        crop = part / whole
    kernel: Literal["bilinear", "bicubic"] = (
        "bicubic" if document.get("resample") == _RESAMPLE["bicubic"] else "bilinear"
    )
    return Preprocess(crop, kernel), bool(document) and document.get("do_resize", True) and not shortest


def _notes(has_head: bool, stretches: bool) -> Iterator[str]:
    if not has_head:
        yield "it has no head: ours is one class of zeros"
    if stretches:
        yield "its processor stretches images to their size; ours keep their shape, and the middle is taken"


def _class_names(document: Mapping[str, Any], model: ModelConfig) -> tuple[str, ...] | None:
    """Names that say something: transformers' own stand-ins do not."""
    names = document.get("id2label")
    if not isinstance(names, dict):
        return None
    found = [names.get(str(number)) for number in range(model.num_classes)]
    if not all(isinstance(name, str) for name in found) or found == [f"LABEL_{n}" for n in range(len(found))]:
        return None
    return tuple(str(name) for name in found)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise ExportError(
            "transformers is not installed, and its own classes read and write this format: "
            "pip install 'transformers>=5.23'"
        ) from None
    return transformers

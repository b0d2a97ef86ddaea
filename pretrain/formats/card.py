"""The model card of an export, README.md: where the weights come from and how to use them, for people."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pretrain.config import ModelConfig
from pretrain.formats import exporter
from pretrain.formats.files import About, input_of
from pretrain.model import num_parameters
from pretrain.redact import redact_text


def card(form: str, trained: ModelConfig, model: ModelConfig, about: About) -> str:
    """trained: the model of the run or the source; model: as the format says it."""
    return redact_text("\n".join(_lines(form, trained, model, about)) + "\n")


def _lines(form: str, trained: ModelConfig, model: ModelConfig, about: About) -> Iterator[str]:
    shown = input_of(model, about.preprocess)
    (height, width), (rows, columns) = model.img_size, model.grid
    yield "---"
    yield f"license: {json.dumps(about.licence or 'unknown')}"
    yield "tags: [image-classification, vision-transformer]"
    yield "---"
    yield ""
    yield f"# Vision Transformer, {num_parameters(model):,} parameters"
    yield ""
    yield f"Format `{form}`. Load it with"
    yield ""
    yield f"    {exporter(form).HOW_TO_LOAD.format(folder='FOLDER')}"
    yield ""
    if about.licence is None:
        yield "The licence is not stated: set `license` above before this is passed on."
        yield ""
    yield "## Model"
    yield ""
    yield from _table([
        ("image, patch, grid", f"{height} x {width}, {model.patch_size[0]} x {model.patch_size[1]}, {rows} x {columns}"),
        ("width, depth, heads, MLP", f"{model.width}, {model.num_blocks}, {model.heads}, {model.mlp_width}"),
        ("pooling", model.global_pool),
        ("prefix tokens", f"{int(model.has_cls_token)} cls, {model.num_registers} registers"),
        ("positions", f"{model.pos_embed} at {model.pos_embed_at}, {model.pos_embed_order}"),
        ("activation, LayerNorm epsilon", f"{model.act}, {model.norm_eps:g}"),
        ("classes", f"{model.num_classes}{'' if about.class_names else ', without names'}"),
    ])  # fmt: skip
    yield ""
    yield "## Input"
    yield ""
    yield from _table([
        ("normalisation", f"(pixel / 255 - mean) / std, mean {shown['mean']}, std {shown['std']}"),
        ("resizing", f"{shown['interpolation']}, the middle {shown['crop']:g} of the side"),
    ])  # fmt: skip
    if (trained.mean, trained.std) != (model.mean, model.std):
        yield ""
        yield f"Trained with mean {list(trained.mean)}, std {list(trained.std)}; the difference is folded into the patch filters."
    yield ""
    yield "## Where it comes from"
    yield ""
    yield from _table((key, _said(value)) for key, value in about.lineage.items() if key not in _APART)
    yield from _metrics(about.lineage.get("metrics"))
    yield from _resizes(about.lineage.get("hand_offs", ()))
    if about.recipe:
        yield from ("", "## Recipe", "", "```yaml", about.recipe.strip(), "```")


_APART = ("metrics", "hand_offs")
"""Parts of the lineage that have a section of their own."""


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield "| what | value |"
    yield "| --- | --- |"
    for what, value in rows:
        yield f"| {_cell(what)} | {_cell(value)} |"


def _metrics(metrics: Mapping[str, float] | None) -> Iterator[str]:
    if metrics:
        yield from ("", "## Metrics", "", "On the run's validation set, at this checkpoint.", "")
        yield from _table((name, f"{value:.6g}") for name, value in metrics.items())


def _resizes(hand_offs: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What each hand-off did to the weights, the latest first; at the end, perhaps, where they were imported from."""
    for each in hand_offs:
        run = _cell(str(each.get("run")))
        if "lineage" in each:
            yield from ("", f"## {run}", "")
            yield from _table((key, _said(value)) for key, value in each["lineage"].items())
            continue
        yield from ("", f"## Hand-off into {run}", "")
        yield f"From {_cell(str(each.get('checkpoint')))}, step {each.get('step')}, sha256 {each.get('sha256')}."
        yield from ("", "| weight | what became of it | how |", "| --- | --- | --- |")
        for row in each.get("weights", ()):
            yield f"| {' | '.join(_cell(str(row.get(key, ''))) for key in ('name', 'action', 'detail'))} |"


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    """On one line, without ending the cell: parts of it come from files."""
    return " ".join(text.replace("|", "\\|").split())

"""`pretrain import`: weights of another library as our own export, proven by that library before it is kept."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pretrain.errors import CheckpointError
from pretrain.formats import IMPORTS, Importer, importer

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.formats.source import Imported

_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "elu", "silu")


def _numbers(_: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3):
        raise click.BadParameter(f"{text!r}: give one number, or one a channel as 0.5,0.5,0.5", param=option)
    return values


@click.command(name="import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--format",
    "form",
    type=click.Choice(list(IMPORTS)),
    help="; ".join(f"{name}: {what}" for name, (_, what) in IMPORTS.items())
    + ". [default: seen from SOURCE]",
)
@click.option("--timm-model", metavar="NAME", help="Of a state dict: timm's model that it belongs to.")
@click.option(
    "--img-size",
    type=click.IntRange(min=1),
    nargs=2,
    metavar="HEIGHT WIDTH",
    help="Of the images, in pixels; an .npz and a bare state dict do not say it.",
)
@click.option("--num-heads", type=click.IntRange(min=1), help="Of a state dict without a model's name.")
@click.option("--act", type=click.Choice(_ACTIVATIONS), help="Activation, where the source does not say it.")
@click.option(
    "--norm-eps",
    type=click.FloatRange(min=0, min_open=True),
    help="Epsilon of LayerNorm, where the source does not say it.",
)
@click.option(
    "--mean",
    callback=_numbers,
    help="Of the input: subtracted from pixels in [0, 1]; one number, or 0.485,0.456,0.406.",
)
@click.option("--std", callback=_numbers, help="Of the input: divides them; likewise.")
@click.option("--licence", help="Of the weights, for the model card.")
@click.option("--no-verify", is_flag=True, help="Do not compare logits with the library's own.")
def import_(
    source: Path, out: Path, form: str | None, licence: str | None, no_verify: bool, **hints: Any
) -> None:
    """Make SOURCE, weights of another library, into an export of ours, which `init.from` takes.

    The library itself loads SOURCE, and its logits are compared with those of what was written; where they differ
    nothing is left behind. Nothing in SOURCE is executed: no pickles, no code that it brings along.
    """
    from pretrain.formats.files import About
    from pretrain.formats.source import Hints
    from pretrain.formats.write import write_export
    from pretrain.images import photographs

    if not source.exists():
        raise CheckpointError(f"{source}: there is no such file or folder")
    name = form or _recognised(source)
    library = importer(name)
    if out.resolve() == source.resolve():
        raise CheckpointError(
            f"{out} is the source itself, which the import would replace; give another --out"
        )
    hints = {key: value for key, value in hints.items() if value is not None}
    if idle := sorted(hints.keys() - library.HINTS):
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in idle)
        raise CheckpointError(f"{flags}: a source of format {name} says that itself; leave it out")
    imported = library.read(source, Hints(**hints))
    proof = None if no_verify else partial(_by_the_library, library, source, imported)
    done = write_export(
        imported.weights,
        imported.model,
        About(_lineage(source, name, imported), imported.preprocess, imported.class_names, licence=licence),
        out,
        "safetensors",
        images=None if no_verify else photographs(imported.model),
        expected=proof,
        before_head=not imported.has_head,
        verify=not no_verify,
    )
    click.echo(f"{name}: {done.parameters:,} parameters in {done.path}")
    for note in imported.notes:
        click.echo(f"note: {note}")
    if done.difference is None:
        click.echo("not verified (--no-verify)")
    else:
        of = "logits" if imported.has_head else "features"
        click.echo(f"against {name} itself: {of} differ by {done.difference:.1e} at most, on {done.images}")
    click.echo(f"Start from it with  init.from: {done.path}")


def _recognised(source: Path) -> str:
    from pretrain.formats.files import is_export, read_provenance

    for name in IMPORTS:
        if importer(name).recognises(source):
            return name
    if is_export(source):
        raise CheckpointError(
            f"{source} is an export of ours, of format {read_provenance(source).format}: init.from and `pretrain export` take "
            "a safetensors one as it is, of a bigvision one import the model.npz, and from onnx and mlflow nothing is read"
        )
    what = ", ".join(what for _, what in IMPORTS.values())
    raise CheckpointError(f"{source} is of no format that is known: {what}. Say which with --format")


def _by_the_library(library: Importer, source: Path, imported: "Imported", images: "Tensor") -> "Tensor":
    """What the library itself answers. What it raises on a source that was found sound is its own word on it."""
    try:
        return library.judge(source, imported)(images)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        words = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CheckpointError(
            f"the library does not load {source}, so nothing was imported: {words}"
        ) from None


def _lineage(source: Path, name: str, imported: "Imported") -> dict[str, Any]:
    from pretrain.formats.files import hashes, sha256
    from pretrain.lineage import code_facts

    files = hashes(source) if source.is_dir() else {source.name: (source.stat().st_size, sha256(source))}
    return {
        "imported_from": source.name,
        "source_format": name,
        "sha256": {file: digest for file, (_, digest) in files.items()},
        "notes": list(imported.notes),
        "code": code_facts(),
    }

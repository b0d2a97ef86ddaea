"""`pretrain export`: a checkpoint in a form that other programs load, proven before it is said to be done.

`pretrain.formats` knows each form and does the work; `lineage` says where the weights come from.
"""

from pathlib import Path

import click

from pretrain.errors import ExportError
from pretrain.formats import EXPORTS


@click.command()
@click.argument("source", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(list(EXPORTS)),
    default="safetensors",
    show_default=True,
    help="; ".join(f"{name}: {what}" for name, (_, what) in EXPORTS.items()) + ".",
)
@click.option(
    "--which",
    type=click.Choice(["best", "last"]),
    help="Which checkpoint of the run.  [default: last]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. [default: RUN/export/FORMAT]")
@click.option(
    "--fold-normalization",
    is_flag=True,
    help="Fold the input's mean and std into the patch filters: the export takes pixels in [0, 1].",
)
@click.option("--licence", help="Of the weights, for the model card: an SPDX name such as apache-2.0.")
@click.option("--no-verify", is_flag=True, help="Do not load the export again and compare its logits.")
def export(
    source: Path,
    form: str,
    which: str | None,
    out: Path | None,
    fold_normalization: bool,
    licence: str | None,
    no_verify: bool,
) -> None:
    """Write a checkpoint of RUN, a run directory or a step folder of one, for other programs; or what `pretrain import`
    wrote, so that weights go from one library to another.

    The export is loaded again by the library it is for, and its logits on validation images are compared with those
    of the checkpoint; where they differ nothing is left behind.
    """
    from pretrain.export.opened import open_source
    from pretrain.formats.files import is_export
    from pretrain.formats.write import write_export

    if out is None:
        if not (source / "checkpoints").is_dir():
            raise ExportError(f"{source} is not a run directory: say where to write with --out")
        out = source / "export" / form
    if out.resolve() == source.resolve():
        raise ExportError(f"{out} is what is to be exported, and would be replaced; give another --out")
    if which is not None and is_export(source):
        raise ExportError(f"--which {which}: {source} holds one model and no checkpoints; leave it out")
    found = open_source(source, which or "last", licence)
    done = write_export(
        found.weights,
        found.model,
        found.about,
        out,
        form,
        fold_normalization=fold_normalization,
        images=None if no_verify else found.images(),
        verify=not no_verify,
    )
    click.echo(f"{form}: {done.parameters:,} parameters of {found.name} in {done.path}")
    if done.difference is None:
        click.echo("not verified (--no-verify)")
    else:
        click.echo(f"loaded again: logits differ by {done.difference:.1e} at most, on {done.images}")
    click.echo(f"Load it with  {done.how_to_load}")

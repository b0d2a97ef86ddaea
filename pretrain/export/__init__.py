"""`pretrain export`: a checkpoint in a form that other programs load, proven before it is said to be done.

`write` does the work for any format; `native` and `timm_folder` each know one.
"""

from pathlib import Path

import click

from pretrain.errors import ExportError

FORMATS = ("safetensors", "timm")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="safetensors",
    show_default=True,
    help="safetensors: weights and our own config.json; timm: a folder for timm.create_model.",
)
@click.option(
    "--which",
    type=click.Choice(["best", "last"]),
    default="last",
    show_default=True,
    help="Which checkpoint of the run.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. [default: RUN/export/FORMAT]")
@click.option("--no-verify", is_flag=True, help="Do not load the export again and compare its logits.")
def export(run: Path, form: str, which: str, out: Path | None, no_verify: bool) -> None:
    """Write a checkpoint of RUN, a run directory or a step folder of one, for other programs.

    The export is loaded again by the library it is for, and its logits on validation images are compared with those
    of the checkpoint; where they differ nothing is left behind.
    """
    from pretrain.checkpoint.load import open_weights
    from pretrain.export.write import Preprocess, write_export
    from pretrain.images import validation_images
    from pretrain.lineage import code_facts

    if out is None:
        if not (run / "checkpoints").is_dir():
            raise ExportError(f"{run} is not a run directory: say where to write with --out")
        out = run / "export" / form
    found = open_weights(run, which)
    config = found.config
    lineage = {
        "run": config.run.dir,
        "checkpoint": found.path.name,
        "step": found.step,
        "metrics": dict(found.metrics),
        "trained_on": "::".join(config.data.train.patterns),
        "init_from": config.init.source if config.init else None,
        "code": code_facts(),
    }
    done = write_export(
        found.weights,
        found.model,
        lineage,
        out,
        form,
        preprocess=Preprocess(config.data.val_crop, config.data.interpolation),
        images=None if no_verify else validation_images(config),
        verify=not no_verify,
    )
    click.echo(f"{form}: {done.parameters:,} parameters of step {found.step:,} in {done.path}")
    if done.difference is None:
        click.echo("not verified (--no-verify)")
    else:
        click.echo(f"loaded again: logits differ by {done.difference:.1e} at most, on {done.images}")
    click.echo(f"Load it with  {done.how_to_load}")

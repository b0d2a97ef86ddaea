"""`pretrain show`: figures of what a run's model has learnt."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--which",
    type=click.Choice(["best", "last"]),
    default="last",
    show_default=True,
    help="Checkpoint of RUN.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to draw into. [default: RUN/figures/step_N]"
)
@click.option(
    "--images",
    "count",
    type=click.IntRange(min=1, max=64),
    default=8,
    show_default=True,
    help="Validation images to show to the model.",
)
def show(run: Path, which: str, out: Path | None, count: int) -> None:
    """Draw the figures of the ViT paper for a checkpoint of RUN, a run directory or a step folder of one.

    Similarity of the position embeddings, principal components of the patch filters, attention distance of every head,
    and attention rollout on validation images. The numbers behind them are printed.
    """
    from rich.console import Console
    from rich.table import Table

    from pretrain import logs
    from pretrain.checkpoint.load import open_weights
    from pretrain.errors import RunDirError
    from pretrain.figures import attention_of, draw, look, needed_weights
    from pretrain.figures.during import FOLDER
    from pretrain.images import validation_images
    from pretrain.model import build

    logs.to_stderr()
    found = open_weights(run, which)
    if out is None:
        if not (run / "checkpoints").is_dir():
            raise RunDirError(f"{run} is not a run directory: say where to draw with --out")
        out = run / FOLDER / found.path.name
    images = validation_images(found.config, count)
    heard = None
    if images is not None:
        model = build(found.model, found.weights).eval()
        with attention_of(model) as heard:
            model(images)
    weights = {name: found.weights[name] for name in needed_weights(found.model)}
    seen = look(found.model, weights, images, heard)
    try:
        drawn = draw(seen, f"{run.name}, step {found.step:,}", out)
    except OSError as error:
        raise RunDirError(
            f"cannot draw into {out}: {error.strerror or error}; give another folder with --out"
        ) from None
    table = Table("number", "value", title=f"step {found.step:,}")
    for name, value in seen.metrics().items():
        unit = " px" if "distance" in name else ""
        table.add_row(name.removeprefix("figures/"), f"{value:.3f}{unit}")
    if seen.metrics():
        Console().print(table)
    if seen.similarity is None:
        click.echo(
            f"position_similarity: {found.model.pos_embed} adds no table to the patches, nothing to draw"
        )
    if images is None:
        click.echo("attention: no validation images at hand, nothing to draw")
    for path in drawn:
        click.echo(f"drawn: {path}")

"""`make studies`: train what is missing and print the tables. A stopped call goes on where it was."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pretrain import command
from pretrain.data.manifest import NAME as MANIFEST
from pretrain.demo import fashion_mnist
from pretrain.errors import ConfigError, UserError
from pretrain.studies import report
from pretrain.studies.page import PAGE, renew
from pretrain.studies.questions import LONG, SHORT, SMOKE, STUDIES, runs_of
from pretrain.studies.runner import refuse_others, train_all

SETTINGS = {setting.name: setting for setting in (SHORT, LONG, SMOKE)}


@click.command()
@click.option(
    "--setting",
    "setting_name",
    type=click.Choice(list(SETTINGS)),
    default="short",
    show_default=True,
    help="short: within an hour on two cores; long: 1,000 steps, under two hours; smoke: does it run at all?",
)
@click.option(
    "--study",
    "names",
    multiple=True,
    type=click.Choice(list(STUDIES)),
    help="Only this one; may be given again. [default: all]",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Runs at a time, a thread each."
)
@click.option(
    "--shards",
    type=click.Path(path_type=Path),
    default="data/studies",
    show_default=True,
    help="Folder of train/ and val/ shards, ten classes; Fashion-MNIST is packed into it if it is not there.",
)
@click.option("--keep", is_flag=True, help="Make what was measured the page's results, figures and tables.")
@click.option("--write", "page", flag_value="write", help="Only renew the page's tables from its results.")
@click.option(
    "--check",
    "page",
    flag_value="check",
    help="Only say whether they, and what it says, are those of its results.",
)
def studies(
    setting_name: str, names: tuple[str, ...], jobs: int, shards: Path, keep: bool, page: str | None
) -> None:
    """Measure the answers of docs/vit-questions.md: small ViTs on Fashion-MNIST, variants paired by seed."""
    if page is not None:
        renew(PAGE, write=page == "write")
        return
    if keep and names:
        raise ConfigError("--keep replaces the results of all studies: leave --study out")
    if keep and not PAGE.is_file():
        raise ConfigError(f"--keep needs {PAGE}, which is not here; run this in a clone")
    setting, chosen = SETTINGS[setting_name], [STUDIES[name] for name in names or STUDIES]
    folder = Path("runs") / "studies" / setting.name
    _pack(shards)
    runs = runs_of(chosen, setting, folder)
    refuse_others(runs, shards)
    trained = train_all(runs, jobs, shards)
    results = report.collect(chosen, setting, folder)
    _show(results)
    click.echo(f"\nruns trained: {trained}; the others were there. Next: make ui")
    if keep:
        _keep(results, folder)


def _pack(shards: Path) -> None:
    if all((shards / split / MANIFEST).is_file() for split in ("train", "val")):
        return
    from rich.console import Console

    images = fashion_mnist(Console(stderr=True))
    if images is None:
        raise UserError(
            "Fashion-MNIST is not to be had here: apt-get install dataset-fashion-mnist, or give --shards"
        )
    command = [sys.executable, "-m", "pretrain", "shards", "pack", str(images), str(shards), "--shards", "8"]
    if code := subprocess.run(command).returncode:
        raise UserError(f"packing {images} into {shards} ended with exit code {code}")


def _show(results: Mapping[str, Any]) -> None:
    for name, scores in results["studies"].items():
        click.echo(f"\n{name}\n\n{report.table(STUDIES[name], scores)}")


def _keep(results: Mapping[str, Any], folder: Path) -> None:
    from pretrain.studies.picture import hand_off_figures

    kept = PAGE.parent / "studies"
    report.save(results, kept / report.RESULTS)
    hand_off_figures(folder, kept)
    renew(PAGE, write=True)


if __name__ == "__main__":
    command.run(studies, "python -m pretrain.studies")

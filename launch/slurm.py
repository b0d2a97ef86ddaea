"""`python -m launch.slurm`: stages as jobs of Slurm. See docs/slurm.md."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from launch import plain, queue, snapshot, sweep
from launch import profile as profiles
from launch.job import (
    ARRAY,
    SCRIPT,
    Job,
    best_job,
    default_name,
    export_job,
    folder_of,
    predecessor,
    train_job,
)
from launch.profile import Profile
from launch.render import render, render_array
from pretrain import command
from pretrain.config import Config, load
from pretrain.documents import replace_file
from pretrain.errors import ConfigError
from pretrain.formats import EXPORTS


@dataclass(frozen=True)
class Prepared:
    """A job that could be submitted: nothing is written yet."""

    job: Job
    config: Config | None
    profile: Profile
    script: str

    @classmethod
    def of(cls, job: Job, config: Config | None, profile: Profile) -> "Prepared":
        return cls(job, config, profile, render(job, profile))


def site_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that makes jobs."""
    for option in (
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key of the profile."
        ),
        click.option(
            "--nodes", metavar="N|MIN-MAX", help="Nodes of each training job, in place of the profile's."
        ),
        click.option(
            "--profile", "profile", required=True, metavar="FILE", help="What jobs look like at your site."
        ),
    ):
        function = option(function)
    return function


def asking_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--test-only", is_flag=True, help="Ask Slurm whether and when it would start; submit nothing."
        ),
        click.option("--dry-run", is_flag=True, help="Print the script; submit nothing."),
    ):
        function = option(function)
    return function


def stage_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--name", help="Name of the job.  [default: the run directory's last two parts]"),
        click.option(
            "--after-init",
            is_flag=True,
            help="Start when the run that init.from names is finished, not before.",
        ),
        click.argument("overrides", nargs=-1),
        click.argument("config", type=click.Path(path_type=Path)),
    ):
        function = option(function)
    return function


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@command.debug_option
def slurm() -> None:
    """Run stages as jobs of Slurm, alone or as a chain."""


@slurm.command("render")
@stage_options
@site_options
def render_(**given: Any) -> None:
    """Print the batch script of the stage CONFIG, with OVERRIDES of its settings such as optim.lr=1e-3."""
    click.echo(_prepare_stage(**given).script, nl=False)


@slurm.command()
@stage_options
@site_options
@asking_options
def submit(dry_run: bool, test_only: bool, **given: Any) -> None:
    """Submit the stage CONFIG, with OVERRIDES of its settings such as optim.lr=1e-3.

    A run that was interrupted or has failed is submitted again by the same command, and goes on.
    """
    prepared = _prepare_stage(**given)
    if not _only_asked([prepared], dry_run=dry_run, test_only=test_only):
        before = _living_jobs([prepared.job.needs])
        _submit([prepared], after=before[0] if before else None)


@slurm.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--which", type=click.Choice(["best", "last"]), default="last", show_default=True,
    help="Checkpoint of the last stage to evaluate and export.",
)  # fmt: skip
@click.option(
    "--format", "formats", type=click.Choice(list(EXPORTS)), multiple=True, default=("safetensors",), show_default=True,
    help="What to export; may be given twice.",
)  # fmt: skip
@site_options
@asking_options
def chain(
    configs: Sequence[Path],
    which: str,
    formats: Sequence[str],
    profile: str,
    nodes: str | None,
    settings: Sequence[str],
    dry_run: bool,
    test_only: bool,
) -> None:
    """Submit the stages CONFIGS one after the other, then a job that evaluates and exports the last one.

    Each stage starts from the one before it (init.from), when that is finished. Where one fails the rest is cancelled.
    """
    site = _profile(profile, nodes, settings)
    cwd = Path.cwd()
    stages: list[Prepared] = []
    for config, path in [(load(path), path) for path in configs]:
        needs = None
        if stages:
            needs = predecessor(config, cwd)
            if needs.resolve() != stages[-1].job.run_dir.resolve():
                raise ConfigError(
                    f"{path} starts from {needs} (init.from), but the stage before it writes {stages[-1].job.run_dir}"
                )
        stages.append(Prepared.of(train_job(config, site, cwd, needs=needs), config, site))
    directories = [stage.job.run_dir.resolve() for stage in stages]
    if len(set(directories)) < len(directories):
        raise ConfigError("two stages of the chain have the same run.dir: each needs its own")
    last, one_rank = config, site.for_one_rank()
    stages.append(Prepared.of(export_job(last, one_rank, cwd, which, formats), last, one_rank))
    if not _only_asked(stages, dry_run=dry_run, test_only=test_only):
        _submit(stages, after=None)


@slurm.command("sweep")
@stage_options
@click.option(
    "--over", multiple=True, required=True, metavar="KEY=VALUE,VALUE",
    help="A key and its values; several keys make a grid.",
)  # fmt: skip
@click.option(
    "--at-once", type=click.IntRange(1), metavar="N", help="Most members that run at the same time."
)
@site_options
@asking_options
def sweep_(
    config: Path,
    overrides: Sequence[str],
    over: Sequence[str],
    at_once: int | None,
    profile: str,
    nodes: str | None,
    settings: Sequence[str],
    name: str | None,
    after_init: bool,
    dry_run: bool,
    test_only: bool,
) -> None:
    """Submit the stage CONFIG once for each value of a key, as one array, then a job that marks the best member.

    Each member is a run directory below the config's run.dir, such as lr-0.01. The best one has the highest top-1 on
    data.val. The same command again goes on with what is not finished.
    """
    site, cwd = _profile(profile, nodes, settings), Path.cwd()
    found = sweep.members_of(config, overrides, over)
    needs = [predecessor(one.config, cwd) if after_init else None for one in found]
    members = [
        Prepared.of(train_job(one.config, site, cwd, needs=run), one.config, site)
        for one, run in zip(found, needs, strict=True)
    ]
    place = members[0].job.run_dir.parent
    sweep.check_place(place)
    title = default_name(place) if name is None else plain.name(name, "the job's name")
    array = render_array(place, title, [member.job for member in members], site, at_once)
    one_rank = site.for_one_rank()
    marking = Prepared.of(best_job(place, one_rank, cwd), None, one_rank)
    whole = Prepared(replace(members[0].job, name=title), None, site, array)
    shown = [whole, *members, marking] if dry_run else [whole, marking]
    if not _only_asked(shown, dry_run=dry_run, test_only=test_only):
        _submit_sweep(found, members, array, marking, after=_living_jobs(needs))


@slurm.command()
@click.argument("run", type=click.Path(path_type=Path))
def status(run: Path) -> None:
    """Show how the chain or the sweep that the run directory RUN belongs to stands."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from launch.progress import chain_of, duration, stage_of

    table = Table("run", "stage", "job", "Slurm", "run says", "step", "left", "images/s", "loss")
    links = []
    for folder in chain_of(run):
        stage = stage_of(folder)
        if stage is None:
            continue
        table.add_row(
            escape(stage.run),
            stage.kind,
            stage.job,
            stage.state,
            stage.says,
            "-" if stage.step is None else f"{stage.step:,} of {stage.total_steps or 0:,}",
            "-" if stage.eta_seconds is None else duration(stage.eta_seconds),
            "-" if stage.images_per_second is None else f"{stage.images_per_second:,.0f}",
            "-" if stage.loss is None else f"{stage.loss:.4f}",
        )
        if stage.mlflow is not None:
            links.append(f"{stage.run}: {stage.mlflow}")
    console = Console()
    console.print(table)
    best = sweep.read_best(run)
    if best is not None:
        links.append(f"best: {run / best.run}, top-1 {best.top1:.4f} at step {best.step:,}")
    for link in links:
        console.print(link, soft_wrap=True, highlight=False, markup=False)


@slurm.command()
@click.argument("run", type=click.Path(path_type=Path))
def cancel(run: Path) -> None:
    """Cancel all jobs of the chain or the sweep that the run directory RUN belongs to. What was saved stays."""
    from launch.progress import chain_of

    found = [snapshot.read(folder) for folder in chain_of(run)]
    alive = [job.number for job in found if job is not None and queue.state(job.number) in queue.ALIVE]
    queue.cancel(alive[::-1])  # those that wait first, so that none of them starts meanwhile
    click.echo(f"cancelled: {', '.join(alive)}" if alive else "no job of this chain is alive")


@slurm.command()
def keys() -> None:
    """Print every key of a profile and its default, as a Markdown table."""
    from pretrain.docs import table

    click.echo(table(Profile))


def _prepare_stage(
    config: Path,
    overrides: Sequence[str],
    profile: str,
    nodes: str | None,
    settings: Sequence[str],
    name: str | None,
    after_init: bool,
) -> Prepared:
    site, cwd = _profile(profile, nodes, settings), Path.cwd()
    stage = load(config, overrides)
    needs = predecessor(stage, cwd) if after_init else None
    return Prepared.of(train_job(stage, site, cwd, name=name, needs=needs), stage, site)


def _profile(path: str, nodes: str | None, settings: Sequence[str]) -> Profile:
    return profiles.load(path, [*settings, *([] if nodes is None else [f"nodes={nodes}"])])


def _only_asked(stages: Sequence[Prepared], *, dry_run: bool, test_only: bool) -> bool:
    """Print the scripts, or what Slurm says of them, where that is all that was asked for."""
    for stage in stages:
        if dry_run:
            click.echo(stage.script)
        elif test_only:
            click.echo(f"{stage.job.name}: {queue.test_only(stage.script, _environment(stage))}")
    return dry_run or test_only


def _living_jobs(needs: Iterable[Path | None]) -> list[str]:
    """The jobs that are still working on the run directories `needs`."""
    found = []
    for folder in dict.fromkeys(folder_of(run, "train") for run in needs if run is not None):
        before = snapshot.read(folder)
        if before is not None and queue.state(before.number) in queue.ALIVE:
            found.append(before.number)
    return found


@contextlib.contextmanager
def _all_or_none(stages: Sequence[Prepared]) -> Iterator[list[int]]:
    """Hold the folders of these jobs while the block submits them and lists their numbers; where it fails none stays."""
    jobs: list[int] = []
    with contextlib.ExitStack() as stack:
        for stage in stages:
            stack.enter_context(snapshot.claimed(stage.job))
        try:
            yield jobs
        except BaseException:
            queue.cancel(jobs[::-1])
            raise


def _submit(stages: Sequence[Prepared], after: int | str | None) -> None:
    """Submit stages, each after the one before it; where one is refused none stays."""
    chain = [stage.job.folder for stage in stages]
    with _all_or_none(stages) as jobs:
        for stage in stages:
            path = snapshot.write(stage.job, stage.config, stage.script)
            after = queue.submit(path, _environment(stage), after)
            jobs.append(after)
            snapshot.record(stage.job, after, chain)
    for stage, job in zip(stages, jobs, strict=True):
        click.echo(f"job {job}: {stage.job.name}, its log and snapshot are in {stage.job.folder}")
    click.echo(f"Watch it with  python -m launch.slurm status {stages[0].job.run_dir}")


def _submit_sweep(
    found: Sequence[sweep.Member],
    members: Sequence[Prepared],
    array: str,
    marking: Prepared,
    after: Sequence[str],
) -> None:
    """Submit an array and the job that waits for all of it; where one is refused none stays.

    after: jobs that must end first. One of several that fails is not to take all members with it: each asks for itself
    whether the run that it needs is finished.
    """
    folder = marking.job.folder
    chain = [*(member.job.folder for member in members), folder]
    with _all_or_none([*members, marking]) as jobs:
        for stage in (*members, marking):
            snapshot.write(stage.job, stage.config, stage.script)
        sweep.write(marking.job.run_dir, found)
        replace_file(folder / ARRAY, array)
        jobs.append(
            queue.submit(
                folder / ARRAY,
                _environment(members[0]),
                ":".join(after) or None,
                "afterok" if len(after) == 1 else "afterany",
            )
        )
        for task, member in enumerate(members):
            snapshot.record(member.job, jobs[0], chain, task)
        env = queue.environment(marking.profile.pass_env)
        jobs.append(queue.submit(marking.job.folder / SCRIPT, env, jobs[0], "afterany"))
        snapshot.record(marking.job, jobs[1], chain)
    for task, member in enumerate(members):
        click.echo(
            f"job {jobs[0]}_{task}: {member.job.name}, its log and snapshot are in {member.job.folder}"
        )
    click.echo(f"job {jobs[1]}: {marking.job.name}, when they have ended")
    click.echo(f"Watch it with  python -m launch.slurm status {marking.job.run_dir}")


def _environment(stage: Prepared) -> dict[str, str]:
    missing = [name for name in stage.profile.pass_env if name not in queue.environment([name])]
    for name in missing:
        click.echo(f"Note: pass_env names {name}, which is not set here", err=True)
    return queue.environment(stage.profile.pass_env)


if __name__ == "__main__":
    command.run(slurm, "python -m launch.slurm")

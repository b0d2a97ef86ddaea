"""The stages of a chain as jobs: pretrain, fine-tune, then evaluate and export.

A job is a name, a run directory, a folder of its own in it and the commands that it runs. What belongs to the site is
in the profile.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch import plain
from launch.profile import Profile
from pretrain.config import Config
from pretrain.errors import ConfigError

FOLDER = "slurm"
CONFIG = "config.yaml"
SCRIPT, ARRAY = "stage.sbatch", "array.sbatch"
MAX_NAME = 64


@dataclass(frozen=True)
class Job:
    """One job of Slurm. Paths are absolute.

    kind: a training, which may be interrupted and goes on, or what follows one and is short. needs: the run directory
    that must be finished before this job may begin. cwd: where relative paths of the config start.
    """

    name: str
    kind: Literal["train", "export", "sweep"]
    run_dir: Path
    cwd: Path
    commands: tuple[tuple[str, ...], ...]
    preflight: tuple[str, ...] = ()
    needs: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the job keeps its snapshot, its log and what it decided."""
        return folder_of(self.run_dir, self.kind)


def folder_of(run_dir: Path, kind: str) -> Path:
    return run_dir / FOLDER / kind


def train_job(
    config: Config, profile: Profile, cwd: Path, *, name: str | None = None, needs: Path | None = None
) -> Job:
    """The job that trains a stage. It reads the snapshot of the config, not the file that the user goes on editing."""
    run_dir = cwd / config.run.dir
    python = _interpreter(profile)
    snapshot = str(folder_of(run_dir, "train") / CONFIG)
    patience = str(30 * profile.preflight_minutes)  # with the network: half of what there is
    look = (*python, "-m", "launch.preflight", "--seconds", patience, snapshot)
    return Job(
        name=default_name(run_dir) if name is None else plain.name(name, "the job's name"),
        kind="train",
        run_dir=run_dir,
        cwd=cwd,
        commands=((*python, "-m", "pretrain.train", snapshot),),
        preflight=look if profile.preflight_minutes else (),
        needs=needs,
    )


def export_job(config: Config, profile: Profile, cwd: Path, which: str, formats: Sequence[str]) -> Job:
    """The job that evaluates and exports a finished run; evaluates where the config has something to evaluate on."""
    run_dir = cwd / config.run.dir
    pretrain = (*_interpreter(profile), "-m", "pretrain")
    options = ("--which", which)
    commands = [(*pretrain, "export", *options, "--format", form, "--", str(run_dir)) for form in formats]
    if config.data.val is not None:
        commands.insert(0, (*pretrain, "evaluate", *options, "--", str(run_dir)))
    return Job(
        name=default_name(run_dir, "-export"),
        kind="export",
        run_dir=run_dir,
        cwd=cwd,
        commands=tuple(commands),
        needs=run_dir,
    )


def best_job(run_dir: Path, profile: Profile, cwd: Path) -> Job:
    """The job that looks for the best member of a sweep, when all have ended."""
    return Job(
        name=default_name(run_dir, "-best"),
        kind="sweep",
        run_dir=run_dir,
        cwd=cwd,
        commands=((*_interpreter(profile), "-m", "launch.best", str(run_dir)),),
    )


def predecessor(config: Config, cwd: Path) -> Path:
    """The run directory whose weights a stage starts from; raises `ConfigError` where it names none."""
    if config.init is None:
        raise ConfigError(f"the stage of {config.run.dir} starts from no other: it has no init.from")
    return cwd / config.init.source


def default_name(run_dir: Path, suffix: str = "") -> str:
    """A name of a job from the last two parts of its run directory."""
    text = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(run_dir.parts[-2:]).replace("/", ""))
    return text[: MAX_NAME - len(suffix)] + suffix


def _interpreter(profile: Profile) -> tuple[str, ...]:
    """The words before `-m` that start Python where the ranks run."""
    container = profile.container
    if container is None:
        return (profile.interpreter,)
    if container.kind == "pyxis":
        return (container.python,)
    binds = [word for mount in container.mounts for word in ("--bind", mount)]
    nv = ["--nv"] if profile.gpus_per_node else []
    return ("apptainer", "exec", *nv, *binds, container.image, container.python)

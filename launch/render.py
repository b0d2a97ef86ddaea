"""A batch script from a profile and a job: directives for sbatch, settings for bash, and the template around them.

The template's logic is the same for every job. What differs stands in two places of it, each a line of its own, and
every value there went through `launch.plain`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from launch import plain
from launch.job import ARRAY, SCRIPT, Job, folder_of
from launch.profile import TEMPLATES, Profile

CODE = Path(__file__).resolve().parents[1]
"""Where `launch` and `pretrain` are imported from, on the nodes too."""

DIRECTIVES, SETTINGS = "@DIRECTIVES@", "@SETTINGS@"
LOG, ARRAY_LOG = "log-%j.txt", "log-%A_%a.txt"


def render(job: Job, profile: Profile) -> str:
    """The batch script. Raises `ConfigError` for what cannot stand in one."""
    log = plain.log_folder(str(job.folder)) + "/" + LOG
    return _fill(SCRIPT, _directives(job, profile, log), _settings(job, profile))


def render_array(
    sweep: Path, name: str, members: Sequence[Job], profile: Profile, at_once: int | None
) -> str:
    """The script of an array whose tasks are jobs of the same shape. at_once: most of them that run together."""
    log = plain.log_folder(str(folder_of(sweep, "sweep"))) + "/" + ARRAY_LOG
    tasks = f"0-{len(members) - 1}" + ("" if at_once is None else f"%{at_once}")
    folders = plain.words(str(member.folder) for member in members)
    directives = _directives(replace(members[0], name=name), profile, log)
    return _fill(ARRAY, [*directives, plain.directive("array", tasks)], [f"members=({folders})"])


def _fill(template: str, directives: Iterable[str], settings: Iterable[str]) -> str:
    lines: list[str] = []
    for line in (TEMPLATES / template).read_text(encoding="utf-8").splitlines():
        if line == DIRECTIVES:
            lines += directives
        elif line == SETTINGS:
            lines += settings
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _directives(job: Job, profile: Profile, log: str) -> Iterator[str]:
    options: dict[str, str | int | None] = {
        "job-name": job.name,
        "output": log,
        "chdir": str(job.cwd),
        "account": profile.account,
        "partition": profile.partition,
        "qos": profile.qos,
        "reservation": profile.reservation,
        "constraint": profile.constraint,
        "nodes": profile.nodes,
        # with 1 here, Slurm takes MIN of MIN-MAX for all that is asked for
        "ntasks-per-node": profile.num_ranks_per_node if profile.num_ranks_per_node > 1 else None,
        "cpus-per-task": profile.cpus_per_rank,
        "mem": profile.mem,
        "time": profile.time,
        "exclude": ",".join(profile.exclude) or None,
        "open-mode": "append",
        "kill-on-invalid-dep": "yes",
        "wait-all-nodes": 1,
    }
    if profile.gpus_per_node:
        kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
        gpus = f"{kind}{profile.gpus_per_node}"
        options[profile.gpu_option] = f"gpu:{gpus}" if profile.gpu_option == "gres" else gpus
    if job.kind == "train":
        options["signal"] = f"USR1@{profile.signal_seconds}"
    for option, value in options.items():
        if value is not None:
            yield plain.directive(option, str(value))
    yield plain.directive("requeue")
    if profile.exclusive:
        yield plain.directive("exclusive")
    for text in profile.sbatch:
        option, equals, value = text.removeprefix("--").partition("=")
        yield plain.directive(option, value if equals else None)


def _settings(job: Job, profile: Profile) -> Iterator[str]:
    for name, value in profile.env.items():
        yield f"export {name}={plain.word(str(value), f'env {name}')}"
    if profile.setup is not None:
        yield f"source {plain.word(profile.setup, 'setup')}"
    if profile.modules:
        yield "declare -F module >/dev/null || source /etc/profile"
        yield f"module load {plain.words(profile.modules)}"
    yield f"code={plain.word(str(CODE))}"
    yield f"ranks_per_node={profile.num_ranks_per_node}"
    yield f"srun_options=({plain.words(_srun_options(profile))})"
    yield f"judge=({plain.words(_judge(job, profile))})"
    yield "preflight() {"
    yield (
        f"  step --time={profile.preflight_minutes} {plain.words(job.preflight)}"
        if job.preflight
        else "  true"
    )
    yield "}"
    yield "work() {"
    for command in job.commands:
        yield f"  step {plain.words(command)} || return"
    yield "}"


def _srun_options(profile: Profile) -> Iterator[str]:
    container = profile.container
    if container is not None and container.kind == "pyxis":
        yield f"--container-image={container.image}"
        if container.mounts:
            yield f"--container-mounts={','.join(container.mounts)}"
    if profile.cpus_per_rank is not None:
        yield "--cpu-bind=cores"  # by itself Slurm does so only where the ranks fill what was allocated
    yield from profile.srun


def _judge(job: Job, profile: Profile) -> Iterator[str]:
    """The command that answers the script's questions, on the host: `scontrol` is not in images."""
    yield from (profile.interpreter, "-m", "launch.attempt", str(job.folder))
    if job.kind == "train":
        yield from ("--run", str(job.run_dir))
    if job.needs is not None:
        yield from ("--needs", str(job.needs))
    yield from ("--without-progress", str(profile.retry.without_progress))
    yield from ("--failures-per-day", str(profile.retry.failures_per_day))
    yield from ("--min-nodes", str(profile.min_nodes))
    if profile.exclude:
        yield from ("--exclude", ",".join(profile.exclude))

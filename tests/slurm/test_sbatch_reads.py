"""What a real sbatch makes of the directives: the folder of the job and the path of its log, as they were written."""

from dataclasses import replace
from pathlib import Path

from cluster import Cluster, wait_until
from test_render import HOSTILE, acceptable, job, profile

from launch.render import render
from pretrain.errors import ConfigError

NAMES = [name for name in HOSTILE if acceptable(name)]


def test_a_job_starts_where_it_should_and_its_log_is_where_it_should(
    cluster: Cluster, tmp_path: Path
) -> None:
    logs: dict[Path, Path] = {}
    for number, name in enumerate([*NAMES, "hetjob", "a packjob b", " ends with a blank "]):
        run, cwd = tmp_path / f"run{number}" / name, tmp_path / f"cwd{number}" / name
        one = replace(job(), run_dir=run, cwd=cwd)
        try:
            script = render(one, profile(partition="main"))
        except ConfigError:
            assert {"%", "\\"} & set(name), name
            continue  # Slurm takes these for its own: `test_render` has them refused
        one.folder.mkdir(parents=True)
        cwd.mkdir(parents=True)
        directives = script[: script.index("\n#\n")]
        (one.folder / "stage.sbatch").write_text(f"{directives}\npwd\n")
        submitted = cluster.run("sbatch", "--parsable", "--", str(one.folder / "stage.sbatch")).strip()
        logs[one.folder / f"log-{submitted}.txt"] = cwd
    assert len(logs) > 18

    def missing() -> dict[Path, Path]:
        return {log: cwd for log, cwd in logs.items() if not log.is_file() or log.read_text() != f"{cwd}\n"}

    def jobs_left() -> str:
        return cluster.run("squeue", "--noheader", "--format=%j|%T", "--name=one")

    wait_until(lambda: not jobs_left().strip(), "all jobs have ended")
    assert not missing()

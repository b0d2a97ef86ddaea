"""Secrets planted where people put them; then everything that a run leaves behind is searched for them."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import yaml
from digits import digits
from mlflow_server import Server, Stored
from patience import PATIENCE
from proxy import Proxy

from pretrain.config import dump

__all__ = ["digits"]

ROOT = Path(__file__).parents[2]
COMMAND = """
import runpy, sys
from patience import let_runs_deliver
let_runs_deliver()
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""`python -m`, by which a run that ends waits for MLflow."""
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY00AAAAAAAA",
    "AWS_SECRET_ACCESS_KEY": "canary01/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "AWS_SESSION_TOKEN": "canary02" * 8,
    "HF_TOKEN": "hf_canary03aaaaaaaaaaaaaaaaaaaaaa",
    "MLFLOW_TRACKING_TOKEN": "canary04aaaaaaaa",
    "SITE_PASSWORD": "canary05",
}
"""Set for every command, as users have them set; the last one is handed to the job by the profile's pass_env."""
REFUSED = {
    "tracking.uri=http://me:canary06@head:5000": "looks like a secret",
    "data.train.shards=s3://bucket/a.tar?X-Amz-Signature=canary07": "looks like a secret",
    "data.train.shards=https://canary08@host/a.tar": "looks like a secret",
    "run.campaign=password=canary09": "looks like a secret",
    "tracking.hf_token=canary10": "unknown key",
    "init.from=hf_canary11aaaaaaaaaaaaaaaaaaa": "looks like a secret",
}
"""Overrides that must end the command before anything is written."""
ANSWER = b"denied; you sent Authorization: Bearer canary12aaaaaaaa and token=canary13"
"""What a server may echo in an error, which is logged."""
PROFILE = {"api": "canary14", "url": "https://me:canary15@host/x"}
"""Values of variables that a profile may not name."""
CANARIES = [f"canary{number:02d}" for number in range(17)]


class Talkative(Proxy):
    """Answers 500 with what it was sent, for the first few requests."""

    refusals = 2

    def _answer(self, asked, status: int, body: bytes) -> None:
        super()._answer(asked, status, ANSWER if self.mode == "500" else body)
        if self.seen.get("500", 0) >= self.refusals:
            self.mode = "pass"


class Site:
    """A user's folder with a config, a profile, and programs of Slurm that write down what they are given."""

    def __init__(self, folder: Path, shards: Path, uri: str) -> None:
        self.folder = folder
        self.said: list[str] = []
        config = tiny.config(
            run={"dir": "runs/one"},
            data={
                "train": {"shards": f"{shards}/train"},
                "val": {"shards": f"{shards}/val"},
                "decode_threads": 1,
            },
            model={"in_chans": 1, "num_classes": 10},
            train={
                "global_batch": 8, "total_steps": 6, "log_every_steps": 2, "eval_every_steps": 6, "figures_every_steps": 6,
            },
            profile={"steps": (2, 3)},
            checkpoint={"mirror": str(folder / "mirror")},
            tracking={"uri": uri, "system_seconds": 0.2},
        )  # fmt: skip
        (folder / "one.yaml").write_text(dump(config))
        (folder / "two.yaml").write_text(
            dump(config.model_copy(update={"run": config.run.model_copy(update={"dir": "runs/two"})}))
        )
        self.profile("site.yaml")
        bin_dir = folder / "bin"
        bin_dir.mkdir()
        for name, words in (("sbatch", "echo 101"), ("scontrol", "echo JobState=PENDING"), ("scancel", "")):
            (bin_dir / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/slurm-calls\n{words}\n')
            (bin_dir / name).chmod(0o755)
        self.environment = os.environ | ENVIRONMENT
        self.environment |= {
            "PATH": f"{bin_dir}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        }

    def profile(self, name: str, **env: str) -> None:
        values = {"time": 10, "pass_env": ["SITE_PASSWORD"], **({"env": env} if env else {})}
        (self.folder / name).write_text(yaml.safe_dump(values))

    def call(self, *words: str, code: int) -> str:
        # who delivers for a failed run would be left behind for long
        start = ["-c", COMMAND] if code == 0 else ["-m"]
        done = subprocess.run(
            [sys.executable, *start, *words], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        self.said += [done.stdout, done.stderr]
        return done.stderr


@pytest.fixture
def proxy(server: Server) -> Iterator[Talkative]:
    server.start()
    proxy = Talkative(server.port)
    proxy.mode = "500"
    yield proxy
    proxy.close()


def leaks(folder: Path) -> list[tuple[str, str]]:
    """(file, canary) of every canary in a file below `folder`."""
    return [
        (str(path.relative_to(folder)), canary)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for canary in CANARIES
        if canary.encode() in content_of(path).lower()
    ]


def content_of(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def written(folder: Path, *patterns: str) -> None:
    """See that what is searched is there at all."""
    for pattern in patterns:
        assert any(path.stat().st_size for path in folder.glob(pattern)), pattern


def test_no_secret_of_seventeen_is_in_anything_that_a_run_leaves(
    server: Server, proxy: Talkative, digits: Path, tmp_path: Path
) -> None:
    site = Site(tmp_path, digits, proxy.uri)
    for override, complaint in REFUSED.items():
        assert complaint in site.call("pretrain.train", "one.yaml", override, code=2)
    assert not (tmp_path / "runs").exists()
    site.call("pretrain.train", "one.yaml", code=0)
    assert proxy.seen["500"] >= 2
    assert "does not answer" in (tmp_path / "runs/one/logs/tracking.log").read_text()
    assert Stored(server.database, tmp_path / "runs" / "one").status == "FINISHED"
    for name, (variable, value) in zip(("a", "b"), PROFILE.items(), strict=True):
        site.profile(f"{name}.yaml", **{f"{variable}_key" if variable == "api" else variable: value})
        site.call("launch.slurm", "submit", "two.yaml", "--profile", f"{name}.yaml", code=2)
        (tmp_path / f"{name}.yaml").unlink()  # the user's own
    site.call("launch.slurm", "submit", "two.yaml", "--profile", "site.yaml", "--dry-run", code=0)
    site.call("launch.slurm", "submit", "two.yaml", "--profile", "site.yaml", code=0)
    script = (tmp_path / "runs/two/slurm/train/stage.sbatch").read_text()
    assert script.startswith("#!")
    assert json.loads((tmp_path / "runs/two/slurm/train/job.json").read_text())["job_id"] == 101

    # failing: an error with its traceback, and what the ranks say of it to one another and to the batch script
    proxy.mode, proxy.refusals = "500", 10**9
    bad = [
        "run.dir=runs/bad",
        f"data.train.shards={proxy.uri}/train-000000.tar",
        "data.read_timeout_seconds=2",
        "--debug",
    ]
    said = site.call("pretrain.train", "one.yaml", *bad, code=3)
    assert "Traceback" in said

    over = ["--over", "optim.lr=0.003,0.01", "--profile", "site.yaml"]
    site.call("launch.slurm", "sweep", "two.yaml", "run.dir=runs/sweep", *over, code=0)
    site.call("launch.slurm", "status", "runs/two", code=0)
    site.call("pretrain", "export", "runs/one", "--licence", "hf_canary16aaaaaaaaaaaaaaaaaaa", code=0)
    run = tmp_path / "runs" / "one"
    written(
        run,
        "figures/*/*.png",
        "profile/*/*.json.gz",
        "status.json",
        "heartbeat.json",
        "tracking/*",
        "export/*/*",
    )
    written(tmp_path / "mirror", "*/manifest.json", "journal")
    written(
        tmp_path / "runs",
        "bad/logs/*",
        "sweep/sweep.json",
        "sweep/slurm/*/*.sbatch",
        "sweep/*/slurm/*/*.sbatch",
    )

    (tmp_path / "said").write_text("\n".join(site.said))
    assert not (found := leaks(tmp_path)), found
    assert leaks(server.folder) == []  # database, artifacts and log of MLflow


def test_a_canary_that_leaked_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log").write_text("AWS_ACCESS_KEY_ID=AKIACANARY00AAAAAAAA")
    with gzip.open(tmp_path / "a" / "trace.json.gz", "wb") as file:
        file.write(b"token=Canary13")
    assert leaks(tmp_path) == [("a/log", "canary00"), ("a/trace.json.gz", "canary13")]

"""The same command under real launchers: started, stopped by a signal, gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE, deliver_the_rest
from test_bad_input import write
from test_resume import config

from pretrain.checkpoint import checkpoints
from pretrain.config import load
from pretrain.demo import SMOKE, _refuse_orphan
from pretrain.errors import UserError
from pretrain.images import validation_images
from pretrain.train import UNDER_BATCH_SCRIPT

TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
    "--no-python",
)
TRAIN = (sys.executable, "-m", "pretrain.train")
CLONE = Path(__file__).parents[2]
ACCELERATE = (
    str(Path(sys.executable).parent / "accelerate"),
    "launch",
    "--config_file",
    str(CLONE / "launch" / "single_node.yaml"),
    "-m",
    "pretrain.train",
)


def status(run: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((run / "status.json").read_text())
    return loaded


def wait_for_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if any(int(folder.name.removeprefix("step_")) >= step for folder in checkpoints(run)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was never saved: {process.communicate()}")


def test_launchers_leave_a_stopped_run_the_time_to_save_and_plain_python_finishes(
    digits: Path, tmp_path: Path
) -> None:
    long = config(tmp_path / "run", digits, checkpoint={"every_steps": 2}, train={"total_steps": 5000})
    path = write(long, tmp_path)
    saved = 0
    for launcher, number in (((*TORCHRUN, *TRAIN), signal.SIGTERM), (ACCELERATE, signal.SIGINT)):
        with subprocess.Popen([*launcher, path], stderr=subprocess.PIPE, text=True) as process:
            wait_for_step(tmp_path / "run", saved + 4, process)
            process.send_signal(number)
            assert process.wait(PATIENCE) != 0  # not finished: nothing may be exported behind an `&&`
        stopped = status(tmp_path / "run")
        assert stopped["status"] == "interrupted"
        assert isinstance(stopped["step"], int)
        assert stopped["step"] > saved
        saved = stopped["step"]
    logs = {path.name for path in (tmp_path / "run" / "logs").iterdir()}
    assert {"rank_0.log", "rank_1.log"} <= logs
    shown = subprocess.run([*TRAIN, path, f"train.total_steps={saved + 3}"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert f"resuming at step {saved}" in shown.stderr
    assert status(tmp_path / "run")["status"] == "finished"
    assert shown.stdout == ""


def test_plain_python_stopped_by_ctrl_c_exits_75_and_goes_on(digits: Path, tmp_path: Path) -> None:
    long = config(tmp_path / "run", digits, checkpoint={"every_steps": 1}, train={"total_steps": 5000})
    path = write(long, tmp_path)
    with subprocess.Popen([*TRAIN, path], stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(tmp_path / "run", 2, process)
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, words
    assert "the same command goes on from there" in words
    saved = status(tmp_path / "run")["step"]
    assert isinstance(saved, int)
    shorter = [*TRAIN, path, f"train.total_steps={saved + 2}"]
    assert subprocess.run(shorter, capture_output=True).returncode == 0
    assert status(tmp_path / "run")["step"] == saved + 2


SIGNALLED = """
import os, runpy, signal, sys

class Signalled:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGUSR1)

sys.meta_path.insert(0, Signalled())
runpy.run_module("pretrain.train", run_name="__main__", alter_sys=True)
"""
"""`python -m pretrain.train`, which gets a signal while it imports torch."""


def test_a_signal_during_the_imports_is_not_lost_and_our_batch_script_hears_0(
    digits: Path, tmp_path: Path
) -> None:
    path = write(config(tmp_path / "run", digits), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, path], env=os.environ | {UNDER_BATCH_SCRIPT: "1"}, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stopped = status(tmp_path / "run")
    assert stopped["status"] == "interrupted"
    assert stopped["step"] in range(1, 4)


def test_evaluate_needs_nothing_of_the_training_s_length(digits: Path, tmp_path: Path) -> None:
    """Nor of how it drew its samples: a mixture, copies of samples, mixed pairs."""
    length = {"total_steps": None, "total_epochs": 1.0, "micro_batch": None, "global_batch": 24}
    mix = [
        {"name": split, "shards": str(digits / split), "weight": weight}
        for split, weight in (("train", 3.0), ("val", 1.0))
    ]
    data = {"train": {"mix": tuple(mix)}, "augment": {"repeats": 3}}
    cfg = config(
        tmp_path / "run",
        digits,
        train=length,
        optim={"warmup_steps": 20},
        data=data,
        objective={"mixup_alpha": 0.2},
    )
    assert subprocess.run([*TRAIN, write(cfg, tmp_path)], capture_output=True).returncode == 0
    command = [sys.executable, "-m", "pretrain", "evaluate", str(tmp_path / "run"), "--json", "--batch", "25"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    trained = status(tmp_path / "run")["scores"]
    assert isinstance(trained, dict)
    assert json.loads(shown.stdout)["val/loss"] == pytest.approx(trained["val/loss"], abs=1e-5)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "pretrain"]
    failed = subprocess.run(
        [*torchrun, *command[3:], "--shards", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert failed.returncode != 0
    assert failed.stderr.count("there is no such folder") == 1, failed.stderr
    images = validation_images(load(tmp_path / "run" / "config.yaml"))
    assert images is not None
    assert len(images) == 16


def test_a_second_stage_of_the_demo_is_not_shown_without_its_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    SMOKE.run("finetune").mkdir(parents=True)
    with pytest.raises(UserError, match="rm -r runs/demo-smoke to begin anew"):
        _refuse_orphan(SMOKE)
    SMOKE.run("pretrain").mkdir()
    _refuse_orphan(SMOKE)


SLOW_TO_SAVE = """
import pathlib, signal, sys, time
from pretrain.demo import _call
child = "import signal, time; signal.signal(2, lambda *_: (time.sleep(1), open('saved', 'w').close(), exit(75))); print(1, flush=True); time.sleep(60)"
_call([sys.executable, "-c", child], {})
"""


def test_ctrl_c_in_the_demo_leaves_the_training_the_time_to_save(tmp_path: Path) -> None:
    """A terminal sends it to both."""
    demo = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_SAVE], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert demo.stdout is not None
    assert demo.stdout.readline() == b"1\n"
    os.killpg(demo.pid, signal.SIGINT)
    _, words = demo.communicate(timeout=PATIENCE)
    assert (tmp_path / "saved").is_file()
    assert b"KeyboardInterrupt" in words


def test_the_demo_in_its_smoke_mode(tmp_path: Path) -> None:
    """`accelerate launch` with two processes, hand-off, evaluation and export, by the script that users run."""
    for name in ("pretrain", "launch", "configs", "pyproject.toml"):
        (tmp_path / name).symlink_to(CLONE / name)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.demo", "--smoke"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "right after the resize" in done.stderr
    assert status(tmp_path / "runs/demo-smoke/finetune")["first_scores"]
    assert (tmp_path / "runs/demo-smoke/finetune/export/safetensors/config.json").is_file()
    deliver_the_rest(tmp_path / "runs")
    assert (tmp_path / "runs/mlflow.db").is_file()

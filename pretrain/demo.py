"""`make demo`: the whole way on a small real data set, by the commands that a user would type.

Images to shards, a ViT pretrained at 20 pixels by two processes, handed to a second stage at 28 pixels with its position
embedding resized, evaluated, exported, the export loaded again and compared; all of it tracked in MLflow. A demo that
was interrupted goes on where it stopped. `--smoke` does the same in a minute, on handwritten digits.
"""

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from pretrain import command
from pretrain.errors import UserError
from pretrain.world import EXPECTED_WORLD

CLONE = Path(__file__).absolute().parents[1]
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
GOAL = 0.80
"""Top-1 that the fine-tuned model passes on Fashion-MNIST, besides beating the pretrained one. Other images are
whatever they are: for them the demo only shows the numbers."""


@dataclass(frozen=True)
class Setting:
    """Where the demo writes, and how it differs from the configs that it runs."""

    name: str
    overrides: tuple[str, ...]

    @property
    def shards(self) -> Path:
        return Path("data") / self.name

    def run(self, stage: str) -> Path:
        return Path("runs") / self.name / stage


FULL = Setting("demo", ())
DIGITS = Setting("demo-digits", ())
SMOKE = Setting("demo-smoke", ("train.total_steps=6", "train.eval_every_steps=6", "train.log_every_steps=2",
                               "optim.warmup_steps=2", "checkpoint.every_steps=3"))  # fmt: skip


@click.command()
@click.option(
    "--smoke", is_flag=True, help="A few steps on scikit-learn's digits: does everything work here?"
)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Images of your own: CLASS/*.jpg.",
)
def demo(smoke: bool, data: Path | None) -> None:
    """Run the whole product on a small real data set: three to ten minutes on two CPU cores."""
    began = time.monotonic()
    source = data.resolve() if data else None  # it was given from another folder, perhaps
    os.chdir(CLONE)
    say = Console(stderr=True)
    source, setting = (source, _own(source)) if source else _shipped(smoke, say)
    if smoke:
        setting = Setting(setting.name if data is None else f"{setting.name}-smoke", SMOKE.overrides)
    _pack(setting, source, say)
    classes = _classes(setting)
    _refuse_orphan(setting)
    _train(setting, "pretrain", classes, say)
    _train(setting, "finetune", classes, say)
    finetuned = str(setting.run("finetune"))
    _run(say, "evaluate it on every validation image", "-m", "pretrain", "evaluate", finetuned)
    if not (setting.run("finetune") / "export" / "safetensors").exists():
        _run(say, "export it, load the export, compare", "-m", "pretrain", "export", finetuned)
    _summary(setting, say, time.monotonic() - began)


def _own(images: Path) -> Setting:
    """A folder of the user's has a demo of its own, which no other folder's is taken for, nor the same one's after images
    came or went."""
    files = sorted(str(path) for path in images.rglob("*") if path.is_file())
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", images.name)
    return Setting(
        f"demo-{name}-{hashlib.sha256(chr(0).join([str(images), *files]).encode()).hexdigest()[:6]}", ()
    )


def _shipped(smoke: bool, say: Console) -> tuple[Path, Setting]:
    """Images that can be had on any machine."""
    if smoke:
        return _digits(), SMOKE
    fashion = fashion_mnist(say)
    return (_digits(), DIGITS) if fashion is None else (fashion, FULL)


def _pack(setting: Setting, source: Path, say: Console) -> None:
    """Images to data/NAME/train and data/NAME/val, unless they are there."""
    if (setting.shards / "train" / "manifest.json").is_file():
        return
    split = any(source.glob("*-idx3-ubyte*")) or (source / "train").is_dir()
    share = () if split else ("--val-share", "0.2")
    arguments = ("shards", "pack", str(source), str(setting.shards), "--shards", "8", *share)
    _run(say, f"pack the images of {source} into shards", "-m", "pretrain", *arguments)


def fashion_mnist(say: Console) -> Path | None:
    """Debian's copy of Fashion-MNIST: installed, or fetched below data/ as any user can."""
    if INSTALLED.is_dir():
        return INSTALLED
    folder = Path("data") / "source" / PACKAGE
    if not folder.is_dir():
        say.print(f"[dim]fetching Debian's {PACKAGE} (30 MB)[/dim]")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(
                dir=folder.parent
            ) as aside:  # a half of it would be taken for all
                _fetch(Path(aside), PACKAGE)
                (Path(aside) / "unpacked").rename(folder)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            say.print(f"[dim]not to be had here ({error}): taking scikit-learn's digits[/dim]")
            return None
    return folder / INSTALLED.relative_to("/")


def _fetch(folder: Path, package: str) -> None:
    """A Debian package's files, to `folder`/unpacked; needs no root."""
    subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
    archive = next(folder.glob("*.deb")).resolve()
    subprocess.run(["dpkg", "-x", str(archive), str(folder / "unpacked")], check=True, capture_output=True)


def _digits() -> Path:
    """The 1,797 handwritten digits that come with scikit-learn, as a folder of images by class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = Path("data") / "source" / "digits"
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).save(path)
    return folder


def _classes(setting: Setting) -> int:
    from pretrain.data import open_dataset

    return open_dataset(str(setting.shards / "train")).labels[1] + 1


def _refuse_orphan(setting: Setting) -> None:
    """A second stage whose first is gone would be shown beside the numbers of another model."""
    if setting.run("finetune").exists() and not setting.run("pretrain").exists():
        raise UserError(
            f"{setting.run('finetune')} was made from a {setting.run('pretrain')} that is gone; the two stages belong "
            f"together: rm -r {setting.run('pretrain').parent} to begin anew"
        )


def _train(setting: Setting, stage: str, classes: int, say: Console) -> None:
    from pretrain.run_dir import STATUS, read_status

    run = setting.run(stage)
    if (run / STATUS).is_file() and read_status(run)["status"] == "finished":
        say.print(f"[dim]{run} is finished already; rm -r {run.parent} to begin anew[/dim]")
        return
    config = f"configs/demo_{stage}.yaml"
    overrides = [*setting.overrides, f"run.dir={run}", f"run.campaign={setting.name}"]
    overrides += [f"data.{split}.shards={setting.shards / split}" for split in ("train", "val")]
    overrides += [f"model.num_classes={classes}"]
    if stage == "finetune":
        overrides += [f"init.from={setting.run('pretrain')}"]
    processes = _processes()
    launcher = ("-m", "accelerate.commands.launch", "--config_file", "launch/single_node.yaml")
    needed = () if setting is FULL else overrides  # what its configs say anyway
    what = {"pretrain": "pretrain at low resolution", "finetune": "fine-tune at high resolution"}[stage]
    _run(
        say,
        f"{what}, {processes} process{'es' if processes > 1 else ''}",
        *(launcher if processes > 1 else ()),
        "-m",
        "pretrain.train",
        config,
        *needed,
        env={EXPECTED_WORLD: str(processes)},
    )


def _processes() -> int:
    """Two, as the launcher's file says; one on a machine with a single GPU, which two ranks cannot share."""
    import torch

    return 1 if torch.cuda.device_count() == 1 else 2


def _run(say: Console, what: str, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Show a step and the command that does it; stop the demo if it fails."""
    shown = shlex.join(arguments).replace("-m accelerate.commands.launch", "accelerate launch")
    if arguments[1] == "pretrain":
        shown = shown.replace("-m pretrain ", "pretrain ", 1)
    elif arguments[1] == "pretrain.train":
        shown = f"python {shown}"
    say.rule(f"[bold]{what}")
    say.print(f"$ {shown}", style="cyan", highlight=False, soft_wrap=True)
    code = _call([sys.executable, *arguments], os.environ | (env or {}))
    if code:
        raise UserError(f"this step of the demo ended with exit code {code}; `make demo` tries it again")


def _call(command: list[str], env: Mapping[str, str]) -> int:
    """Run a command to its end, also after a Ctrl-C, which reaches it too: it may have something to save."""
    interrupt = None
    with subprocess.Popen(command, env=env) as process:
        while process.returncode is None:
            try:
                process.wait()
            except KeyboardInterrupt as pressed:
                interrupt = pressed
    if interrupt is not None:
        raise interrupt
    return process.returncode


def _summary(setting: Setting, say: Console, seconds: float) -> None:
    from pretrain.run_dir import read_status

    first, second = (read_status(setting.run(stage)) for stage in ("pretrain", "finetune"))
    before, handed, after = (
        s["val/top1"] for s in (first["scores"], second["first_scores"], second["scores"])
    )
    table = Table("", "top-1 on the validation set", title=f"the demo took {seconds / 60:.1f} minutes")
    table.add_row("pretrained at low resolution", f"{before:.2%}")
    table.add_row("right after the resize, nothing learnt yet", f"{handed:.2%}")
    table.add_row("fine-tuned at high resolution", f"{after:.2%}")
    say.rule("[bold]done")
    say.print(table)
    say.print(f"export    {setting.run('finetune')}/export/safetensors")
    say.print(f"figures   {setting.run('finetune')}/figures: positions, filters, attention")
    say.print("MLflow    make ui")
    say.print("next      your own images: the README's “Train on your own shards”;")
    say.print(f"          to run this again from the start: rm -r runs/{setting.name}")
    if setting is FULL and not (after > before and after > GOAL):
        raise UserError(
            f"the fine-tuned model ({after:.2%}) should beat the pretrained one ({before:.2%}) and {GOAL:.0%}"
        )


if __name__ == "__main__":
    command.run(demo, "python -m pretrain.demo")

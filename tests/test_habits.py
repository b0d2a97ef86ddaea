"""The front door: what README, Makefile and hooks say is what is there."""

import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from click.testing import CliRunner
from patience import PATIENCE

from launch.best import best
from launch.mlflow_server import mlflow_server
from launch.slurm import slurm
from pretrain.cli import pretrain
from pretrain.config.load import parse
from pretrain.demo import demo
from pretrain.docs import BEGIN, END, docs
from pretrain.studies.__main__ import studies
from pretrain.train import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
MAKEFILE = (ROOT / "Makefile").read_text()
ROOMS = ("configs/", "launch/", "pretrain/", "tests/", "benchmarks/", "docs/", "slurm/")
MODULES = {
    "pretrain": pretrain,
    "pretrain.train": train,
    "pretrain.docs": docs,
    "pretrain.demo": demo,
    "pretrain.studies": studies,
    "launch.slurm": slurm,
    "launch.best": best,
}


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def headers(folder: str) -> Iterable[str]:
    """The commands in the headers of the shipped configs and launcher files."""
    for path in sorted((ROOT / folder).rglob("*.yaml")):
        text = re.sub(r"\\\n# +", "", path.read_text())
        yield from re.findall(r"^# {3,}(accelerate launch .*|pretrain .*)$", text, re.MULTILINE)


INLINE = re.findall(r"`((?:make|pretrain|python -m|launch/\w+\.sh) [^`\n]+)`", README)
COMMANDS = sorted(
    {line for page in PAGES for block in blocks("sh", page) for line in block.splitlines() if line}
    | set(INLINE)
    | set(headers("configs"))
    | set(headers("launch"))
)


def accept(command: click.Command, words: list[str]) -> None:
    """Let click parse the words as `command` would, without running it; raises `click.UsageError`."""
    context = command.make_context(command.name or "", list(words), resilient_parsing=False)
    if isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, inner, rest = command.resolve_command(context, rest)
        assert name is not None
        assert inner is not None
        if rest:  # naming a command without its arguments is talking about it
            accept(inner, rest)


def accept_make(words: list[str]) -> None:
    for word in words:
        name, equals, _ = word.partition("=")
        assert re.search(rf"\$\({name}\)" if equals else rf"^{name}:", MAKEFILE, re.MULTILINE), word


def accept_accelerate(words: list[str]) -> None:
    arguments = launch_command_parser().parse_args(words[1:])
    assert words[0] == "launch"
    assert (ROOT / arguments.config_file).is_file()
    assert arguments.module
    if arguments.training_script_args[0] != "CONFIG":
        accept(MODULES[arguments.training_script], arguments.training_script_args)


def accept_python(words: list[str]) -> None:
    flag, module, *rest = words
    assert flag == "-m"
    if rest:
        accept(MODULES[module], rest)
    assert module in MODULES


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "pretrain": lambda words: accept(pretrain, words),
    "make": accept_make,
    "accelerate": accept_accelerate,
    "python": accept_python,
    "source": lambda words: None,
    "launch/pretrain.sh": lambda words: accept(slurm, ["submit", *words]),
    "launch/finetune.sh": lambda words: accept(slurm, ["submit", "--after-init", *words]),
    "launch/pipeline.sh": lambda words: accept(slurm, ["chain", *words]),
    "launch/mlflow-server": lambda words: accept(mlflow_server, words),
}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_that_we_show_is_one_that_we_have(line: str) -> None:
    program, *words = shlex.split(line)
    assert program in CHECKS, f"a test does not know {program}"
    if words:
        CHECKS[program](words)


@pytest.mark.parametrize(
    "line",
    [
        "pretrain plans x",
        "pretrain plan x --gpus 8",
        "make demos",
        "make demo DATE=x",
        "pretrain shards unpack x",
    ],
)
def test_a_command_that_we_do_not_have_would_be_noticed(line: str) -> None:
    program, *words = shlex.split(line)
    with pytest.raises((click.UsageError, AssertionError)):
        CHECKS[program](words)


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_every_config_in_the_readme_is_accepted(number: int) -> None:
    parse(blocks("yaml")[number], f"README block {number}")


def test_every_path_in_the_readme_exists() -> None:
    written_by_the_reader = {"configs/mine.yaml", "configs/mine_224.yaml"}
    named = set(re.findall(rf"\b(?:{'|'.join(ROOMS)})[\w./-]*\w", README))
    missing = {path for path in named if not (ROOT / path).exists()}
    assert missing == written_by_the_reader


def rooms() -> set[str]:
    """What the tree should list: everything visible at the top, and one level more inside the product."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    found = {"pretrain/"}
    for parts in (path.split("/") for path in tracked if not path.startswith((".", "README.md"))):
        depth = 2 if parts[0] == "pretrain" else 1
        found.add("/".join(parts[:depth]) + ("/" if len(parts) > depth else ""))
    return {room for room in found if "/__" not in room}


def tree() -> list[str]:
    """The rooms that the README lists, in its order."""
    found = re.search(r"^```\n(.*?)^```$", section("The tree"), re.MULTILINE | re.DOTALL)
    assert found
    listed, above = [], ""
    for line in found[1].splitlines():
        parts = re.fullmatch(r"( *)(\S+) +\S.*", line)
        assert parts, line
        above = above if parts[1] else parts[2]
        listed.append(above + parts[2] if parts[1] else parts[2])
    return listed


def test_the_tree_has_one_line_for_each_room_and_no_other() -> None:
    assert sorted(tree()) == sorted(rooms())


def test_the_tree_goes_down_as_the_imports_do() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    depth = {name: d for d, line in enumerate(contract["layers"]) for name in re.findall(r"\w+", line)}
    depths = [
        depth[Path(room).stem] for room in tree() if room.startswith("pretrain/") and room != "pretrain/"
    ]
    assert depths == sorted(depths)


def test_the_table_of_settings_is_that_of_the_schema() -> None:
    done = CliRunner().invoke(docs, [str(ROOT / "README.md"), "--check"])
    assert done.exit_code == 0, done.exception


def test_an_old_or_a_missing_table_of_settings_is_noticed_and_an_old_one_mended(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n| `run.dirr` |\n{END}\nafter\n")
    assert "is not that of the schema" in str(CliRunner().invoke(docs, [str(readme)]).exception)
    assert CliRunner().invoke(docs, [str(readme), "--write"]).exit_code == 0
    assert CliRunner().invoke(docs, [str(readme)]).exit_code == 0
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")
    readme.write_text("no table\n")
    assert "no place for the table" in str(CliRunner().invoke(docs, [str(readme)]).exception)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE
    )


def test_make_alone_lists_every_command() -> None:
    done = make()
    assert done.returncode == 0, done.stderr
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())  # type: ignore[index]
    assert set(re.findall(r"^  make (\S+)", done.stdout, re.MULTILINE)) == phony - {
        "debian-packages",
        "native",
    }


def test_make_demo_hands_its_settings_over_whole() -> None:
    done = make("--dry-run", "demo", "DATA=my photos; ls", "SMOKE=1", "VENV=/nowhere")
    assert '/nowhere/bin/python -m pretrain.demo --data "$DATA" --smoke' in done.stdout


def test_an_old_python_and_one_without_venv_are_told_what_to_install(tmp_path: Path) -> None:
    for answers, message in (
        ("1", "Python 3.11 or newer is needed"),
        ("0 1", "apt-get install python3-venv"),
    ):
        python = tmp_path / "python3"
        count = tmp_path / "count"
        count.write_text("")
        # A stand-in that answers each question with the next exit code.
        python.write_text(
            f'#!/bin/bash\n[ "$1" = -c ] || exit 0\nanswers=({answers})\necho >> {count}\n'
            f"exit ${{answers[$(($(wc -l < {count}) - 1))]:-0}}\n"
        )
        python.chmod(0o755)
        done = make("lint", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        assert done.returncode != 0
        assert message in done.stderr


def test_ci_runs_the_commands_that_people_type() -> None:
    script = ROOT / ".ci" / "run"
    assert subprocess.run(["bash", "-n", str(script)], timeout=PATIENCE).returncode == 0
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make ")] == ["make lint", "make test"]


def test_a_commit_is_judged_by_the_tools_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks[0]["hooks"]}
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]  # type: ignore[index]
    assert tools == set(re.findall(r"\$\(BIN\)/(\w+)", recipe))

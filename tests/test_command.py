"""How commands end, what they import before they work, and what hardware they see."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from patience import PATIENCE

from launch.slurm import slurm
from pretrain import command, hardware
from pretrain.cli import COMMANDS, pretrain
from pretrain.command import one_speaker
from pretrain.errors import CheckpointError, ConfigError
from pretrain.world import World

ROOT = Path(__file__).parents[1]
MOST_MODULES = 500
"""What a fifth of a second imports is less; most of the heavy ones alone are more."""
HEAVY = ("torch", "deepspeed", "mlflow", "webdataset", "accelerate", "pandas")

IMPORTS = f"""
import atexit, runpy, sys
atexit.register(lambda: print(len(sys.modules)))
atexit.register(lambda: print("heavy:", *[name for name in {HEAVY!r} if name in sys.modules]))
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=False)
"""


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of every command and subcommand."""
    found = [path]
    context = click.Context(group)
    for name in group.list_commands(context):
        inner = group.get_command(context, name)
        found += commands(inner, (*path, name)) if isinstance(inner, click.Group) else [(*path, name)]
    return found


MODULES = [("pretrain", *words) for words in commands(pretrain)] + [
    ("pretrain.train",),
    ("pretrain.demo",),
    ("pretrain.docs",),
    ("launch.preflight",),
    *(("launch.slurm", *words) for words in commands(slurm)),
]


@pytest.mark.parametrize("words", MODULES, ids=" ".join)
def test_help_comes_at_once_and_without_heavy_imports(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *words, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ")
    *_, heavy, count = done.stdout.splitlines()
    assert heavy.split() == ["heavy:"]
    assert int(count) < MOST_MODULES


def test_the_group_lists_every_command_by_its_line_and_imports_none() -> None:
    code = "import sys; from pretrain.cli import main; sys.argv[1:] = ['--help']\ntry: main()\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    table, _, modules = done.stdout.partition("Commands:")[2].rpartition("\n\n")
    for name, lazy in COMMANDS.items():
        assert name in table
        assert lazy.summary.split()[0] in table
        assert lazy.target.partition(":")[0] not in modules.split()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_can_be_imported(name: str) -> None:
    found = pretrain.get_command(click.Context(pretrain), name)
    assert found is not None
    assert found.help


def ending(
    action: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> int | str | None:
    """The exit code of a command that does `action`."""
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(SystemExit) as caught:
        command.run(click.Command("x", callback=action), "x")
    return caught.value.code


def fail(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


Capture = pytest.CaptureFixture[str]


def test_a_users_mistake_is_its_message_alone_and_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert ending(fail(CheckpointError("it is gone")), monkeypatch) == CheckpointError.exit_code
    assert capsys.readouterr() == ("", "Error: it is gone\n")


def test_debug_shows_the_traceback_and_keeps_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert ending(fail(CheckpointError("it is gone")), monkeypatch, "--debug") == CheckpointError.exit_code
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert "it is gone" in error


def test_a_wrong_option_is_clicks_message(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert ending(lambda: None, monkeypatch, "--wrong") == 2
    assert "No such option" in capsys.readouterr().err


def test_ctrl_c_ends_in_silence(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert ending(fail(KeyboardInterrupt()), monkeypatch) == 130
    assert capsys.readouterr().err.strip() == ""


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ZeroDivisionError):
        command.run(click.Command("x", callback=lambda: 1 / 0), "x")


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (75, 75)])
def test_a_number_that_a_command_returns_is_its_exit_code(
    result: int | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ending(lambda: result, monkeypatch) == code


def test_a_mistake_in_a_config_ends_a_command_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text("run: {dir: no}\n")
    for words in (["pretrain", "plan"], ["pretrain.train"]):
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS, *words, str(config)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 2
        assert "mistakes in the configuration" in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.splitlines()[0].split() == ["heavy:"]


def test_the_processor_is_named_and_its_bf16_units_are_seen() -> None:
    epyc = (
        "processor\t: 0\nmodel name\t: AMD EPYC 9654\nflags\t\t: fpu avx2 avx512_bf16 sse\n\nprocessor\t: 1\n"
    )
    assert hardware.cpu(epyc) == hardware.Hardware("cpu", "AMD EPYC 9654", has_bf16=True)
    xeon = "model name\t: Intel Xeon\nflags\t\t: fpu avx2 avx512f amx_bf16x\n"
    assert hardware.cpu(xeon) == hardware.Hardware("cpu", "Intel Xeon", has_bf16=False)


def test_a_machine_that_says_nothing_of_itself_has_no_bf16() -> None:
    unknown = hardware.cpu("")
    assert unknown.name
    assert not unknown.has_bf16


def test_the_hardware_here_is_found() -> None:
    found = hardware.detect()
    assert found.device in ("cpu", "cuda")
    assert found.name


def test_before_ranks_have_met_the_first_of_each_machine_speaks_and_then_rank_0_alone() -> None:
    met = ConfigError("met")
    met.is_shared = True
    alone, speaks, silent = ConfigError("alone"), (0, 4), (1, 5)
    for rank in (*speaks, *silent):
        place = World(rank, 8, rank % 4, "127.0.0.1", 0, "test")
        with pytest.raises(ConfigError if rank in speaks else SystemExit), one_speaker(place):
            raise alone
        with pytest.raises(ConfigError if rank == 0 else SystemExit), one_speaker(place):
            raise met

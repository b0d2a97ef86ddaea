"""Nothing of a config, a profile or the environment reaches a shell, or sbatch, as anything but one word."""

import re
import shlex
import subprocess
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from fakes import calls, fake, run_script
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from launch import plain
from launch.job import Job, default_name, export_job, train_job
from launch.profile import TEMPLATES, Profile, load
from launch.render import CODE, render
from pretrain.docs import table
from pretrain.errors import ConfigError
from pretrain.train import UNDER_BATCH_SCRIPT

HOSTILE = [
    "$(touch canary)", "`touch canary`", "; touch canary", "a b", "it's", 'say "hi"', "\\", "\\\\'", "#x", "*", "~",
    "${HOME}", "$'\\n'", "-n", "--help", "&& touch canary", "| touch canary", "> canary", "ü€😀", "\u202e", "!!", "%j",
    "@SETTINGS@", "a\tb", "x\n#SBATCH --partition=evil", "x\r", "x\x00", "x\u2028y", "x\x85y", "\ud800",
]  # fmt: skip
PIECE = st.sampled_from(HOSTILE) | st.text(max_size=12)
TEXT = st.lists(PIECE, min_size=1, max_size=3).map("".join).filter(bool)


def profile(**values: Any) -> Profile:
    return Profile.model_validate({"time": 10, "python": "python", "preflight": False} | values)


def job(run_dir: str = "/runs/one", **values: Any) -> Job:
    facts: dict[str, Any] = {
        "name": "one", "kind": "train", "run_dir": Path(run_dir), "cwd": Path("/work"),
        "commands": (("python", "-m", "pretrain.train"),),
    }  # fmt: skip
    return Job(**(facts | values))


def directives(script: str) -> dict[str, str | None]:
    """Option -> value, read as sbatch does: to the first line that is no comment; double quotes and backslashes."""
    found: dict[str, str | None] = {}
    for line in script.split("\n"):
        if not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "), comments=True)
            option, equals, value = word.partition("=")
            found[option.removeprefix("--")] = value if equals else None
    return found


def acceptable(text: str) -> bool:
    return all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in text)


@settings(max_examples=60)
@given(argument=TEXT, variable=TEXT, python=TEXT, image=TEXT)
@example(argument="\n#SBATCH --x", variable="a", python="b", image="c")
def test_every_word_arrives_as_it_was_and_nothing_else_runs(
    argument: str, variable: str, python: str, image: str
) -> None:
    texts = (argument, variable, python, image)
    container = {"kind": "pyxis", "image": image}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        judge = fake(folder, "judge", 'case "${@: -2}" in *begin) echo go ;; *) echo finished ;; esac')
        try:
            site = profile(env={"OF_MINE": variable}, container=container, python=python)
            script = render(job(commands=(("program", argument, python),), needs=Path("/", argument)), site)
        except (ConfigError, ValueError):
            assert not all(acceptable(text) for text in texts)
            return
        assert all(acceptable(text) for text in texts)
        path = folder / "stage.sbatch"
        path.write_text(script.replace(f"judge=({plain.word(python)} ", f"judge=({judge} "))
        assert subprocess.run(["bash", "-n", str(path)], timeout=10).returncode == 0
        fake(folder, "srun", 'printf %s "$OF_MINE" > variable')
        fake(folder, "scontrol", "echo node0")
        done = run_script(path, folder)
        assert done.returncode == 0, done.stderr
        begin, _, run, end = calls(folder)
        assert begin[:3] == ["judge", "-m", "launch.attempt"]
        assert begin[begin.index("--needs") + 1] == str(Path("/", argument))
        assert run[0] == "srun"
        assert run[-4:] == [f"--container-image={image}", "program", argument, python]
        assert end[-2:] == ["end", "0"]
        assert (folder / "variable").read_bytes().decode() == variable
        assert {p.name for p in folder.iterdir()} == {
            "judge",
            "srun",
            "scontrol",
            "stage.sbatch",
            "calls",
            "variable",
        }


@settings(max_examples=200)
@given(run=TEXT, cwd=TEXT)
def test_a_path_is_one_value_of_one_directive(run: str, cwd: str) -> None:
    expected = set(directives(render(job(), profile())))
    try:
        script = render(job(run_dir=f"/runs/{run}", cwd=Path("/", cwd)), profile())
    except ConfigError:
        assert not acceptable(run) or not acceptable(cwd) or "%" in run
        return
    found = directives(script)
    assert set(found) == expected
    assert found["output"] == f"{Path(f'/runs/{run}')}/slurm/train/log-%j.txt"
    assert found["chdir"] == str(Path("/", cwd))


@pytest.mark.parametrize(
    "text", ["a\n#SBATCH --uid=0", "a\rb", "a\x00b", "a\u2028b", "a\x85b", "\ud800", "a\x1b[31m"]
)
def test_a_line_break_or_a_control_character_is_an_error_wherever_it_stands(text: str) -> None:
    for where in (
        lambda: render(job(run_dir=f"/{text}"), profile()),
        lambda: render(job(cwd=Path(f"/{text}")), profile()),
        lambda: render(job(commands=((text,),)), profile()),
        lambda: render(job(needs=Path(text)), profile()),
        lambda: render(job(), profile(env={"A": text})),
        lambda: render(job(), profile(setup=text)),
        lambda: render(job(), profile(python=text)),
        lambda: render(job(), profile(container={"kind": "pyxis", "image": text})),
    ):
        with pytest.raises((ConfigError, ValueError), match=r"cannot stand in a batch script|unicode"):
            where()


@given(text=TEXT)
def test_a_name_is_64_plain_characters_or_an_error(text: str) -> None:
    assert re.fullmatch(r"[\w.-]{1,64}", default_name(Path("/runs", text), "-export"), re.ASCII)
    assume(not re.fullmatch(r"[\w.-]{1,64}", text, re.ASCII))
    with pytest.raises(ConfigError, match="are a name"):
        plain.name(text, "the job's name")


NAMES = ("account", "partition", "qos", "reservation", "gpu_type", "constraint")


@pytest.mark.parametrize(
    "text", ["a b", "a\n", "$(id)", "a;b", "é", "a" * 300, "", 'a"', "a\n#SBATCH --uid=0"]
)
def test_what_slurm_is_given_by_name_is_checked_in_the_profile(text: str) -> None:
    for field in (*NAMES, "time", "mem", "nodes"):
        with pytest.raises(ValueError, match=field):
            profile(**{"gpus_per_node": 1, field: text})
    for field in ("exclude", "modules", "sbatch", "srun", "pass_env"):
        with pytest.raises(ValueError, match=field):
            profile(**{field: (text,)})
    with pytest.raises(ValueError, match="env"):
        profile(env={text: "x"})


SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": "hunter2-hunter2",
    "MY_API_KEY": "abc",
    "URL": "https://user:pass@host/x",
    "X": "AKIAABCDEFGHIJKLMNOP",
    "Y": "hf_abcdefghijklmnopqrstuv",
    "Z": "Bearer abcdefghijkl",
    "AUTH": "x=1",
}


@pytest.mark.parametrize(("name", "value"), SECRETS.items())
def test_a_secret_in_a_profile_is_refused_and_not_repeated(name: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({"time": 10, "env": {name: value}}))
    with pytest.raises(ConfigError, match="name it in pass_env") as caught:
        load(str(path))
    assert value not in str(caught.value)


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "RANK", "BASH_ENV", "IFS", UNDER_BATCH_SCRIPT])
def test_who_a_rank_is_cannot_be_set_by_a_profile(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        profile(env={name: "1"})
    with pytest.raises(ValueError, match=name):
        profile(pass_env=(name,))


@pytest.mark.parametrize("option", ["--requeue", "--output=x", "--signal=USR1@1", "--nodes=4", "--wrap=x"])
def test_an_option_that_the_script_sets_cannot_be_given_again(option: str) -> None:
    with pytest.raises(ValueError, match="set by the script"):
        profile(sbatch=(option,))


def test_every_mistake_of_a_profile_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("time: 10\npartitoin: gpu\nnodes: 4-2x\nretry: {tries: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load(str(path), ["account=a b"])
    for words in (
        "site.yaml:2: partitoin: unknown key (did you mean partition?)",
        "site.yaml:3: nodes",
        "retry.tries",
        "account",
    ):
        assert words in str(caught.value)


def test_the_example_profile_is_one_and_asks_for_what_it_says() -> None:
    example = load("example")
    found = directives(render(job(), example))
    assert found["nodes"] == "1-4"
    assert found["gpus-per-node"] == "8"
    assert found["ntasks-per-node"] == "8"
    assert found["cpus-per-task"] == "12"
    assert found["signal"] == "USR1@300"
    assert found["requeue"] is None
    assert directives(render(job(kind="export"), example.for_one_rank()))["gpus-per-node"] == "1"


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (10, 600),
        ("10", 600),
        ("10:30", 630),
        ("2:00:00", 7200),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-0:0:1", 86401),
    ],
)
def test_the_signal_comes_within_the_time_limit(time: int | str, seconds: int) -> None:
    assert profile(time=time).seconds == seconds
    assert profile(time=time, signal_seconds=min(seconds - 1, 65535)).signal_seconds
    if seconds < 65535:
        with pytest.raises(ValueError, match="not below the time limit"):
            profile(time=time, signal_seconds=seconds)


def test_gpus_can_be_asked_for_as_gres_with_a_type() -> None:
    found = directives(render(job(), profile(gpus_per_node=4, gpu_type="a100", gpu_option="gres")))
    assert found["gres"] == "gpu:a100:4"


def test_apptainer_runs_in_front_of_each_rank_and_pyxis_within_srun() -> None:
    cfg = tiny.config(run={"dir": "runs/x"})
    box: dict[str, Any] = {"image": "/i.sif", "mounts": ("/data:/data",)}
    apptainer = train_job(cfg, profile(gpus_per_node=1, container={"kind": "apptainer", **box}), Path("/w"))
    assert apptainer.commands[0][:7] == (
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        "/data:/data",
        "/i.sif",
        "python",
    )
    site = profile(container={"kind": "pyxis", **box})
    pyxis = train_job(cfg, site, Path("/w"))
    assert pyxis.commands[0][:2] == ("python", "-m")
    assert "srun_options=(--container-image=/i.sif --container-mounts=/data:/data)" in render(pyxis, site)


def test_the_exporting_job_evaluates_only_where_there_is_something_to_evaluate_on() -> None:
    cfg = tiny.config(run={"dir": "-runs/x"})
    (command,) = export_job(cfg, profile(), Path("/w"), "last", ["timm"]).commands
    assert command[-2:] == ("--", "/w/-runs/x")
    with_val = tiny.config(run={"dir": "x"}, data={"val": {"shards": "v"}})
    assert [c[3] for c in export_job(with_val, profile(), Path("/w"), "last", ["timm", "safetensors"]).commands] == [
        "evaluate", "export", "export",
    ]  # fmt: skip


def test_modules_and_the_setup_file_come_before_the_work(tmp_path: Path) -> None:
    setup = tmp_path / "it's site.sh"
    setup.write_text(f"module() {{ echo \"$@\" > '{tmp_path}/loaded'; }}\n")
    judge = fake(tmp_path, "judge", "echo finished")
    script = tmp_path / "stage.sbatch"
    script.write_text(
        render(job(), profile(python=str(judge), setup=str(setup), modules=("cuda/12.6", "gcc")))
    )
    assert run_script(script, tmp_path).returncode == 0
    assert (tmp_path / "loaded").read_text() == "load cuda/12.6 gcc\n"


def test_the_script_and_the_trainer_mean_the_same_variable_and_the_same_code() -> None:
    assert f"export {UNDER_BATCH_SCRIPT}=1" in (TEMPLATES / "stage.sbatch").read_text()
    assert (CODE / "pretrain" / "train.py").is_file()


def test_the_keys_in_the_documentation_are_those_of_the_profile() -> None:
    text = (CODE / "docs" / "slurm.md").read_text()
    assert f"<!-- keys: begin -->\n{table(Profile)}\n<!-- keys: end -->" in text

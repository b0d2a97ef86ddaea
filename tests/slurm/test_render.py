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
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from patience import PATIENCE

from launch import plain
from launch.job import Job, default_name, export_job, train_job
from launch.profile import TEMPLATES, Profile, load
from launch.render import CODE, render, render_array
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


TAKEN = TEXT.map(lambda text: "".join(filter(acceptable, text)) or "x")
"""Without what is refused: a script with a dozen texts would seldom be rendered otherwise."""


def profile(**values: Any) -> Profile:
    return Profile.model_validate({"time": 10, "python": "python", "preflight_minutes": 0} | values)


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


FREE = ("argument", "run", "cwd", "needs", "code", "variable", "setup", "python", "image", "mount", "inside")
"""Where any text may stand: of a config, the clone's folder, a profile."""


def rendered(folder: Path, text: dict[str, str]) -> str:
    """A script that has the texts wherever a text may stand; its setup file says that it was read."""
    setup = folder / "setup" / text["setup"]
    if acceptable(text["setup"]):
        setup.parent.mkdir(parents=True)
        setup.write_text(f"echo read >> {folder}/sourced\n")
    site = profile(
        env={"OF_MINE": text["variable"]},
        container={
            "kind": "pyxis", "image": text["image"], "mounts": (f"/{text['mount']}:/x",), "python": text["inside"]
        },
        python=text["python"],
        setup=str(setup),
        preflight_minutes=2,
    )  # fmt: skip
    inside = site.container.python if site.container else ""
    return render(
        job(
            f"/{text['run']}",
            cwd=Path("/", text["cwd"]),
            commands=((inside, "train", text["argument"]),),
            preflight=(inside, "look", text["argument"]),
            needs=Path("/", text["needs"]),
        ),
        site,
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    text=st.fixed_dictionaries(dict.fromkeys(FREE, TAKEN)),
    worst=st.tuples(st.sampled_from(FREE), TEXT),
    address=TEXT,
)
@example(
    text=dict.fromkeys(FREE, "$(touch canary)"), worst=("run", "`touch canary`"), address="`touch canary`"
)
@example(text=dict.fromkeys(FREE, "'; touch canary; '"), worst=("run", '"$IFS'), address='"; touch canary; "')
@example(text=dict.fromkeys(FREE, "a"), worst=("argument", "\n#SBATCH --x"), address="a")
def test_every_word_arrives_as_it_was_and_nothing_else_runs(
    text: dict[str, str], worst: tuple[str, str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text | {"run": re.sub(r"[%\\]", "_", text["run"])} | dict([worst])
    # a name of a file is at most 255 bytes without a slash, and a mount has neither a colon nor a comma
    text = text | {
        "setup": text["setup"].replace("/", "_").strip(".") or "x",
        "mount": re.sub("[:,]", "_", text["mount"]),
    }
    text["code"] = text["code"].replace("\0", "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        monkeypatch.setattr("launch.render.CODE", Path("/", text["code"]))
        refused = any(not acceptable(value) for value in text.values()) or {"%", "\\"} & set(text["run"])
        try:
            script = rendered(folder, text)
        except (ConfigError, ValueError):
            assert refused
            return
        assert not refused
        judge = fake(folder, "judge", 'case "${@: -2}" in *begin) echo go ;; *) echo finished ;; esac')
        path = folder / "stage.sbatch"
        path.write_text(script.replace(f"judge=({plain.word(text['python'])} ", f"judge=({judge} "))
        assert subprocess.run(["bash", "-n", str(path)], timeout=PATIENCE).returncode == 0
        seen = ("OF_MINE", "PYTHONPATH", "MASTER_ADDR")
        fake(folder, "srun", *(f'printf %s "${name}" > {folder}/{name}' for name in seen))
        fake(folder, "scontrol", "printf '%s\\n' \"${@: -1}\"")
        address = "".join(c for c in address if c != "\0" and c.isprintable())
        done = run_script(path, folder, SLURM_JOB_NODELIST=address)
        assert done.returncode == 0, done.stderr
        begin, *_, look, train, end = calls(folder)
        for said in (begin, end):
            assert said[:3] == ["judge", "-m", "launch.attempt"]
            assert said[3] == f"{Path('/' + text['run'])}/slurm/train"
            assert said[said.index("--run") + 1] == str(Path("/" + text["run"]))
            assert said[said.index("--needs") + 1] == str(Path("/", text["needs"]))
        container = [f"--container-image={text['image']}", f"--container-mounts=/{text['mount']}:/x"]
        assert look[-6:] == [*container, "--time=2", text["inside"], "look", text["argument"]]
        assert train[-5:] == [*container, text["inside"], "train", text["argument"]]
        assert (folder / "OF_MINE").read_bytes().decode() == text["variable"]
        assert (folder / "PYTHONPATH").read_bytes().decode() == str(Path("/", text["code"]))
        assert (folder / "MASTER_ADDR").read_bytes().decode() == address
        assert (folder / "sourced").read_text() == "read\n"
        ours = {"judge", "srun", "scontrol", "stage.sbatch", "calls", "setup", "sourced", *seen}
        assert {p.name for p in folder.iterdir()} == ours


def texts_of(field: str, text: str) -> Any:
    """`text` as the value of a field of the profile."""
    shapes = {"exclude": (text,), "sbatch": (text,), "srun": (text,), "modules": (text,), "pass_env": (text,)}
    return shapes.get(field, {text: "x"} if field == "env" else text)


NO_TEXT = {"container", "retry"}
MODULES_ARE_THERE = "declare -F module >/dev/null || source /etc/profile"


@settings(max_examples=300)
@given(
    field=st.sampled_from(sorted(set(Profile.model_fields) - NO_TEXT)),
    text=TEXT | st.from_regex(r"--[a-z]{1,9}=\S{1,9}", fullmatch=True),
)
def test_a_profile_s_text_is_refused_or_changes_nothing_but_its_own_value(field: str, text: str) -> None:
    """Of every key that the profile has, also one that is new."""
    base: dict[str, Any] = {"gpus_per_node": 1}
    try:
        script = render(job(), profile(**(base | {field: texts_of(field, text)})))
    except (ConfigError, ValueError):
        return
    plain_script = render(job(), profile(**base))
    gone, come = set(plain_script.split("\n")), set(script.split("\n"))
    for line in come - gone - {MODULES_ARE_THERE}:
        words = shlex.split(line)
        assert words[0] in ("#SBATCH", "export", "source", "module") or "=(" in words[0], line
        assert len(words) <= 3 or "=(" in words[0], line
    template = {
        line for line in (TEMPLATES / "stage.sbatch").read_text().split("\n") if not line.startswith("@")
    }
    assert template <= come
    assert set(directives(script)) <= set(directives(plain_script)) | {
        field.replace("_", "-"), "cpus-per-task", text.removeprefix("--").partition("=")[0]
    }  # fmt: skip


@pytest.mark.parametrize("variable", ["SLURM_JOB_NUM_NODES", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"])
def test_what_stands_where_a_number_should_is_not_run(variable: str, tmp_path: Path) -> None:
    script = tmp_path / "stage.sbatch"
    script.write_text(render(job(), profile(python=str(fake(tmp_path, "judge", "echo go")))))
    fake(tmp_path, "srun")
    done = run_script(script, tmp_path, **{variable: "a[$(touch canary)]"})
    assert done.returncode == 2
    assert not (tmp_path / "canary").exists()


@settings(max_examples=20)
@given(names=st.lists(TEXT, min_size=2, max_size=3), number=st.integers(0, 1))
def test_a_task_of_a_sweep_runs_its_member_s_script_and_nothing_else(names: list[str], number: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [folder / "s" / re.sub("[/\0]", "_", text).strip(".") / str(n) for n, text in enumerate(names)]
        members = [job(str(run)) for run in runs]
        try:
            script = render_array(folder / "s", "sweep", members, profile(), None)
        except ConfigError:
            assert not all(map(acceptable, names))
            return
        for member in members:
            member.folder.mkdir(parents=True)
            (member.folder / "stage.sbatch").write_text(f"echo {members.index(member)}\n")
        before = {p for p in folder.rglob("*") if "log-" not in p.name}
        (folder / "array.sbatch").write_text(script)
        env = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": str(number)}
        assert run_script(folder / "array.sbatch", folder, **env).returncode == 0
        assert (members[number].folder / f"log-9_{number}.txt").read_text() == f"{number}\n"
        assert {p for p in folder.rglob("*") if "log-" not in p.name} == before | {folder / "array.sbatch"}
        assert (
            run_script(
                folder / "array.sbatch", folder, **(env | {"SLURM_ARRAY_TASK_ID": "x[$(touch canary)]"})
            ).returncode
            == 2
        )
        assert not (folder / "canary").exists()


@settings(max_examples=200)
@given(run=TEXT, cwd=TEXT)
def test_a_path_is_one_value_of_one_directive(run: str, cwd: str) -> None:
    expected = set(directives(render(job(), profile())))
    try:
        script = render(job(run_dir=f"/runs/{run}", cwd=Path("/", cwd)), profile())
    except ConfigError:
        assert not acceptable(run) or not acceptable(cwd) or {"%", "\\"} & set(run)
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


def test_ranks_are_bound_to_the_cores_that_were_asked_for_and_a_site_s_own_word_comes_last() -> None:
    assert "cpu-bind" not in render(job(), profile())
    script = render(job(), profile(cpus_per_rank=3, srun=("--cpu-bind=none",)))
    assert "srun_options=(--cpu-bind=cores --cpu-bind=none)" in script


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

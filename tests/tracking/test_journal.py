import errno
import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE

from pretrain.errors import ConfigError, RunDirError
from pretrain.tracking import Journal, journal, records
from pretrain.tracking.locks import LockFile
from pretrain.tracking.target import resolve_uri


def open_journal(run_dir: Path, **options) -> Journal:
    return Journal.open(run_dir, **{"experiment": "pretrain", "name": "run", **options})


def kill(journal: Journal) -> None:
    """All that the kernel does for a killed process."""
    os.close(journal._descriptor)


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def metrics(run_dir: Path, attempt: int) -> list[dict]:
    return [line for line in lines(run_dir) if line["op"] == "metrics" and line["attempt"] == attempt]


def test_training_imports_no_mlflow():
    code = "import sys, pretrain.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_call_is_on_disk_when_it_returns(tmp_path):
    journal = open_journal(tmp_path)
    journal.metrics(3, {"train/loss": 0.25})
    assert metrics(tmp_path, 1)[0]["values"] == {"train/loss": 0.25}


def test_lines_are_strict_json_whatever_the_numbers(tmp_path):
    journal = open_journal(tmp_path)
    journal.metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1})
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["values"]
    largest = sys.float_info.max
    flags = {"nonfinite/a": 1.0, "nonfinite/b": 1.0, "nonfinite/c": 1.0}
    assert values == {"a": None, "b": largest, "c": -largest, "d": 1.0} | flags


@given(st.text("aZ9/.:- _$%\n\té", max_size=12))
def test_a_name_that_the_journal_takes_is_taken_by_mlflow(name):
    from mlflow.utils.validation import _validate_metric_name, _validate_tag_name

    try:
        records.check_name(name)
    except ValueError:
        return
    _validate_metric_name(name)
    _validate_tag_name(name)


@pytest.mark.parametrize("name", ["a\n", "$", "a//b", "/a", "../a", "..", "a/", "", "é", "x" * 231])
def test_a_name_that_mlflow_might_refuse_is_refused_at_the_call(tmp_path, name):
    with pytest.raises(ValueError, match="is no name"):
        open_journal(tmp_path).metrics(1, {name: 1.0})


def test_usual_names_are_taken():
    for name in ("loss", "train/top1", "val/top-5 acc", "perf/images_per_second", "a:b.c"):
        assert records.check_name(name) == name


def test_a_tensor_is_refused_because_it_would_wait_for_the_device(tmp_path):
    import torch

    with pytest.raises(TypeError, match=r"\.item\(\)"):
        open_journal(tmp_path).metrics(1, {"loss": torch.tensor(1.0)})


@pytest.mark.parametrize("tail", [b'{"op":"metrics","attempt":1,"st', b"{", b"\0" * 100_000])
def test_a_torn_tail_costs_that_line_alone(tmp_path, tail):
    first = open_journal(tmp_path)
    first.metrics(1, {"loss": 1.0})
    kill(first)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    second = open_journal(tmp_path, from_step=1)
    second.metrics(2, {"loss": 0.5})
    assert [line["step"] for line in lines(tmp_path) if line["op"] == "metrics"] == [1, 2]
    assert second.attempt == 2


def test_a_step_executed_again_with_the_same_value_stays_the_same_point(tmp_path):
    first = open_journal(tmp_path, clock=lambda: 100.0)
    first.metrics(1, {"loss": 1.0, "nan": math.nan})
    first.metrics(2, {"loss": 0.5, "nan": math.nan})
    kill(first)
    second = open_journal(tmp_path, from_step=1, clock=lambda: 200.0)
    second.metrics(2, {"loss": 0.5, "nan": math.nan})
    (line,) = metrics(tmp_path, 2)
    assert line["known"] == {"loss": [0.5, 100_000], "nan": [None, 100_000], "nonfinite/nan": [1.0, 100_000]}
    kill(second)
    third = open_journal(tmp_path, from_step=0, clock=lambda: 300.0)
    third.metrics(2, {"loss": 0.5})
    assert metrics(tmp_path, 3)[0]["known"] == {"loss": [0.5, 100_000]}


def test_a_step_executed_again_with_another_value_is_counted_and_newer_even_if_the_clock_fell_back(tmp_path):
    first = open_journal(tmp_path, clock=lambda: 100.0)
    first.metrics(2, {"loss": 0.5, "lr": 0.1})
    kill(first)
    second = open_journal(tmp_path, from_step=0, clock=lambda: 50.0)
    second.metrics(2, {"loss": 0.75, "lr": 0.1})
    (line,) = metrics(tmp_path, 2)
    assert line["values"] == {"loss": 0.75, "lr": 0.1, "resume/diverged": 1.0}
    assert list(line["known"]) == ["lr"]
    assert line["time"] > 100_000


def test_speed_measured_again_is_kept_beside_the_first_measurement(tmp_path):
    first = open_journal(tmp_path, clock=lambda: 100.0)
    first.metrics(2, {"perf/images_per_second": 900.0})
    kill(first)
    second = open_journal(tmp_path, from_step=0)
    second.metrics(2, {"perf/images_per_second": 700.0})
    (line,) = metrics(tmp_path, 2)
    assert line["values"] == {"perf/images_per_second": 700.0}
    assert line["known"] == {"perf/images_per_second": [900.0, 100_000]}


def test_a_setting_that_changed_between_attempts_becomes_a_tag(tmp_path):
    first = open_journal(tmp_path)
    first.params({"train/total_steps": 100, "lr": 0.1})
    kill(first)
    open_journal(tmp_path).params({"train/total_steps": 200, "lr": 0.1, "new": 1})
    added = [
        (line["op"], line["values"]) for line in lines(tmp_path) if line["attempt"] == 2 and "values" in line
    ]
    assert added == [("params", {"new": "1"}), ("tags", {"attempt_2/train/total_steps": "200"})]


def test_identity_is_that_of_the_first_attempt(tmp_path):
    kill(open_journal(tmp_path, experiment="one"))
    open_journal(tmp_path, experiment="two")
    assert [line["experiment"] for line in lines(tmp_path) if line["op"] == "run"] == ["one"]


def test_two_writers_of_one_run_directory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "LOCK_WAIT_SECONDS", 0.2)
    first = open_journal(tmp_path)
    with pytest.raises(RunDirError, match="another process is writing"):
        open_journal(tmp_path)
    kill(first)
    assert open_journal(tmp_path).attempt == 2


def _fill_limited_disk(run_dir: Path) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = open_journal(run_dir)
    size = (run_dir / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 150, size + 150))
    writer.metrics(1, {"loss": 1.0})
    with pytest.raises(RunDirError, match=r"metrics\.jsonl"):
        writer.metrics(2, {"loss": 1.0})


def test_a_file_system_without_locks_is_used_with_a_word_of_warning(tmp_path, monkeypatch, caplog):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level("WARNING", "pretrain"):
        open_journal(tmp_path).metrics(1, {"loss": 1.0})
        with LockFile(tmp_path / "lock"):
            pass
    assert "no file locks" in caplog.text


def test_damaged_lines_do_not_keep_a_run_from_going_on(tmp_path):
    first = open_journal(tmp_path)
    first.metrics(1, {"loss": 1.0})
    kill(first)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(
            b'\x00\xff\n[]\n{"op":"metrics","attempt":1,"time":1,"stap":2,"values":{}}\n{"op":["x"]}\n'
        )
    second = open_journal(tmp_path)
    second.metrics(1, {"loss": 1.0})
    assert second.attempt == 2
    assert (
        records.decode((tmp_path / "metrics.jsonl").read_bytes().splitlines()[-1])["known"]["loss"][0] == 1.0
    )


def test_a_full_disk_is_named_and_leaves_whole_lines(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_fill_limited_disk, args=(tmp_path,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert lines(tmp_path)[-1]["op"] == "metrics"


def test_a_run_directory_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="cannot write the journal"):
        open_journal(tmp_path / "file" / "run")


@pytest.mark.parametrize("path", ["../outside.txt", "link.txt", "missing.txt", ".", "large.bin"])
def test_only_small_files_of_the_run_directory_are_artifacts(tmp_path, path):
    run_dir = tmp_path / "run"
    writer = open_journal(run_dir)
    (tmp_path / "outside.txt").write_text("secret")
    (run_dir / "link.txt").symlink_to(tmp_path / "outside.txt")
    with (run_dir / "large.bin").open("wb") as file:
        file.truncate(journal.MAX_ARTIFACT_BYTES + 1)
    with pytest.raises(ValueError, match="artifact"):
        writer.artifact(Path(path))


def test_the_last_record_is_found_behind_a_long_line(tmp_path):
    writer = open_journal(tmp_path)
    writer.tags({"long": "x" * 50_000})
    last = records.last_record(tmp_path / "metrics.jsonl")
    assert last is not None
    assert last["values"] == {"long": "x" * 50_000}


def test_relative_database_is_taken_from_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_uri("http://host:5000/") == "http://host:5000"


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("http://user:hunter2@host:5000", "MLFLOW_TRACKING_USERNAME"),
        ("postgresql://user:hunter2@host/db", "MLFLOW_TRACKING_USERNAME"),
        ("https://host/?token=hunter2", "query"),
        ("file:./mlruns", "not supported"),
        ("./mlruns", "not supported"),
        ("sqlite://", "not supported"),
        ("http://[::1", "not a URI"),
    ],
)
def test_a_uri_that_cannot_be_used_is_refused_without_repeating_its_password(uri, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        resolve_uri(uri)
    assert "hunter2" not in str(caught.value)

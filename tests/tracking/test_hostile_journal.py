"""A journal that a dying disk, a full one or a stranger wrote in: each such line costs itself alone, whoever reads it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow_server import Stored
from patience import PATIENCE

from launch.progress import _last_metrics
from pretrain.errors import ConfigError
from pretrain.track import own_uri, track
from pretrain.tracking import Journal, progress, records
from pretrain.tracking.deliver import Drainer, deliver
from pretrain.tracking.journal import journal_path, label
from pretrain.tracking.records import MAX_LINE, decode


def line(op: str = "metrics", **changes: object) -> bytes:
    """A line of step 50, which nothing is wrong with, changed."""
    fields: dict[str, object] = {"op": op, "attempt": 1, "time": 1}
    fields |= {
        "run": {"uid": "ab" * 16, "experiment": "e", "name": "n"},
        "attempt": {"from_step": 0},
        "metrics": {"step": 50, "values": {"train/loss": 9.0}},
        "system": {"step": 50, "values": {"system/cpu_utilization_percentage": 9.0}},
        "tags": {"values": {"stage": "stolen"}},
        "params": {"values": {"lr": "9"}},
        "artifact": {"path": "config.yaml"},
        "dataset": {"name": "n", "digest": "d", "source": "s", "context": "training"},
        "status": {"status": "FAILED"},
        "gap": {},
    }[op]
    return json.dumps(fields | changes).encode()


GOOD = line()
DEEP = b"[" * 200_000
HOSTILE: dict[str, bytes] = {
    "nested without end": DEEP,
    "nested in a field": GOOD[:-1] + b',"x":' + DEEP + b"]" * 200_000 + b"}",
    "objects nested": b'{"op":' * 200_000,
    "not UTF-8": GOOD.replace(b"train", b"tr\xff\xfein"),
    "Latin-1": line("tags").replace(b"stolen", b"gestohl\xe9n"),
    "half a pair": line("tags", values={"stage": "\udc80"}),
    "half a pair as a name": line(values={"\ud800": 1.0}),
    "zeros": bytes(4096),
    "a carriage return before a status": b"x\r" + line("status"),
    "cut": GOOD[:40],
    "two in one": GOOD[:30] + GOOD,
    "NaN": GOOD.replace(b"9.0", b"NaN"),
    "infinity": GOOD.replace(b"9.0", b"-Infinity"),
    "a number beyond all floats": GOOD.replace(b"9.0", b"1e999"),
    "an integer beyond all floats": GOOD.replace(b"9.0", b"9" * 400),
    "more digits than Python reads": GOOD.replace(b"9.0", b"9" * 10_000),
    "a name twice": GOOD.replace(b'{"train/loss": 9.0}', b'{"train/loss": 9.0, "train/loss": 8.0}'),
    "an op twice": GOOD[:-1] + b',"op":"status","status":"FAILED"}',
    "no object": b"[]",
    "a number": b"7",
    "nothing": b"",
    "an op that is a list": line(op="metrics").replace(b'"metrics"', b'["metrics"]'),
    "an unknown op": GOOD.replace(b"metrics", b"delete"),
    "a value in words": line(values={"train/loss": "9"}),
    "a value that is true": line(values={"train/loss": True}),
    "values in a list": line(values=[["train/loss", 9.0]]),
    "no values": line(values=None),
    "a step that is true": line(step=True),
    "a step of a fraction": line(step=50.5),
    "a step below zero": line(step=-1),
    "a step that no database holds": line(step=2**63),
    "a time that no database holds": line(time=10**30),
    "a time after the year 9999": line(time=10**15),
    "a time before 1970": line(time=-1),
    "a time in words": line(time="1"),
    "an attempt that no database holds": line("attempt", attempt=2**64),
    "an attempt from below zero": line("attempt", from_step=-5),
    "an attempt with an address that is none": line("attempt", uri=["http://127.0.0.1"]),
    "known points in a list": line(known=[["train/loss", 1, 1]]),
    "a known point that is a number": line(known={"train/loss": 1.0}),
    "a known point too short": line(known={"train/loss": [1.0]}),
    "a known point in words": line(known={"train/loss": ["1.0", 1]}),
    "a known point of no time": line(known={"train/loss": [1.0, None]}),
    "a machine's figure in words": line("system", values={"system/cpu_utilization_percentage": "9"}),
    "a tag that is a number": line("tags", values={"stage": 7}),
    "a setting that is an object": line("params", values={"lr": {}}),
    "an artifact that is a number": line("artifact", path=7),
    "a data set without a digest": line("dataset", digest=None),
    "a status of another kind": line("status", status="DELETED"),
    "a status in a list": line("status", status=["FAILED"]),
    "a run with a query for a name": line("run", uid="' OR tags.`run_uid` LIKE '%"),
    "a gap of no attempt": line("gap", attempt=None),
}  # fmt: skip


@pytest.mark.parametrize("op", records._FIELDS)
def test_the_lines_that_are_damaged_here_were_whole(op: str) -> None:
    assert decode(line(op)) == json.loads(line(op))


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_line_of_a_journal_is_none(case: str) -> None:
    assert decode(HOSTILE[case]) is None


def put_in(run_dir: Path, damage: bytes) -> None:
    with journal_path(run_dir).open("ab") as file:
        file.write(damage + b"\n")


def test_of_a_journal_full_of_damage_all_the_rest_arrives(write: Callable[..., Path], database: Path) -> None:
    run_dir = write(range(1, 11), status=None)
    for damage in HOSTILE.values():
        put_in(run_dir, damage)
    write(range(11, 21), from_step=10, status=None)  # reads all of it, too
    for damage in HOSTILE.values():
        put_in(run_dir, damage)
    write(range(21, 31), from_step=20, status="FINISHED")
    put_in(run_dir, HOSTILE["not UTF-8"])
    assert deliver(Drainer(run_dir, f"sqlite:///{database}"), lambda: True, PATIENCE)
    stored = Stored(database, run_dir)
    assert stored.points("train/loss") == [(step, step) for step in range(1, 31)]
    assert (stored.status, stored.tags()["attempt"]) == ("FINISHED", "3")
    assert "stage" not in stored.tags()
    letters = (run_dir / "tracking" / "dead_letter.jsonl").read_text().splitlines()
    assert len(letters) == 2 * len(HOSTILE) + 1
    assert max(map(len, letters)) < 100_000
    assert progress.count_unsent(run_dir) == 0


def test_the_newest_record_is_found_behind_damage_of_any_length(write: Callable[..., Path]) -> None:
    run_dir = write(range(1, 4))
    for damage in HOSTILE.values():
        put_in(run_dir, damage)
    for damage in (b"", b"x" * (3 * MAX_LINE)):
        put_in(run_dir, damage)
        last = records.last_record(journal_path(run_dir))
        assert last is not None
        assert last["status"] == "FINISHED"
    label(run_dir, {"best": "true"})
    last = records.last_record(journal_path(run_dir))
    assert last is not None
    assert last["status"] == "FINISHED"


def test_a_status_table_reads_past_damage(write: Callable[..., Path]) -> None:
    run_dir = write(range(1, 4))
    for damage in HOSTILE.values():
        if len(damage) < 10_000:
            put_in(run_dir, damage)
    assert _last_metrics(run_dir)["step"] == 3


def test_a_line_without_end_is_never_held_whole_and_the_next_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE", 100)
    (tmp_path / "a").write_bytes(
        b"x" * 99 + b"\n" + b"y" * 100 + b"\n" + b"z" * 5_000 + b"\n{}\n" + b"t" * 500
    )
    with (tmp_path / "a").open("rb") as file:
        found = list(records.read_lines(file, 0))
    assert [len(text) for text, _ in found] == [100, 101, 101, 3]
    assert [end for _, end in found] == [100, 201, 5_202, 5_205]  # the tail is no line yet
    assert records.decode(b'{"op":"gap","attempt":1,"time":1}' + b" " * 100) is None
    with pytest.raises(ValueError, match="too long for a journal"):
        records.encode({"op": "tags", "values": {"a": "x" * 100}})


@pytest.mark.parametrize(
    "note",
    [b"", b"{", DEEP, b"[]", b"7", b"\xff", b'{"uri":5,"offset":0,"error":null}', b'{"uri":"u","offset":-1,"error":null}',
     b'{"uri":"u","offset":"0","error":null}', b'{"uri":"u","offset":0,"error":[]}', b'{"uri":"u"}', b'{"uri":"u","offset":1e99}'],
)  # fmt: skip
def test_a_note_of_progress_that_is_none_means_from_the_start(tmp_path: Path, note: bytes) -> None:
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "delivered.json").write_bytes(note)
    assert progress.read(tmp_path) is None


@pytest.mark.parametrize("offset", [7, 10**12])
def test_a_note_that_fits_another_journal_loses_nothing(
    write: Callable[..., Path], database: Path, offset: int
) -> None:
    run_dir = write(range(1, 4))
    progress.Delivered(f"sqlite:///{database}", offset).save(run_dir)
    assert deliver(Drainer(run_dir, f"sqlite:///{database}"), lambda: True, PATIENCE)
    assert Stored(database, run_dir).points("train/loss") == [(1, 1), (2, 2), (3, 3)]
    assert not (run_dir / "tracking" / "dead_letter.jsonl").exists()


@pytest.mark.parametrize("page", [b"", b"\xff\xfe", b"#/experiments/1/runs/\x1b[2Jx", b"javascript:alert(1)"])
def test_a_page_that_is_none_is_not_shown(tmp_path: Path, page: bytes) -> None:
    (tmp_path / "tracking").mkdir()
    assert progress.read_page(tmp_path) is None
    (tmp_path / "tracking" / "page").write_bytes(page)
    assert progress.read_page(tmp_path) is None
    progress.save_page(tmp_path, "#/experiments/1/runs/ab12")
    assert progress.read_page(tmp_path) == "#/experiments/1/runs/ab12"


@pytest.mark.parametrize(
    "uri", ["file:///tmp/x", "databricks", "http://u:hunter2@h", "plugin://x", "sqlite://"]
)
def test_a_journal_sends_nobody_to_a_store_that_a_config_may_not_name(tmp_path: Path, uri: str) -> None:
    Journal.open(tmp_path, experiment="e", name="n", uri=uri).close("FINISHED")
    with pytest.raises(ConfigError) as refused:
        own_uri(tmp_path)
    assert "hunter2" not in str(refused.value)
    ended = CliRunner().invoke(track, ["sync", str(tmp_path)])
    assert isinstance(ended.exception, ConfigError)


@pytest.mark.parametrize("uid", ["", "\n", "' OR 1 = 1", "xyz"])
def test_a_name_of_a_run_that_a_power_cut_left_empty_is_made_anew(tmp_path: Path, uid: str) -> None:
    """All runs with an empty one would be one run in MLflow."""
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "run_uid").write_text(uid)
    Journal.open(tmp_path, experiment="e", name="n").close("FINISHED")
    (run,) = records.read_ops(journal_path(tmp_path), "run")
    assert records.is_uid(run["uid"])
    assert run["uid"] == (tmp_path / "tracking" / "run_uid").read_text().strip()


def test_a_path_whose_bytes_are_no_text_does_not_cost_the_tags_beside_it(tmp_path: Path) -> None:
    pen = Journal.open(tmp_path, experiment="e\udcff", name="n\udcff")
    pen.tags({"stage": "pretrain", "run_dir": "/runs/\udcff"})
    pen.close("FINISHED")
    (tags,) = records.read_ops(journal_path(tmp_path), "tags")
    assert tags["values"] == {"stage": "pretrain", "run_dir": "/runs/?"}
    assert [run["name"] for run in records.read_ops(journal_path(tmp_path), "run")] == ["n?"]

"""Checkpoints have a copy elsewhere: made beside training, whole or absent, and restored from where the run has none."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from buckets import s3_server
from engines import config, losses_of, make_engine, weights
from patience import PATIENCE
from pydantic import ValidationError
from ranks import RankError, Ranks, _context, on_ranks
from saves import save
from test_checkpoint import content

from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.checkpoint.layout import BEST, LATEST, MANIFEST, folder_of, point, pointer, write_manifest
from pretrain.checkpoint.load import newest_valid
from pretrain.checkpoint.mirror import Mirror, restore
from pretrain.checkpoint.place import MirrorError, Place
from pretrain.checkpoint.save import prune, remove_later
from pretrain.config import CheckpointConfig

WAIT = float(PATIENCE)
NAMES = [f"step_{step:08d}" for step in range(9)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with checkpoints of steps 1, 2 and 3; the first is the best."""
    folder = tmp_path_factory.mktemp("run")
    on_ranks(2, write_three, folder)
    point(folder, BEST, folder_of(folder, 1))
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of that run which a test may change."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_server(monkeypatch):
        yield "s3://bucket/runs/a"


def write_three(ranks: Ranks, run: Path) -> None:
    engine, plan = make_engine(config(1, "fp32", None, 0), ranks, run)
    for step in (1, 2, 3):
        losses_of(engine, plan, ranks, step - 1, step)
        save(run, content(engine, plan, step), ranks)


def mirrored(run: Path, url: str, *, back_to: int | None = None) -> Mirror:
    """Bring the copy up to date once."""
    mirror = Mirror(run, url, run / "metrics.jsonl")
    if back_to is not None:
        mirror.go_back(back_to)
    mirror.close(WAIT)
    return mirror


def holds(url: str, run: Path) -> list[str]:
    """The checkpoints of a copy that have a manifest."""
    keys = Place(url, run).listed()
    return [key.partition("/")[0] for key in keys if key.endswith(MANIFEST)]


def aws() -> dict[str, str]:
    """What leads to the store: the ranks are forked from a process that began before."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def bring_back(
    ranks: Ranks, run: Path, url: str, env: dict[str, str] | None = None
) -> tuple[int, dict[str, torch.Tensor]] | None:
    os.environ |= env or {}
    if not restore(run, url, ranks, run / "restored"):
        return None
    found = newest_valid(run, ranks)
    assert found is not None
    return found.manifest.step, {name: found.whole(name) for name in found.manifest.shapes}


def train_on(ranks: Ranks, run: Path, url: str, steps: int, env: dict[str, str]) -> list[float]:
    os.environ |= env
    engine, plan = make_engine(config(2, "fp32", None, 0), ranks, run)
    if url:
        assert restore(run, url, ranks, run / "restored")
    found = newest_valid(run, ranks)
    assert found is not None
    engine.restore(found.read, found.manifest.optimizer_steps)
    assert weights(engine)
    return losses_of(engine, plan, ranks, found.manifest.step, found.manifest.step + steps)


@pytest.mark.parametrize("world", [1, 3])
def test_a_wiped_disk_is_restored_at_another_world_size(
    run: Path, s3: str, tmp_path: Path, world: int
) -> None:
    mirror = mirrored(run, s3)
    assert mirror.metrics() == {"checkpoint/mirror_lag_steps": 0, "checkpoint/mirror_failures": 0}
    assert holds(s3, run) == [NAMES[1], NAMES[3]]  # the newest and the best
    expected = on_ranks(world, train_on, run, "", 3, {})[0]
    (new := tmp_path / "new").mkdir()
    assert on_ranks(world, train_on, new, s3, 3, aws())[0] == expected
    assert [folder.name for folder in checkpoints(new)] == [NAMES[1], NAMES[3]]
    assert pointer(new, LATEST) == folder_of(new, 3)
    place = Place(s3, run)
    assert [place.read(name, 100) for name in (LATEST, BEST)] == [f"{NAMES[n]}\n".encode() for n in (3, 1)]
    mirrored(new, s3)  # goes on as the same run
    assert holds(s3, run) == [NAMES[1], NAMES[3]]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda folder: os.truncate(folder / "rank_00001.safetensors", 100),
    "changed": lambda folder: _flip(folder / "rank_00001.safetensors"),
    "missing": lambda folder: (folder / "rank_00000.safetensors").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "changed manifest": lambda folder: _flip(folder / MANIFEST),
}


def keep_two(copy: Path, mirror: Path) -> None:
    """Let the mirror hold steps 2 and 3."""
    (copy / "checkpoints" / BEST).unlink()
    point(copy, LATEST, folder_of(copy, 2))
    mirrored(copy, str(mirror))
    point(copy, LATEST, folder_of(copy, 3))
    mirrored(copy, str(mirror))


def test_a_damaged_copy_is_refused_and_the_one_before_it_taken(copy: Path, tmp_path: Path) -> None:
    keep_two(copy, tmp_path / "mirror")
    for number, damage in enumerate(DAMAGE.values()):
        hurt = Path(shutil.copytree(tmp_path / "mirror", tmp_path / f"hurt-{number}"))
        damage(hurt / NAMES[3])
    jobs = [(tmp_path / f"run-{n}", str(tmp_path / f"hurt-{n}")) for n in range(len(DAMAGE))]
    assert on_ranks(2, bring_all_back, jobs)[1] == [2] * len(DAMAGE)


def bring_all_back(ranks: Ranks, jobs: list[tuple[Path, str]]) -> list[int | None]:
    found = [bring_back(ranks, run, url) for run, url in jobs]
    return [None if one is None else one[0] for one in found]


def test_where_no_copy_verifies_or_none_can_be_asked_the_run_does_not_begin_anew(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored(run, str(tmp_path / "mirror"))
    for folder in (tmp_path / "mirror").glob("step_*"):
        _flip(folder / "rank_00000.safetensors")
    with pytest.raises(RankError, match=r"none of the mirror's checkpoints can be restored(.|\n)*sha256"):
        on_ranks(2, bring_back, tmp_path / "new", str(tmp_path / "mirror"))
    assert checkpoints(tmp_path / "new") == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(RankError, match=r"MirrorError: s3://bucket/x: ") as caught:
        on_ranks(1, bring_back, tmp_path / "new", "s3://bucket/x", aws())
    assert "hunter2" not in str(caught.value)


def test_an_empty_mirror_is_the_beginning_of_a_run(tmp_path: Path) -> None:
    assert on_ranks(1, bring_back, tmp_path / "run", str(tmp_path / "mirror")) == [None]


def _die_after(files: int, run: Path, url: str) -> None:
    send = Place.put_file

    def counted(self: Place, path: Path, key: str) -> None:
        nonlocal files
        if files == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        files -= 1
        send(self, path, key)

    Place.put_file = counted  # type: ignore[method-assign]
    mirrored(run, url)


@pytest.mark.parametrize("files", [0, 1])
def test_a_kill_between_two_files_leaves_no_manifest_and_the_next_start_completes_it(
    copy: Path, tmp_path: Path, files: int
) -> None:
    url = str(tmp_path / "mirror")
    process = _context.Process(target=_die_after, args=(files, copy, url))
    process.start()
    process.join(WAIT)
    assert process.exitcode == -signal.SIGKILL
    assert holds(url, copy) == []
    assert len([key for key in Place(url, copy).listed() if key.startswith("step")]) == files
    mirrored(copy, url)
    assert NAMES[3] in holds(url, copy)


def test_the_mirror_keeps_what_the_run_keeps_and_another_runs_copy_is_left_alone(
    copy: Path, run: Path, tmp_path: Path
) -> None:
    url = str(tmp_path / "mirror")
    keep_two(copy, Path(url))
    assert holds(url, copy) == [NAMES[2], NAMES[3]]
    prune(copy, 1, 3)
    mirrored(copy, url)
    assert holds(url, copy) == [NAMES[3]]
    (other := tmp_path / "other").mkdir()
    shutil.copytree(run / "checkpoints" / NAMES[1], other / "checkpoints" / NAMES[1])
    point(other, LATEST, folder_of(other, 1))
    assert mirrored(other, url).failures == 1
    assert holds(url, copy) == [NAMES[3]]


def test_a_run_whose_disk_is_wiped_before_a_checkpoint_is_there_knows_its_place_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, new = str(tmp_path / "mirror"), tmp_path / "new"
    new.mkdir()
    assert mirrored(new, url).failures == 0  # nothing to send yet, and nothing claimed
    assert list((tmp_path / "mirror").iterdir()) == []
    for refused, failures in ((True, 1), (False, 0)):
        shutil.rmtree(new)
        shutil.copytree(run / "checkpoints" / NAMES[3], new / "checkpoints" / NAMES[3])
        point(new, LATEST, folder_of(new, 3))
        with monkeypatch.context() as patch:
            if refused:
                patch.delattr(Place, "put_file")
            assert mirrored(new, url).failures == failures
        assert (tmp_path / "mirror" / "owner").is_file()
    assert holds(url, new) == [NAMES[3]]


def test_a_rollback_and_new_scores_reach_the_mirror(copy: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "mirror")
    keep_two(copy, Path(url))
    remove_later(copy, 2)
    folder = folder_of(copy, 2)
    manifest = read_manifest(folder)
    write_manifest(folder, type(manifest)(**{**vars(manifest), "progress": {"rollbacks": 1}}))
    point(copy, LATEST, folder)
    mirrored(copy, url, back_to=2)
    assert holds(url, copy) == [NAMES[2]]
    assert read_manifest(Path(url) / NAMES[2]).progress == {"rollbacks": 1}


def test_a_rollback_while_the_copy_is_brought_up_to_date_is_not_forgotten(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, put = str(tmp_path / "mirror"), Place.put
    (copy / "checkpoints" / BEST).unlink()

    def go_back(place: Place, content: bytes, key: str) -> None:
        if key == LATEST:
            monkeypatch.undo()
            remove_later(copy, 2)
            point(copy, LATEST, folder_of(copy, 2))
            mirror.go_back(2)
        put(place, content, key)

    monkeypatch.setattr(Place, "put", go_back)
    mirror = Mirror(copy, url, copy / "metrics.jsonl")
    mirror.close(WAIT)
    assert holds(url, copy) == [NAMES[2]]


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(copy: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "mirror")
    mirrored(copy, url)
    _flip(folder_of(copy, 3) / "rank_00000.safetensors")
    shutil.rmtree(Path(url) / NAMES[3])
    assert mirrored(copy, url).failures == 1
    assert holds(url, copy) == [NAMES[1]]


def test_what_is_being_sent_is_not_pruned(copy: Path) -> None:
    prune(copy, 1, 3, in_use=folder_of(copy, 2))
    assert [folder.name for folder in checkpoints(copy)] == NAMES[1:4]  # best, in use, newest


def test_a_mirror_that_fails_is_counted_and_behind(
    copy: Path, s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = mirrored(copy, s3.replace("bucket", "nobody"))
    assert mirror.metrics() == {"checkpoint/mirror_lag_steps": 3, "checkpoint/mirror_failures": 1}
    assert "hunter2" not in caplog.text


def test_a_mirror_inside_of_the_run_is_refused(copy: Path) -> None:
    with pytest.raises(Exception, match="would be lost with it"):
        Place(str(copy / "checkpoints"), copy)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat", "http://host/a", "ftp://host/a", "s3://bucket", "s3://user:hunter2@bucket/a", "s3://bucket/a?sig=x",
        "s3://bucket/../a", "s3://bucket//a", "../a", "a/../../b", "a|b", "$HOME/a", "file://host:80/a#x", "", "a\nb",
        "gs://bucket/a\x1b[2J", "S3://bucket/a", "{a,b}", "~root;ls",
    ],
)  # fmt: skip
def test_a_mirror_is_a_bucket_or_a_folder_and_nothing_else(url: str) -> None:
    with pytest.raises(ValidationError, match="mirror must be s3://"):
        CheckpointConfig(mirror=url)


@pytest.mark.parametrize(
    "url", ["s3://b.c-1/runs/a", "gs://bucket/a/", "/mnt/other/a b", "mirror", "file:///mnt/a"]
)
def test_places_are_taken(url: str) -> None:
    assert CheckpointConfig(mirror=url).mirror == url


def test_a_hostile_manifest_of_a_mirror_writes_nothing_outside(run: Path, tmp_path: Path) -> None:
    mirrored(run, str(tmp_path / "mirror"))
    for folder in (tmp_path / "mirror").glob("step_*"):
        manifest = read_manifest(folder)
        files = {"../../canary": next(iter(manifest.files.values()))}
        write_manifest(folder, type(manifest)(**{**vars(manifest), "files": files}))
    with pytest.raises(RankError, match=r"a file called '\.\./\.\./canary'"):
        on_ranks(1, bring_back, tmp_path / "new", str(tmp_path / "mirror"))
    assert not list(tmp_path.rglob("canary"))
    assert issubclass(MirrorError, Exception)


def test_a_checkpoint_that_is_there_has_the_journal_that_led_to_it(copy: Path, tmp_path: Path) -> None:
    """Also where what comes after it was not sent any more."""
    lines = b'{"op": "attempt"}\n'
    (copy / "metrics.jsonl").write_bytes(lines)
    for slices in (copy / "checkpoints" / NAMES[1]).glob("*.safetensors"):  # the best one: sent last
        slices.write_bytes(b"")
    mirror = mirrored(copy, str(tmp_path / "mirror"))
    assert mirror.failures == 1
    assert holds(str(tmp_path / "mirror"), copy) == [NAMES[3]]
    assert (tmp_path / "mirror" / "journal").read_bytes() == lines

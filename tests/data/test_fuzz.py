"""Damage of every kind, thousands of times: what is read are the samples that were packed, or an error names the file."""

import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzz import Files, Found, by_tarfile, damage
from made import Member, picture, sample_members, write_tar

from pretrain.data import open_dataset
from pretrain.data.read import LocalReader
from pretrain.data.scan import index_folder
from pretrain.errors import BadSampleError, DataError

pytestmark = pytest.mark.filterwarnings("ignore")


def read_all(folder: Path) -> list[Found]:
    """Every sample of a folder of shards, read one by one; raises `DataError`."""
    dataset = open_dataset(str(folder))
    reader = LocalReader(dataset, block_samples=4)
    found: list[Found] = []
    try:
        for number in range(len(dataset)):
            try:
                [read] = reader.read(*dataset.locate(np.array([number])))
                found.append((read.key, bytes(read.image), read.label))
            except BadSampleError as bad:
                found.append((bad.key, None, None))
    finally:
        reader.close()
    return found


class Folder:
    """A folder of files, damaged and mended again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: Files = {file.name: file.read_bytes() for file in path.iterdir()}

    def damaged(self, seed: int, only: str = "") -> tuple[str, bool]:
        """Do the damage of a seed: (what it was, whether any byte is other now)."""
        random = np.random.default_rng(seed)
        files = {name: data for name, data in self.files.items() if name.endswith(only)}
        what, changed = damage(files, random)
        for name, data in changed.items():
            (self.path / name).write_bytes(data)
            if what.startswith("remove"):
                (self.path / name).unlink()
        return what, any(data != self.files[name] for name, data in changed.items())

    def mend(self) -> None:
        for file in self.path.iterdir():
            if file.name not in self.files:
                file.unlink()
        for name, data in self.files.items():
            file = self.path / name
            if not file.exists() or file.read_bytes() != data:
                file.write_bytes(data)


# --- shards with index and manifest


@pytest.fixture
def indexed(tmp_path: Path) -> Folder:
    """Three shards of 8 samples with names for their classes; between samples a member that belongs to none."""
    folder = tmp_path / "indexed"
    for shard in range(3):
        members: list[Member] = []
        for i in range(8):
            members += sample_members(f"{shard}/{i}", i % 4, picture(10 * shard + i, 16, 16))
            members += [("README", b"no sample")] if i % 3 == 0 else []
        write_tar(folder / f"s-{shard}.tar", members)
    index_folder(folder, ["ant", "bee", "cat", "dog"])
    return Folder(folder)


def everything(folder: Path) -> tuple[object, ...] | DataError:
    """All that a training would use of a folder, or why it would not."""
    try:
        opened = open_dataset(str(folder))
        return read_all(folder), opened.paths, opened.digest, opened.labels, opened.class_names
    except DataError as error:
        return error


def outcomes(folder: Folder, seeds: range) -> Counter[tuple[str, str, str]]:
    """(kind of damage, kind of file, what came of it) for each seed that changed a byte; fails at a silent change."""
    whole = everything(folder.path)
    assert isinstance(whole, tuple)
    counts: Counter[tuple[str, str, str]] = Counter()
    for seed in seeds:
        what, changed = folder.damaged(seed)
        kind, name, *_ = what.split()
        found = everything(folder.path)
        if isinstance(found, DataError):
            assert str(folder.path) in str(found), (seed, what)
            assert changed, (seed, what, found)
        elif (
            what == "remove manifest.json"
        ):  # the tars are indexed anew: all is the same but what only it knew
            assert found == (*whole[:-1], None), seed
        else:
            assert found == whole, (seed, what)
        if changed:
            outcome = "a named error" if isinstance(found, DataError) else "the original"
            counts[kind, Path(name).suffix, outcome] += 1
        folder.mend()
    return counts


def test_damage_to_shards_indexes_and_manifest_is_an_error_or_harmless(indexed):
    counts = outcomes(indexed, range(300))
    assert sum(counts.values()) > 250
    assert sum(n for (_, _, outcome), n in counts.items() if outcome == "a named error") > 220
    untouched = {(kind, suffix) for kind, suffix, outcome in counts if outcome == "the original"}
    assert not {suffix for _, suffix in untouched} & {".idx"}  # every byte of an index is under its hash


@pytest.mark.slow
def test_damage_to_shards_indexes_and_manifest_at_length(indexed):
    report(outcomes(indexed, range(300, 6300)))


# --- stock tars, seen for the first time


FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.fixture
def stock(tmp_path: Path) -> Iterator[dict[str, Folder]]:
    """A tar of each common form, with the members that tars are found to have."""
    folders = {}
    for name, form in FORMS.items():
        folder = tarfile.TarInfo("a-folder")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("k1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        long = "ü" * 20 + "/" + "n" * 120 if form != tarfile.USTAR_FORMAT else "p" * 90 + "/" + "n" * 90
        members = [
            folder, *sample_members("k0", 0), *sample_members("k1", 1), link, ("README", b"text"),
            *sample_members(long, 2), ("k3.json", b"{}"), *sample_members("k3", 3), *sample_members("k4", 4),
        ]  # fmt: skip
        write_tar(tmp_path / name / "a.tar", members, form)
        folders[name] = Folder(tmp_path / name)
    yield folders
    shutil.rmtree(tmp_path)


def first_contacts(folders: dict[str, Folder], seeds: range) -> Counter[tuple[str, str, str]]:
    """(kind of damage, form of tar, what came of it); fails where an index disagrees with `tarfile`."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for seed in seeds:
        form = list(folders)[seed % len(folders)]
        folder = folders[form]
        what, changed = folder.damaged(seed, only=".tar")
        kind = what.split()[0]
        if changed and kind != "remove":
            counts[kind, form, _first_contact(folder.path, (seed, what), bits_only=kind == "flip")] += 1
        folder.mend()
    return counts


def _first_contact(folder: Path, case: object, bits_only: bool) -> str:
    refusal = why_refused(folder)
    if refusal is not None:
        assert str(folder) in refusal, case
        return "refused"
    assert read_all(folder) == by_tarfile(folder / "a.tar"), case
    if bits_only:  # no flipped bit may end a tar early
        assert len(open_dataset(str(folder))) >= 5, case
    return "as tarfile sees it"


def why_refused(folder: Path) -> str | None:
    try:
        index_folder(folder)
    except DataError as error:
        return str(error)
    return None


def test_a_damaged_stock_tar_is_refused_or_read_as_tarfile_reads_it(stock):
    counts = first_contacts(stock, range(300))
    assert {outcome for _, _, outcome in counts} == {"refused", "as tarfile sees it"}


@pytest.mark.slow
def test_a_damaged_stock_tar_at_length(stock):
    report(first_contacts(stock, range(300, 6300)))


def report(counts: Counter[tuple[str, str, str]]) -> None:
    """Shown with `pytest -s`."""
    for outcome in sorted({key[2] for key in counts}):
        print(f"\n{sum(n for key, n in counts.items() if key[2] == outcome):,} x {outcome}: ", end="")
        by_kind: Counter[str] = Counter()
        for (kind, where, said), n in counts.items():
            by_kind[f"{kind} {where}"] += n if said == outcome else 0
        print(", ".join(f"{kind} {n}" for kind, n in sorted(by_kind.items()) if n))

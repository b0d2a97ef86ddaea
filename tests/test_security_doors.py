"""Every door through which bytes of strangers come in: what lies behind it runs nothing, and is refused by name.

The payloads here leave a file where they run; `docs/security.md` lists the doors and the tests of the others.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save
from test_config import SMALLEST

from pretrain.checkpoint import layout
from pretrain.checkpoint.load import open_weights
from pretrain.config.load import parse
from pretrain.errors import CheckpointError, ConfigError, RunDirError
from pretrain.run_dir import STATUS, read_heartbeat, read_status

ROOT = Path(__file__).parents[1]
CANARY = "executed"


class Executes:
    """Unpickled, it leaves a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (self.canary,)


def pickled(protocol: int) -> Callable[[Path], bytes]:
    return lambda canary: pickle.dumps(Executes(canary), protocol)


def by_torch(*, archive: bool) -> Callable[[Path], bytes]:
    def make(canary: Path) -> bytes:
        buffer = io.BytesIO()
        torch.save({"w": Executes(canary)}, buffer, _use_new_zipfile_serialization=archive)
        return buffer.getvalue()

    return make


def by_numpy(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Executes(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def header(document: Any, length: int | None = None) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(16)


KEY = "weight:w:0:4"
RANK_FILES: dict[str, Callable[[Path], bytes]] = {
    **{f"a pickle of protocol {n}": pickled(n) for n in range(6)},
    "a pickle by os.system": lambda canary: b"cposix\nsystem\n(S'mkdir " + str(canary).encode() + b"'\ntR.",
    "a file of torch.save": by_torch(archive=True),
    "an old file of torch.save": by_torch(archive=False),
    "an array of objects": by_numpy,
    "a program": lambda canary: f"#!/bin/sh\nmkdir {canary}\n".encode(),
    "a header of exabytes": lambda canary: header({}, 2**60),
    "a header of gigabytes": lambda canary: header({}, 2**31),
    "a nested header": lambda canary: header(b"[" * 100_000),
    "data past the end": lambda canary: header({KEY: {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}}),
    "another name": lambda canary: save({"weight:v:0:4": torch.zeros(4)}),
    "another shape": lambda canary: save({KEY: torch.zeros(2, 2, 2)}),
}  # fmt: skip


def body(**changes: Any) -> dict[str, Any]:
    """A manifest's, which nothing is wrong with."""
    return {
        "step": 1, "world_size": 1, "zero_stage": 0, "config": parse(SMALLEST, "x").model_dump(mode="json", by_alias=True),
        "plan": {}, "data": {}, "progress": {}, "metrics": {}, "optimizer": "adamw", "optimizer_steps": 1,
        "shapes": {"w": [4]}, "slices": {"w": [[0, 4, 0]]},
        "files": {layout.rank_file(0): [1, "0" * 64]}, "version": layout.VERSION,
    } | changes  # fmt: skip


def folder_with(tmp_path: Path, content: bytes, **changes: Any) -> Path:
    """A checkpoint whose hashes are right: whoever writes a payload writes them too."""
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / layout.rank_file(0)).write_bytes(content)
    files = {layout.rank_file(0): [len(content), hashlib.sha256(content).hexdigest()]}
    document = body(**{"files": files} | changes)
    digest = hashlib.sha256(layout._canonical(document)).hexdigest()
    (folder / layout.MANIFEST).write_text(json.dumps({"sha256": digest, "body": document}))
    return folder


def test_the_checkpoint_that_the_payloads_are_put_into_is_read(tmp_path: Path) -> None:
    opened = open_weights(folder_with(tmp_path, save({KEY: torch.arange(4.0)})))
    assert opened.weights["w"].tolist() == [0, 1, 2, 3]


PROGRAMS = [name for name in RANK_FILES if name.split()[1] in ("pickle", "file", "old", "array", "program")]
UNSAFE: tuple[Callable[[Path], object], ...] = (
    lambda path: pickle.loads(path.read_bytes()),  # noqa: S301 (the control)
    lambda path: torch.load(path, weights_only=False),
    lambda path: np.load(path, allow_pickle=True),
    lambda path: subprocess.run(["/bin/sh", str(path)], check=True),
)
"""Readers that trust what they read."""


@pytest.mark.parametrize("case", PROGRAMS)
def test_behind_an_open_door_each_program_among_them_runs(tmp_path: Path, case: str) -> None:
    payload = tmp_path / "payload"
    payload.write_bytes(RANK_FILES[case](tmp_path / CANARY))
    for reader in UNSAFE:
        with contextlib.suppress(Exception):
            reader(payload)
    assert (tmp_path / CANARY).is_dir()


@pytest.mark.parametrize("case", RANK_FILES)
def test_a_rank_file_is_tensors_or_nothing(tmp_path: Path, case: str) -> None:
    folder = folder_with(tmp_path, RANK_FILES[case](tmp_path / CANARY))
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors does not hold weight w"):
        _ = open_weights(folder).weights["w"]
    assert not (tmp_path / CANARY).exists()


GOOD = layout.rank_file(0)
MANIFESTS: dict[str, dict[str, Any]] = {
    "a way out": {"files": {"../../canary": [1, "0" * 64]}},
    "an absolute name": {"files": {"/etc/passwd": [1, "0" * 64]}},
    "a pickle by name": {"files": {"rank_00000.pkl": [1, "0" * 64]}},
    "a name with an escape sequence": {"files": {"\x1b[2Jrank_00000.safetensors": [1, "0" * 64]}},
    "a size of NaN": {"files": {GOOD: [float("nan"), "0" * 64]}},
    "a size of infinity": {"files": {GOOD: [float("inf"), "0" * 64]}},
    "less than nothing": {"files": {GOOD: [-1, "0" * 64]}},
    "a size that is true": {"files": {GOOD: [True, "0" * 64]}},
    "a size in words": {"files": {GOOD: ["1", "0" * 64]}},
    "a hash that is none": {"files": {GOOD: [1, "x"]}},
    "files in a list": {"files": [GOOD]},
    "a step of NaN": {"step": float("nan")},
    "a step below zero": {"step": -1},
    "a shape below zero": {"shapes": {"w": [-4]}},
    "a shape in words": {"shapes": {"w": "4"}},
    "slices of nothing": {"slices": {"w": 4}},
    "slices of a rank that is not there": {"slices": {"w": [[0, 4, 7]]}},
    "a section that is a list": {"progress": [1]},
    "a field more": {"__reduce__": ["os.system", "x"]},
    "another version": {"version": 99},
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_with_a_right_hash_is_not_believed_for_it(tmp_path: Path, case: str) -> None:
    folder = folder_with(tmp_path, save({KEY: torch.zeros(4)}), **MANIFESTS[case])
    with pytest.raises(CheckpointError) as refused:
        open_weights(folder)
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("case", sorted(MANIFESTS.keys() - {"a field more", "another version"}))
def test_without_the_look_beyond_its_hash_each_manifest_would_be_believed(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path, save({KEY: torch.zeros(4)}), **MANIFESTS[case])
    monkeypatch.setattr(layout, "_hostile", lambda manifest: None)
    layout.read_manifest(folder)


NO_MANIFEST: dict[str, Callable[[Path], bytes]] = {
    "a pickle": pickled(4),
    "a program in YAML": lambda canary: f"!!python/object/apply:os.mkdir ['{canary}']".encode(),
    "nested": lambda canary: b"[" * 10**6,
    "digits": lambda canary: b"9" * 10**6,
    "nothing": lambda canary: b"",
    "no text": lambda canary: b"\xff\xfe\0",
}


@pytest.mark.parametrize("case", NO_MANIFEST)
def test_what_is_no_manifest_or_status_is_said_so(tmp_path: Path, case: str) -> None:
    content = NO_MANIFEST[case](tmp_path / CANARY)
    (tmp_path / layout.MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a manifest"):
        open_weights(tmp_path)
    (tmp_path / STATUS).write_bytes(content)
    (tmp_path / "heartbeat.json").write_bytes(content)
    with pytest.raises(RunDirError):
        read_status(tmp_path)
    assert read_heartbeat(tmp_path) is None
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    "text", ["[]", "7", "null", '"x"', "{}", '{"status": "hacked", "step": 1}',
             '{"status": ["finished"], "step": 1}', '{"status": "finished", "step": "1"}']
)  # fmt: skip
def test_json_of_another_kind_is_no_status_and_no_heartbeat(tmp_path: Path, text: str) -> None:
    (tmp_path / STATUS).write_text(text)
    (tmp_path / "heartbeat.json").write_text(text)
    with pytest.raises(RunDirError, match=r"holds no status|not the directory of a run"):
        read_status(tmp_path)
    assert read_heartbeat(tmp_path) is None


def test_a_pipe_in_place_of_a_manifest_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / layout.MANIFEST)
    with pytest.raises(CheckpointError, match="cannot be read as a manifest"):
        layout.read_manifest(tmp_path)


LAUGHS = "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))  # fmt: skip
YAMLS = {
    "apply": "run: !!python/object/apply:os.mkdir ['CANARY']",
    "new": "run: !!python/object/new:os.mkdir ['CANARY']",
    "object": "run: !!python/object:os.mkdir {}",
    "name": "run: !!python/name:os.system",
    "module": "run: !!python/module:os",
    "tuple": "run: !!python/tuple [1]",
    "verbatim": "run: !<tag:yaml.org,2002:python/object/apply:os.mkdir> ['CANARY']",
    "directive": "%TAG !p! tag:yaml.org,2002:python/\n---\nrun: !p!object/apply:os.mkdir ['CANARY']",
    "a key": "!!python/object/apply:os.mkdir ['CANARY']: 1",
    "bytes": "run: !!binary aGVsbG8=",
    "a billion laughs": LAUGHS,
    "a merge": "run: &r {dir: x}\ndata: {<<: *r}",
    "itself": "run: &r [*r]",
    "nested": "run: " + "[" * 100_000,
}


@pytest.mark.parametrize("case", ["apply", "new", "verbatim", "directive", "a key"])
def test_an_unsafe_reader_of_yaml_would_run_these(tmp_path: Path, case: str) -> None:
    with contextlib.suppress(yaml.YAMLError):  # after the deed: what comes back is no key
        yaml.unsafe_load(YAMLS[case].replace("CANARY", str(tmp_path / CANARY)))
    assert (tmp_path / CANARY).is_dir()


@pytest.mark.parametrize("case", YAMLS)
def test_a_config_is_plain_values_or_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(ConfigError):
        parse(YAMLS[case].replace("CANARY", str(tmp_path / CANARY)), "mine.yaml")
    assert not (tmp_path / CANARY).exists()


def test_at_least_forty_payloads_run_and_every_test_of_the_table_exists() -> None:
    assert len(RANK_FILES) + len(MANIFESTS) + len(NO_MANIFEST) + len(YAMLS) >= 40
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) >= 12
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), (file, test)

"""Weights of one library go out to another: `pretrain import`, then `pretrain export` of what it wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peers import SQUARE, WIDE, model, photographs, random_weights, write

from pretrain.errors import CheckpointError, ExportError
from pretrain.export import export
from pretrain.formats import EXPORTS, exporter
from pretrain.formats.files import About, Preprocess, read_provenance
from pretrain.importing import import_
from pretrain.model import build

ABOUT = About({"run": "runs/a"}, Preprocess(0.8, "bicubic"), ("a", "b", "c", "d", "e"), licence="apache-2.0")
FROM_EACH: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "timm, cls": ("timm", {}, set(EXPORTS)),
    "timm, GAP": ("timm", {"global_pool": "avg"}, set(EXPORTS) - {"transformers", "bigvision"}),
    "timm, GAP behind the norm": ("timm", {"global_pool": "norm_avg"}, set(EXPORTS) - {"transformers"}),
    "timm, MAP": ("timm", {"global_pool": "map"}, set(EXPORTS) - {"transformers"}),
    "transformers, cls": ("transformers", {}, set(EXPORTS)),
    "npz, cls": ("bigvision", {}, set(EXPORTS)),
    "npz, GAP": ("bigvision", {"global_pool": "norm_avg"}, set(EXPORTS) - {"transformers"}),
    "npz, MAP": ("bigvision", {"global_pool": "map"}, set(EXPORTS) - {"transformers"}),
}
"""Format that the weights come in, how they differ, and the formats that can hold them."""


def bring(folder: Path, name: str, shape: dict[str, Any], about: About = ABOUT) -> Path:
    """A source of another library's, imported."""
    form, changes, _ = FROM_EACH[name]
    config = model(mean=(0.5,), std=(0.5,), **shape | changes)
    source = write(folder / "source", form, config, about).path
    size = [str(side) for side in config.img_size]
    said = [str(source / "model.npz"), "--img-size", *size] if form == "bigvision" else [str(source)]
    done = CliRunner().invoke(import_, [*said, "--out", str(folder / "here")], catch_exceptions=False)
    assert done.exit_code == 0
    return folder / "here"


def send(source: Path, out: Path, form: str, *more: str) -> Result:
    return CliRunner().invoke(
        export, [str(source), "--out", str(out), "--format", form, *more], catch_exceptions=False
    )


@pytest.mark.parametrize(
    ("name", "form", "shape"),
    [("npz, cls", "transformers", WIDE), ("transformers, cls", "timm", WIDE), ("timm, MAP", "bigvision", SQUARE)],
)  # fmt: skip
def test_weights_of_one_library_come_out_for_another(
    tmp_path: Path, name: str, form: str, shape: dict[str, Any]
) -> None:
    here = bring(tmp_path, name, shape)
    done = send(here, tmp_path / "there", form)
    assert "of here in" in done.output
    assert "at most, on 8 images" in done.output
    config = model(mean=(0.5,), std=(0.5,), **shape | FROM_EACH[name][1])
    images = photographs(config)
    with torch.no_grad():
        expected = build(config, random_weights(config))(images)
    torch.testing.assert_close(
        exporter(form).load(tmp_path / "there")(images), expected, atol=1e-5, rtol=1e-4
    )


def test_what_is_known_of_the_weights_goes_with_them(tmp_path: Path) -> None:
    here = bring(tmp_path, "timm, cls", WIDE)
    send(here, tmp_path / "there", "transformers", "--licence", "mit")
    found = read_provenance(tmp_path / "there")
    assert found.lineage["imported_from"] == "source"
    assert found.lineage["export_of"]["folder"] == "here"
    assert found.preprocess == (0.8, "bicubic")
    assert found.class_names == ABOUT.class_names
    assert found.licence == "mit"
    assert "export_of" in (tmp_path / "there" / "README.md").read_text()
    send(tmp_path / "here", tmp_path / "there", "safetensors")
    assert read_provenance(tmp_path / "there").licence is None


def test_only_a_whole_export_of_ours_goes_on(tmp_path: Path) -> None:
    here = bring(tmp_path, "timm, cls", WIDE)
    with pytest.raises(CheckpointError, match="is an export of format timm; `pretrain import` makes one"):
        send(tmp_path / "source", tmp_path / "out", "onnx")
    with pytest.raises(ExportError, match=r"--which best: .* leave it out"):
        send(here, tmp_path / "out", "timm", "--which", "best")
    with pytest.raises(ExportError, match="is what is to be exported"):
        send(here, here, "timm")
    with pytest.raises(ExportError, match="say where to write with --out"):
        CliRunner().invoke(export, [str(here)], catch_exceptions=False)
    for place in (".", ".."):
        with pytest.raises(ExportError, match="is not the name of a folder"):
            send(here, Path(place), "timm")
    document = json.loads((here / "config.json").read_text())
    document["pretrain"]["model"]["depth"] = 3
    (here / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"missing in the source: blocks\.2"):
        send(here, tmp_path / "out", "timm")
    weights = bytearray((here / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (here / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="is damaged or was replaced"):
        send(here, tmp_path / "out", "timm")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("name", FROM_EACH)
@pytest.mark.timeout(900)
def test_every_pair_of_libraries(tmp_path: Path, name: str, shape: dict[str, Any]) -> None:
    """Prints the table of largest differences: `pytest -m slow -s`."""
    here = bring(tmp_path, name, shape)
    for form in EXPORTS:
        if form not in FROM_EACH[name][2]:
            with pytest.raises(ExportError, match="cannot express this model; use --format"):
                send(here, tmp_path / form, form)
            continue
        done = send(here, tmp_path / form, form)
        difference = done.output.partition("differ by ")[2].split()[0]
        assert float(difference) <= 1e-5
        print(f"pair {name:26} -> {form:12} {shape['img_size']!s:9} {difference}")

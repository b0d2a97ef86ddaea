"""`pretrain predict` names the classes that the model answers, image by image, and what it could not read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peers import ABOUT, WIDE, model, photographs, random_weights, write
from PIL import Image

from pretrain.errors import CheckpointError, DataError, ExportError
from pretrain.formats.files import About, Preprocess
from pretrain.model import build
from pretrain.predict import predict

NAMES = ("ant", "bee", "cat", "dog", "elk")
CONFIG = model(num_classes=5, act="gelu_tanh", **WIDE)


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(predict, list(map(str, arguments)), catch_exceptions=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs at the model's size in a folder and one below it, beside something that is no image."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "below").mkdir()
    for number, pixels in enumerate(photographs(CONFIG, 5).numpy()):
        Image.fromarray(pixels).save(folder / ("below" if number == 4 else ".") / f"{number}.png")
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for form in ("safetensors", "timm", "transformers", "bigvision", "onnx"):
        write(folder / form, form, CONFIG, About({}, class_names=NAMES))
    return folder


@pytest.mark.parametrize("form", ["safetensors", "timm", "transformers", "bigvision", "onnx"])
def test_the_best_classes_are_the_model_s_from_any_export(exports: Path, images: Path, form: str) -> None:
    done = ask(exports / form, images, "--json", "--batch", 2, "--top", 3)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [Path(each["path"]).name for each in found["images"]] == [f"{n}.png" for n in range(5)]
    with torch.no_grad():
        shares = build(CONFIG, random_weights(CONFIG))(photographs(CONFIG, 5)).softmax(-1)
    for each, row in zip(found["images"], shares, strict=True):
        values, classes = row.topk(3)
        assert [entry["class"] for entry in each["top"]] == classes.tolist()
        assert [entry["name"] for entry in each["top"]] == [NAMES[c] for c in classes]
        assert [entry["probability"] for entry in each["top"]] == pytest.approx(values.tolist(), abs=1e-5)
    assert found["not_classified"] == []


def test_people_get_a_line_for_each_image(exports: Path, images: Path) -> None:
    done = ask(exports / "safetensors", images / "0.png", images / "below")
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{images}/0.png: ")
    assert second.startswith(f"{images}/below/4.png: ")
    assert first.count("%") == 5
    assert any(name in first for name in NAMES)


def test_images_are_resized_and_cropped_as_in_validation(tmp_path: Path, images: Path) -> None:
    """A larger picture, through the view that evaluation uses."""
    import numpy as np

    from pretrain.data.augment import EvalView

    large = np.array(Image.open(images / "2.png").resize((90, 70)))
    Image.fromarray(large).save(tmp_path / "large.png")
    about = About({}, Preprocess(0.8, "bicubic"), probabilities="sigmoid")
    done = write(tmp_path / "out", "safetensors", CONFIG, about)
    said = json.loads(ask(done.path, tmp_path / "large.png", "--json").stdout)["images"][0]["top"]
    seen = np.empty((8, 24, 3), np.uint8)
    EvalView(0.8, "bicubic").render(large, np.empty(0), seen)
    with torch.no_grad():
        shares = build(CONFIG, random_weights(CONFIG))(torch.from_numpy(seen)[None])[0].sigmoid()
    assert said[0]["class"] == int(shares.argmax())
    assert said[0]["probability"] == pytest.approx(float(shares.max()), abs=1e-5)
    assert said[0]["name"] is None


def test_bad_images_are_named_and_the_others_classified(exports: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((images / "0.png").read_bytes())
    (tmp_path / "b.png").write_bytes((images / "0.png").read_bytes()[:60])
    (tmp_path / "c.jpg").write_text("no image")
    done = ask(exports / "safetensors", tmp_path, tmp_path / "d.png", "--json", "--batch", 1)
    assert isinstance(done.exception, DataError)
    assert str(done.exception) == "3 of 4 images could not be read"
    assert done.exception.exit_code == 3
    found = json.loads(done.stdout)
    assert [Path(each["path"]).name for each in found["images"]] == ["a.png"]
    assert [Path(each["path"]).name for each in found["not_classified"]] == ["b.png", "c.jpg", "d.png"]
    assert "not classified:" in done.stderr
    assert "c.jpg: not decodable" in done.stderr


def spoil(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "kind", "message"),
    [
        (spoil, CheckpointError, "is damaged or was replaced"),
        (lambda f: (f / "config.json").unlink(), CheckpointError, "`pretrain export` makes one"),
        (lambda f: (f / "config.json").write_text('{"architecture": "x"}'), CheckpointError, "is not from"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "cannot be read"),
    ],
    ids=["bit", "no config", "foreign", "no weights"],
)
def test_a_damaged_export_classifies_nothing(
    tmp_path: Path, images: Path, harm: Any, kind: type[Exception], message: str
) -> None:
    done = write(tmp_path / "out", "safetensors", CONFIG)
    harm(done.path)
    asked = ask(done.path, images)
    assert isinstance(asked.exception, kind)
    assert message in str(asked.exception)
    assert asked.stdout == ""


def test_an_mlflow_model_is_left_to_mlflow(tmp_path: Path, images: Path) -> None:
    done = write(tmp_path / "out", "mlflow", CONFIG, ABOUT, verify=False)
    asked = ask(done.path, images)
    assert isinstance(asked.exception, ExportError)
    assert "mlflow models serve" in str(asked.exception)


def test_a_model_of_one_class_is_no_classifier(tmp_path: Path, images: Path) -> None:
    """What `pretrain import` makes of a source without a head would call every image class 0, at 100 %."""
    done = write(tmp_path / "out", "safetensors", model(num_classes=1), ABOUT)
    asked = ask(done.path, images)
    assert isinstance(asked.exception, ExportError)
    assert "had no head; fine-tune it first" in str(asked.exception)


def test_a_folder_without_images_is_said_so(exports: Path, tmp_path: Path) -> None:
    asked = ask(exports / "safetensors", tmp_path)
    assert isinstance(asked.exception, DataError)
    assert "there is no image (.jpg, .jpeg, .png, .webp)" in str(asked.exception)

"""Every Python block of the README runs as written, in order and in one namespace.

From outside come small models under the names of the large ones, checkpoints in the hub's layout instead of downloads,
and a folder of pictures.
"""

import json
import pathlib
import re

import families
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_weights import exported

import keras_vits
from keras_vits import checkpoints, creation

README = pathlib.Path(__file__).parents[1] / "README.md"
SMALL = {
    "mobilevit_xs": next(f.tiny for f in families.FAMILIES if f.name == "mobilevit"),
    "deit3_small_patch16_224": dict(image_size=32, patch_size=8, width=24, depth=5, heads=2, mlp_hidden=48),
}


def blocks():
    """(line, source) of each Python block."""
    text = README.read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 2, m.group(1)) for m in re.finditer(r"```python\n(.*?)```", text, re.S)]


def photos(folder, classes=("ant", "bee", "cat"), count=30, side=40):
    """Writes a folder of pictures, one subfolder for each class, whose colour tells the class."""
    from PIL import Image

    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 120, (side, side, 3))
            pixels[..., number] += 120
            Image.fromarray(pixels.astype("uint8")).save(folder / name / f"{i}.png")


def checkpoint(folder, name, create):
    """Writes random weights of a small model in the hub's layout, with ImageNet's 1000 classes; returns the folder."""
    folder.mkdir(parents=True)
    model = families.randomize(create(name, **{**SMALL[name], "num_classes": 1000}))
    save_file(exported(model), folder / "model.safetensors")
    published = {"num_classes": 1000, "tag": "in1k", "input_size": [3, *model.cfg.image_size]}
    config = {"architecture": name, "pretrained_cfg": published}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.once  # tests/test_compile.py trains the chain's model on each backend
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    photos(tmp_path / "photos")
    (tmp_path / "photos" / "bee" / "0.png").rename(tmp_path / "photo.jpg")
    real = creation.create

    def create(name, weights=None, **given):
        sizes = {k: v for k, v in SMALL[name].items() if k != "num_classes"}
        return real(name, weights, **{**given, **sizes})

    def download(hub_id):
        folder = tmp_path / "hub" / hub_id
        return folder if folder.is_dir() else checkpoint(folder, hub_id.split("/")[1].split(".")[0], real)

    monkeypatch.setattr(keras_vits, "create", create, raising=False)
    monkeypatch.setattr(checkpoints.files, "download", download)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    assert len(blocks()) >= 3
    for line, source in blocks():
        exec(compile("\n" * (line - 1) + source, README, "exec"), namespace)
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "time.png").is_file()
    assert namespace["model"].class_names == ["ant", "bee", "cat"]
    assert namespace["best"].artifact.path.is_file()

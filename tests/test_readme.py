"""Every Python block of the README, and of the documentation's pages, runs as written, in order and in one namespace.

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
from keras_vits import checkpoints, creation, edge

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if "```python" in page.read_text(encoding="utf-8"))
SMALL = {
    "vit_tiny_patch16_224": dict(image_size=32, patch_size=8, width=24, depth=2, heads=2, mlp_hidden=48),
    "mobilevit_xs": next(f.tiny for f in families.FAMILIES if f.name == "mobilevit"),
    "deit3_small_patch16_224": dict(image_size=32, patch_size=8, width=24, depth=5, heads=2, mlp_hidden=48),
}


def blocks(page):
    """(line, source) of each Python block, but those below a comment `<!-- notest: the reason -->`."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"(?<!-->\n)^```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start()].count("\n") + 2, match.group(1)) for match in found]


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


@pytest.fixture
def run(tmp_path, monkeypatch, short_timing):
    """Runs the blocks of a page in a folder with pictures; returns the names that they left."""
    photos(tmp_path / "photos")
    (tmp_path / "photos" / "bee" / "0.png").rename(tmp_path / "photo.jpg")
    real = creation.create

    def create(name, weights=None, **given):
        sizes = {k: v for k, v in SMALL.get(name, {}).items() if k != "num_classes"}
        return real(name, weights, **{**given, **sizes})

    def download(hub_id):
        folder = tmp_path / "hub" / hub_id
        return folder if folder.is_dir() else checkpoint(folder, hub_id.split("/")[1].split(".")[0], real)

    monkeypatch.setattr(keras_vits, "create", create, raising=False)
    monkeypatch.setattr(checkpoints.files, "download", download)
    monkeypatch.chdir(tmp_path)

    def execute(page):
        namespace = {}
        for line, source in blocks(page):
            exec(compile("\n" * (line - 1) + source, page, "exec"), namespace)
        return namespace

    return execute


@pytest.mark.once  # tests/test_compile.py trains the chain's model on each backend
def test_the_python_of_the_readme_runs(run, tmp_path):
    assert len(blocks(README)) >= 2
    namespace = run(README)
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "time.png").is_file()
    assert namespace["model"].class_names == ["ant", "bee", "cat"]


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(run, page):
    namespace = run(page)
    for value in namespace.values():  # files that a page has made are the bytes that were written
        if isinstance(value, edge.Artifact):
            assert edge.artifact.load(value.path).sha256 == value.sha256
    if page.stem == "quantize-to-a-budget":
        assert namespace["best"].artifact.path.is_file() and namespace["best"].tried
    if page.stem == "tutorial":
        assert all(check.partitions == 1 for check in namespace["checks"])

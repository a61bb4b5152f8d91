"""The wheel, built from a copy of the source and used without it: what is in it, and that it works."""

import configparser
import email
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement

from keras_vits import version

pytestmark = pytest.mark.once

VERSION = version.__version__
ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LAZY = {
    "ai_edge_litert",
    "ai_edge_quantizer",
    "coremltools",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "rich",
    "sklearn",
    "typer",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel file."""
    source, folder = tmp_path_factory.mktemp("source") / "keras-vits", tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "out", "build", "dist")
    shutil.copytree(ROOT, source, ignore=unwanted)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel installed, and nothing of the source."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--target", folder, wheel)
    return folder


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"keras_vits-{VERSION}.dist-info/METADATA"))


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(folder, *command):
    """What a command prints in an empty place where only the installed wheel is found."""
    environment = os.environ | {"PYTHONPATH": str(folder), "KERAS_BACKEND": "jax"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.startswith(f"keras_vits-{VERSION}.dist-info/")]
    expected = {f"keras_vits/{name}" for name in python_files(ROOT / "keras_vits")}
    expected |= {f"keras_vits/edge/{name}" for name in python_files(ROOT / "edge")}
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name for name in names if not name.endswith(".py")} == {
        "keras_vits/__init__.pyi",
        "keras_vits/checkpoints/checkpoints.csv",
        "keras_vits/edge/__init__.pyi",
        "keras_vits/py.typed",
        "keras_vits/checkpoints/imagenet_classes.txt",
        "keras_vits/edge/bundling/templates/ImageClassifier.kt",
        "keras_vits/edge/bundling/templates/ImageClassifier.swift",
        "keras_vits/edge/bundling/templates/ImageClassifier.ts",
        *(
            f"keras_vits/edge/devices/browser_page/{name}"
            for name in ("index.html", "model.html", "model.js", "page.js")
        ),
        "keras_vits/edge/evidence/templates/report.css",
        "keras_vits/edge/evidence/templates/report.html.j2",
    }
    assert {name.split("/")[0] for name in names} == {"keras_vits"}


def test_every_package_is_listed():
    folders = [(ROOT / "keras_vits", "keras_vits"), (ROOT / "edge", "keras_vits.edge")]
    found = {
        ".".join([name, *path.parent.relative_to(folder).parts])
        for folder, name in folders
        for path in folder.rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_a_checkout_resolves_edge_where_the_wheel_has_it():
    assert (ROOT / "keras_vits" / "edge").resolve() == ROOT / "edge"


def test_metadata_agrees_with_the_source(wheel, metadata):
    assert wheel.name == f"keras_vits-{VERSION}-py3-none-any.whl"
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert f"keras_vits-{VERSION}.dist-info/licenses/LICENSE" in names


def test_core_needs_only_keras_and_small_packages(metadata):
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert {r.name for r in required if r.marker is None} == {"keras", "numpy", "filelock", "msgspec", "psutil"}


def test_every_extra_leads_to_packages(metadata):
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra")) == set(extras)

    def packages(name):
        for requirement in map(Requirement, extras[name]):
            if requirement.name == "keras-vits":
                for other in requirement.extras:
                    yield from packages(other)
            else:
                yield requirement.name

    for name in extras:
        assert set(packages(name)), name
    development = {"test", "docs"}
    users = {package for name in extras if name not in development for package in packages(name)}
    assert set(packages("all")) == users


def test_installed_wheel_works_without_the_source(installed):
    code = [
        "import sys, keras",
        "before = set(sys.modules)",
        "import keras_vits; from keras_vits import edge",
        "added = set(sys.modules) - before",
        "model = keras_vits.create('vit_tiny_patch16_224', image_size=32, depth=1, num_classes=3)",
        "print(keras_vits.__version__, keras_vits.__file__, edge.__file__, model.output_shape, sep='\\n')",
        f"print(sorted({LAZY} & added))",
    ]
    lines = run(installed, sys.executable, "-P", "-c", "\n".join(code)).splitlines()
    assert lines == [
        VERSION,
        str(installed / "keras_vits" / "__init__.py"),
        str(installed / "keras_vits" / "edge" / "__init__.py"),
        "(None, 3)",
        "[]",
    ]


def test_every_public_name_is_there_after_the_import(installed):
    code = [
        "import sys, keras_vits",
        "assert not {'keras', 'numpy'} & set(sys.modules), 'the import is light'",
        "names = {*keras_vits.__all__, 'hub'}",
        "assert names <= set(dir(keras_vits))",
        "assert all(getattr(keras_vits, name) is not None for name in keras_vits.__all__)",
        "print(*sorted(names))",
    ]
    found = run(installed, sys.executable, "-P", "-c", "\n".join(code)).split()
    folder = installed / "keras_vits"
    inner = {"_util", "cli", "graph", "heads"}  # rooms whose public names stand elsewhere
    packages = {p.parent.name for p in folder.glob("*/__init__.py")} - inner
    assert packages | {"VisionModel", "checkpoints", "create", "hub", "list_models", "predict", "preprocess"} <= set(
        found
    )


def test_console_script_answers(wheel, installed):
    with zipfile.ZipFile(wheel) as archive:
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(f"keras_vits-{VERSION}.dist-info/entry_points.txt").decode())
    assert dict(parser["console_scripts"]) == {"keras-vits": "keras_vits.cli:main"}
    assert "export" in run(installed, sys.executable, "-P", installed / "bin" / "keras-vits", "--help")

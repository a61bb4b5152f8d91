"""The documentation's site: built without a warning and without network, complete, and true. `make docs` runs these."""

import ast
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
SITE = ROOT / "out" / "site"
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FOLDERS = ("keras_vits", "edge", "tests", "tools", "benchmarks", "examples", "docs")
page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@pytest.fixture(scope="module")
def hooks():
    """docs/hooks.py, which writes the generated parts."""
    return load(ROOT / "docs" / "hooks.py")


@pytest.fixture(scope="module")
def house():
    return load(ROOT / "tools" / "house.py")


def load(file):
    """A script as a module."""
    from importlib import util

    spec = util.spec_from_file_location(file.stem, file)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_is_built_without_a_warning_and_has_every_public_name(hooks):
    """One test, since two processes must not build into one folder at once."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "KERAS_BACKEND": "jax"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean", "--site-dir", str(SITE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {path: path.read_text(encoding="utf-8") for path in SITE.rglob("*.html")}
    everything = "".join(pages.values())
    wanted = [name for package in hooks.PLACES for name in hooks.names(package)]
    assert len(wanted) > 60
    assert not [name for name in wanted if f'id="{name}"' not in everything]
    assert all(f"keras-vits {verb}" in everything for verb in ("train", "export", "quantize", "bundle"))
    for path, text in pages.items():  # nothing is fetched from elsewhere
        fetched = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//[^"]*"', text)
        fetched += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|preload)"[^>]*href="(?:https?:)?//[^"]*"', text)
        assert not fetched, (path, fetched)


def test_the_tree_and_the_arrows_are_true(house):
    text = house.PAGE.read_text(encoding="utf-8")
    assert house.updated(text) == text, "docs/design/house.md is out of date: python tools/house.py writes it again."
    rooms = {room for layer in house.layers() for room in layer}
    for folder, name in ((ROOT / "keras_vits", "keras_vits"), (ROOT / "edge", "keras_vits.edge")):
        for path in folder.glob("*/__init__.py"):
            room = f"{name}.{path.parent.name}"
            assert room in rooms or room == "keras_vits.edge", f"{room} is in no layer of [tool.importlinter]"
    made = ("out", "build", "dist", "__pycache__")  # by commands, beside the source
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."}
    folders = {name for name in folders if name not in made and not name.endswith(".egg-info")}
    assert folders == {"keras_vits", "edge", *house.BESIDE}


@page
def test_files_that_a_page_names_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`([\w./-]+)`", text):
        if name.split("/")[0] in FOLDERS and "/" in name:
            assert (ROOT / name).exists(), name
    for name in re.findall(r"(?:python|bash) ([\w/-]+\.(?:py|sh))", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@page
def test_command_lines_of_a_page_are_known(page):
    import typer

    from keras_vits.cli import app

    verbs = typer.main.get_command(app).commands
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["keras-vits"] or words[1].startswith("-") or words[1].isupper():
                continue
            known = {option for parameter in verbs[words[1]].params for option in parameter.opts} | {"--help"}
            assert {word for word in words[2:] if word.startswith("-")} <= known, line


@page
def test_python_of_a_page_is_run_or_says_why_not(page):
    """tests/test_readme.py runs it; what it leaves out has a reason in a comment before it."""
    for reason in re.findall(r"-->\n```python", page.read_text(encoding="utf-8")):
        before = page.read_text(encoding="utf-8").split(reason)[0].splitlines()[-1] + "-->"
        assert re.fullmatch(r"<!-- notest: .{8,} -->", before), before


def test_the_docs_extra_brings_what_builds_the_site():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert any(name.startswith("mkdocs-material") for name in extras["docs"])
    assert any("docs" in name for name in extras["test"])


@page
def test_prose_uses_standard_terms(page):
    text = page.read_text(encoding="utf-8")
    for term in ("as they come", "is another one", "with regard to what they meet", "is of the next one"):
        assert term not in text, term


def test_hooks_read_the_names_from_the_source(hooks):
    """Each package in the reference has its names, and none is missing that the packages export."""
    stub = ast.parse((ROOT / "edge" / "__init__.pyi").read_text(encoding="utf-8"))
    listed = next(ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign))
    modules = {"artifact", "coreml", "keras_file", "litert", "onnx"}
    assert {f"keras_vits.edge.{name}" for name in set(listed) - modules} == set(hooks.names("keras_vits.edge"))

"""Style, types and layering: what keeps the house so. `make lint` runs these alone."""

import ast
import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
LONGEST = 600  # lines of a file without a reason at its top
COMPLETE = 0.99  # of the public surface has types; it only rises
PUBLIC = ("keras_vits/__init__.pyi", "edge/__init__.pyi")
# Packages that are public as a whole: what their __init__ exports.
PACKAGES = ("keras_vits/layers", "keras_vits/checkpoints", "keras_vits/training", "edge/targets/litert",
            "edge/targets/coreml", "edge/targets/onnx")  # fmt: skip


def run(*command):
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)


def source():
    return [path for folder in ("keras_vits", "edge") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("command", [("ruff", "check"), ("ruff", "format", "--check")], ids=" ".join)
def test_style(command):
    done = run(*command)
    assert done.returncode == 0, done.stdout


def test_arrows_between_the_rooms_point_one_way():
    done = subprocess.run(
        [pathlib.Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[done.stdout.find("Broken contracts") :]


def test_no_file_is_long_without_a_reason():
    for path in source():
        lines = path.read_text(encoding="utf-8").splitlines()
        top = (ast.get_docstring(ast.parse("\n".join(lines))) or "").lower()
        assert len(lines) <= LONGEST or "one file" in top, (
            f"{path.relative_to(ROOT)} has {len(lines)} lines: split it, or say in its docstring why it is one file."
        )


def test_no_module_is_shadowed_by_a_function_of_its_name():
    """`import keras_vits.edge.x` and `keras_vits.edge.x` are the same thing."""
    for init in [*(ROOT / "keras_vits").rglob("__init__.py*"), *(ROOT / "edge").rglob("__init__.py*")]:
        if init.suffix not in (".py", ".pyi"):
            continue
        beside = {p.stem for p in init.parent.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
        for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                home = (node.module or "").rpartition(".")[2]
                for alias in node.names:
                    name = alias.asname or alias.name
                    of_a_module = home not in ("", init.parent.name)  # else it is the module itself
                    assert not (name in beside and of_a_module), f"{init.relative_to(ROOT)}: {name}"


def test_messages_install_from_a_checkout():
    """The package is on no index: what a message says must work."""
    for path in source():
        assert not re.search(r"pip install \\?[\"']?keras-vits", path.read_text(encoding="utf-8")), path


# ---------------------------------------------------------------- types


def test_types():
    """The whole package passes the type checker, and modules of the public surface pass it strictly."""
    done = run("mypy")
    assert done.returncode == 0, done.stdout


def exported():
    """(module file, name) of every public name, from the stubs and the packages that are public as a whole."""
    for stub in PUBLIC:
        folder = (ROOT / stub).parent
        for node in ast.parse((ROOT / stub).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                yield from ((resolve(folder, node), alias.name) for alias in node.names)
    for package in PACKAGES:
        folder = ROOT / package
        for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                yield from ((resolve(folder, node), alias.name) for alias in node.names)


def resolve(folder, node):
    """The file that an import is from, or `None` if it is not of this package or imports a module."""
    if node.level:
        base = folder
        for _ in range(node.level - 1):
            base = base.parent
    elif (node.module or "").startswith("keras_vits"):
        base = ROOT
    else:
        return None
    path = base.joinpath(*(node.module or "").split(".")) if node.module else base
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def functions(file, name):
    """(qualified name, definition) of a public function, or of a class's constructor and public methods."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if getattr(node, "name", None) != name:
            continue
        if isinstance(node, ast.FunctionDef):
            yield name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and (inner.name == "__init__" or not inner.name.startswith("_")):
                    yield f"{name}.{inner.name}", inner


def is_complete(node):
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    own = [a for a in arguments if a is not None and a.arg not in ("self", "cls")]
    return all(a.annotation for a in own) and (node.returns is not None or node.name == "__init__")


def test_public_surface_has_types():
    found = {}
    for file, name in exported():
        if file is not None:
            found |= {f"{file.relative_to(ROOT)}:{q}": is_complete(node) for q, node in functions(file, name)}
    share = sum(found.values()) / len(found)
    print(f"\n{share:.1%} of {len(found)} public functions and methods have complete types")
    assert len(found) > 100
    missing = sorted(name for name, complete in found.items() if not complete)
    assert share >= COMPLETE, f"{share:.1%} have types, {COMPLETE:.0%} are asked; without: {', '.join(missing)}"


def imported_from(home, name):
    """What `from home import name` gives."""
    module = importlib.import_module(home)
    return getattr(module, name) if hasattr(module, name) else importlib.import_module(f"{home}.{name}")


@pytest.mark.parametrize("package", ["keras_vits", "edge"])
def test_stubs_are_what_the_packages_export(package):
    import keras_vits
    from keras_vits import edge

    stub = ast.parse((ROOT / package / "__init__.pyi").read_text(encoding="utf-8"))
    listed = next(ast.literal_eval(n.value) for n in stub.body if isinstance(n, ast.Assign))
    imported = {a.asname or a.name for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names}
    module = {"keras_vits": keras_vits, "edge": edge}[package]
    assert sorted(listed) == sorted(module.__all__) and set(listed) <= imported
    for node in (n for n in stub.body if isinstance(n, ast.ImportFrom)):
        home = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__name__)
        for alias in node.names:
            assert imported_from(home, alias.name) is getattr(module, alias.asname or alias.name), alias.name

"""Writes the tree of the repository and the arrows between its rooms into docs/design/house.md.

    python tools/house.py

The tree is that of the packages, each with the first sentence of its docstring; the arrows are the layers of
`[tool.importlinter]` in pyproject.toml.
"""

import ast
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design" / "house.md"
BESIDE = {  # folders that hold no package
    "tests": "mirrors both; one command: make test",
    "benchmarks": "scripts that record, and the pages made of the records",
    "docs": "this site",
    "examples": "small programs and apps",
    "tools": "what generates files of the product",
}


def described(folder):
    """The first sentence of a package's docstring, in one line."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[\w)])\. ", paragraph)[0].rstrip(".")


def packages(folder):
    """(depth, folder) of a package and of those in it, in the order of the alphabet."""
    found = sorted(path.parent for path in folder.rglob("__init__.py"))
    return [
        (len(path.relative_to(folder).parts), path) for path in found if "edge" not in path.relative_to(ROOT).parts[1:]
    ]


def tree():
    """The repository's folders, a line each."""
    lines = []
    for root in ("keras_vits", "edge"):
        for depth, folder in packages(ROOT / root):
            name = f"{'    ' * depth}{folder.name}/"
            lines.append(f"{name:<28}{described(folder)}".rstrip())
            if (depth, root) == (0, "keras_vits"):
                lines.append(f"{'    edge':<28}a link to ../edge")
    lines += [f"{name + '/':<28}{text}" for name, text in BESIDE.items()]
    return "\n".join(lines)


def layers():
    """The rooms of each layer that are there, from the top; a room is the name of a module."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    listed = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    found = [[room.strip(" ()") for room in re.split(r"[|:]", layer)] for layer in listed]
    return [there for layer in found if (there := [room for room in layer if is_there(room)])]


def is_there(room):
    path = ROOT.joinpath(*room.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def arrows():
    """A line for each layer, the highest first; rooms in one line know nothing of each other."""
    return "\n".join(" | ".join(room.removeprefix("keras_vits.") for room in layer) for layer in layers())


def updated(page):
    """The page with what stands between the marks written again."""
    for name, text in (("tree", tree()), ("arrows", arrows())):
        block = f"<!-- {name} -->\n```\n{text}\n```\n<!-- /{name} -->"
        page = re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, block=block: block, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

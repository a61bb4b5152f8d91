"""Writes parts of the site from the source, so that they cannot fall behind it.

A line `<!-- public: keras_vits.layers -->` becomes the reference of every name that the package exports, except those
that the page names itself. `<!-- readme: recipes -->` becomes the README's table of this name, `<!-- help -->` the help
of every verb of the command line. `<!-- table: operations -->` is a table of tools/product_tables.py.
"""

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
PLACES = {  # a package whose public names are in the reference -> the file that lists them
    "keras_vits": "keras_vits/__init__.pyi",
    "keras_vits.layers": "keras_vits/layers/__init__.py",
    "keras_vits.checkpoints": "keras_vits/checkpoints/__init__.py",
    "keras_vits.training": "keras_vits/training/__init__.py",
    "keras_vits.edge": "edge/__init__.pyi",
    "keras_vits.edge.litert": "edge/targets/litert/__init__.py",
    "keras_vits.edge.coreml": "edge/targets/coreml/__init__.py",
    "keras_vits.edge.onnx": "edge/targets/onnx/__init__.py",
}
VERBS = ("export", "quantize", "load")  # of a target that says nothing of what it exports
UNSHOWN = ("TARGET",)  # the entry in the registry of targets: not for users


def exported(package):
    """The names that a package exports, in the order of the alphabet."""
    body = ast.parse((ROOT / PLACES[package]).read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return sorted(set(ast.literal_eval(node.value)) - set(UNSHOWN), key=str.lower)
    return sorted(VERBS)


def is_module(package, name):
    """Whether a name is a module, which has a page of its own."""
    return package in ("keras_vits", "keras_vits.edge") and f"{package}.{name}" in {
        *PLACES, "keras_vits.models", "keras_vits.preprocess", "keras_vits.edge.artifact", "keras_vits.edge.keras_file",
    }  # fmt: skip


def names(package):
    """Full names of what a package exports, without modules."""
    return [f"{package}.{name}" for name in exported(package) if not is_module(package, name) and name[:2] != "__"]


def on_page_markdown(markdown, page, config, files):
    def public(match):
        own = set(re.findall(r"^::: ([\w.]+)", markdown, re.MULTILINE))
        return "\n\n".join(f"::: {name}" for name in names(match[1]) if name not in own)

    markdown = re.sub(r"^<!-- public: ([\w.]+) -->$", public, markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^<!-- readme: (\w+) -->$", readme, markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^<!-- table: (\w+) -->$", table, markdown, flags=re.MULTILINE)
    return markdown.replace("<!-- help -->", help_texts()) if "<!-- help -->" in markdown else markdown


def readme(match):
    """What stands between the marks of this name in the README; its links to files become the files' names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split(f"<!-- {match[1]} -->\n")[1].split(f"<!-- /{match[1]} -->")[0]
    return re.sub(r"\[([^]]+)\]\((?!https?:)([^)]+)\)", r"\1 (`\2`)", block)


def table(match):
    """A table of what the package has."""
    for folder in ("tools", "benchmarks"):
        if str(ROOT / folder) not in sys.path:
            sys.path.append(str(ROOT / folder))
    import product_tables

    lines = product_tables.TABLES[match[1]]()
    return lines if isinstance(lines, str) else "\n".join(lines)


def help_texts():
    """A section for each verb: what it does, how it is called, its options."""
    import typer

    from keras_vits.cli import app
    from keras_vits.cli._app import VERBS

    lines = []
    commands = typer.main.get_command(app).commands
    for verb in VERBS:
        command = commands[verb]
        lines += [f"## {verb}", "", command.help.strip(), ""]
        rows = []
        for option in command.params:
            shown = option.opts[-1] if option.param_type_name == "option" else option.name.upper()
            rows.append(f"| `{shown}` | {(option.help or '').replace('|', '/')} |")
        lines += ["| | |", "| --- | --- |", *rows, "", command.epilog or "", ""]
    return "\n".join(lines)

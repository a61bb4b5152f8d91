"""Tables of what the package has, read from its registries, as lists of Markdown lines.

`tools/generate.py` puts families and recipes into the README, and all of them into a folder for the documentation.
"""

import collections
import dataclasses
import importlib
import re
import sys

from rendering.tables import table


def families(source="keras_vits/models/"):
    """A row for each file of a family: its title, how many variants and published weights it has, its paper.

    Args:
        source: what links to the families' files begin with.
    """
    from keras_vits import checkpoints
    from keras_vits.models import _registry as registry

    published = collections.Counter(checkpoint.variant for checkpoint in checkpoints.table())
    found = {}
    for variant, (cls, _) in registry.variants().items():
        found.setdefault(cls.__module__, []).append(variant)
    rows = []
    for module, variants in sorted(found.items()):
        text = sys.modules[module].__doc__
        title = re.split(r"[.:,](?:\s|$)", text, maxsplit=1)[0]
        paper = re.search(r"^Paper .*?arXiv\s+([\d.]+\d)", text, re.MULTILINE | re.DOTALL)[1]
        name = f"[{title}]({source}{module.rpartition('.')[2]}.py)"
        weights = sum(published[variant] for variant in variants)
        link = f"[{paper}](https://arxiv.org/abs/{paper})"
        rows.append([name, f"`{variants[0]}`", str(len(variants)), str(weights), link])
    rows.append(["all", "", str(len(registry.variants())), str(published.total()), ""])
    return _table(["family", "such as", "variants", "published weights", "paper"], rows)


def recipes():
    """A row for each way to quantize."""
    from keras_vits.edge.quantize.recipes import RECIPES
    from keras_vits.edge.targets._protocol import target

    rows = [
        [
            f"`{recipe.name}`",
            ", ".join(target(name).traits.title for name in recipe.formats),
            recipe.description,
            "needed" if recipe.needs_calibration else "of use" if recipe.is_integer else "",
        ]
        for recipe in RECIPES.values()
    ]
    return _table(["recipe", "file", "what it does", "calibration"], rows)


def devices():
    """A row for each device that `edge.benchmark` knows."""
    from keras_vits.edge.devices import DEVICES
    from keras_vits.edge.targets._protocol import target

    rows = []
    for name in DEVICES:
        module = importlib.import_module(f"keras_vits.edge.devices.{name}")
        what = " ".join(re.split(r"[.:](?:\s|$)", module.__doc__, maxsplit=1)[0].split())
        formats = ", ".join(target(name).traits.title for name in module.FORMATS)
        threads = ", ".join(map(str, module.THREADS))
        rows.append([f"`{name}`", what, formats, ", ".join(f"`{a}`" for a in module.ACCELERATORS), threads])
    return _table(["device", "what it is", "files", "accelerators", "threads by default"], rows)


def operations():
    """A row for each primitive operation of a graph, and what its entry says of it."""
    from keras_vits.graph.ops import OPS

    rows = []
    for name, op in sorted(OPS.items()):
        fields = {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}
        traits = ", ".join(key.replace("_", " ") for key, value in fields.items() if value is True)
        texts = [str(fields.get(key) or "") for key in ("half_risk", "gpu_unfriendly")]
        rows.append([f"`{name}`", traits, *texts])
    return _table(["operation", "traits", "in half precision", "on a phone's GPU"], rows)


def _table(header, rows):
    """A table of text without the columns that no row has anything in."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return table([header[i] for i in kept], [[row[i] for i in kept] for row in rows], len(kept))


TABLES = {"families": families, "recipes": recipes, "devices": devices, "operations": operations}

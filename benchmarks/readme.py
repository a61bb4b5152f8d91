"""Puts recorded runs of the demo, and what the registry holds, into the README, each between two marks.

python benchmarks/readme.py out [out2 ...]     takes over out/report.json as benchmarks/results/demo_<backend>.json
python benchmarks/readme.py                    writes the README's tables again (Keras must be able to import a backend)

Both write RESULTS.md and RESULTS.html again, too.
"""

import collections
import json
import pathlib
import re
import sys

from keras_vits.edge.quantize.recipes import demonstrated

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
COLUMNS = {
    "model": lambda row: row["model"],
    "file": lambda row: f"{row['format']} {row['recipe']}",
    "size": lambda row: f"{row['size_bytes'] / 1e6:.2f} MB",
    "top-1": lambda row: f"{row['top1']:.1%}",
    "agreement": lambda row: f"{row['top1_agreement']:.1%}",
    "SQNR": lambda row: "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.0f} dB",
    "median": lambda row: "" if row["latency_median_ms"] is None else f"{row['latency_median_ms']:.2f} ms",
    "partitions": lambda row: "" if row["partitions"] is None else str(row["partitions"]),
    "verified by": lambda row: row["verified_by"],
}
SHOWN = ("float32", *demonstrated("litert"))


def table(header, rows):
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---"] * len(header), *rows])


def accuracies(records):
    """Top-1 of every LiteRT file: a row for each backend and model."""
    found = {}
    for record in records:
        for row in record["rows"]:
            if row["format"] == "litert":
                found.setdefault((record["backend"], row["model"]), {})[row["recipe"]] = f"{row['top1']:.1%}"
    return [[*key, *(by_recipe[recipe] for recipe in SHOWN)] for key, by_recipe in found.items()]


def demo():
    """The first recorded run's table, and the accuracies of all runs."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("demo_*.json"))]
    record = records[0]
    environment = record["environment"]
    where = f"{environment['cpu']}, {environment['cores']} cores, {record['backend']} backend; 500 held-out digits.\n\n"
    files = table(list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in record["rows"]])
    others = table(["trained on", "model", *(f"litert {recipe}" for recipe in SHOWN)], accuracies(records))
    return f"{where}{files}\nThe same job on every backend, top-1 of the LiteRT files:\n\n{others}"


def models():
    """A row for each file of a family: its title, how many variants and published weights it has, its paper."""
    from keras_vits import checkpoints
    from keras_vits.models import _registry as registry

    published = collections.Counter(checkpoint.variant for checkpoint in checkpoints.table())
    families = {}
    for variant, (cls, _) in registry.variants().items():
        families.setdefault(cls.__module__, []).append(variant)
    rows = []
    for module, variants in sorted(families.items()):
        text = sys.modules[module].__doc__
        title = re.split(r"[.:,](?:\s|$)", text, maxsplit=1)[0]
        paper = re.search(r"^Paper .*?arXiv\s+([\d.]+\d)", text, re.MULTILINE | re.DOTALL)[1]
        name = f"[{title}](keras_vits/models/{module.rpartition('.')[2]}.py)"
        weights = sum(published[variant] for variant in variants)
        rows.append(
            [name, f"`{variants[0]}`", str(len(variants)), str(weights), f"[{paper}](https://arxiv.org/abs/{paper})"]
        )
    total = ["all", "", str(len(registry.variants())), str(published.total()), ""]
    return table(["family", "such as", "variants", "published weights", "paper"], [*rows, total])


def recipes():
    """A row for each way to quantize."""
    from keras_vits.edge.quantize.recipes import RECIPES

    formats = {"litert": "LiteRT", "coreml": "Core ML"}
    return table(
        ["recipe", "file", "what it does", "calibration"],
        [
            [
                f"`{recipe.name}`",
                ", ".join(formats[f] for f in recipe.formats),
                recipe.description,
                "needed" if recipe.needs_calibration else "of use" if recipe.is_integer else "",
            ]
            for recipe in RECIPES.values()
        ],
    )


def peers():
    """A row for each model of the recorded run side by side with the peers, 2 threads."""
    import run
    from suite import CONTESTANTS, REFERENCE

    recorded = [row for row in run.read(run.RECORD) if row["threads"] == 2]
    known = {(row["model"], row["contestant"]): row for row in recorded}
    rows = []
    for model, verdict in run.verdicts(recorded).items():
        ours, best, peer, int8 = (
            known.get((model, name))
            for name in (REFERENCE, verdict["best_int8"], verdict["best_float32"], verdict["best_peer_int8"])
        )
        fast = f"{best['median_ms']:.1f} ms ({best['recipe']}, {best['sqnr_db']:.0f} dB)" if best else "none of 30 dB"
        cells = [model, f"{ours['median_ms']:.1f} ms", fast]
        for row in (peer, int8):
            label = CONTESTANTS[row["contestant"]].label if row else ""
            cells.append(f"{row['median_ms']:.1f} ms ({label}, {row['sqnr_db']:.0f} dB)" if row else "")
        rows.append(cells)
    where = f"{recorded[0]['device']}, 2 threads, batch 1, random weights; median times. `{recorded[0]['command']}`\n\n"
    return where + table(["model", "float32", "int8", "fastest float32 peer", "fastest int8 peer"], rows)


SECTIONS = {"demo": demo, "peers": peers, "models": models, "recipes": recipes}


def updated(readme):
    """The README with what stands between the marks of every section written again."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = readme.split(begin)
        readme = head + begin + section() + end + rest.split(end)[1]
    return readme


if __name__ == "__main__":
    import results

    for folder in sys.argv[1:]:
        record = json.loads((pathlib.Path(folder) / "report.json").read_text(encoding="utf-8"))
        path = RESULTS / f"demo_{record['backend']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    results.write()  # the page has the demo, too
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")

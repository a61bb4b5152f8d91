"""What gpu.sh recorded on a GPU: speed against timm, parity, where a step's time goes, attention's cost."""

import recording

from . import plots
from .tables import grouped, megabytes, number, spread, table

RECORD = recording.RESULTS / "gpu.jsonl"
KEY = ("part", "device", "dtype", "model", "runner", "backend", "library", "mode")
METHOD = (
    "Every runner has the same network and a process of its own, which has the GPU alone while it is measured; the "
    "arithmetic is bfloat16 (`mixed_bfloat16`, `torch.autocast`). Ratios are to timm without compilation, more is "
    "faster, with the quartiles of the turns. The relative error is that of the logits to timm's in float32 on the "
    "processor, with the same weights; timm's own error is beside ours."
)


def read():
    """The rows: where something was measured again, the last that did not fail."""
    found = {}
    for row in recording.read(RECORD):
        key = *(row[name] for name in KEY), row["tokens"] if row["part"] == "tokens" else None
        if key not in found or found[key]["error"] or not row["error"]:
            found[key] = row
    rows = list(found.values())
    measured = {(row["part"], row["device"], row["backend"]) for row in rows if row["tokens"] and not row["error"]}
    left = lambda row: row["part"] == "tokens" and not row["tokens"]  # all sizes, which had no time
    return [row for row in rows if not left(row) or (row["part"], row["device"], row["backend"]) not in measured]


def section(rows):
    if not rows:
        return []
    lines = ["## On a GPU", "", f"Recorded by `benchmarks/gpu.sh`. {METHOD}", ""]
    for (device,), found in grouped(rows, "device").items():
        lines += [f"### {device}", "", made_with(found), ""]
        for part, render in TABLES.items():
            if these := [row for row in found if row["part"] == part and not row["error"]]:
                lines += [*render(these), ""]
        if failed := dict.fromkeys(f"- {where(row)}, failed: {row['error']}" for row in found if row["error"]):
            lines += [*failed, ""]
    return lines


def made_with(rows):
    """When and with what rows of one device were recorded, and the rates that it has."""
    runs = {(row["date"], row["commit"], row["command"]) for row in rows}
    said = "; and on ".join(f"{date} at commit {commit} by `{command}`" for date, commit, command in sorted(runs))
    versions = {row["runtime"]: row["runtime_version"] for row in rows if row["runtime_version"]}
    rates = [
        f"{row['gemm_flops_per_second'] / 1e12:.0f} TFLOP/s in one large product and copies of "
        f"{row['copy_bytes_per_second'] / 1e9:,.0f} GB/s by {row['backend']}"
        for row in rows
        if row["part"] == "device" and not row["error"]
    ]
    facts = [", ".join(f"{name} {version}" for name, version in versions.items()), *rates]
    return f"Recorded on {said}: {'; '.join(facts)}."


def where(row):
    """What a row is of, where it has no figures."""
    tokens = row["tokens"] and f"N = {row['tokens']:,}"
    return ", ".join(filter(None, (row["part"], row["model"], row["runner"], row["mode"], tokens)))


def speed_table(rows):
    """A row for each model and runner."""
    cells = []
    for (model, runner), found in grouped(rows, "model", "runner").items():
        cells.append([model, runner])
        for mode in ("train", "infer"):
            row = next((row for row in found if row["mode"] == mode), dict.fromkeys(rows[0]))
            cells[-1] += [number(row["images_per_second"], ",.0f"), spread(row)]
            share = row["gemm_flops_per_second"] and row["flops_per_second"] / row["gemm_flops_per_second"]
            cells[-1] += [number(share, ".1%"), megabytes(row["peak_memory_bytes"])]
    header = ["model", "runner"]
    for what in ("train", "infer"):
        header += [f"{what} images/s", "/ timm", "of one product", "MB"]
    return table(header, cells, 2)


def parity_table(rows):
    """A row for each model: the errors of each library, backend and format."""
    columns = dict.fromkeys((row["library"], row["backend"], row["dtype"]) for row in rows)
    names = {"keras": "keras_vits"}
    cells = []
    for (model,), found in grouped(rows, "model").items():
        errors = {(row["library"], row["backend"], row["dtype"]): row["relative_error"] for row in found}
        cells.append([model, *(number(errors.get(key), ".1e") for key in columns)])
    header = ["relative error", *(f"{names.get(name, name)}, {backend}, {dtype}" for name, backend, dtype in columns)]
    return table(header, cells)


def profile_table(rows):
    """A row for each profile of a training step."""
    cells = [
        [
            row["model"],
            row["runner"],
            number(row["median_ms"], ".1f"),
            *(number(row[key], ".0%") for key in ("gemm_share", "attention_share", "gap_share")),
            number(row["kernels_per_step"], ",.0f"),
        ]
        for row in rows
    ]
    header = ["training step of", "runner", "ms", "products", "attention", "gaps", "kernels"]
    return table(header, cells, 2)


def tokens_table(rows):
    """A row for each attention layer and backend: milliseconds for one sample of N tokens."""
    sizes = sorted({row["tokens"] for row in rows})
    cells = []
    for (layer, backend), found in grouped(rows, "runner", "backend").items():
        ms = {row["tokens"]: 1e3 / row["images_per_second"] for row in found}
        cells.append([layer, backend, *(number(ms.get(n), ".3f") for n in sizes)])
    header = ["attention alone, ms a sample", "backend", *(f"N = {n:,}" for n in sizes)]
    return table(header, cells, 2)


TABLES = {"speed": speed_table, "parity": parity_table, "profile": profile_table, "tokens": tokens_table}


def figures(rows):
    """Speed against timm of every model, and attention's time against the number of tokens, under each device."""
    rows = [row for row in rows if not row["error"]]
    return {device: list(plots_of(found)) for (device,), found in grouped(rows, "device").items()}


def plots_of(rows):
    for mode, what in (("train", "Training"), ("infer", "Inference")):
        bars = [
            plots.Bar(
                label=f"{row['model']}: {row['runner']}",
                **dict(ratio=row["ratio"], low=row["ratio_q1"], high=row["ratio_q3"]),
                series=plots.OURS if "keras_vits" in row["runner"] else plots.PEER,
            )
            for row in rows
            if row["part"] == "speed" and row["mode"] == mode and row["ratio"]
        ]
        if bars:
            caption = f"{what}: speed / timm's, right is faster"
            yield caption, plots.bars(bars, f"{rows[0]['device']}, {caption}")
    tokens = [row for row in rows if row["part"] == "tokens"]
    for (backend,), found in grouped(tokens, "backend").items():
        lines = {}
        for row in found:
            lines.setdefault(row["runner"], {})[row["tokens"]] = 1e3 / row["images_per_second"]
        what = f"ms for one sample, {backend}"
        yield f"Attention alone: {what}", plots.curves(lines, "tokens N", what)

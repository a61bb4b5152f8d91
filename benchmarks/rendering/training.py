"""Training and inference against timm and keras-hub: how fast, and how it grows with tokens, batch and devices."""

import recording
import train

from . import plots
from .tables import grouped, megabytes, number, spread, table

METHOD = (
    "Every runner has the same network with random weights, and a process of its own; they took their steps in turns. "
    "Ratios are to timm's speed without compilation, more is faster: the median over the turns, and the quartiles. "
    "A training step is forward, cross entropy, backward and AdamW. Memory is the process' peak on a CPU, Python and "
    "libraries and compiler included, and the allocator's on a GPU. The first step is the first of training, "
    "compilation included. GFLOP/s are two for each multiply-add of the network, three times that in training; of GEMM "
    "is their share of the rate of one large matrix product measured in the same turns."
)
TITLES = {
    "speed": "Speed of {model}",
    "tokens": "Tokens: {model}",
    "batch": "Batch size: {model}",
    "devices": "Devices: {model}",
}


def read():
    return recording.read(train.RECORD)


def section(rows):
    if not rows:
        return []
    lines = ["## Training and inference", "", "Recorded by `benchmarks/train.py`. " + METHOD, ""]
    if not any(map(on_gpu, rows)):
        lines += ["Every figure of this section is of a CPU.", ""]
    for found in parts(rows):
        lines += [f"### {title(found)}", "", made_with(found), "", *TABLES[found[0]["part"]](found), ""]
    return lines


def parts(rows):
    """The rows of each part, device and model."""
    return grouped(rows, "part", "device", "model").values()


def title(rows):
    """The heading above the rows of one part, model and device."""
    where = f", {rows[0]['device']}" if on_gpu(rows[0]) else ""
    return TITLES[rows[0]["part"]].format(model=rows[0]["model"]) + where


def on_gpu(row):
    return row["dtype"] == "bfloat16"


def made_with(rows):
    """When, where and with what rows of one run were recorded, as a sentence."""
    one = rows[0]
    versions = {row["library"]: row["library_version"] for row in rows} | {
        row["runtime"]: row["runtime_version"] for row in rows
    }
    facts = [f"{one['device']}, {one['threads']} threads", one["dtype"]]
    facts += [f"batch {one['batch']}"] if len({row["batch"] for row in rows}) == 1 else []
    parameters = {row["parameters"] for row in rows} - {None}
    facts += [f"{parameters.pop():,} parameters"] if len(parameters) == 1 else []
    facts.append(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    return f"Recorded on {one['date']} at commit {one['commit']} by `{one['command']}`: {'; '.join(facts)}."


# ---------------------------------------------------------------- tables


def speed_table(rows):
    gemm = any(row["gemm_flops_per_second"] for row in rows)
    header = ["runner", "train images/s", "/ timm", "infer images/s", "/ timm", "train MB", "infer MB", "first step s"]
    header += ["train GFLOP/s", "of GEMM"][: 1 + gemm]
    cells = []
    for (name,), found in grouped(rows, "runner").items():
        training, inference = (next(row for row in found if row["mode"] == mode) for mode in ("train", "infer"))
        speeds = [
            cell for row in (training, inference) for cell in (number(row["images_per_second"], ".1f"), spread(row))
        ]
        memory = [megabytes(row["peak_memory_bytes"]) for row in (training, inference)]
        cells.append([name, *speeds, *memory, number(training["first_step_s"], ".1f"), *rate(training)[: 1 + gemm]])
    return table(header, cells) + failures(rows)


def tokens_table(rows):
    alone = rows[0]["model"] == train.ATTENTION
    sizes = sorted({row["tokens"] for row in rows})
    smallest = train.fitted_from(sizes) if alone else sizes[0]
    cells = []
    for (name,), found in grouped(rows, "runner").items():
        ms = {row["tokens"]: 1e3 / row["images_per_second"] for row in found if row["images_per_second"]}
        p = found[0]["exponent"]  # of the rounds, where they went through all sizes
        if p is None and len(ms) > 1:
            p = train.exponent({n: [t] for n, t in ms.items()}, smallest)
        cells.append([name, *(number(ms.get(n), ".2f") for n in sizes), number(p, ".2f")])
    what = (
        f"The layers alone, of width {train.train_worker.WIDTH} and with {train.train_worker.HEADS} heads."
        if alone
        else f"Tokens are counted in squares of {train.PATCH} pixels."
    )
    return [
        f"Milliseconds for one {'sample' if alone else 'image'} of N tokens, and the exponent p of time ~ N^p from "
        f"N = {smallest:,} on. {what}",
        "",
        *table(["attention" if alone else "runner", *(f"N = {n:,}" for n in sizes), "p"], cells),
        *failures(rows),
    ]


def batch_table(rows):
    sizes = sorted({row["batch"] for row in rows})
    cells = []
    for (name, mode), found in grouped(rows, "runner", "mode").items():
        pairs = {
            row["batch"]: f"{row['images_per_second']:.1f} / {megabytes(row['peak_memory_bytes'])}"
            for row in found
            if known(row)
        }
        cells.append([name, mode, *(pairs.get(n, "") for n in sizes)])
    return [
        "Images per second, and after the slash the peak memory in MB.",
        "",
        *table(["runner", "", *(f"batch {n}" for n in sizes)], cells, 2),
        *failures(rows),
    ]


def devices_table(rows):
    virtual = "The devices are virtual, parts of one processor: the ratios to one of them show what sharing costs."
    cells = [
        [
            str(row["devices"]),
            row["mode"],
            number(row["images_per_second"], ".1f"),
            spread(row),
            megabytes(row["peak_memory_bytes"]),
            number(row["first_step_s"], ".1f"),
        ]
        for row in rows
    ]
    return [
        "One batch, shared among the devices. " + ("Ratios are to one device." if on_gpu(rows[0]) else virtual),
        "",
        *table(["devices", "", "images/s", "/ one", "MB", "first step s"], cells, 2),
        *failures(rows),
    ]


def failures(rows):
    """What did not run, and its error, as a list."""
    said = dict.fromkeys(f"- {row['runner']}, {row['mode']}, failed: {row['error']}" for row in rows if row["error"])
    return ["", *said] if said else []


def known(row):
    return row["images_per_second"] is not None


def rate(row):
    """GFLOP/s, and how much of the GEMM's they are."""
    found, gemm = row["flops_per_second"], row["gemm_flops_per_second"]
    return number(found and found / 1e9, ".1f"), f"{found / gemm:.0%}" if found and gemm else ""


TABLES = {"speed": speed_table, "tokens": tokens_table, "batch": batch_table, "devices": devices_table}


# ---------------------------------------------------------------- figures

STYLES = {
    "one matrix product": ("|", 2, True),
    "timm": ("o", 1, True),
    "keras-hub": ("o", 1, False),
    "keras_vits": ("o", 0, True),
}


def figures(rows):
    """The plots of each part and model; under the section's heading the arithmetic rates of all models."""
    rows = [row for row in rows if known(row)]
    speed = grouped([row for row in rows if row["part"] == "speed"], "device")
    found = {None: [("Arithmetic rate in GFLOP/s: " + device, rates(group)) for (device,), group in speed.items()]}
    return found | {title(group): list(PLOTS[group[0]["part"]](group)) for group in parts(rows)}


def rates(rows):
    """The fastest runner of every library, and one matrix product where it was measured."""
    found = []
    for (model, mode), group in grouped(rows, "model", "mode").items():
        rate = {}
        for row in group:
            library = train.RUNNERS[row["runner"]][0].replace("_hub", "-hub")
            rate[library] = max(rate.get(library, 0), row["flops_per_second"] / 1e9)
            if row["gemm_flops_per_second"]:
                rate["one matrix product"] = row["gemm_flops_per_second"] / 1e9
        found.append((f"{model}, {'training' if mode == 'train' else 'inference'}", rate))
    return plots.rates(found, STYLES)


def speed_plots(rows):
    for mode, what in (("train", "Training"), ("infer", "Inference")):
        bars = [
            plots.Bar(
                label=row["runner"],
                **dict(ratio=row["ratio"], low=row["ratio_q1"], high=row["ratio_q3"]),
                series=plots.OURS if "keras_vits" in row["runner"] else plots.PEER,
            )
            for row in rows
            if row["mode"] == mode and row["ratio"]
        ]
        if bars:
            name = f"{title(rows)}: {what.lower()}, speed / timm's"
            yield f"{what}: speed / timm's, right is faster", plots.bars(bars, name)


def tokens_plots(rows):
    lines = {}
    for row in rows:
        lines.setdefault(row["runner"], {})[row["tokens"]] = 1e3 / row["images_per_second"]
    what = "sample" if rows[0]["model"] == train.ATTENTION else "image"
    yield f"Time against tokens: ms for one {what}", plots.curves(lines, "tokens N", f"ms for one {what}")


def batch_plots(rows):
    yield from against(rows, "batch", "batch size")


def devices_plots(rows):
    yield from against(rows, "devices", "devices")


def against(rows, x, label):
    """Speed of inference and of training against a field of the rows, a line for each runner."""
    for mode, what in (("train", "Training"), ("infer", "Inference")):
        lines = {}
        for row in rows:
            if row["mode"] == mode:
                lines.setdefault(row["runner"], {})[row[x]] = row["images_per_second"]
        if lines:
            yield f"{what}: images per second", plots.curves(lines, label, "images per second")


PLOTS = {"speed": speed_plots, "tokens": tokens_plots, "batch": batch_plots, "devices": devices_plots}

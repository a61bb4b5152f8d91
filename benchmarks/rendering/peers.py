"""Our files side by side with what else could run the same networks."""

import math

import recording
import run
from suite import CONTESTANTS, GEMM, MODELS, REFERENCE

from . import plots
from .tables import grouped, spread, table

THREADS = 2  # of the summary and the plots; the tables have the others
SUMMARY = f"Summary, {THREADS} threads"
INT8_DB = 30.0  # an int8 file below it is not compared: its answers are others
METHOD = (
    "Every contestant has the same network with the same random weights and, before it is timed, is compared with "
    "timm's float32 outputs on crops of a photograph: SQNR. Batch 1. Each has a process of its own, a LiteRT file "
    f"{run.PROCESSES} one after the other, and they ran in turns of about {run.ROUND_SECONDS} s. Times are medians "
    "over ours in float32, with the quartiles of the turns in parentheses; less is faster. Our int8 files and static "
    "int8 are calibrated on the same 8 crops of another photograph. Memory is the peak of the process, and in "
    "parentheses what was there before the file was loaded: Python and the runtime's package. GFLOP/s are two for "
    "each multiply-add of the network, and in parentheses what part they are of one large product of matrices in "
    "LiteRT, float32 or dynamic int8, in the same turns. PyTorch and Keras compile at the first image, which is not "
    "in their time to load."
)


def read():
    return recording.read(run.RECORD)


def verdicts(rows, threads=THREADS):
    """How our files stand to the fastest peers.

    Args:
        rows: recorded ones.
        threads: that are compared.

    Returns:
        model -> {float32, best_float32, int8, best_int8, int8_to_peer, best_peer_int8}: our median time over that of
        the fastest float32 peer and its name; our fastest int8 file of 30 dB or more, over our float32, and its name;
        the same over the fastest int8 peer, and its name. None where there is no such row.
    """
    found = {}
    for model in MODELS:
        these = [r for r in rows if (r["model"], r["threads"]) == (model, threads) and r["ratio"]]

        def best(role, is_int8, least_db=-math.inf, these=these):
            fit = [
                r
                for r in these
                if CONTESTANTS[r["contestant"]].role == role
                and (r["recipe"] != "float32") == is_int8
                and r["sqnr_db"] >= least_db
            ]
            return min(fit, key=lambda r: r["ratio"], default=None)

        peer, int8, peer_int8 = best("peer", False), best("ours", True, INT8_DB), best("peer", True)
        if these:
            found[model] = {
                "float32": peer and 1 / peer["ratio"],
                "best_float32": peer and peer["contestant"],
                "int8": int8 and int8["ratio"],
                "best_int8": int8 and int8["contestant"],
                "int8_to_peer": int8 and peer_int8 and int8["ratio"] / peer_int8["ratio"],
                "best_peer_int8": peer_int8 and peer_int8["contestant"],
            }
    return found


# ---------------------------------------------------------------- the README


def block(rows):
    """A row for each model: our times, and the fastest peers'."""
    recorded = [row for row in rows if row["threads"] == THREADS]
    known = {(row["model"], row["contestant"]): row for row in recorded}
    cells = []
    for model, verdict in verdicts(recorded).items():
        ours, best, peer, int8 = (
            known.get((model, name))
            for name in (REFERENCE, verdict["best_int8"], verdict["best_float32"], verdict["best_peer_int8"])
        )
        fast = f"{best['median_ms']:.1f} ms ({best['recipe']}, {best['sqnr_db']:.0f} dB)" if best else "none of 30 dB"
        peers = [
            f"{row['median_ms']:.1f} ms ({CONTESTANTS[row['contestant']].label}, {row['sqnr_db']:.0f} dB)"
            if row
            else ""
            for row in (peer, int8)
        ]
        cells.append([model, f"{ours['median_ms']:.1f} ms", fast, *peers])
    header = ["model", "float32", "int8", "fastest float32 peer", "fastest int8 peer"]
    one = recorded[0]
    where = f"{one['device']}, {THREADS} threads, batch 1, random weights; median times. `{one['command']}`"
    return [where, "", *table(header, cells, len(header))]


# ---------------------------------------------------------------- RESULTS


def section(rows):
    if not rows:
        return []
    lines = ["## Side by side with the peers", "", METHOD, "", *summary(rows)]
    for model in MODELS:
        lines += model_table([row for row in rows if row["model"] == model])
    return lines


def summary(rows):
    """Our times over the fastest peers', a row for each model."""
    columns = {
        "our float32 / fastest float32 peer": ("float32", "best_float32"),
        f"our fastest int8 of {INT8_DB:.0f} dB or more / our float32": ("int8", "best_int8"),
        "the same / fastest int8 peer": ("int8_to_peer", "best_peer_int8"),
    }
    cells = [
        [
            model,
            *(
                "no such row" if verdict[key] is None else f"{verdict[key]:.2f} ({CONTESTANTS[verdict[of]].label})"
                for key, of in columns.values()
            ),
        ]
        for model, verdict in verdicts(rows).items()
    ]
    said = "Ratios of times, less is faster, and in parentheses the file or peer that they are of."
    return [f"### {SUMMARY}", "", said, "", *table(["model", *columns], cells, 1 + len(columns)), ""]


def model_table(rows):
    """The rows of one model, as lines of Markdown."""
    if not rows:
        return []
    threads = sorted({row["threads"] for row in rows})
    runs = {(row["date"], row["device"], row["commit"], row["command"]) for row in rows}
    recorded = [f"{date}, {device}, commit {commit}, `{command}`" for date, device, commit, command in sorted(runs)]
    header = ["contestant", "version"]
    for n in threads:
        header += [f"{n} thread{'s' if n > 1 else ''}: time / ours", "ms"]
    header += ["SQNR dB", "file MB", "memory MB", "load ms", "GFLOP/s"]
    known = {(row["contestant"], row["threads"]): row for row in rows}
    cells, failed = [], []
    for name in dict.fromkeys(row["contestant"] for row in rows):
        of_threads = [known.get((name, n)) for n in threads]
        row = next(row for row in reversed(of_threads) if row)
        if row["error"]:
            failed.append(f"- {CONTESTANTS[name].label}, failed: {row['error']}")
            continue
        roof = known.get((GEMM[row["recipe"]], row["threads"]))
        part = f" ({row['gflops'] / roof['gflops']:.0%})" if roof and roof["gflops"] else ""
        cells.append(
            [
                CONTESTANTS[name].label,
                f"{row['runtime']} {row['runtime_version']}" if row["runtime"] else "",
                *(cell for r in of_threads for cell in speed(r)),
                "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
                f"{row['size_bytes'] / 1e6:.1f}",
                f"{row['peak_memory_bytes'] / 1e6:.0f} ({row['baseline_memory_bytes'] / 1e6:.0f})",
                f"{row['load_ms']:.0f}",
                f"{row['gflops']:.0f}{part}",
            ]
        )
    return [
        f"### {rows[0]['model']}",
        "",
        f"Recorded on {'; and on '.join(recorded)}. Size, memory, load time and rate with {threads[-1]} threads.",
        "",
        *table(header, cells, 2),
        *([""] * bool(failed)),
        *failed,
        "",
    ]


def speed(row):
    """Two cells: time over ours, and milliseconds."""
    return ["", ""] if row is None or row["median_ms"] is None else [spread(row), f"{row['median_ms']:.2f}"]


# ---------------------------------------------------------------- figures

ROLES = {"ours": "keras_vits", "peer": "fastest peer", "gemm": "one matrix product"}
STYLES = {
    "one matrix product, float32": ("|", 2, True),
    "one matrix product, int8": ("|", 3, True),
    "fastest peer, float32": ("o", 1, True),
    "fastest peer, int8": ("o", 1, False),
    "keras_vits, float32": ("o", 0, True),
    "keras_vits, int8": ("o", 0, False),
}


def figures(rows):
    """The arithmetic rates of all models, and under the summary all contestants of each model against ours."""
    rows = [row for row in rows if row["threads"] == THREADS]
    models = grouped(rows, "model").items()
    found = {None: [], SUMMARY: []}
    if of_models := [(model, rate) for (model,), group in models if (rate := rates(group))]:
        found[None] = [(f"Arithmetic rate in GFLOP/s: {THREADS} threads", plots.rates(of_models, STYLES))]
    for (model,), group in models:
        caption = f"{model}: time / ours in float32, {THREADS} threads, left is faster"
        bars = [bar(row) for row in group if CONTESTANTS[row["contestant"]].role != "gemm"]
        bars.sort(key=lambda bar: bar.ratio or math.inf)
        found[SUMMARY].append((caption, plots.bars(bars, caption)))
    return found


def bar(row):
    contestant = CONTESTANTS[row["contestant"]]
    series = plots.OURS if contestant.role == "ours" else plots.PEER
    figures = dict(ratio=row["ratio"], low=row["ratio_q1"], high=row["ratio_q3"])
    return plots.Bar(label=contestant.label, series=series, error=row["error"], **figures)


def rates(rows):
    """The fastest of every role in `ROLES`, in float32 and in int8."""
    found = {}
    for row in rows:
        role = CONTESTANTS[row["contestant"]].role
        if row["gflops"] and role in ROLES:
            name = f"{ROLES[role]}, {'float32' if row['recipe'] == 'float32' else 'int8'}"
            found[name] = max(found.get(name, 0), row["gflops"])
    return found

"""Time of the attention layers against the number of tokens N, and the exponent p of time ~ N^p.

KERAS_BACKEND=jax python benchmarks/linear_attention.py    measures and writes results/linear_attention.json
"""

import datetime
import json
import pathlib
import statistics
import time

import numpy as np

HERE = pathlib.Path(__file__).parent
RECORD = HERE / "results" / "linear_attention.json"
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
WIDTH, HEADS = 64, 2
WORK = 16384  # tokens in a batch, whatever N: the fixed costs of a call weigh the same at every N


def measure(sizes=SIZES, width=WIDTH, rounds=9, longest_softmax=8192, clock=time.perf_counter):
    """Inference time of every attention layer, all layers and sizes in turns.

    Args:
        sizes: numbers of tokens N.
        width: D.
        rounds: how often each is measured.
        longest_softmax: largest N of softmax attention, whose matrices (N,N) take the memory of the machine.
        clock: () -> seconds.

    Returns:
        Layer -> N -> seconds for one sample, one number a round.
    """
    import keras

    from keras_vits.layers import ATTENTIONS, MultiHeadAttention

    calls = {}
    for name, cls in {"softmax": MultiHeadAttention, **ATTENTIONS}.items():
        for tokens in sizes:
            if name == "softmax" and tokens > longest_softmax:
                continue
            x = keras.Input((tokens, width))
            model = keras.Model(x, cls(heads=HEADS, name="attention")(x))
            batch = max(1, (longest_softmax if name == "softmax" else WORK) // tokens)
            data = np.random.default_rng(0).normal(size=(batch, tokens, width)).astype("float32")
            calls[name, tokens] = model, data
            model.predict_on_batch(data)  # compiles
    found = {name: {tokens: [] for n, tokens in calls if n == name} for name, _ in calls}
    for _ in range(rounds):
        for (name, tokens), (model, data) in calls.items():
            start = clock()
            model.predict_on_batch(data)
            found[name][tokens].append((clock() - start) / len(data))
    return found


def exponent(times, smallest=1024):
    """Median over the rounds of the slope of log(time) against log(N), from N = `smallest` on."""
    sizes = [n for n in times if n >= smallest]
    slopes = np.polyfit(np.log(sizes), np.log([times[n] for n in sizes]), 1)[0]
    return float(np.median(slopes))


def section():
    """The part of RESULTS.md about the recorded run, as lines of Markdown."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    sizes, environment = record["sizes"], record["environment"]
    lines = [
        "## Linear attention",
        "",
        f"Written by `benchmarks/linear_attention.py`. Recorded on {record['date']}, {environment['cpu']}, "
        f"{environment['cores']} cores, {record['backend']} backend, width {WIDTH}, {HEADS} heads, float32. "
        "Milliseconds of inference for one sample of N tokens (median of interleaved rounds), and the exponent p of "
        "time ~ N^p from N = 1,024 on.",
        "",
        f"| attention | {' | '.join(f'N = {n:,}' for n in sizes)} | p |",
        f"|---|{'---:|' * (len(sizes) + 1)}",
    ]
    for row in record["rows"]:
        cells = [f"{row['median_ms'][str(n)]:.2f}" if str(n) in row["median_ms"] else "" for n in sizes]
        lines.append(f"| {row['attention']} | {' | '.join(cells)} | {row['exponent']:.2f} |")
    return [*lines, ""]


if __name__ == "__main__":
    import keras
    import results

    from keras_vits.edge.report import host_environment

    rows = [
        {
            "attention": name,
            "median_ms": {n: round(1e3 * statistics.median(seconds), 4) for n, seconds in times.items()},
            "exponent": round(exponent(times), 3),
        }
        for name, times in measure().items()
    ]
    record = dict(date=datetime.date.today().isoformat(), backend=keras.backend.backend(), sizes=SIZES, rows=rows)
    RECORD.write_text(json.dumps({**record, "environment": host_environment()}, indent=1) + "\n", encoding="utf-8")
    results.write()

"""The child process of host.py: holds one artifact and runs it when told to.

    stdin   one JSON object a line: what to load, then any number of {runs}; the process ends with its stdin
    stdout  one answer a line: {runtime, load_ms, baseline_memory_bytes}, then for every {runs} {ms, peak_memory_bytes}

It is started as a script, and to run a LiteRT or a Core ML file it imports nothing of this package that imports Keras:
Keras and its backend, which a phone does not have, are not in the memory that it reports.
"""

import json
import sys
import time
from collections.abc import Sequence

import numpy as np

from keras_vits._util.process import answers, peak_memory_bytes
from keras_vits.edge.targets._protocol import target


def main() -> None:
    reply = answers()
    order = json.loads(sys.stdin.readline())
    load = target(order["format"]).run(order)  # imports the runtime, whose time is not the file's
    baseline = peak_memory_bytes()
    start = time.perf_counter()
    run, runtime = load()
    load_ms = (time.perf_counter() - start) * 1e3
    reply(runtime=runtime, load_ms=load_ms, baseline_memory_bytes=baseline)

    random = np.random.default_rng(0)
    inputs = [_values(random, **spec) for spec in order["inputs"]]
    for line in sys.stdin:
        ms = []
        for _ in range(json.loads(line)["runs"]):
            start = time.perf_counter()
            run(*inputs)
            ms.append((time.perf_counter() - start) * 1e3)
        reply(ms=ms, peak_memory_bytes=peak_memory_bytes())


def _values(random: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    if dtype == "float32":
        return random.normal(size=shape).astype("float32")
    return random.integers(0, 256 if dtype in ("uint8", "image") else 2, shape).astype(
        "uint8" if dtype == "image" else dtype
    )


if __name__ == "__main__":
    main()

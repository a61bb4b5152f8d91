"""The child process of benchmark.py: holds one artifact and runs it when told to.

    stdin   one JSON object a line: what to load, then any number of {runs}; the process ends with its stdin
    stdout  one answer a line: {runtime, load_ms, baseline_memory_bytes}, then for every {runs} {ms, peak_memory_bytes}

It is started as a script, and to run a LiteRT or a Core ML file it imports nothing of this package that imports Keras:
Keras and its backend, which a phone does not have, are not in the memory that it reports.
"""

import json
import os
import pathlib
import sys
import time

import numpy as np

from keras_vits.edge.targets._protocol import target


def answers():
    """reply(**fields), which alone writes to stdout from now on: a runtime may print what it likes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda **fields: print(json.dumps(fields), file=replies, flush=True)


def main():
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


def _values(random, shape, dtype):
    if dtype == "float32":
        return random.normal(size=shape).astype("float32")
    return random.integers(0, 256 if dtype in ("uint8", "image") else 2, shape).astype(
        "uint8" if dtype == "image" else dtype
    )


def peak_memory_bytes():
    """The largest resident memory of this process so far."""
    if sys.platform == "linux":  # where ru_maxrss begins at the peak of the process that started this one
        status = pathlib.Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()

"""Measurements that nobody made, for tests of what is said of them."""

from keras_vits.edge.records import Latency


def latency(path, median_ms, **fields):
    """A `Latency` of 64 runs with 2 threads on this machine; `fields` replace what is said here."""
    known = dict(
        device="host", cpu="Test CPU", runtime="ai_edge_litert 2.3.0", threads=2, runs=64, load_ms=12.0,
        p90_ms=median_ms * 1.1, p99_ms=median_ms * 1.5, round_ms=(median_ms,), started="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return Latency(artifact_path=path, median_ms=median_ms, **(known | fields))

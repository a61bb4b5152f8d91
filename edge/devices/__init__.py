"""Where artifacts are measured, one file for each kind of device; see evidence/benchmark.py."""

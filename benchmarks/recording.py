"""What the scripts that record share: the child processes' environment, the files of rows, and what every row says."""

import argparse
import contextlib
import functools
import json
import pathlib
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results"
QUIET = {  # environment variables of every child: its threads sleep while others work
    "OMP_WAIT_POLICY": "passive",
    "KMP_BLOCKTIME": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
ON = {  # of a child on this device
    "cpu": {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "KERAS_TORCH_DEVICE": "cpu"},
    "gpu": {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"},
}


def threads(count):
    """Environment variables that give a child so many threads; NPROC is JAX's."""
    return dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "NPROC"), str(count))


def read(path):
    """The rows of a JSON-lines file, as dictionaries; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write(path, rows):
    """Writes rows as a JSON-lines file, whole or not at all."""
    from keras_vits._util.files import writing

    with writing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path, record):
    """Writes one record as a JSON file, whole or not at all."""
    from keras_vits._util.files import writing

    with writing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@functools.cache  # as it was before anything is recorded
def commit():
    """The commit of the working tree, with "-dirty" where files differ from it; None outside a clone."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def positive(text):
    """A number of a command line, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; received {text}")
    return int(text)

"""Training steps and inference against timm and keras-hub: the same networks, on the same machine, in one run.

    python benchmarks/training_speed.py                            records results/training_speed_<device>.json
    python benchmarks/training_speed.py --models mixer_s16_224     records one model again, and keeps the others
    python benchmarks/training_speed.py --smoke                    a few steps of everything, printed but not recorded

A step is a whole one: forward, cross entropy, backward and AdamW, through each library's usual interface (`fit`'s own
step for Keras). On a GPU the batch is larger and the arithmetic bfloat16 (`mixed_bfloat16`, `torch.autocast`), on a CPU
float32. Each runner of a model lives in a child process of its own (training_worker.py); they are measured in turns,
A B C A B C ..., and one that is not being measured waits for its next line and uses no processor.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
MODELS = {  # name -> (side of the images in pixels, batch that keeps a GPU busy while all runners fit into its memory)
    "vit_tiny_patch16_224": (224, 256),
    "mobilevit_s": (256, 64),
    "mobilevitv2_100": (256, 64),
    "mixer_s16_224": (224, 128),
}
RUNNERS = {  # name -> (library, backend, whether it is asked to compile)
    "timm": ("timm", "torch", False),
    "timm, torch.compile": ("timm", "torch", True),
    "keras_vits, PyTorch": ("keras_vits", "torch", False),
    "keras_vits, PyTorch, jit_compile": ("keras_vits", "torch", True),
    "keras_vits, JAX": ("keras_vits", "jax", False),
    "keras_vits, TensorFlow": ("keras_vits", "tensorflow", False),
    "keras-hub, PyTorch": ("keras_hub", "torch", False),
    "keras-hub, JAX": ("keras_hub", "jax", False),
    "keras-hub, TensorFlow": ("keras_hub", "tensorflow", False),
}
REFERENCE = "timm"  # what ratios are to
KERAS_HUB_MODELS = ("vit_tiny_patch16_224",)  # keras-hub has none of the others
MODES = ("infer", "train")  # in this order: a process never forgets its peak memory, and training takes more
CPU_BATCH = 8
ROUND_SECONDS = 0.3  # of one runner's turn, at least one step
WARMUP_STEPS = 3, 10  # at least and at most
STEADY = 1.5  # a step is compiled when it takes at most so many times the fastest one
ENVIRONMENT = {  # of every child; their threads sleep while others work
    "OMP_WAIT_POLICY": "passive",
    "KMP_BLOCKTIME": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
ON = {  # of a child on this device
    "cpu": {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "KERAS_TORCH_DEVICE": "cpu"},
    "gpu": {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"},
}
PACKAGES = ("timm", "keras-hub")  # beside those that the environment lists anyway
METHOD = (
    "Every runner has the same network with random weights, and a process of its own; they took their steps in turns. "
    "Ratios are to timm's speed without compilation, more is faster: the median over the turns, and the quartiles. "
    "A training step is forward, cross entropy, backward and AdamW. Memory is the process' peak on a CPU, Python and "
    "libraries and compiler included, and the allocator's on a GPU. The first step is the first of training, "
    "compilation included."
)


# ---------------------------------------------------------------- measure


class Runner:
    """One model in a process of its own. It ends with the `with` block, and with this process however that ends."""

    def __init__(self, name, model, batch, device, threads):
        library, backend, compiled = RUNNERS[name]
        self.name, self.model, self.device, self.threads = name, model, device, threads
        self.order = {"library": library, "backend": backend, "compiled": compiled, "model": model, "batch": batch}
        self.order |= {"image_size": MODELS[model][0], "gpu": device == "gpu", "threads": threads}
        self.ms = {mode: [] for mode in MODES}  # one array for each turn
        self.first_step_ms, self.peak_memory_bytes = {}, {}

    def __enter__(self):
        threads = dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "NPROC"), str(self.threads))  # NPROC: JAX
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "training_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, **ENVIRONMENT, **ON[self.device], **threads, "KERAS_BACKEND": self.order["backend"]},
            text=True,
        )
        try:
            self.parameters = self._ask(**self.order)["parameters"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def _ask(self, **order):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")
        raise ValueError(f"{self.name} could not run {self.model}, its process ended with code {code}: {last}")

    def warm_up(self, mode):
        """Takes steps until they are compiled; returns how many make a turn."""
        (at_least, at_most), ms = WARMUP_STEPS, []
        while len(ms) < at_least or (len(ms) < at_most and ms[-1] > STEADY * min(ms)):
            ms += self._ask(mode=mode, steps=1)["ms"]
        self.first_step_ms[mode] = ms[0]
        return max(1, round(ROUND_SECONDS * 1e3 / min(ms)))

    def measure(self, mode, steps):
        answer = self._ask(mode=mode, steps=steps)
        self.ms[mode].append(np.array(answer["ms"]))
        self.peak_memory_bytes[mode] = answer["peak_memory_bytes"]

    def seconds(self, mode):
        return sum(ms.sum() for ms in self.ms[mode]) / 1e3


def measure(model, runners, *, batch, device, threads, seconds):
    """One model with all its runners in turns: parameters of the network, and a row for each runner and mode."""
    from keras_vits.edge.progress import progress

    names = [name for name in runners if RUNNERS[name][0] != "keras_hub" or model in KERAS_HUB_MODELS]
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Runner(name, model, batch, device, threads)) for name in progress(names, model)]
        sizes = {child.name: child.parameters for child in children}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"The runners of {model} are not the same network, by their parameters: {sizes}.")
        for mode in MODES:
            turns = [child.warm_up(mode) for child in progress(children, f"{model} {mode}, compiling")]
            while not all(child.seconds(mode) >= seconds for child in children):
                for child, steps in zip(children, turns, strict=True):
                    child.measure(mode, steps)
        rows = [row(child, children[0], mode, batch) for child in children for mode in MODES]
    return {"parameters": children[0].parameters, "rows": rows}


def row(child, reference, mode, batch):
    """How fast a runner is. The ratio is the median, over the turns, of how much faster it was than the reference."""
    means, theirs = ([ms.mean() for ms in runner.ms[mode]] for runner in (child, reference))
    low, median, high = np.percentile(np.divide(theirs, means), (25, 50, 75))
    return {
        "runner": child.name,
        "mode": mode,
        "images_per_second": batch * 1e3 / np.median(np.concatenate(child.ms[mode])),
        "ratio_to_timm": median,
        "ratio_quartiles": [low, high],
        "steps": sum(map(len, child.ms[mode])),
        "turns": len(child.ms[mode]),
        "first_step_ms": child.first_step_ms[mode],
        "peak_memory_bytes": child.peak_memory_bytes[mode],
    }


def environment(device, threads):
    from keras_vits.edge.report import host_environment

    facts = host_environment() | {name: importlib.metadata.version(name) for name in PACKAGES} | {"threads": threads}
    if device == "gpu":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        facts["gpu"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return facts


# ---------------------------------------------------------------- record and show


def record_path(device):
    return HERE / "results" / f"training_speed_{device}.json"


def section():
    """The part of RESULTS.md about the recorded runs, as lines of Markdown."""
    lines = ["## Training and inference speed", "", "Written by `benchmarks/training_speed.py`. " + METHOD, ""]
    for path in map(record_path, ON):
        if path.exists():
            for model, run in json.loads(path.read_text()).items():
                lines += table(model, run)
    return lines


def table(model, run):
    """One model on one device, as lines of Markdown."""
    facts = run["environment"]
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("keras", "torch", "jax", "tensorflow", *PACKAGES))
    lines = [
        f"### {model}, {run['device']}",
        "",
        f"Recorded on {run['date']}, {where}; batch {run['batch']}, {run['dtype']}, {run['parameters']:,} parameters; "
        f"{versions}.",
        "",
        "| runner | train images/s | / timm | infer images/s | / timm | train MB | infer MB | first step s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    found = {(row["runner"], row["mode"]): row for row in run["rows"]}
    for name in dict.fromkeys(row["runner"] for row in run["rows"]):
        both = [found[name, mode] for mode in ("train", "infer")]
        speeds = [f"{row['images_per_second']:.1f} | {spread(row)}" for row in both]
        memory = [f"{row['peak_memory_bytes'] / 1e6:.0f}" for row in both]
        lines.append(f"| {name} | {' | '.join(speeds + memory)} | {both[0]['first_step_ms'] / 1e3:.1f} |")
    return [*lines, ""]


def spread(row):
    low, high = row["ratio_quartiles"]
    return f"{row['ratio_to_timm']:.2f} ({low:.2f} to {high:.2f})"


def parsed(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS), help=f"beside {REFERENCE}")
    parser.add_argument("--device", choices=ON, default="gpu" if shutil.which("nvidia-smi") else "cpu")
    parser.add_argument("--batch", type=positive, help=f"images in a step; {CPU_BATCH} on a CPU, more on a GPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="that every runner is measured for, in each mode")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="of every runner")
    parser.add_argument("--smoke", action="store_true", help="batch 2, one turn, no record: does it run?")
    found = parser.parse_args(arguments)
    if found.device == "gpu" and not shutil.which("nvidia-smi"):
        parser.error("--device gpu needs an NVIDIA GPU and its nvidia-smi command, which is not here: use --device cpu")
    if found.smoke:
        found.batch, found.seconds = found.batch or 2, 0.01
    found.runners = [REFERENCE, *(name for name in found.runners if name != REFERENCE)]
    return found


def positive(text):
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; received {text}")
    return value


def main():
    options = parsed()
    os.environ["KERAS_BACKEND"] = "numpy"  # of this process, which computes nothing: the quickest to import
    path = record_path(options.device)
    for model in options.models:
        batch = options.batch or (CPU_BATCH if options.device == "cpu" else MODELS[model][1])
        run = {
            "date": datetime.date.today().isoformat(),
            "device": options.device,
            "dtype": "float32" if options.device == "cpu" else "bfloat16",
            "batch": batch,
            "environment": environment(options.device, options.threads),
        }
        run |= measure(
            model,
            options.runners,
            batch=batch,
            device=options.device,
            threads=options.threads,
            seconds=options.seconds,
        )
        print("\n".join(table(model, run)))
        if not options.smoke:  # a model at a time, so that an interrupt loses one only
            record = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(record | {model: run}, indent=1) + "\n")
    if not options.smoke:
        import results

        results.write()


if __name__ == "__main__":
    main()

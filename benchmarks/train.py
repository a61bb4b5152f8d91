"""Training steps and inference against timm and keras-hub, and how their cost grows with tokens, batch and devices.

    python benchmarks/train.py                               records everything again in results/train.jsonl
    python benchmarks/train.py --part speed --models mixer_s16_224     records that part of that model, keeps the rest
    python benchmarks/train.py --smoke                       a step of everything, printed but not recorded

    speed     every model with every runner
    tokens    inference of larger and larger images, and the attention layers alone: softmax and linear
    batch     larger and larger batches
    devices   one batch shared among more and more devices (JAX, `keras.distribution.DataParallel`); on a CPU the
              devices are virtual, so that the figure is what sharing costs

A step is a whole one: forward, cross entropy, backward and AdamW, through each library's usual interface (`fit`'s own
step for Keras). On a GPU the batch is larger and the arithmetic bfloat16 (`mixed_bfloat16`, `torch.autocast`), on a CPU
float32. Each runner of a model lives in a child process of its own (train_worker.py); they are measured in turns,
A B C B A C ..., and one that is not being measured waits for its next line and uses no processor. Each of them also
multiplies two large matrices in its turns: the fastest of these is what the machine can do.
"""

import argparse
import contextlib
import datetime
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys

import numpy as np
import recording
import train_worker
from recording import ON, QUIET, commit, positive

from keras_vits._util.process import Worker, WorkerError

HERE = pathlib.Path(__file__).parent
RECORD = recording.RESULTS / "train.jsonl"
MODELS = {  # name -> (side of the images in pixels, batch that keeps a GPU busy while all runners fit into its memory)
    "vit_tiny_patch16_224": (224, 256),
    "mobilevit_s": (256, 64),
    "mobilevitv2_100": (256, 64),
    "mixer_s16_224": (224, 128),
    "efficientvit_b1": (224, 128),
    "vit_base_patch16_224": (224, 128),
}
ATTENTION = "attention"  # stands for a model where the layers alone are measured
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
SHARED = "keras_vits, JAX"  # what runs on several devices, and the attention layers
PARTS = {  # name -> (models on a CPU, and those that a GPU has beside them, runners)
    "speed": (list(MODELS)[:4], ["efficientvit_b1", "vit_base_patch16_224"], list(RUNNERS)),
    "tokens": ([ATTENTION, "vit_tiny_patch16_224", "mobilevitv2_100", "efficientvit_b1"], [], [REFERENCE, SHARED]),
    "batch": (["vit_tiny_patch16_224"], ["vit_base_patch16_224"], [REFERENCE, SHARED, "keras_vits, TensorFlow"]),
    "devices": (["vit_tiny_patch16_224"], [], [SHARED]),
}
KERAS_HUB_MODELS = ("vit_tiny_patch16_224", "vit_base_patch16_224")  # keras-hub has none of the others
MODES = ("infer", "train")  # in this order: a process never forgets its peak memory, and training takes more
SIDES = (256, 512, 1024)  # pixels, part "tokens": multiples of 64, which MobileViT v2 asks for
LAYER_TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)  # of the attention layers alone
LAYER_ROUNDS = 9
LAYER_FIT = 1024  # the smallest N that the exponent is fitted to
CPU_BATCH = 8
CPU_BATCHES, GPU_BATCHES = (1, 4, 16), (1, 4, 16, 64, 256, 1024)
DEVICES = (1, 2, 4)
PATCH = 16  # pixels; tokens are counted in squares of so many, for every model
GEMM = {"cpu": 2048, "gpu": 8192}  # rows and columns of the matrices
ROUND_SECONDS = 0.3  # of one runner's turn, at least one step
WARMUP_STEPS = 3, 10  # at least and at most
STEADY = 1.5  # a step is compiled when it takes at most so many times the fastest one


# ---------------------------------------------------------------- measure


class Runner:
    """One model in a process of its own. It ends with the `with` block, and with this process however that ends.

    What it cannot do is kept as `error`, a sentence, and it is asked nothing more.
    """

    def __init__(self, name, model, device, threads, devices=1, **order):
        library, self.backend, compiled = RUNNERS[name]
        self.name, self.model, self.device, self.threads, self.devices = name, model, device, threads, devices
        self.order = {"library": library, "backend": self.backend, "compiled": compiled, "model": model} | order
        self.order |= {"gpu": device == "gpu", "threads": threads, "devices": devices, "gemm": GEMM[device]}
        self.ms = {mode: [] for mode in (*MODES, "gemm")}  # one array for each turn
        self.first_step_ms, self.peak_memory_bytes, self.facts, self.error = {}, {}, {}, None

    def __enter__(self):
        virtual = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={self.devices}"} if self.devices > 1 else {}
        environment = {**os.environ, **QUIET, **ON[self.device], **recording.threads(self.threads), **virtual}
        environment["KERAS_BACKEND"] = self.backend
        self.worker = Worker([sys.executable, "-P", str(HERE / "train_worker.py")], environment)
        try:
            self.facts = self.ask(**self.order) or {}
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.worker.__exit__()

    def ask(self, **order):
        """The answer of the child; none, and `error`, where it ended instead."""
        try:
            return self.worker.ask(**order)
        except WorkerError as e:
            self.error = str(e)

    def warm_up(self, mode):
        """Takes steps until they are compiled; returns how many make a turn."""
        (at_least, at_most), ms = WARMUP_STEPS, []
        self.mode = mode
        while len(ms) < at_least or (len(ms) < at_most and ms[-1] > STEADY * min(ms)):
            if not (answer := self.ask(mode=mode, steps=1)):
                return 0
            ms += answer["ms"]
        self.first_step_ms[mode] = ms[0]
        return max(1, round(ROUND_SECONDS * 1e3 / min(ms)))

    def measure(self, mode, steps):
        if answer := self.ask(mode=mode, steps=steps):
            self.ms[mode].append(np.array(answer["ms"]))
            self.peak_memory_bytes[mode] = answer["peak_memory_bytes"]
        else:
            self.ms[mode].clear()

    def has_enough(self, min_runs, min_seconds):
        """Whether its turns in the mode that it was warmed up for took so long; or it is asked nothing more."""
        return bool(self.error) or sum(ms.sum() for ms in self.ms[self.mode]) / 1e3 >= min_seconds


def measure(runners, *, modes=MODES, seconds):
    """Runners of one model in turns; returns a row's figures for each of them and each mode.

    Args:
        runners: list of `Runner` that have not started; ratios are to the first one.
        modes: of `MODES`.
        seconds: that each runner is measured for, in each mode.
    """
    from keras_vits._util.progress import progress
    from keras_vits.edge.devices.turns import orders

    model, random = runners[0].model, np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(runner) for runner in progress(runners, model)]
        sizes = {child.name: child.facts["parameters"] for child in children if not child.error}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"The runners of {model} are not the same network, by their parameters: {sizes}.")
        for mode in (*modes, "gemm"):
            well = [child for child in children if not child.error]
            wanted = min(seconds, 1) if mode == "gemm" else seconds
            turns = {child: child.warm_up(mode) for child in progress(well, f"{model} {mode}, compiling")}
            enough = lambda child, wanted=wanted: child.has_enough(0, wanted)
            for order in orders(lambda well=well: well, enough, random):
                for child in order:
                    if not child.error:
                        child.measure(mode, turns[child])
    gemm = [np.median(np.concatenate(child.ms["gemm"])) for child in children if child.ms["gemm"]]
    gemm = 2e3 * GEMM[runners[0].device] ** 3 / min(gemm) if gemm else None
    macs = count_macs(model, runners[0].order["image_size"])
    return [figures(child, children[0], mode, macs, gemm) for child in children for mode in modes]


def count_macs(model, image_size):
    """Multiply-adds of one image."""
    import keras_vits
    from keras_vits._util import keras_private

    with keras_private.values_later():
        return keras_vits.count_macs(keras_vits.create(model, image_size=image_size))


def figures(child, reference, mode, macs, gemm):
    """How fast a runner is. The ratio is the median, over the turns, of how much faster it was than the reference."""
    order, facts = child.order, child.facts
    row = {
        "model": child.model,
        "runner": child.name,
        "backend": child.backend,
        "runtime": child.backend,
        "runtime_version": facts.get("version"),
        "library": library(child.name),
        "library_version": facts.get("library_version"),
        "mode": mode,
        "batch": order["batch"],
        "tokens": (order["image_size"] // PATCH) ** 2,
        "devices": child.devices,
        "parameters": facts.get("parameters"),
    }
    if not child.ms[mode]:
        return row | {"error": child.error}
    seconds = float(np.median(np.concatenate(child.ms[mode]))) / 1e3
    row |= {
        "median_ms": seconds * 1e3,
        "images_per_second": order["batch"] / seconds,
        "first_step_s": child.first_step_ms[mode] / 1e3,
        "peak_memory_bytes": child.peak_memory_bytes[mode],
        "steps": sum(map(len, child.ms[mode])),
        "flops_per_second": flops(macs, mode) * order["batch"] / seconds,
        "gemm_flops_per_second": gemm,
    }
    if turns := min(len(runner.ms[mode]) for runner in (child, reference)):
        means, theirs = ([ms.mean() for ms in runner.ms[mode][:turns]] for runner in (child, reference))
        quartiles = np.percentile(np.divide(theirs, means), (25, 50, 75)).tolist()
        row |= dict(zip(("ratio_q1", "ratio", "ratio_q3"), quartiles, strict=True))
    return row


def library(runner):
    return {"keras_vits": "keras", "keras_hub": "keras-hub"}.get(RUNNERS[runner][0], "timm")


def flops(macs, mode):
    """Of one image: two for each multiply-add, and a backward pass is two forward passes."""
    return 2 * macs * (3 if mode == "train" else 1)


# ---------------------------------------------------------------- parts


def measure_part(part, model, options):
    """A row's figures for everything that a part measures of a model."""
    gpu, common = options.device == "gpu", (options.device, options.threads)
    if model == ATTENTION:
        return attention(*common, *(((64, 256), 1) if options.smoke else (LAYER_TOKENS, LAYER_ROUNDS)))
    side, batch = MODELS[model][0], options.batch or (MODELS[model][1] if gpu else CPU_BATCH)
    names = [REFERENCE, *(name for name in options.runners or PARTS[part][2] if name != REFERENCE)]
    names = [name for name in names if RUNNERS[name][0] != "keras_hub" or model in KERAS_HUB_MODELS]

    def together(image_size, batch, modes=MODES):
        runners = [Runner(name, model, *common, image_size=image_size, batch=batch) for name in names]
        return measure(runners, modes=modes, seconds=options.seconds)

    if part == "tokens":
        found = [together(n, 1, ("infer",)) for n in (SIDES[:2] if options.smoke else SIDES)]
    elif part == "batch":
        found = [together(side, n) for n in ((1, 2) if options.smoke else GPU_BATCHES if gpu else CPU_BATCHES)]
    elif part == "devices":
        counts = [n for n in DEVICES if n <= (len(gpus()) if gpu else 2 if options.smoke else max(DEVICES))]
        order = {"image_size": side, "batch": max(batch, *counts)}
        found = [measure([Runner(SHARED, model, *common, n, **order) for n in counts], seconds=options.seconds)]
    else:
        found = [together(side, batch)]
    return [row for rows in found for row in rows]


def attention(device, threads, sizes, rounds):
    """A row's figures for every attention layer alone and number of tokens."""
    with Runner(SHARED, ATTENTION, device, threads, attention={"sizes": sizes, "rounds": rounds}) as runner:
        if runner.error:
            raise ValueError(f"The attention layers could not run: {runner.error}")
        facts, found = runner.facts, []
        for name, times in facts["seconds"].items():
            times = {int(tokens): seconds for tokens, seconds in times.items()}
            p = exponent(times, fitted_from(times))
            for tokens, seconds in times.items():
                batch = train_worker.layer_batch(name, tokens)
                found.append(attention_row(name, tokens, batch, statistics.median(seconds), p, runner.backend, facts))
    return found


def attention_row(name, tokens, batch, seconds, exponent, backend, facts):
    """The figures of a layer that takes so many seconds for a sample."""
    return {
        "model": ATTENTION,
        "runner": name,
        "backend": backend,
        "runtime": backend,
        "runtime_version": facts["version"],
        "library": "keras",
        "library_version": facts["library_version"],
        "mode": "infer",
        "batch": batch,
        "tokens": tokens,
        "devices": 1,
        "median_ms": 1e3 * seconds * batch,
        "images_per_second": 1 / seconds,
        "exponent": exponent,
    }


def exponent(times, smallest):
    """Median over the rounds of the slope of log(time) against log(N), from N = `smallest` on.

    Args:
        times: N -> a time for each round.
    """
    sizes = [n for n in times if n >= smallest]
    slopes = np.polyfit(np.log(sizes), np.log([times[n] for n in sizes]), 1)[0]
    return float(np.median(slopes))


def fitted_from(sizes):
    """The smallest of the layers' sizes that the exponent is fitted to."""
    return min([n for n in sizes if n >= LAYER_FIT] or sizes)


def gpus():
    """Names of the GPUs."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()


# ---------------------------------------------------------------- record


FIELDS = (
    "benchmark part model runner backend runtime runtime_version library library_version mode batch tokens devices "
    "threads device dtype date commit command parameters steps median_ms images_per_second first_step_s "
    "peak_memory_bytes ratio ratio_q1 ratio_q3 flops_per_second gemm_flops_per_second exponent error"
).split()  # of a row of train.jsonl; null where it is not known


def record(new):
    """Puts rows into the record, in place of those of their part, model and device."""
    group = lambda row: (row["part"], row["model"], row["device"])
    replaced = {group(row) for row in new}
    kept = [row for row in recording.read(RECORD) if group(row) not in replaced]
    names = [*PARTS], [ATTENTION, *MODELS]
    order = lambda row: (names[0].index(row["part"]), row["device"], names[1].index(row["model"]))  # and as measured
    recording.write(RECORD, ({key: row.get(key) for key in FIELDS} for row in sorted([*kept, *new], key=order)))


def circumstances(options):
    """What all rows of a run have in common."""
    from keras_vits.edge.devices._common import cpu_name

    gpu = options.device == "gpu"
    return {
        "benchmark": "train",
        "threads": options.threads,
        "device": gpus()[0] if gpu else f"{cpu_name()}, {os.cpu_count()} cores",
        "dtype": "bfloat16" if gpu else "float32",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": shlex.join(["python", "benchmarks/train.py", *sys.argv[1:]]),
    }


# ---------------------------------------------------------------- command line


def parsed(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=[*MODELS, ATTENTION], help="of every part; its own by default")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, help=f"beside {REFERENCE}; the part's by default")
    parser.add_argument("--device", choices=ON, default="gpu" if shutil.which("nvidia-smi") else "cpu")
    parser.add_argument("--batch", type=positive, help=f"images in a step; {CPU_BATCH} on a CPU, more on a GPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="that every runner is measured for, in each mode")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="of every runner")
    parser.add_argument("--smoke", action="store_true", help="small sizes, one turn, no record: does it run?")
    found = parser.parse_args(arguments)
    if found.device == "gpu" and not shutil.which("nvidia-smi"):
        parser.error("--device gpu needs an NVIDIA GPU and its nvidia-smi command, which is not here: use --device cpu")
    if found.models and ATTENTION in found.models and found.part != ["tokens"]:
        parser.error(f"--models {ATTENTION} has the layers alone, which only --part tokens measures")
    if found.smoke:
        found.batch, found.seconds = found.batch or 2, 0.01
    return found


def main():
    options = parsed()
    os.environ["KERAS_BACKEND"] = "numpy"  # of this process, which computes nothing: the quickest to import
    common = circumstances(options)
    for part in options.part:
        cpu, gpu, _ = PARTS[part]
        for model in options.models or cpu + gpu * (options.device == "gpu"):
            found = [
                dict.fromkeys(FIELDS) | common | {"part": part} | row for row in measure_part(part, model, options)
            ]
            print("\n".join(map(said, found)), flush=True)
            if not options.smoke:  # a model at a time, so that an interrupt loses one only
                record(found)


def said(row):
    """A row as a line, for who waits."""
    what = [row["part"], row["model"], row["runner"], row["mode"], f"batch {row['batch']}", f"{row['tokens']} tokens"]
    figures = f"failed: {row['error']}" if row["error"] else f"{row['images_per_second']:.1f} images/s"
    return f"{', '.join(filter(None, what))}: {figures}"


if __name__ == "__main__":
    main()

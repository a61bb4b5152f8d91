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
import json
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys

import numpy as np
import train_worker
from run import commit
from worker import Worker, WorkerError

HERE = pathlib.Path(__file__).parent
RECORD = HERE / "results" / "train.jsonl"
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
ENVIRONMENT = {  # of every child; their threads sleep while others work
    "OMP_WAIT_POLICY": "passive",
    "KMP_BLOCKTIME": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
ON = {  # of a child on this device
    "cpu": {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "KERAS_TORCH_DEVICE": "cpu"},
    "gpu": {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"},
}
METHOD = (
    "Every runner has the same network with random weights, and a process of its own; they took their steps in turns. "
    "Ratios are to timm's speed without compilation, more is faster: the median over the turns, and the quartiles. "
    "A training step is forward, cross entropy, backward and AdamW. Memory is the process' peak on a CPU, Python and "
    "libraries and compiler included, and the allocator's on a GPU. The first step is the first of training, "
    "compilation included. GFLOP/s are two for each multiply-add of the network, three times that in training; of GEMM "
    "is their share of the rate of one large matrix product measured in the same turns."
)


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
        threads = dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "NPROC"), str(self.threads))  # NPROC: JAX
        virtual = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={self.devices}"} if self.devices > 1 else {}
        environment = {**os.environ, **ENVIRONMENT, **ON[self.device], **threads, **virtual}
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

    def seconds(self, mode):
        return sum(ms.sum() for ms in self.ms[mode]) / 1e3


def measure(runners, *, modes=MODES, seconds):
    """Runners of one model in turns; returns a row's figures for each of them and each mode.

    Args:
        runners: list of `Runner` that have not started; ratios are to the first one.
        modes: of `MODES`.
        seconds: that each runner is measured for, in each mode.
    """
    from keras_vits._util.progress import progress

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
            while well := [child for child in well if not child.error]:
                if all(child.seconds(mode) >= wanted for child in well):
                    break
                for child in random.permutation(well):  # what ran before leaves the processor in its state
                    child.measure(mode, turns[child])
    gemm = [np.median(np.concatenate(child.ms["gemm"])) for child in children if child.ms["gemm"]]
    gemm = 2e3 * GEMM[runners[0].device] ** 3 / min(gemm) if gemm else None
    macs = count_macs(model, runners[0].order["image_size"])
    return [figures(child, children[0], mode, macs, gemm) for child in children for mode in modes]


def count_macs(model, image_size):
    """Multiply-adds of one image."""
    import keras_vits
    from keras_vits.checkpoints import assign as weights

    with weights.values_later():
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


def rows():
    """The recorded rows, as dictionaries; none where there is no record."""
    return [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()] if RECORD.exists() else []


def record(new):
    """Puts rows into the record, in place of those of their part, model and device."""
    from keras_vits._util.files import writing

    group = lambda row: (row["part"], row["model"], row["device"])
    replaced = {group(row) for row in new}
    kept = [row for row in rows() if group(row) not in replaced]
    names = [*PARTS], [ATTENTION, *MODELS]
    order = lambda row: (names[0].index(row["part"]), row["device"], names[1].index(row["model"]))  # and as measured
    with writing(RECORD) as temporary:
        lines = (json.dumps({key: row.get(key) for key in FIELDS}) for row in sorted([*kept, *new], key=order))
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


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


# ---------------------------------------------------------------- show


def section():
    """The part of RESULTS.md about the recorded rows, as lines of Markdown."""
    recorded = rows()
    lines = ["## Training and inference", "", "Written by `benchmarks/train.py`. " + METHOD, ""]
    if not any(map(on_gpu, recorded)):
        lines += ["No GPU was at hand when these were recorded: every figure is of a CPU.", ""]
    return lines + tables(recorded)


def tables(rows):
    lines = []
    for (part, _, _), found in grouped(rows, "part", "device", "model").items():
        lines += [f"### {title(found)}", "", made_with(found), "", *TABLES[part](found), ""]
    return lines


def title(rows):
    """The heading above the rows of one part, model and device."""
    where = f", {rows[0]['device']}" if on_gpu(rows[0]) else ""
    return TITLES[rows[0]["part"]].format(model=rows[0]["model"]) + where


def on_gpu(row):
    return row["dtype"] == "bfloat16"


def grouped(rows, *keys):
    """Values of the keys -> rows that have them, in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


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


def speed_table(rows):
    gemm = any(row["gemm_flops_per_second"] for row in rows)
    lines = [
        "| runner | train images/s | / timm | infer images/s | / timm | train MB | infer MB | first step s "
        f"| train GFLOP/s |{' of GEMM |' * gemm}",
        f"|---|{'---:|' * (8 + gemm)}",
    ]
    for (name,), found in grouped(rows, "runner").items():
        train, infer = (next(row for row in found if row["mode"] == mode) for mode in ("train", "infer"))
        speeds = [cell for row in (train, infer) for cell in (number(row["images_per_second"], ".1f"), spread(row))]
        cells = [name, *speeds, megabytes(train), megabytes(infer), number(train["first_step_s"], ".1f")]
        lines.append(f"| {' | '.join([*cells, *rate(train)[: 1 + gemm]])} |")
    return lines + failures(rows)


def tokens_table(rows):
    alone = rows[0]["model"] == ATTENTION
    sizes = sorted({row["tokens"] for row in rows})
    smallest = fitted_from(sizes) if alone else sizes[0]
    lines = [
        f"Milliseconds for one {'sample' if alone else 'image'} of N tokens, and the exponent p of time ~ N^p from "
        f"N = {smallest:,} on. "
        + (
            f"The layers alone, of width {train_worker.WIDTH} and with {train_worker.HEADS} heads."
            if alone
            else f"Tokens are counted in squares of {PATCH} pixels."
        ),
        "",
        f"| {'attention' if alone else 'runner'} | {' | '.join(f'N = {n:,}' for n in sizes)} | p |",
        f"|---|{'---:|' * (len(sizes) + 1)}",
    ]
    for (name,), found in grouped(rows, "runner").items():
        ms = {row["tokens"]: 1e3 / row["images_per_second"] for row in found if row["images_per_second"]}
        p = found[0]["exponent"]  # of the rounds, where they went through all sizes
        if p is None and len(ms) > 1:
            p = exponent({n: [t] for n, t in ms.items()}, smallest)
        lines.append(f"| {' | '.join([name, *(number(ms.get(n), '.2f') for n in sizes), number(p, '.2f')])} |")
    return lines + failures(rows)


def batch_table(rows):
    sizes = sorted({row["batch"] for row in rows})
    lines = [
        "Images per second, and behind the stroke the peak memory in MB.",
        "",
        f"| runner | | {' | '.join(f'batch {n}' for n in sizes)} |",
        f"|---|---|{'---:|' * len(sizes)}",
    ]
    for (name, mode), found in grouped(rows, "runner", "mode").items():
        cells = {row["batch"]: f"{row['images_per_second']:.1f} / {megabytes(row)}" for row in found if known(row)}
        lines.append(f"| {' | '.join([name, mode, *(cells.get(n, '') for n in sizes)])} |")
    return lines + failures(rows)


def devices_table(rows):
    virtual = "The devices are virtual, parts of one processor: the ratios to one of them show what sharing costs."
    lines = [
        "One batch, shared among the devices. " + ("Ratios are to one device." if on_gpu(rows[0]) else virtual),
        "",
        "| devices | | images/s | / one | MB | first step s |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            number(row["images_per_second"], ".1f"),
            spread(row),
            megabytes(row),
            number(row["first_step_s"], ".1f"),
        ]
        lines.append(f"| {row['devices']} | {row['mode']} | {' | '.join(cells)} |")
    return lines + failures(rows)


def failures(rows):
    """What did not run, and its error, as a list."""
    said = dict.fromkeys(f"- {row['runner']}, {row['mode']}, failed: {row['error']}" for row in rows if row["error"])
    return ["", *said] if said else []


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


def known(row):
    return row["images_per_second"] is not None


def number(value, spec):
    return "" if value is None else format(value, spec)


def megabytes(row):
    return "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:.0f}"


def spread(row):
    return "" if row["ratio"] is None else f"{row['ratio']:.2f} ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"


def rate(row):
    """GFLOP/s, and how much of the GEMM's they are."""
    found, gemm = row["flops_per_second"], row["gemm_flops_per_second"]
    return number(found and found / 1e9, ".1f"), f"{found / gemm:.0%}" if found and gemm else ""


TITLES = {
    "speed": "Speed of {model}",
    "tokens": "Tokens: {model}",
    "batch": "Batch size: {model}",
    "devices": "Devices: {model}",
}
TABLES = {"speed": speed_table, "tokens": tokens_table, "batch": batch_table, "devices": devices_table}


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


def positive(text):
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; received {text}")
    return value


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
            print("\n".join(tables(found)), flush=True)
            if not options.smoke:  # a model at a time, so that an interrupt loses one only
                record(found)
    if not options.smoke:
        import results

        results.write()


if __name__ == "__main__":
    main()

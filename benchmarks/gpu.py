"""What a GPU makes of the models, in eight minutes or in `--seconds`: see gpu.sh, which starts this.

    device     rate of one large bfloat16 product and of copies, by PyTorch and by JAX
    parity     relative error of the logits, ours and timm's, to timm's in float32 on the processor, same weights
    speed      training and inference in bfloat16; the fields are those of train.jsonl
    profile    kernels of a training step: shares of products and of attention, gaps between kernels
    tokens     softmax and linear attention alone, forward, against the number of tokens

Every runner is a process (gpu_worker.py). All compile side by side, and whatever is ready is measured: all other
processes are stopped meanwhile, so that the GPU and the processor are the measured one's. Within a model PyTorch's
runners take their steps in turns, JAX, which does not give memory back, comes last. What has not started when
nine tenths of the time are over is left out, what has not ended with it is stopped; either is a row with its reason.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import datetime
import json
import os
import pathlib
import shlex
import signal
import statistics
import sys
import threading
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import train

from keras_vits._util.process import Worker, WorkerError

HERE = pathlib.Path(__file__).resolve().parent
VARIANTS = HERE.parent / "tests" / "data" / "variants.csv"  # for the multiply-adds
MODELS = {  # name -> (side of the images in pixels, batch that fills the device), the most telling first
    "vit_base_patch16_224": (224, 128),
    "mobilevit_s": (256, 128),
    "mobilevitv2_100": (256, 128),
    "vit_small_patch16_224": (224, 256),
    "mixer_b16_224": (224, 128),
}
DRY_MODELS = {"vit_tiny_patch16_224": (32, 2)}
RUNNERS = (
    "timm",
    "timm, torch.compile",
    "keras_vits, PyTorch",
    "keras_vits, PyTorch, jit_compile",
    "keras_vits, JAX",
)
DRY_RUNNERS = ("timm", "timm, torch.compile", "keras_vits, PyTorch", "keras_vits, JAX")
PROFILED = ("keras_vits, JAX", "keras_vits, PyTorch, jit_compile", "keras_vits, PyTorch", "timm")
DRY_TOKENS = (16, 32)
TOKENS = (1024, 2048, 4096, 8192, 16384)
WORK = 32768  # tokens in a batch of the attention layers, whatever N
WARM, TURNS, STEPS = 5, 2, 5  # steps before the first turn, turns, measured steps of a turn
SECONDS = 440  # in all
FORCE, STOP = 0.7, 0.9  # of the seconds: from then on measure without who is not ready, start nothing new
PATIENCE = 75  # seconds that one answer may take while it is measured
MORE = (  # fields beside train.jsonl's
    "copy_bytes_per_second relative_error gemm_share attention_share gap_share kernels_per_step attention_kernels "
    "kernels note"
).split()
FIELDS = [*train.FIELDS, *MORE]
BACKENDS = ("torch", "jax")
MODES = ("train", "infer")  # in this order: training is what is asked first
PARTS = ("device", "parity", "speed", "tokens")  # profiles come with speed


class Job(train.Runner):
    """A process with a duty. What it cannot do is kept as `error`, and it is asked nothing more."""

    def __init__(self, duty, name, model, device, threads, *, dry, runner=None, **order):
        super().__init__(runner or "timm", model, device, threads, **order)
        self.duty, self.name, self.dry, self.ready, self.failed = duty, name, dry, False, {}
        self.order |= {"duty": duty}
        self.modes = MODES

    def start(self):
        own = {"KERAS_BACKEND": self.backend, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        if self.dry:
            own |= {"GPU_DRY_RUN": "1"}
        environment = {**os.environ, **train.QUIET, **train.ON[self.device], **own}
        if self.device == "gpu":
            environment["JAX_PLATFORMS"] = "cuda,cpu"  # Keras has things that it keeps on the processor
        self.worker = Worker([sys.executable, "-P", str(HERE / "gpu_worker.py")], environment)
        found = self.ask(**self.order)
        self.facts = {} if self.error else found

    def ask(self, **order):
        """The answer; with {error} where it could not do that, which is all where its process has ended."""
        if not self.error:
            try:
                found = self.worker.ask(**order)
                self.failed |= {order["mode"]: found["error"]} if "error" in found and "mode" in order else {}
                return found
            except (WorkerError, ValueError, OSError) as e:
                self.error = self.error or " ".join(str(e).split())[:500]
        return {"error": self.error}

    def ask_soon(self, **order):
        """The answer, or the error that it did not come in time."""

        def give_up():
            self.error = f"it took longer than {PATIENCE} seconds"
            self.send(signal.SIGKILL)

        timer = threading.Timer(PATIENCE, give_up)
        timer.start()
        try:
            return self.ask(**order)
        finally:
            timer.cancel()

    def send(self, number):
        """To the process and all that it has started, once it leads a group of its own; before that, to it alone."""
        if getattr(self, "worker", None) and self.worker.process.poll() is None:
            try:
                os.killpg(self.worker.process.pid, number)
            except (ProcessLookupError, PermissionError):
                self.worker.process.send_signal(number)

    def end(self, why=None):
        self.error = self.error or why
        self.send(signal.SIGCONT)
        self.send(signal.SIGKILL)
        if getattr(self, "worker", None):
            self.worker.__exit__()


class Bench:
    def __init__(self, options):
        self.options, self.dry = options, options.smoke
        self.device = "cpu" if self.dry else "gpu"
        self.began, self.lock, self.gemm = time.monotonic(), threading.Lock(), {}
        self.force, self.stop, self.end = (share * options.seconds for share in (FORCE, STOP, 1))
        self.jobs, self.paused, self.over = [], False, False
        self.models = DRY_MODELS if self.dry else {model: MODELS[model] for model in options.models}
        self.changes = {"depth": 1} if self.dry else {}
        name = "dry run, CPU" if self.dry else train.gpus()[0]
        self.common = {
            "benchmark": "gpu",
            "threads": options.threads,
            "device": name,
            "dtype": "float32" if self.dry else "bfloat16",
            "date": datetime.date.today().isoformat(),
            "commit": os.environ.get("COMMIT") or train.commit(),
            "command": shlex.join(["bash", "benchmarks/gpu.sh", *sys.argv[1:]]),
        }
        with open(VARIANTS, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.macs = {r["name"]: float(r["gmacs_flopcounter"]) * 1e9 for r in rows if r["gmacs_flopcounter"]}

    def seconds(self):
        return time.monotonic() - self.began

    def job(self, duty, name, backend, model=None, runner=None, **order):
        """A job that has not started. `backend` is for those that are no runner."""
        made = Job(
            duty, name, model, self.device, self.options.threads, dry=self.dry, runner=runner, changes=self.changes,
            **order,
        )  # fmt: skip
        if backend:
            made.backend = made.order["backend"] = backend
            made.order["library"] = "keras_vits" if duty in ("parity", "attention") else backend
        self.jobs.append(made)
        return made

    def emit(self, part, **row):
        """Writes one row, at once, and shows what matters of it."""
        row = dict.fromkeys(FIELDS) | self.common | {"part": part} | row
        with self.lock:
            with open(self.options.record, "a", encoding="utf-8") as file:
                file.write(json.dumps({key: row[key] for key in FIELDS}) + "\n")
                file.flush()
            shown = (
                "model",
                "runner",
                "library",
                "dtype",
                "mode",
                "tokens",
                "median_ms",
                "images_per_second",
                "ratio",
                "relative_error",
            )
            shown += ("gemm_share", "attention_share", "gap_share", "attention_kernels", "error", "note")
            facts = [f"{k}={row[k]:.4g}" if isinstance(row[k], float) else f"{k}={row[k]}" for k in shown if row[k]]
            if row["flops_per_second"] or row["gemm_flops_per_second"]:
                facts.append(f"TFLOP/s={(row['flops_per_second'] or row['gemm_flops_per_second']) / 1e12:.1f}")
                if row["flops_per_second"] and row["gemm_flops_per_second"]:
                    facts.append(f"of product={row['flops_per_second'] / row['gemm_flops_per_second']:.1%}")
            print(f"[{self.seconds():5.1f} s] {part}: {', '.join(facts)}", flush=True)

    def base(self, job):
        """What a row says of the process that it is from."""
        return {
            "model": job.model,
            "runner": job.name,
            "backend": job.backend,
            "runtime": job.backend,
            "runtime_version": job.facts.get("version"),
            "library": {"keras_vits": "keras"}.get(job.order["library"], job.order["library"]),
            "library_version": job.facts.get("library_version"),
        }

    # ------------------------------------------------------------ one at a time on the GPU

    @contextlib.contextmanager
    def alone(self, jobs):
        """Everything but these jobs stands still."""
        with self.lock:
            self.paused = True
            others = [job for job in self.jobs if job not in jobs]
            for job in others:
                job.send(signal.SIGSTOP)
        if not self.dry:
            time.sleep(0.3)  # what the stopped ones have launched ends
        try:
            yield
        finally:
            with self.lock:
                self.paused = False
                for job in others:
                    job.send(signal.SIGCONT)

    def prepare(self, job, orders=()):
        """Starts a job and has it do what may happen beside others; in a thread.

        Args:
            job: a `Job`.
            orders: list of orders, or a function of the job, once started, that gives one.
        """
        try:
            while self.paused and not self.over:  # a process that starts now would not stand still
                time.sleep(0.05)
            if self.over or job.error:
                return
            job.start()
            for order in orders(job) if callable(orders) else orders:
                found = job.ask(**order)
                if "first_step_ms" in found:
                    job.first_step_ms[order["mode"]] = found["first_step_ms"]
        except Exception as e:  # a row, whatever it is
            job.error = job.error or f"{type(e).__name__}: {e}"
        finally:
            job.ready = True

    # ------------------------------------------------------------ parts

    def measure_device(self, jobs):
        size = dict(side=256, copy_bytes=2**20) if self.dry else dict(side=8192, copy_bytes=2**32)
        for job in jobs:
            with self.alone([job]):
                found = job.ask_soon(do="measure", **size, warm=3, steps=10)
            if "error" not in found:
                self.gemm[job.backend] = found["gemm_flops_per_second"]
            self.emit("device", **self.base(job), mode="gemm", **found)
            job.end()

    def parity(self, job):
        """In its thread, beside what compiles: nothing is timed."""
        for model, (side, _) in self.models.items():
            if self.seconds() > self.stop:
                break
            found = job.ask(do="measure", model=model, image_size=side, batch=2 if self.dry else 8)
            row = self.base(job) | {"model": model, "mode": "infer"}
            if "error" in found:
                self.emit("parity", **row, error=found["error"])
                continue
            for library, dtype, error in found["errors"]:
                library = {"keras_vits": "keras"}.get(library, library)
                self.emit("parity", **row | {"library": library, "dtype": dtype, "relative_error": error})
        job.end()

    def measure_model(self, model, jobs):
        """The runners of a model: PyTorch's in turns, then JAX', each with a profile."""
        blocks = [[job for job in jobs if job.backend == backend] for backend in BACKENDS]
        reference = next((job for job in jobs if job.name == train.REFERENCE), jobs[0])
        for block in filter(None, blocks):
            with self.alone(block):
                for mode in MODES:
                    chosen = [job for job in block if mode in job.modes]
                    for turn in range(1 if self.dry else TURNS):
                        for job in chosen[:: -1 if turn % 2 else 1]:
                            self.turn(job, mode, turn)
                    for job in chosen:
                        self.speed(job, reference, mode)
                for job in block:
                    profiled = (model in self.options.profiled or self.dry) and job.name in PROFILED
                    profiled = profiled and "train" in job.modes
                    if profiled and job.ms["train"] and not job.error and self.seconds() < self.stop:
                        self.profile(job)
            for job in block:
                job.end()

    def turn(self, job, mode, turn):
        if mode in job.failed or job.error:
            return
        warm, steps = (1, 1) if self.dry else (WARM if turn == 0 else 1, STEPS)
        found = job.ask_soon(do="measure", mode=mode, warm=warm, steps=steps)
        if "error" not in found:
            job.ms[mode].append(np.array(found["ms"]))
            job.peak_memory_bytes[mode] = found["peak_memory_bytes"]

    def speed(self, job, reference, mode):
        job.first_step_ms.setdefault(mode, float("nan"))
        row = train.figures(job, reference, mode, self.macs[job.model], max(self.gemm.values(), default=None))
        if np.isnan(row.get("first_step_s", 0)):
            row["first_step_s"] = None
        self.emit("speed", **row | {"error": None if job.ms[mode] else job.failed.get(mode) or job.error})

    def profile(self, job):
        found = job.ask_soon(do="profile", steps=1 if self.dry else 3)
        figures = {"median_ms": found.pop("span_ms", None)}
        self.emit("profile", **self.base(job), mode="train", batch=job.order["batch"], **figures, **found)

    def layers(self, job, do, **more):
        """An order for every attention layer and number of tokens."""
        names = [*job.facts.get("layers", ())][: 2 if self.dry else None]
        return [
            dict(do=do, layer=name, tokens=n, **more) for n in (DRY_TOKENS if self.dry else TOKENS) for name in names
        ]

    def measure_attention(self, job):
        with self.alone([job]):
            for order in self.layers(job, "measure", warm=3, steps=2 if self.dry else 7):
                found = {"error": "left out: the time was over"}
                if self.seconds() < self.stop:
                    found = job.ask_soon(**order)
                row = self.base(job) | {"model": train.ATTENTION, "runner": order["layer"], "tokens": order["tokens"]}
                if "error" in found:
                    self.emit("tokens", **row, mode="infer", error=found["error"])
                    continue
                ms, batch = statistics.median(found["ms"]), found["batch"]
                rate = {"images_per_second": batch / ms * 1e3, "steps": len(found["ms"])}
                self.emit("tokens", **row, mode="infer", batch=batch, median_ms=ms, **rate)
        job.end()

    # ------------------------------------------------------------ the plan

    def run(self):
        options, make = self.options, self.job
        device = [make("device", f"{b} product", b) for b in BACKENDS] if "device" in options.part else []
        parity = [make("parity", f"parity, {b}", b) for b in BACKENDS] if "parity" in options.part else []
        attention = [make("attention", train.ATTENTION, b, work=32 if self.dry else WORK) for b in reversed(BACKENDS)]
        attention = attention if "tokens" in options.part else []
        units = {model: self.runners(model) for model in self.models} if "speed" in options.part else {}
        orders = lambda job: [{"do": "prepare", "mode": mode} for mode in job.modes]
        early = concurrent.futures.ThreadPoolExecutor(options.workers)
        try:
            for job in device:
                early.submit(self.prepare, job)
            runners = [job for jobs in units.values() for job in jobs]
            last = lambda job: job.order["compiled"] and job.backend == "torch" and job.order["library"] == "keras_vits"
            for job in [job for job in runners if not last(job)]:
                early.submit(self.prepare, job, orders)
            for job in attention:  # by PyTorch there is nothing to compile
                early.submit(self.prepare, job, lambda job: self.layers(job, "prepare") if job.backend == "jax" else [])
            for job in parity:
                early.submit(self.compared, job)
            for job in filter(last, runners):  # they take longest, and nothing is to wait for them
                early.submit(self.prepare, job, orders)
            waiting = [("device", None, device)] * bool(device) + [("speed", *unit) for unit in units.items()]
            waiting += [("tokens", None, [job]) for job in attention]
            self.schedule(waiting)
            while self.seconds() < self.end and not all(job.ready for job in parity):
                time.sleep(0.1)
        finally:
            self.over = True
            for job in self.jobs:
                job.end("it was stopped: the time was over")
            early.shutdown(wait=True, cancel_futures=True)
        print(f"[{self.seconds():5.1f} s] done: {options.record}", flush=True)

    def runners(self, model):
        """The jobs of a model. What takes minutes to compile does so in two processes, one for each mode."""
        side, batch = self.models[model]
        made = []
        for runner in self.options.runners or (DRY_RUNNERS if self.dry else RUNNERS):
            library, _, compiled = train.RUNNERS[runner]
            for modes in [(mode,) for mode in MODES] if compiled and library == "keras_vits" else [MODES]:
                job = self.job("runner", runner, None, model, runner, image_size=side, batch=batch)
                job.modes = modes
                made.append(job)
        return made

    def compared(self, job):
        self.prepare(job)
        job.ready = False
        try:
            self.parity(job)
        finally:
            job.ready = True

    def schedule(self, waiting):
        """Measures what is ready, the first of the list first, until nothing is left or the time is over.

        Args:
            waiting: list of (part, model, jobs).
        """
        while waiting and self.seconds() < self.stop:
            # After a while without those that are not ready; the rate that all else is a share of comes first.
            enough = lambda job: job.ready or self.seconds() > self.force
            ready = [
                unit for unit in waiting if all(map(enough, unit[2])) and any(j.ready and not j.error for j in unit[2])
            ]
            if any(part == "speed" for part, _, _ in waiting) and self.seconds() < self.force:
                # Meanwhile their compilers would stand still.
                ready = [unit for unit in ready if unit[0] != "tokens"]
            lost = [unit for unit in waiting if all(job.ready and job.error for job in unit[2])]
            if waiting[0][0] == "device" and self.seconds() < self.force:
                ready, lost = ([u for u in units if u[0] == "device"] for units in (ready, lost))
            if not (ready or lost):
                time.sleep(0.05)
                continue
            part, model, jobs = unit = (ready or lost)[0]
            waiting.remove(unit)
            for job in jobs:
                if not job.ready:
                    job.end("it was not compiled in time")
            try:
                if part == "device":
                    self.measure_device(jobs)
                elif part == "tokens":
                    self.measure_attention(jobs[0])
                else:
                    self.measure_model(model, jobs)
            except Exception as e:  # of one unit: the others go on
                self.emit(part, model=model, error=f"{type(e).__name__}: {e}")
        for part, model, jobs in waiting:
            for job in jobs:
                for mode in job.modes if part == "speed" else (None,):
                    row = self.base(job) | {"model": model, "mode": mode}
                    self.emit(part, **row, error=job.error or "left out: the time was over")


def parsed(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    record = pathlib.Path(os.environ.get("OUT") or HERE / "results") / "gpu.jsonl"
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="of speed and parity")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, help=f"of speed; ratios are to {train.REFERENCE}")
    parser.add_argument("--profiled", nargs="+", choices=MODELS, default=[next(iter(MODELS))], help="of --models")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that all of it may take")
    parser.add_argument("--record", type=pathlib.Path, default=record, help="rows are appended to it")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count()), help="of every process")
    parser.add_argument("--workers", type=int, default=max(4, os.cpu_count() // 2), help="that compile side by side")
    parser.add_argument("--smoke", action="store_true", default=bool(os.environ.get("GPU_DRY_RUN")), help="on a CPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    Bench(parsed()).run()

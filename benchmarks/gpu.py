"""What a GPU makes of the models, in eight minutes: see gpu.sh, which starts this.

    device     rate of one large bfloat16 product and of copies, by PyTorch and by JAX
    parity     relative error of the logits, ours and timm's, to timm's in float32 on the processor, same weights
    speed      training and inference in bfloat16; the fields are those of train.jsonl
    profile    kernels of a training step: shares of products and of attention, gaps between kernels
    tokens     softmax and linear attention alone, forward, against the number of tokens

Every runner is a process (gpu_worker.py). All compile side by side, and whatever is ready is measured: all other
processes are stopped meanwhile, so that the GPU and the processor are the measured one's. Within a model PyTorch's
runners take their steps in turns, JAX, which does not give memory back, comes last. What has not started when
`STOP` seconds are over is left out, what has not ended at `END` is stopped; either is a row with its reason.
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

sys.path.append(str(pathlib.Path(__file__).parent))
import train
from worker import Worker, WorkerError

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
PROFILED = (
    "vit_base_patch16_224",
    ("keras_vits, JAX", "keras_vits, PyTorch, jit_compile", "keras_vits, PyTorch", "timm"),
)
TOKENS = (1024, 2048, 4096, 8192, 16384)
WORK = 32768  # tokens in a batch of the attention layers, whatever N
WARM, TURNS, STEPS = 5, 2, 5  # steps before the first turn, turns, measured steps of a turn
FORCE, STOP, END = 300, 420, 465  # seconds: measure without who is not ready, start nothing new, end everything
PATIENCE = 75  # seconds that one answer may take while it is measured
MORE = (  # fields beside train.jsonl's
    "copy_bytes_per_second relative_error gemm_share attention_share gap_share kernels_per_step attention_kernels "
    "kernels note"
).split()
FIELDS = [*train.FIELDS, *MORE]
BACKENDS = ("torch", "jax")


class Job(train.Runner):
    """A process with a duty. What it cannot do is kept as `error`, and it is asked nothing more."""

    def __init__(self, duty, name, model, device, threads, *, dry, runner=None, **order):
        super().__init__(runner or "timm", model, device, threads, **order)
        self.duty, self.name, self.dry, self.ready, self.prepared = duty, name, dry, False, set()
        self.order |= {"duty": duty}

    def start(self):
        own = {"KERAS_BACKEND": self.backend, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        if self.dry:
            own |= {"GPU_DRY_RUN": "1"}
        environment = {**os.environ, **train.ENVIRONMENT, **train.ON[self.device], **own}
        # A session of its own: its compilers are stopped and ended with it.
        self.worker = Worker(["setsid", sys.executable, "-P", str(HERE / "gpu_worker.py")], environment)
        self.facts = self.ask(**self.order) or {}

    def ask(self, **order):
        if self.error:
            return None
        try:
            return self.worker.ask(**order)
        except (WorkerError, ValueError, OSError) as e:
            self.error = self.error or " ".join(str(e).split())[:500]

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
        if getattr(self, "worker", None) and self.worker.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.worker.process.pid, number)

    def end(self, why=None):
        self.error = self.error or why
        self.send(signal.SIGCONT)
        self.send(signal.SIGKILL)


class Bench:
    def __init__(self, options):
        self.options, self.dry = options, options.smoke
        self.device = "cpu" if self.dry else "gpu"
        self.began, self.lock, self.gemm = time.monotonic(), threading.Lock(), {}
        self.jobs, self.paused, self.over = [], False, False
        self.models = DRY_MODELS if self.dry else MODELS
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
            shown = ("model", "runner", "mode", "tokens", "median_ms", "images_per_second", "ratio", "relative_error")
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
        """Starts a job and has it do what may happen beside others; in a thread."""
        try:
            while self.paused and not self.over:  # a process that starts now would not stand still
                time.sleep(0.05)
            if self.over:
                return
            job.start()
            for order in orders:
                found = job.ask(**order)
                if not found and job.error:
                    break
                if "first_step_ms" in (found or {}):
                    job.first_step_ms[order["mode"]] = found["first_step_ms"]
                job.prepared.add(order.get("mode"))
        except Exception as e:  # a row, whatever it is
            job.error = job.error or f"{type(e).__name__}: {e}"
        finally:
            job.ready = True

    # ------------------------------------------------------------ parts

    def measure_device(self, jobs):
        size = dict(side=256, copy_bytes=2**20) if self.dry else dict(side=8192, copy_bytes=2**32)
        for job in jobs:
            with self.alone([job]):
                found = job.ask_soon(do="measure", **size, warm=3, steps=10) or {}
            if found:
                self.gemm[job.backend] = found["gemm_flops_per_second"]
            self.emit("device", **self.base(job), mode="gemm", error=job.error, **found)
            job.end()

    def parity(self, job):
        """In its thread, beside what compiles: nothing is timed."""
        for model, (side, _) in self.models.items():
            found = job.ask(do="measure", model=model, image_size=side, batch=2 if self.dry else 8)
            row = self.base(job) | {"model": model, "mode": "infer"}
            if not found:
                self.emit("parity", **row, error=job.error or "left out")
                continue
            for library, dtype, error in found["errors"]:
                self.emit("parity", **row | {"library": library, "dtype": dtype, "relative_error": error})
        job.end()

    def measure_model(self, model, jobs):
        """The runners of a model: PyTorch's in turns, then JAX', then a profile of each."""
        torch = [job for job in jobs if job.backend == "torch"]
        blocks = [block for block in (torch, [job for job in jobs if job.backend == "jax"]) if block]
        for block in blocks:
            with self.alone(block):
                for mode in ("train", "infer"):
                    for turn in range(1 if self.dry else TURNS):
                        for job in block[:: -1 if turn % 2 else 1]:
                            self.turn(job, mode, turn)
                    for job in block:
                        if mode in job.prepared or job.error:
                            self.speed(job, jobs[0], mode)
                if model == PROFILED[0] or self.dry:
                    for job in block:
                        if job.name in PROFILED[1] and not job.error and self.seconds() < STOP:
                            self.profile(job)
            for job in block:
                job.end()

    def turn(self, job, mode, turn):
        if mode not in job.prepared or job.error:
            return
        warm, steps = (1, 1) if self.dry else (WARM if turn == 0 else 1, STEPS)
        if found := job.ask_soon(do="measure", mode=mode, warm=warm, steps=steps):
            job.ms[mode].append(np.array(found["ms"]))
            job.peak_memory_bytes[mode] = found["peak_memory_bytes"]

    def speed(self, job, reference, mode):
        job.first_step_ms.setdefault(mode, float("nan"))
        row = train.figures(job, reference, mode, self.macs[job.model], max(self.gemm.values(), default=None))
        if np.isnan(row.get("first_step_s", 0)):
            row["first_step_s"] = None
        row["error"] = None if job.ms[mode] else job.error or "it was not prepared in time"
        self.emit("speed", **row)

    def profile(self, job):
        found = job.ask_soon(do="profile", steps=1 if self.dry else 3) or {}
        figures = {"median_ms": found.pop("span_ms", None), "error": job.error}
        self.emit("profile", **self.base(job), mode="train", batch=job.order["batch"], **figures, **found)

    def orders(self, layers, tokens):
        return [{"layer": layer, "tokens": n} for n in tokens for layer in layers]

    def measure_attention(self, job):
        tokens = (16, 32) if self.dry else TOKENS
        with self.alone([job]):
            for order in self.orders(job.facts.get("layers", ()), tokens):
                if self.seconds() > STOP:
                    break
                found = job.ask_soon(do="measure", **order, warm=2 if self.dry else 3, steps=2 if self.dry else 7)
                row = self.base(job) | {"model": train.ATTENTION, "runner": order["layer"], "tokens": order["tokens"]}
                if not found:
                    self.emit("tokens", **row, mode="infer", error=job.error)
                    break
                ms, batch = statistics.median(found["ms"]), found["batch"]
                rate = {"images_per_second": batch / ms * 1e3, "steps": len(found["ms"])}
                self.emit("tokens", **row, mode="infer", batch=batch, median_ms=ms, **rate, error=found.get("error"))
        job.end()

    # ------------------------------------------------------------ the plan

    def run(self):
        runners, make = DRY_RUNNERS if self.dry else RUNNERS, self.job
        device = [make("device", f"{backend} product", backend) for backend in BACKENDS]
        units = {
            model: [
                make("runner", runner, None, model, runner, image_size=side, batch=batch) for runner in runners
            ]
            for model, (side, batch) in self.models.items()
        }  # fmt: skip
        parity = [make("parity", f"parity, {backend}", backend) for backend in BACKENDS]
        attention = [make("attention", train.ATTENTION, b, work=32 if self.dry else WORK) for b in ("jax", "torch")]
        modes = [{"do": "prepare", "mode": mode} for mode in ("train", "infer")]
        pool = concurrent.futures.ThreadPoolExecutor(2 if self.dry else max(4, self.options.workers))
        try:
            for job in device:
                pool.submit(self.prepare, job)
            # The longest first, model by model: what Keras has compiled by PyTorch takes minutes.
            slow = lambda job: job.order["compiled"] and job.order["library"] == "keras_vits"
            queue = [job for jobs in units.values() for job in jobs]
            for job in sorted(queue[: len(runners)], key=slow, reverse=True):
                pool.submit(self.prepare, job, modes)
            for job in sorted(queue[len(runners) :], key=slow, reverse=True):
                pool.submit(self.prepare, job, modes)
            pool.submit(self.prepare, attention[0])
            pool.submit(self.prepare, attention[1])
            for job in parity:
                pool.submit(lambda job=job: (self.prepare(job), self.parity(job)))
            self.schedule(device, units, attention)
            while not self.over and any(not job.error and job.worker.process.poll() is None for job in parity):
                if self.seconds() > END:
                    break
                time.sleep(0.2)
        finally:
            self.over = True
            for job in self.jobs:
                job.end("it was stopped: the time was over")
            pool.shutdown(wait=True, cancel_futures=True)
        print(f"[{self.seconds():5.1f} s] done: {self.options.record}", flush=True)

    def schedule(self, device, units, attention):
        """Measures what is ready, the first of the order first, until nothing is left or the time is over."""
        waiting = [("device", None, device), *(("speed", *unit) for unit in units.items())]
        waiting += [("tokens", None, [job]) for job in attention]
        while waiting and self.seconds() < STOP:
            late = self.seconds() > FORCE
            whole = [unit for unit in waiting if all(job.ready for job in unit[2])]
            some = [unit for unit in waiting if any(job.ready and not job.error for job in unit[2])] if late else []
            if device and waiting[0][0] == "device" and not late:  # the rate that all else is a share of
                whole = [unit for unit in whole if unit[0] == "device"]
            if not (whole or some):
                time.sleep(0.1)
                continue
            unit = (whole or some)[0]
            waiting.remove(unit)
            part, model, jobs = unit
            try:
                if part == "device":
                    self.measure_device(jobs)
                elif part == "tokens":
                    self.measure_attention(jobs[0])
                else:
                    for job in jobs:
                        if not job.ready and not job.prepared:
                            job.end("it was not compiled in time")
                    self.measure_model(model, jobs)
            except Exception as e:  # of one unit: the others go on
                self.emit(part, model=model, error=f"{type(e).__name__}: {e}")
        for part, model, jobs in waiting:
            for job in jobs:
                self.emit(part, **self.base(job) | {"model": model}, error=job.error or "left out: the time was over")


def parsed(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    record = pathlib.Path(os.environ.get("OUT") or HERE / "results") / "gpu.jsonl"
    parser.add_argument("--record", type=pathlib.Path, default=record, help="rows are appended to it")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count()), help="of every process")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile side by side")
    parser.add_argument("--smoke", action="store_true", default=bool(os.environ.get("GPU_DRY_RUN")), help="on a CPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    Bench(parsed()).run()

"""The child process of gpu.py: one framework, one duty, in steps that it is told to take.

    stdin   one JSON object a line: the duty, then any number of {do, ...}; the process ends with its stdin
    stdout  one answer a line: {version, library_version, ...}, then one for every {do}

    duty "runner"     prepare {mode}, measure {mode, warm, steps}, profile {steps}
    duty "device"     measure: rate of a bfloat16 matrix product, of random numbers, and of a copy in memory
    duty "parity"     measure {model, image_size}: errors against timm in float32 on the processor, same weights
    duty "attention"  prepare and measure {layer, tokens}: the layer alone

To prepare is to compile; other processes may use the GPU meanwhile. JAX compiles ahead of time, without running.
PyTorch compiles by running, and gives its memory back: where another process holds it, it waits and tries again.
To measure, a step is launched before the one before it has ended, as in `fit`, and none fetches its result: the times
are those between the ends of steps.
"""

import contextlib
import glob
import importlib
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
import traceback

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parent))
import train_worker
from timm_models import randomized

PATIENCE = 12  # times that a step without memory is tried again
WIDTH, HEADS = 768, 12  # of the attention layers alone
CALLS = 10  # of an attention layer in one measured step
GEMMS = r"gemm|cutlass|nvjet|xmma|cublas|wgmma|sm90_|sm80_|conv|dot|triton_tem|matmul|addmm|mm_"
ATTENTIONS = r"flash|fmha|sdpa|attention|mha"


def main():
    reply = train_worker.host_worker.answers()
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()  # one of its own, so that its compilers are stopped and ended with it
    order = json.loads(sys.stdin.readline())
    duty = DUTIES[order["duty"]](order)
    reply(**duty.facts, version=version(order["backend"]), library_version=version(order["library"]))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(duty, asked.pop("do"))(**asked)
        except Exception as e:  # memory that is not enough for one thing may be for the next
            traceback.print_exc()
            answer = {"error": f"{type(e).__name__}: {' '.join(str(e).split())}"[:500]}
            with contextlib.suppress(Exception):
                duty.frame.release()
        reply(**answer)


def version(package):
    return importlib.import_module({"keras_vits": "keras"}.get(package, package)).__version__


class Frame:
    """What PyTorch and JAX call differently: when a result is there, and memory."""

    def __init__(self, order):
        self.name, self.gpu = order["backend"], order["gpu"]
        if self.name == "torch":
            import torch

            self.torch = torch

    def mark(self, result):
        """Something to wait for: the end of all that was launched so far, of which `result` is the last."""
        if self.name != "torch":
            return result.block_until_ready
        if not self.gpu:
            return lambda: None
        event = self.torch.cuda.Event()
        event.record()
        return event.synchronize

    def release(self):
        """Gives back what no tensor uses."""
        if self.name == "torch" and self.gpu:
            self.torch.cuda.synchronize()
            self.torch.cuda.empty_cache()

    def peak(self):
        where = train_worker.PEAK_MEMORY_BYTES[self.name] if self.gpu else train_worker.host_worker.peak_memory_bytes
        return where()

    def step_ms(self, step, warm, steps):
        """Milliseconds of each of so many steps, after `warm` of them."""
        for _ in range(warm):
            result = step()
        before, stamps = self.mark(step()), []
        for _ in range(steps + 1):
            result = step()
            after = self.mark(result)
            before()
            stamps.append(time.perf_counter())
            before = after
        before()
        if not np.isfinite(self.numpy(result.reshape(-1)[:1000])).all():
            raise ValueError("a step gave a result that is not finite")
        return (np.diff(stamps) * 1e3).tolist()

    def numpy(self, x):
        return x.detach().float().cpu().numpy() if self.name == "torch" else np.asarray(x, "float32")


class Runner:
    """A model that trains and infers."""

    def __init__(self, order):
        self.order, self.frame = order, Frame(order)
        random, size = np.random.default_rng(0), order["image_size"]
        images = random.normal(size=(order["batch"], size, size, 3)).astype("float32")
        labels = random.integers(0, train_worker.CLASSES, order["batch"])
        make = {"torch": self.keras_torch, "jax": self.keras_jax}[order["backend"]]
        self.steps, parameters = (self.timm if order["library"] == "timm" else make)(images, labels)
        self.facts = {"parameters": parameters}

    def timm(self, images, labels):
        model, steps = train_worker.timm_steps(self.order, images, labels)
        return steps, sum(p.numel() for p in model.parameters())

    def keras(self, images, labels):
        from keras import ops

        train_worker.policy(self.order)
        batch = ops.convert_to_tensor(images), ops.convert_to_tensor(labels), None
        model = train_worker.compiled(self.order, images.shape[1:])
        model._symbolic_build(data_batch=batch)  # optimizer and metrics, as `train_on_batch` does
        return model, batch, sum(math.prod(v.shape) for v in model.trainable_variables)

    def keras_torch(self, images, labels):
        model, batch, parameters = self.keras(images, labels)
        model.make_train_function()
        model.make_predict_function()
        steps = {
            "infer": lambda: model.predict_function([batch[:1]]),
            "train": lambda: model.train_function([batch])["loss"],
        }
        return steps, parameters

    def keras_jax(self, images, labels):
        """Keras' own steps under jax.jit, as its trainer makes them, but the state stays with us between steps."""
        import jax

        model, batch, parameters = self.keras(images, labels)
        state = tuple(
            [v.value for v in variables]
            for variables in (
                model.trainable_variables,
                model.non_trainable_variables,
                model.optimizer.variables,
                model.metrics_variables,
            )
        )
        self.state = jax.tree.map(lambda x: x.copy(), state)  # training takes the arrays, inference needs them, too
        predict = jax.jit(lambda state, data: model.predict_step(state, data)[0])
        self.programs = {
            "infer": lambda: predict.lower(state[:2], batch[:1]).compile(),
            "train": lambda: jax.jit(model.train_step, donate_argnums=0).lower(self.state, batch).compile(),
        }

        def infer():
            return self.programs["infer"](state[:2], batch[:1])

        def train():
            logs, self.state = self.programs["train"](self.state, batch)
            return logs["loss"]

        return {"infer": infer, "train": train}, parameters

    def prepare(self, mode):
        start = time.perf_counter()
        if self.order["backend"] == "jax":
            self.programs[mode] = self.programs[mode]()
        elif not self.order["compiled"]:
            return {}
        else:
            self.patiently(lambda: self.frame.mark(self.steps[mode]())())
            self.frame.release()
        return {"first_step_ms": (time.perf_counter() - start) * 1e3}

    def patiently(self, run):
        for left in reversed(range(PATIENCE)):
            try:
                return run()
            except RuntimeError as e:  # torch.OutOfMemoryError is one, and so is cuBLAS' that finds no memory
                if not left or not re.search("out of memory|ALLOC_FAILED", str(e)):
                    raise
            self.frame.release()
            time.sleep(2)

    def measure(self, mode, warm, steps):
        if self.frame.name == "torch" and self.frame.gpu:
            self.frame.torch.cuda.reset_peak_memory_stats()
        ms = self.frame.step_ms(self.steps[mode], warm, steps)
        forgets = self.frame.name == "torch"  # JAX does not: it knows the peak of the first mode, which is training
        peak = self.frame.peak() if forgets or mode == "train" else None
        self.frame.release()
        return {"ms": ms, "peak_memory_bytes": peak}

    def profile(self, steps):
        """Where the time of training goes: the kernels of so many steps, by name."""
        step = self.steps["train"]
        self.frame.mark(step())()
        kernels = (torch_kernels if self.frame.name == "torch" else jax_kernels)(self.frame, step, steps)
        found = summary(kernels, steps)
        self.frame.release()
        return found


def torch_kernels(frame, step, steps):
    """(name, start, end) of every kernel, in microseconds."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    wanted = DeviceType.CUDA if frame.gpu else DeviceType.CPU
    # The processor's side costs time between kernels: it is asked for only where nothing comes without it.
    for activities in ([ProfilerActivity.CUDA], [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + frame.gpu])[
        0 if frame.gpu else 1 :
    ]:
        with profile(activities=activities) as found:
            for _ in range(steps):
                result = step()
            frame.mark(result)()
        events = [e for e in found.events() if e.device_type == wanted and not e.is_user_annotation]
        if events:
            break
    return [(e.name, e.time_range.start, e.time_range.end) for e in events]


def jax_kernels(frame, step, steps):
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                result = step()
            result.block_until_ready()
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(file)
        kernels = []
        for plane in data.planes:
            if ("GPU" in plane.name) if frame.gpu else ("CPU" in plane.name):
                lines = list(plane.lines)  # of a GPU one for each stream, beside those that XLA derives from them
                for line in [line for line in lines if "Stream" in line.name] or lines:
                    kernels += [(e.name, e.start_ns / 1e3, (e.start_ns + e.duration_ns) / 1e3) for e in line.events]
    return kernels


def summary(kernels, steps):
    """Shares of the time from the first kernel's start to the last one's end."""
    if not kernels:
        raise ValueError("the profiler recorded no kernel")
    kernels = sorted(kernels, key=lambda k: k[1])
    first, last = kernels[0][1], max(end for _, _, end in kernels)
    busy, until, by_name = 0.0, first, {}
    for name, start, end in kernels:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
        ms, count = by_name.get(name, (0.0, 0))
        by_name[name] = ms + (end - start) / 1e3 / steps, count + 1
    span = max(last - first, 1e-9)
    of = lambda chosen: sum(ms for name, (ms, _) in by_name.items() if chosen(name)) * 1e3 * steps / span
    attention = lambda name: bool(re.search(ATTENTIONS, name, re.I))
    gemm = lambda name: not attention(name) and bool(re.search(GEMMS, name, re.I))
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])
    return {
        "span_ms": span / 1e3 / steps,
        "gemm_share": of(gemm),
        "attention_share": of(attention),
        "gap_share": 1 - busy / span,
        "kernels_per_step": sum(count for _, count in by_name.values()) / steps,
        "attention_kernels": [name[:200] for name, _ in longest if attention(name)][:4],
        "kernels": [[name[:160], round(ms, 4), round(count / steps, 2)] for name, (ms, count) in longest[:25]],
    }


class Device:
    """The machine's own rates, by which everything else is judged."""

    def __init__(self, order):
        self.order, self.frame = order, Frame(order)
        self.facts = {}

    def measure(self, side, copy_bytes, warm, steps):
        random = np.random.default_rng(0)
        rows = random.normal(size=(2, side, side)).astype("float32")
        if self.frame.name == "torch":
            torch, device = self.frame.torch, "cuda" if self.frame.gpu else "cpu"
            a, b = torch.from_numpy(rows).to(device, torch.bfloat16)
            source = torch.arange(copy_bytes // 4, dtype=torch.int32, device=device)
            target = torch.empty_like(source)
            product, copy = lambda: a @ b, lambda: target.copy_(source)
            where = torch.cuda.get_device_name() if self.frame.gpu else "cpu"
            memory = torch.cuda.get_device_properties(0).total_memory if self.frame.gpu else None
            more = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        else:
            import jax
            from jax import numpy as jnp

            a, b = jnp.asarray(rows, jnp.bfloat16)
            source = jnp.arange(copy_bytes // 4, dtype=jnp.int32)
            matmul, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
            product, copy = lambda: matmul(a, b), lambda: add(source)
            device = jax.devices()[0]
            where, memory, more = device.device_kind, None, {"jaxlib": importlib.import_module("jaxlib").__version__}
        gemm = np.median(self.frame.step_ms(product, warm, steps)) / 1e3
        copied = np.median(self.frame.step_ms(copy, warm, steps)) / 1e3
        return {
            "median_ms": gemm * 1e3,
            "gemm_flops_per_second": 2 * side**3 / gemm,
            "copy_bytes_per_second": 2 * copy_bytes / copied,
            "note": f"{where}, {memory} bytes; {more}",
        }


class Parity:
    """One model after the other with the weights that a seed gives."""

    def __init__(self, order):
        self.order, self.frame = order, Frame(order)
        self.facts = {}
        if self.frame.name == "torch":
            torch = self.frame.torch
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        else:
            import jax

            jax.config.update("jax_default_matmul_precision", "highest")

    def measure(self, model, image_size, batch):
        import keras
        import torch

        import keras_vits
        from keras_vits.checkpoints import assign as weights

        changes = self.order["changes"] | ({"img_size": image_size} if model.startswith("vit_") else {})
        reference = randomized(train_worker.import_timm().create_model(model, num_classes=10, **changes))
        tensors = {name: tensor.numpy().copy() for name, tensor in reference.state_dict().items()}
        images = np.random.default_rng(0).normal(size=(batch, image_size, image_size, 3)).astype("float32")
        feed = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        with torch.inference_mode():
            expected = reference(feed).double().numpy()
        error = lambda found: float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        found = {}
        if self.frame.name == "torch":
            device = "cuda" if self.frame.gpu else "cpu"
            reference, feed = reference.to(device), feed.to(device)
            with torch.inference_mode():
                found["timm", "float32"] = error(reference(feed).cpu().numpy())
                with torch.autocast(device, torch.bfloat16):
                    found["timm", "bfloat16"] = error(reference(feed).float().cpu().numpy())
        for policy, dtype in (("float32", "float32"), ("mixed_bfloat16", "bfloat16")):
            changes = self.order["changes"] | {"image_size": image_size, "num_classes": 10, "dtype": policy}
            ours = keras_vits.create(model, **changes)
            weights.assign(ours, tensors, "timm", "timm", (), (image_size, image_size))
            found["keras_vits", dtype] = error(np.asarray(ours.predict_on_batch(images), "float64"))
            del ours
            keras.backend.clear_session()
        self.frame.release()
        return {"errors": [[*key, value] for key, value in found.items()]}


class Attention:
    """An attention layer alone, forward: of so many tokens in all, whatever N."""

    def __init__(self, order):
        self.order, self.frame = order, Frame(order)
        train_worker.policy(order)
        from keras_vits.layers import ATTENTIONS, MultiHeadAttention

        self.layers = {"softmax": MultiHeadAttention, **ATTENTIONS}
        self.calls = {}
        self.facts = {"layers": list(self.layers)}

    def prepare(self, layer, tokens):
        from keras import ops

        width, heads = (WIDTH, HEADS) if self.frame.gpu else (64, 2)
        batch = max(1, self.order["work"] // tokens)
        shape = batch, tokens, width
        made = self.layers[layer](heads=heads, dtype="mixed_bfloat16" if self.frame.gpu else "float32")
        made.build(shape)
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        x = ops.cast(ops.convert_to_tensor(x), made.compute_dtype)
        if self.frame.name == "torch":
            torch = self.frame.torch

            def call():
                with torch.inference_mode():
                    return made(x)

        else:
            import jax

            values = [[v.value for v in made.trainable_variables], [v.value for v in made.non_trainable_variables]]
            program = jax.jit(lambda t, n, x: made.stateless_call(t, n, x)[0]).lower(*values, x).compile()

            def call():
                return program(*values, x)

        self.calls[layer, tokens] = call, batch
        return {}

    def measure(self, layer, tokens, warm, steps):
        if (layer, tokens) not in self.calls:  # of PyTorch, which has nothing to compile
            self.prepare(layer, tokens)
        call, batch = self.calls.pop((layer, tokens))
        self.frame.release()

        def several():  # one call is no longer than it takes to start it and to learn of its end
            for _ in range(CALLS):
                result = call()
            return result

        ms = [step / CALLS for step in self.frame.step_ms(several, warm, steps)]
        self.frame.release()
        return {"ms": ms, "batch": batch}


DUTIES = {"runner": Runner, "device": Device, "parity": Parity, "attention": Attention}

if __name__ == "__main__":
    if os.environ.get("GPU_DRY_RUN"):  # Inductor takes minutes on two cores: what is tried is everything around it
        with contextlib.suppress(ImportError):
            import torch

            whole = torch.compile
            torch.compile = lambda *args, **kwargs: whole(*args, **{**kwargs, "backend": "eager"})
    main()

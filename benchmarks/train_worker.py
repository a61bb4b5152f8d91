"""The child process of train.py: holds one model and takes steps with it when told to.

    stdin   one JSON object a line: what to build, then any number of {mode, steps}; the process ends with its stdin
    stdout  one answer a line: {parameters, version, library_version}, then for every {mode, steps}
            {ms, peak_memory_bytes}

A step begins with its batch on the device and ends when its result is in numpy: "infer" the logits, "train" the loss,
"gemm" a row of one large matrix product. Where {attention} is asked for instead of a model, {seconds} is the answer.
"""

import importlib
import json
import math
import pathlib
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path += map(str, (HERE, HERE.parent))
from timm_models import import_timm  # noqa: E402

from keras_vits.edge.devices import host_worker  # noqa: E402

CLASSES = 1000
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05  # of AdamW
WIDTH, HEADS = 64, 2  # of the attention layers
WORK = 16384  # tokens in a batch of attention, whatever N: the fixed costs of a call weigh the same at every N
LONGEST_SOFTMAX = 8192  # tokens; its matrices (N,N) take the memory of the machine
KERAS_HUB = {  # what stands in for a preset, which keras-hub does not have
    "vit_tiny_patch16_224": dict(patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768),
    "vit_base_patch16_224": dict(patch_size=16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072),
}


def main():
    reply = host_worker.answers()
    order = json.loads(sys.stdin.readline())
    if "attention" in order:
        seconds = attention_seconds(**order["attention"])
        return reply(seconds=seconds, version=version(order["backend"]), library_version=version("keras"))
    random, size = np.random.default_rng(0), order["image_size"]
    images = random.normal(size=(order["batch"], size, size, 3)).astype("float32")
    labels = random.integers(0, CLASSES, order["batch"])
    steps, parameters = LOADERS[order["library"]](order, images, labels)
    peak_memory_bytes = PEAK_MEMORY_BYTES[order["backend"]] if order["gpu"] else host_worker.peak_memory_bytes
    library = "keras" if order["library"] == "keras_vits" else order["library"]
    reply(parameters=parameters, version=version(order["backend"]), library_version=version(library))
    for line in sys.stdin:
        asked, ms = json.loads(line), []
        for _ in range(asked["steps"]):
            start = time.perf_counter()
            result = steps[asked["mode"]]()
            ms.append((time.perf_counter() - start) * 1e3)
            if not np.isfinite(result).all():
                raise ValueError(f"{asked['mode']} gave a result that is not finite")
        reply(ms=ms, peak_memory_bytes=peak_memory_bytes())


def version(package):
    return importlib.import_module(package).__version__


# A loader builds the model and returns {mode: step} and the number of trainable parameters.


def timm_loader(order, images, labels):
    import torch

    device = "cuda" if order["gpu"] else "cpu"
    model, launch = timm_steps(order, images, labels)
    matrix = torch.ones((order["gemm"],) * 2, dtype=torch.bfloat16 if order["gpu"] else torch.float32, device=device)
    steps = {
        "infer": lambda: launch["infer"]().float().cpu().numpy(),
        "train": lambda: launch["train"]().item(),
        "gemm": lambda: (matrix @ matrix)[0].float().cpu().numpy(),
    }
    return steps, sum(p.numel() for p in model.parameters())


def timm_steps(order, images, labels):
    """The model, and {mode: step}, whose result is still on the device."""
    import torch

    device = "cuda" if order["gpu"] else "cpu"
    torch.set_num_threads(order["threads"])
    size = {"img_size": order["image_size"]} if order["model"].startswith("vit_") else {}  # others take any
    model = import_timm().create_model(order["model"], num_classes=CLASSES, **size, **order.get("changes", {}))
    model = model.to(device)
    forward = torch.compile(model) if order["compiled"] else model
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.from_numpy(labels).to(device)
    bfloat16 = torch.autocast(device, torch.bfloat16, enabled=order["gpu"])

    def infer():
        model.eval()
        with torch.inference_mode(), bfloat16:
            return forward(images)

    def train():
        model.train()
        with bfloat16:
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, {"infer": infer, "train": train}


def keras_loader(order, images, labels):
    import keras
    from keras import ops

    policy(order)
    images, labels, matrix = map(ops.convert_to_tensor, (images, labels, np.ones((order["gemm"],) * 2, "float32")))
    matrix = ops.cast(matrix, "bfloat16" if order["gpu"] else "float32")
    if order["devices"] > 1:
        parallel = keras.distribution.DataParallel(devices=keras.distribution.list_devices()[: order["devices"]])
        keras.distribution.set_distribution(parallel)  # before the model, whose weights go to all devices
        images = keras.distribution.distribute_tensor(images, parallel.get_data_layout(images.shape))
    model = compiled(order, images.shape[1:])
    steps = {
        "infer": lambda: model.predict_on_batch(images),
        "train": lambda: model.train_on_batch(images, labels),
        "gemm": lambda: ops.convert_to_numpy(ops.cast(ops.matmul(matrix, matrix)[0], "float32")),
    }
    return steps, sum(math.prod(v.shape) for v in model.trainable_variables)


def policy(order):
    """Threads and number format of Keras."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(order["threads"])
    if order["gpu"]:
        keras.config.set_dtype_policy("mixed_bfloat16")


def compiled(order, shape):
    """A Keras model with its loss and optimizer, for images of this shape."""
    import keras

    model = KERAS_MODELS[order["library"]](order["model"], shape, **order.get("changes", {}))
    model.compile(
        keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=order["compiled"] or "auto",
    )
    return model


def keras_vits_model(name, shape, **changes):
    import keras_vits

    return keras_vits.create(name, image_size=tuple(shape[:2]), num_classes=CLASSES, **changes)


def keras_hub_model(name, shape):
    from keras_hub import models

    return models.ViTImageClassifier(models.ViTBackbone(shape, **KERAS_HUB[name]), CLASSES, head_dtype="float32")


def layer_batch(name, tokens, longest_softmax=LONGEST_SOFTMAX):
    """Samples of so many tokens in a batch."""
    return max(1, (longest_softmax if name == "softmax" else WORK) // tokens)


def attention_seconds(sizes, rounds, *, width=WIDTH, longest_softmax=LONGEST_SOFTMAX, clock=time.perf_counter):
    """Inference time of every attention layer alone, all layers and sizes in turns.

    Args:
        sizes: numbers of tokens N.
        rounds: how often each is measured.
        width: D.
        longest_softmax: largest N of softmax attention.
        clock: () -> seconds.

    Returns:
        Layer -> N -> seconds for one sample, one number a round.
    """
    import keras

    from keras_vits.layers import ATTENTIONS, MultiHeadAttention

    calls = {}
    for name, cls in {"softmax": MultiHeadAttention, **ATTENTIONS}.items():
        for tokens in sizes:
            if name == "softmax" and tokens > longest_softmax:
                continue
            x = keras.Input((tokens, width))
            model = keras.Model(x, cls(heads=HEADS, name="attention")(x))
            batch = layer_batch(name, tokens, longest_softmax)
            data = np.random.default_rng(0).normal(size=(batch, tokens, width)).astype("float32")
            calls[name, tokens] = model, data
            model.predict_on_batch(data)  # compiles
    found = {name: {tokens: [] for n, tokens in calls if n == name} for name, _ in calls}
    for _ in range(rounds):
        for (name, tokens), (model, data) in calls.items():
            start = clock()
            model.predict_on_batch(data)
            found[name][tokens].append((clock() - start) / len(data))
    return found


# Peak memory of a GPU, for each backend; inference is measured first, because not all of them can forget a peak.


def torch_peak():
    import torch

    return torch.cuda.max_memory_allocated()


def jax_peak():
    import jax

    return jax.local_devices(backend="gpu")[0].memory_stats()["peak_bytes_in_use"]


def tensorflow_peak():
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


LOADERS = {"timm": timm_loader, "keras_vits": keras_loader, "keras_hub": keras_loader}
KERAS_MODELS = {"keras_vits": keras_vits_model, "keras_hub": keras_hub_model}
PEAK_MEMORY_BYTES = {"torch": torch_peak, "jax": jax_peak, "tensorflow": tensorflow_peak}

if __name__ == "__main__":
    main()

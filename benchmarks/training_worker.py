"""The child process of training_speed.py: holds one model and takes steps with it when told to.

    stdin   one JSON object a line: what to build, then any number of {mode, steps}; the process ends with its stdin
    stdout  one answer a line: {parameters}, then for every {mode, steps} {ms, peak_memory_bytes}

A step begins with its batch on the device and ends when its result is in numpy: "infer" the logits, "train" the loss.
"""

import importlib.util
import json
import math
import os
import pathlib
import sys
import time

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "edge"))
import benchmark_worker  # not as keras_vits.edge: that imports Keras, whose memory is not timm's

CLASSES = 1000
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05  # of AdamW
KERAS_HUB = {  # what stands in for a preset, which keras-hub does not have
    "vit_tiny_patch16_224": dict(patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768),
}


def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a runtime may print what it likes

    def reply(**fields):
        print(json.dumps(fields), file=replies, flush=True)

    order = json.loads(sys.stdin.readline())
    random, size = np.random.default_rng(0), order["image_size"]
    images = random.normal(size=(order["batch"], size, size, 3)).astype("float32")
    labels = random.integers(0, CLASSES, order["batch"])
    steps, parameters = LOADERS[order["library"]](order, images, labels)
    peak_memory_bytes = PEAK_MEMORY_BYTES[order["backend"]] if order["gpu"] else benchmark_worker.peak_memory_bytes
    reply(parameters=parameters)
    for line in sys.stdin:
        asked, ms = json.loads(line), []
        for _ in range(asked["steps"]):
            start = time.perf_counter()
            result = steps[asked["mode"]]()
            ms.append((time.perf_counter() - start) * 1e3)
            if not np.isfinite(result).all():
                raise ValueError(f"{asked['mode']} gave a result that is not finite")
        reply(ms=ms, peak_memory_bytes=peak_memory_bytes())


# A loader builds the model and returns {mode: step} and the number of trainable parameters.


def timm_loader(order, images, labels):
    import torch

    device = "cuda" if order["gpu"] else "cpu"
    torch.set_num_threads(order["threads"])
    model = import_timm().create_model(order["model"], num_classes=CLASSES).to(device)
    forward = torch.compile(model) if order["compiled"] else model
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.from_numpy(labels).to(device)
    bfloat16 = torch.autocast(device, torch.bfloat16, enabled=order["gpu"])

    def infer():
        model.eval()
        with torch.inference_mode(), bfloat16:
            return forward(images).float().cpu().numpy()

    def train():
        model.train()
        with bfloat16:
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return {"infer": infer, "train": train}, sum(p.numel() for p in model.parameters())


def keras_loader(order, images, labels):
    import keras

    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(order["threads"])
    if order["gpu"]:
        keras.config.set_dtype_policy("mixed_bfloat16")
    model = KERAS_MODELS[order["library"]](order["model"], images.shape[1:])
    model.compile(
        keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=order["compiled"] or "auto",
    )
    images, labels = keras.ops.convert_to_tensor(images), keras.ops.convert_to_tensor(labels)
    steps = {"infer": lambda: model.predict_on_batch(images), "train": lambda: model.train_on_batch(images, labels)}
    return steps, sum(math.prod(v.shape) for v in model.trainable_variables)


def keras_vits_model(name, shape):
    import keras_vits

    return keras_vits.create(name, image_size=shape[:2], num_classes=CLASSES)


def keras_hub_model(name, shape):
    from keras_hub import models

    return models.ViTImageClassifier(models.ViTBackbone(shape, **KERAS_HUB[name]), CLASSES, head_dtype="float32")


def import_timm():
    """timm, also where torchvision's compiled part is for another PyTorch: of its operators, a name is enough."""
    import torch

    try:
        torch.ops.load_library(pathlib.Path(importlib.util.find_spec("torchvision").origin).with_name("_C.so"))
    except OSError:
        import_timm.library = torch.library.Library("torchvision", "DEF")  # kept, or its operators go
        for name in ("nms", "qnms"):
            import_timm.library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


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

"""The table of run.py: which models, the files that are made of each, and the contestants that run them.

A file is made by the function of its name in export_worker.py or, where `exporter` says so, of another; a contestant is
loaded by the function `loader` in run_worker.py. Both run in a virtual environment: `main` is the one that runs run.py,
of any other the packages are in requirements/<environment>.txt.
"""

import dataclasses

VITS = ("vit_tiny_patch16_224", "vit_small_patch16_224")
MODELS = (*VITS, "mobilevit_s", "mobilevitv2_100", "mixer_s16_224", "efficientvit_b1")
SMOKE_IMAGE_SIZE = 64  # pixels
REFERENCE = "ours_float32"  # what ratios are to
GEMM = {
    "float32": "gemm_float32",
    "dynamic_int8": "gemm_dynamic_int8",
    "static_int8": "gemm_dynamic_int8",
}  # the roof of a recipe
GEMM_SIDE = 1024  # of its square matrices: 1.07 G multiply-adds
ENVIRONMENTS = ("main", "onnx", "executorch", "litert_torch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """What is written once for each model.

    Attributes:
        suffix: of the file's name; "" for a folder.
        needs: the file that it is made from: `"weights"`, timm's model with random weights, or one made from it.
        environment: where it is made.
        backend: Keras', where it is made.
        exporter: name of the function; the file's own name by default.
        options: of the function.
    """

    suffix: str
    needs: str = "weights"
    environment: str = "main"
    backend: str = "jax"
    exporter: str = ""
    options: dict = dataclasses.field(default_factory=dict)


def _ours(source, recipe):
    return File(suffix=".tflite", needs=source, exporter="ours_quantized", options={"recipe": recipe})


def _aeq(source, recipe):
    return File(suffix=".tflite", needs=source, exporter="ai_edge_quantizer", options={"recipe": recipe})


def _executorch(**options):
    return File(suffix=".pte", environment="executorch", exporter="executorch", options=options)


FILES = {
    "weights": File(suffix="", needs=""),
    "keras": File(suffix=".keras"),
    "ours_float32": File(suffix=".tflite"),
    "ours_dynamic_int8": _ours("ours_float32", "dynamic_int8"),
    "ours_static_int8": _ours("ours_float32", "static_int8"),
    "ours_aeq_dynamic_int8": _aeq("ours_float32", "dynamic_wi8_afp32"),
    "ours_aeq_static_int8": _aeq("ours_float32", "static_wi8_ai8"),
    "keras_export": File(suffix=".tflite", backend="tensorflow"),
    "keras_export_dynamic_int8": _aeq("keras_export", "dynamic_wi8_afp32"),
    "keras_export_static_int8": _aeq("keras_export", "static_wi8_ai8"),
    "keras_hub_export": File(suffix=".tflite", backend="tensorflow"),
    "litert_torch": File(suffix=".tflite", environment="litert_torch"),
    "onnx_float32": File(suffix=".onnx", environment="onnx"),
    "onnx_dynamic_int8": File(suffix=".onnx", needs="onnx_float32", environment="onnx"),
    "onnx_static_int8": File(suffix=".onnx", needs="onnx_float32", environment="onnx"),
    "executorch_float32": _executorch(),
    "executorch_dynamic_int8": _executorch(dynamic=True),
    "executorch_static_int8": _executorch(dynamic=False),
    "gemm_float32": File(suffix=".tflite", options={"side": GEMM_SIDE}),
    "gemm_dynamic_int8": _ours("gemm_float32", "dynamic_int8"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """A file and what runs it.

    Attributes:
        label: in tables.
        role: `"ours"`; `"peer"`, what a user could pick instead, which our targets are about; `"mixed"`, a peer's
            quantizer on our file; `"gemm"`, one large product of matrices, which is no model.
        loader: name of the function that loads it.
        file: name of the file; the contestant's own name by default.
        recipe: `"float32"`, `"dynamic_int8"` or `"static_int8"`.
        environment: where it runs.
        backend: Keras', where it runs.
        options: of the loader.
        models: that it exists for.
    """

    label: str
    role: str = "peer"
    loader: str = "litert"
    file: str = ""
    recipe: str = "float32"
    environment: str = "main"
    backend: str = ""
    options: dict = dataclasses.field(default_factory=dict)
    models: tuple[str, ...] = MODELS


def _keras(label, backend, **options):
    return Contestant(label=label, loader="keras", file="keras", backend=backend, options=options)


def _onnx(label, **more):
    return Contestant(label=label, loader="onnx", environment="onnx", **more)


def _et(label, **more):
    return Contestant(label=label, loader="executorch", environment="executorch", **more)


CONTESTANTS = {
    "ours_float32": Contestant(label="keras_vits, LiteRT", role="ours"),
    "ours_dynamic_int8": Contestant(label="keras_vits, LiteRT dynamic int8", role="ours", recipe="dynamic_int8"),
    "ours_static_int8": Contestant(label="keras_vits, LiteRT static int8", role="ours", recipe="static_int8"),
    "keras_jax": _keras("Keras on JAX", "jax"),
    "keras_tensorflow": _keras("Keras on TensorFlow", "tensorflow"),
    "keras_torch": _keras("Keras on PyTorch", "torch"),
    "keras_torch_compiled": _keras("Keras on PyTorch, jit_compile", "torch", compiled=True),
    "keras_export": Contestant(label="Keras' export, LiteRT"),
    "keras_hub_export": Contestant(label="keras-hub's ViT, Keras' export, LiteRT", models=VITS),
    "litert_torch": Contestant(label="timm, litert-torch, LiteRT"),
    "onnx_float32": _onnx("timm, ONNX Runtime"),
    "executorch_float32": _et("timm, ExecuTorch XNNPACK"),
    "timm": Contestant(label="timm, PyTorch", loader="timm", file="weights"),
    "timm_compiled": Contestant(label="timm, torch.compile", loader="timm", file="weights", options={"compiled": True}),
    "keras_export_dynamic_int8": Contestant(
        label="Keras' export, ai-edge-quantizer dynamic_wi8_afp32", recipe="dynamic_int8"
    ),
    "keras_export_static_int8": Contestant(
        label="Keras' export, ai-edge-quantizer static_wi8_ai8", recipe="static_int8"
    ),
    "onnx_dynamic_int8": _onnx("timm, ONNX Runtime dynamic int8", recipe="dynamic_int8"),
    "onnx_static_int8": _onnx("timm, ONNX Runtime static int8", recipe="static_int8"),
    "executorch_dynamic_int8": _et("timm, ExecuTorch XNNPACK dynamic int8", recipe="dynamic_int8"),
    "executorch_static_int8": _et("timm, ExecuTorch XNNPACK static int8", recipe="static_int8"),
    "ours_aeq_dynamic_int8": Contestant(
        label="keras_vits' file, ai-edge-quantizer dynamic_wi8_afp32", role="mixed", recipe="dynamic_int8"
    ),
    "ours_aeq_static_int8": Contestant(
        label="keras_vits' file, ai-edge-quantizer static_wi8_ai8", role="mixed", recipe="static_int8"
    ),
    "gemm_float32": Contestant(label="one product of matrices", role="gemm"),
    "gemm_dynamic_int8": Contestant(label="one product of matrices, dynamic int8", role="gemm", recipe="dynamic_int8"),
}


def file_of(name):
    """Name of the file that a contestant runs."""
    return CONTESTANTS[name].file or name

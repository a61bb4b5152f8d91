"""timm's models for the workers and the tests: the package, and a model whose weights are all random."""

import functools
import importlib.util
import pathlib

_libraries = []  # their operators live as long as they do


@functools.cache  # it can be done once
def import_timm():
    """The timm package.

    It imports torchvision, which stops at the missing operator `nms` when its compiled part was built for another
    PyTorch (a CUDA one, say). Nothing here uses that operator: its name is enough.
    """
    import torch

    try:
        torch.ops.load_library(pathlib.Path(importlib.util.find_spec("torchvision").origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
    import timm

    return timm


def randomized(model, seed=0):
    """A timm model with every parameter and running statistic random, none of them 0 or 1, that keeps signals' size."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("weight"):
                gain = 1.3 if tensor.ndim == 4 else 1  # convolutions end in activations that shrink the signal
                tensor.normal_(0, gain * tensor[0].numel() ** -0.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.2, generator=generator)
    return model.eval()

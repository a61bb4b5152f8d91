"""Models whose layers Keras itself has quantized, which nothing here can change or convert."""

import keras

from keras_vits._util.keras_private import flatten_layers


def refuse_quantized(model: keras.Model) -> None:
    """Raises a ValueError if a layer of the model computes with weights that Keras has quantized."""
    for layer in flatten_layers(model):
        mode = getattr(getattr(layer, "dtype_policy", None), "quantization_mode", None)
        if mode is not None:
            raise ValueError(
                f"{model.name} has a layer that Keras has quantized itself, {layer.path!r} to {mode}: take the model "
                "as it was before model.quantize, and quantize what is exported of it."
            )

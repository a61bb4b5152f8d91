"""What `keras_vits` exports, for editors and type checkers: at run time each name is imported at its first use."""

from keras_vits import checkpoints as checkpoints
from keras_vits import edge as edge
from keras_vits import hub as hub
from keras_vits import layers as layers
from keras_vits import models as models
from keras_vits import preprocess as preprocess
from keras_vits import training as training
from keras_vits.checkpoints.loading import load_weights as load_weights
from keras_vits.creation import create as create
from keras_vits.creation import list_models as list_models
from keras_vits.graph.macs import count_macs as count_macs
from keras_vits.models._base import VisionModel as VisionModel
from keras_vits.prediction import predict as predict
from keras_vits.saving import load as load
from keras_vits.version import __version__ as __version__

__all__ = [
    "VisionModel",
    "__version__",
    "checkpoints",
    "count_macs",
    "create",
    "edge",
    "layers",
    "list_models",
    "load",
    "load_weights",
    "models",
    "predict",
    "preprocess",
    "training",
]

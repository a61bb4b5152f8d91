"""What keeps a .tflite file from running wholly on a phone's GPU.

LiteRT's analyzer has a check of this kind, but the published packages are built without it: it calls every file, even
one with a custom operation, compatible.
"""

import pathlib

from keras_vits.graph.ops import OPS

from .packages import schema

BUILTINS = {  # builtin operation of a file -> the graph's operation that it computes
    "GATHER": "gather",
    "GATHER_ND": "gather",
    "SELECT": "where",
    "SELECT_V2": "where",
    "CAST": "cast",
    "REDUCE_PROD": "prod",
    "TOPK_V2": "top_k",
    "ARG_MAX": "argmax",
}
FORBIDDEN = {  # builtin operation -> what a GPU delegate cannot do about it
    **{builtin: OPS[op].gpu_unfriendly for builtin, op in BUILTINS.items()},
    "SPLIT": "slices do the same",  # these our writer does not know, but other converters' files have them
    "SPLIT_V": "slices do the same",
    "BROADCAST_TO": "arithmetic broadcasts by itself",
    "SHAPE": "shapes must be static",
    "PACK": "shapes must be static; a concat joins tensors",
    "CUSTOM": "it is no builtin operation",
}
FLOATS = ("FLOAT32", "FLOAT16", "INT8", "UINT8", "INT4", "INT32", "BOOL")  # the GPU dequantizes; INT32: shapes and axes
RANK = 4


def offenders(path: str | pathlib.Path) -> tuple[str, ...]:
    """Why a GPU would refuse the file, or parts of it.

    Args:
        path: of a .tflite file.

    Returns:
        A tuple of sentences, each beginning with the tensor that our layer's name is in; () if nothing offends.

    Raises:
        ImportError: ai-edge-litert is not installed.
    """
    S = schema()
    names = {v: k for k, v in vars(S.BuiltinOperator).items() if isinstance(v, int)}
    types = {v: k for k, v in vars(S.TensorType).items() if isinstance(v, int)}
    with open(path, "rb") as file:
        model = S.Model.GetRootAs(file.read())
    found = []
    codes = [names[model.OperatorCodes(i).BuiltinCode()] for i in range(model.OperatorCodesLength())]
    for g in range(model.SubgraphsLength()):
        graph = model.Subgraphs(g)
        for i in range(graph.TensorsLength()):
            tensor = graph.Tensors(i)
            name, kind = tensor.Name().decode(), types[tensor.Type()]
            if tensor.ShapeLength() > RANK:
                found.append(f"{name}: a tensor of {tensor.ShapeLength()} dimensions, where GPUs have {RANK}")
            if kind not in FLOATS:
                found.append(f"{name}: a tensor of type {kind.lower()}, which GPUs do not have")
            if tensor.ShapeSignatureLength() and -1 in tensor.ShapeSignatureAsNumpy():
                found.append(f"{name}: its shape is not static")
        for i in range(graph.OperatorsLength()):
            operator = graph.Operators(i)
            code = codes[operator.OpcodeIndex()]
            if code in FORBIDDEN:
                name = graph.Tensors(operator.Outputs(0)).Name().decode()
                found.append(f"{name}: {code} is not for GPUs, {FORBIDDEN[code]}")
    return tuple(found)

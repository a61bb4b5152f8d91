"""What keeps a .tflite file from running wholly on a phone's GPU.

LiteRT's analyzer has a check of this kind, but the published packages are built without it: it calls every file, even
one with a custom operation, compatible.
"""

import pathlib

from .packages import schema

FORBIDDEN = {  # operation -> what a GPU delegate cannot do about it
    "GATHER": "it reads at computed places: a slice or a dense layer does the same",
    "GATHER_ND": "it reads at computed places: a slice or a dense layer does the same",
    "SPLIT": "slices do the same",
    "SPLIT_V": "slices do the same",
    "SELECT": "a product with a mask does the same",
    "SELECT_V2": "a product with a mask does the same",
    "BROADCAST_TO": "arithmetic broadcasts by itself",
    "CAST": "GPUs compute in one type of float",
    "SHAPE": "shapes must be static",
    "PACK": "shapes must be static; a concat joins tensors",
    "REDUCE_PROD": "shapes must be static",
    "TOPK_V2": "it sorts: leave it to the application, head='softmax'",
    "ARG_MAX": "it gives integers: leave it to the application, head='softmax'",
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

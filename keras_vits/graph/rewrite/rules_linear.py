"""Rules that fold scales, offsets, norms and paddings into dense layers and convolutions, or divide and join those."""

import itertools

import numpy as np

from keras_vits.graph.ir import Node, Value, constant

from ._sweep import LINEAR, Sweep, is_constant, last_axis


def fold_after_linear(sweep: Sweep, node: Node) -> Value | None:
    """add(linear(x), c) -> the bias; mul(linear(x), c) -> weight and bias."""
    linear = sweep.made_by(node.inputs[0], *LINEAR)
    c = None if linear is None or not is_constant(node.inputs[1]) else last_axis(node.inputs[1])
    if c is None or len(node.inputs[1].shape) > len(linear.output.shape) or not sweep.single_use(linear.output):
        return None
    x, weight, bias = linear.inputs
    size = linear.output.shape[-1]
    if c.size not in (1, size):
        return None
    c = np.broadcast_to(c, size)
    old = np.zeros(size, np.float32) if bias is None else bias.data
    if node.op == "mul":
        shape = {"dense": (-1, 1), "conv2d": (-1,), "depthwise_conv2d": weight.shape[2:]}[linear.op]
        weight = constant(weight.data * c.reshape(shape), weight.name)
        bias = bias and constant(old * c, bias.name)
    else:
        bias = constant(old + c, bias.name if bias else node.inputs[1].name)
    sweep.layer = linear.layer
    return sweep.new(linear.op, x, weight, bias, name=linear.output.name, **linear.attrs)


def fold_before_linear(sweep: Sweep, node: Node) -> Value | None:
    """linear(mul(x, c)) -> weight; linear(add(x, c)) -> bias if no zeros are padded; conv(reverse(x)) -> kernel."""
    x, weight, bias = node.inputs
    before = sweep.made_by(x, "mul", "add", "reverse")
    if before is None or not sweep.read_by_linear(x) or not is_constant(weight) or node.attrs.get("groups", 1) != 1:
        return None
    axis = 1 if node.op == "dense" else 2  # of the weight: the input channels
    channels = weight.shape[axis]
    if before.op == "reverse":
        if before.attrs["axes"] != (len(x.shape) - 1,) or node.op != "conv2d":
            return None
        weight = constant(np.flip(weight.data, axis), weight.name)
        return sweep.new(node.op, before.inputs[0], weight, bias, name=node.output.name, **node.attrs)
    c = last_axis(before.inputs[1]) if is_constant(before.inputs[1]) else None
    if c is None or c.size not in (1, channels) or before.inputs[0].shape != x.shape:
        return None
    per_input = np.broadcast_to(c, channels).reshape([-1 if i == axis else 1 for i in range(weight.data.ndim)])
    if before.op == "mul":
        weight = constant(weight.data * per_input, weight.name)
    elif any(map(any, node.attrs.get("pads", ()))):
        return None
    else:
        shift = weight.data.astype(np.float64) * per_input
        shift = {
            "dense": lambda: shift.sum(1),
            "conv2d": lambda: shift.sum((0, 1, 2)),
            "depthwise_conv2d": lambda: shift.sum((0, 1)).reshape(-1),
        }[node.op]()
        bias = constant(shift + (0 if bias is None else bias.data), bias.name if bias else before.inputs[1].name)
    return sweep.new(node.op, before.inputs[0], weight, bias, name=node.output.name, **node.attrs)


def fold_norm(sweep: Sweep, node: Node) -> Value | None:
    """dense(layer_norm(x, gamma, beta)) -> gains and offsets into weight and bias, when dense layers alone read it."""
    x, weight, bias = node.inputs
    norm = sweep.made_by(x, "layer_norm")
    if (
        norm is None
        or norm.inputs[1:] == (None, None)
        or not sweep.read_by_linear(x, "dense")
        or not is_constant(weight)
    ):
        return None
    size = weight.shape[1]
    gamma, beta = (None if v is None else last_axis(v) for v in norm.inputs[1:])
    if any(v is not None and f is None for v, f in zip(norm.inputs[1:], (gamma, beta), strict=True)):
        return None
    if beta is not None:
        shift = weight.data @ np.broadcast_to(beta, size)
        bias = constant(shift + (0 if bias is None else bias.data), bias.name if bias else norm.inputs[2].name)
    if gamma is not None:
        weight = constant(weight.data * gamma, weight.name)
    layer, sweep.layer = sweep.layer, norm.layer
    key = ("layer_norm", norm.inputs[0], repr(norm.attrs))  # every dense that read the norm reads the same plain one
    if key not in sweep.seen:
        sweep.seen[key] = sweep.new("layer_norm", norm.inputs[0], None, None, name=norm.output.name, **norm.attrs)
    sweep.layer = layer
    return sweep.new("dense", sweep.seen[key], weight, bias, name=node.output.name)


def fold_into_concat(sweep: Sweep, node: Node) -> Value | None:
    """mul or add(concat(linear...), c) along the last axis -> each part's share of c, on its way into its weights."""
    x, c = node.inputs
    concat = sweep.made_by(x, "concat")
    if concat is None or not is_constant(c) or last_axis(c) is None or not sweep.single_use(x):
        return None
    axis = len(x.shape) - 1
    parts = concat.inputs
    if concat.attrs["axis"] != axis or len(c.shape) > len(x.shape):
        return None
    if not all(sweep.made_by(part, *LINEAR) and sweep.single_use(part) for part in parts):
        return None
    each = np.split(np.broadcast_to(last_axis(c), x.shape[-1]), np.cumsum([part.shape[-1] for part in parts])[:-1])
    shares = [sweep.new(node.op, part, constant(share, c.name)) for part, share in zip(parts, each, strict=True)]
    sweep.layer = concat.layer
    return sweep.new("concat", *shares, axis=axis, name=x.name)


def merge_heads(sweep: Sweep, node: Node) -> Value | None:
    """add(dense(a), dense(b)) of vectors (B,K) -> one dense of both: the two heads of a distilled model are one."""
    dense = [sweep.made_by(x, "dense") for x in node.inputs]
    if None in dense or len(node.output.shape) != 2 or not all(sweep.single_use(x) for x in node.inputs):
        return None
    if len({x.shape for x in node.inputs}) > 1 or not all(is_constant(d.inputs[1]) for d in dense):
        return None
    (a, first, bias), (b, second, other) = (d.inputs for d in dense)
    if a.shape[:-1] != b.shape[:-1]:
        return None
    biases = [v.data for v in (bias, other) if v is not None]
    weight = constant(np.concatenate([first.data, second.data], axis=1), first.name)
    both = sweep.new("concat", a, b, axis=1)
    return sweep.new("dense", both, weight, constant(sum(biases), node.output.name) if biases else None)


def split_dense(sweep: Sweep, node: Node) -> Value | None:
    """slice(dense(x)) along the last axis -> a dense with these rows, when disjoint slices alone read the dense."""
    linear = sweep.made_by(node.inputs[0], "dense")
    if linear is None or linear.output in sweep.graph.outputs or not (ranges := sweep.uses.get(linear.output)):
        return None
    spans = []
    for reader in ranges:
        if reader.op != "slice" or any(s != 1 for s in reader.attrs["strides"]):
            return None
        *outer, last = zip(reader.attrs["begin"], reader.attrs["end"], strict=True)
        if any(span != (0, n) for span, n in zip(outer, linear.output.shape, strict=False)):
            return None
        spans.append(last)
    spans.sort()
    if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
        return None
    x, weight, bias = linear.inputs
    begin, end = node.attrs["begin"][-1], node.attrs["end"][-1]
    part = lambda v: v and constant(v.data[begin:end], v.name)
    sweep.layer = linear.layer
    return sweep.new("dense", x, part(weight), part(bias), name=linear.output.name)


def fold_padding(sweep: Sweep, node: Node) -> Value | None:
    """conv(pad(x)) with zeros around height and width -> the convolution's own padding, without what it never reads."""
    pad = sweep.made_by(node.inputs[0], "pad")
    pads = node.attrs["pads"]
    x, weight, bias = node.inputs
    if (
        pad
        and pad.attrs["mode"] == "constant"
        and pad.attrs["value"] == 0
        and not any(map(any, (pad.attrs["pads"][0], pad.attrs["pads"][3])))
    ):
        x = pad.inputs[0]
        pads = tuple((a + c, b + d) for (a, b), (c, d) in zip(pads, pad.attrs["pads"][1:3], strict=True))
    pads = tuple(
        (a, min(b, max(0, (out - 1) * s + (k - 1) * d + 1 - n - a)))
        for (a, b), out, n, k, s, d in zip(
            pads,
            node.output.shape[1:3],
            x.shape[1:3],
            weight.shape[:2],
            node.attrs["strides"],
            node.attrs["dilation"],
            strict=True,
        )
    )
    if pads != node.attrs["pads"] or x is not node.inputs[0]:
        return sweep.new(node.op, x, weight, bias, name=node.output.name, **{**node.attrs, "pads": pads})


def fold_pool_padding(sweep: Sweep, node: Node) -> Value | None:
    """max_pool(pad(x)) with minus infinity around height and width -> the pooling's own padding."""
    pad = sweep.made_by(node.inputs[0], "pad")
    if (
        pad
        and pad.attrs["mode"] == "constant"
        and pad.attrs["value"] <= np.finfo(np.float32).min
        and not any(map(any, (pad.attrs["pads"][0], pad.attrs["pads"][3])))
    ):
        around = zip(node.attrs["pads"], pad.attrs["pads"][1:3], strict=True)
        pads = tuple((a + c, b + d) for (a, b), (c, d) in around)
        if any(max(p) >= k for p, k in zip(pads, node.attrs["size"], strict=True)):
            return None  # a window of nothing but padding, which ONNX refuses
        return sweep.new("max_pool2d", pad.inputs[0], name=node.output.name, **{**node.attrs, "pads": pads})


def pool_of_one(sweep: Sweep, node: Node) -> Value | None:
    """A pooling of single pixels, as in ResNetV2's shortcuts, takes every other pixel: a depthwise 1 x 1 of ones."""
    a, channels = node.attrs, node.output.shape[-1]
    if tuple(a["size"]) != (1, 1) or any(map(any, a["pads"])) or node.output.dtype != "float32":
        return None
    ones = constant(np.ones((1, 1, channels, 1), np.float32), f"{node.output.name}/ones")
    where = dict(strides=a["strides"], pads=((0, 0), (0, 0)), dilation=(1, 1))
    return sweep.new("depthwise_conv2d", node.inputs[0], ones, None, name=node.output.name, **where)

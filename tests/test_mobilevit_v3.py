"""MobileViT v3 against a plain PyTorch model, written from the paper and from the layout of the published checkpoints.

The state dict of that model has the checkpoints' names and shapes, and goes into ours through the `cvnets` table.
"""

import pathlib
import re
from collections import OrderedDict

import keras
import pytest
from families import images, predict
from safetensors.torch import save_file
from test_parity import close, outputs
from timm_models import randomized

import keras_vits

torch = pytest.importorskip("torch")
nn = torch.nn

DATA = pathlib.Path(__file__).parent / "data"
LAYOUTS = {"mobilevitv3_s": "small", "mobilevitv3_050": "050"}  # variants whose checkpoint's layout is on file


def numbered(**modules):
    return nn.Sequential(OrderedDict(modules))


class Conv(nn.Module):
    """Convolution with batch norm and SiLU, or with a bias."""

    def __init__(self, c, out, size=1, stride=1, groups=1, norm=True, act=True, bias=False):
        super().__init__()
        self.block = numbered(conv=nn.Conv2d(c, out, size, stride, size // 2, groups=groups, bias=bias))
        if norm:
            self.block.add_module("norm", nn.BatchNorm2d(out))
        if act:
            self.block.add_module("act", nn.SiLU())

    def forward(self, x):
        return self.block(x)


class InvertedResidual(nn.Module):
    def __init__(self, c, out, stride, expand):
        super().__init__()
        hidden = c * expand
        self.residual = stride == 1 and c == out
        self.block = numbered(
            exp_1x1=Conv(c, hidden),
            conv_3x3=Conv(hidden, hidden, 3, stride, hidden),
            red_1x1=Conv(hidden, out, act=False),
        )

    def forward(self, x):
        return x + self.block(x) if self.residual else self.block(x)


class SoftmaxAttention(nn.Module):
    """(B,N,d) -> (B,N,d), four heads."""

    def __init__(self, d):
        super().__init__()
        self.qkv_proj, self.out_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv_proj(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class SeparableAttention(nn.Module):
    """(B,d,P,N) -> (B,d,P,N)."""

    def __init__(self, d):
        super().__init__()
        self.d = d
        self.qkv_proj = Conv(d, 1 + 2 * d, norm=False, act=False, bias=True)
        self.out_proj = Conv(d, d, norm=False, act=False, bias=True)

    def forward(self, x):
        q, k, v = self.qkv_proj(x).split([1, self.d, self.d], 1)
        return self.out_proj(v.relu() * (q.softmax(-1) * k).sum(-1, keepdim=True))


class SoftmaxLayer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.pre_norm_mha = nn.Sequential(nn.LayerNorm(d), SoftmaxAttention(d))
        mlp = nn.Linear(d, 2 * d), nn.SiLU(), nn.Dropout(), nn.Linear(2 * d, d)
        self.pre_norm_ffn = nn.Sequential(nn.LayerNorm(d), *mlp)

    def forward(self, x):
        x = x + self.pre_norm_mha(x)
        return x + self.pre_norm_ffn(x)


class SeparableLayer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.pre_norm_attn = nn.Sequential(nn.GroupNorm(1, d), SeparableAttention(d))
        mlp = Conv(d, 2 * d, norm=False, bias=True), nn.Dropout(), Conv(2 * d, d, norm=False, act=False, bias=True)
        self.pre_norm_ffn = nn.Sequential(nn.GroupNorm(1, d), *mlp)

    def forward(self, x):
        x = x + self.pre_norm_attn(x)
        return x + self.pre_norm_ffn(x)


CORNERS = [(i, j) for i in (0, 1) for j in (0, 1)]  # the pixels of a patch: each is at one place of every second one


class SoftmaxBlock(nn.Module):
    def __init__(self, c, d, depth):
        super().__init__()
        self.local_rep = numbered(conv_3x3=Conv(c, c, 3, groups=c), conv_1x1=Conv(c, d, norm=False, act=False))
        self.global_rep = nn.Sequential(*(SoftmaxLayer(d) for _ in range(depth)), nn.LayerNorm(d))
        self.conv_proj = Conv(d, c)
        self.fusion = Conv(d + c, c)

    def forward(self, x):
        local = self.local_rep(x)
        mixed = torch.empty_like(local)
        for i, j in CORNERS:
            part = local[..., i::2, j::2]
            mixed[..., i::2, j::2] = self.global_rep(part.flatten(2).mT).mT.unflatten(2, part.shape[2:])
        return x + self.fusion(torch.cat([local, self.conv_proj(mixed)], 1))


class SeparableBlock(nn.Module):
    def __init__(self, c, d, depth):
        super().__init__()
        self.local_rep = nn.Sequential(Conv(c, c, 3, groups=c), Conv(c, d, norm=False, act=False))
        self.global_rep = nn.Sequential(*(SeparableLayer(d) for _ in range(depth)), nn.GroupNorm(1, d))
        self.conv_proj = Conv(2 * d, c, act=False)

    def forward(self, x):
        local = self.local_rep(x)
        parts = [local[..., i::2, j::2] for i, j in CORNERS]
        tokens = self.global_rep(torch.stack([part.flatten(2) for part in parts], 2))
        mixed = torch.empty_like(local)
        for n, (i, j) in enumerate(CORNERS):
            mixed[..., i::2, j::2] = tokens[:, :, n].unflatten(2, parts[n].shape[2:])
        return x + self.conv_proj(torch.cat([mixed, local], 1))


class Reference(nn.Module):
    """A stem, two stages of inverted residuals, three that end in a block, and the classifier."""

    def __init__(self, stem, widths, residuals, expand, tokens, depths, block, final):
        super().__init__()
        self.num_classes = 1000
        c, layers = stem, OrderedDict(conv_1=Conv(3, stem, 3, 2))
        for s, (width, count) in enumerate(zip(widths, residuals, strict=True)):
            parts = []
            for i in range(count):
                parts.append(InvertedResidual(c, width, 2 if s and not i else 1, expand))
                c = width
            if s >= 2:
                parts.append(block(c, tokens[s - 2], depths[s - 2]))
            layers[f"layer_{s + 1}"] = nn.Sequential(*parts)
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        if final:
            layers["conv_1x1_exp"] = Conv(c, final)
            layers["classifier"] = numbered(pool=pool[0], flat=pool[1], fc=nn.Linear(final, 1000))
        else:
            layers["pool"] = pool[0]
            layers["classifier"] = nn.Sequential(pool[1], nn.Linear(c, 1000))
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


V1_FORM = {  # C of the five stages, d, channels of the last convolution, expansion of the inverted residuals
    "xxs": ((16, 24, 64, 80, 128), (64, 80, 96), 512, 2),
    "xs": ((32, 48, 96, 160, 160), (96, 120, 144), 640, 4),
    "s": ((32, 64, 128, 256, 320), (144, 192, 240), 960, 4),
}


def reference(variant):
    size = variant.removeprefix("mobilevitv3_")
    if size.isdigit():
        w = int(size) / 100
        widths = [int(w * c) for c in (64, 128, 256, 384, 512)]
        d = [c // 2 for c in widths[2:]]
        return Reference(int(w * 32), widths, (1, 2, 1, 1, 1), 2, d, (2, 4, 3), SeparableBlock, None)
    size, _, short = size.partition("_")
    widths, d, final, expand = V1_FORM[size]
    return Reference(16, widths, (1, 3, 1, 1, 1), expand, d, (2, 2 if short else 4, 3), SoftmaxBlock, final)


@pytest.mark.parametrize(
    "variant",  # one of each form on every backend
    [
        pytest.param(name, marks=() if name in ("mobilevitv3_xxs", "mobilevitv3_050") else pytest.mark.once)
        for name in keras_vits.list_models("mobilevitv3_*")
    ],
)
def test_logits_and_blocks_equal_the_reference(variant, tmp_path):
    theirs = randomized(reference(variant))
    state = theirs.state_dict()
    if variant in LAYOUTS:
        lines = (DATA / f"mobilevit_v3_{LAYOUTS[variant]}_checkpoint_keys.txt").read_text().splitlines()
        layout = {name: tuple(map(int, re.findall(r"\d+", shape))) for name, shape in (s.split(" ", 1) for s in lines)}
        assert {name: tuple(t.shape) for name, t in state.items()} == layout
    save_file(state, tmp_path / "checkpoint.safetensors")

    model = keras_vits.create(variant, image_size=(128, 192))
    keras_vits.load_weights(model, tmp_path / "checkpoint.safetensors", format="cvnets")
    blocks = [layer.name for layer in model.layers if "block_" in layer.name]
    tapped = keras.Model(model.input, [model.output, *model.features(blocks).outputs])
    pictures = images(model)
    logits, *features = predict(tapped, pictures)
    numbers = [[int(n) for n in re.findall(r"\d+", name)] for name in blocks]
    expected, expected_features = outputs(theirs, pictures, [f"layer_{s + 1}.{i}" for s, i in numbers])
    close(logits, expected)
    assert len(features) == len(blocks) >= 9
    for ours, feature in zip(features, expected_features, strict=True):
        close(ours, feature)


@pytest.mark.parametrize(("variant", "order"), [("mobilevitv3_xxs", "bgr"), ("mobilevitv3_050", "rgb")])
def test_preprocessing(variant, order):
    settings = keras_vits.create(variant, image_size=64).preprocessing
    assert (settings.channel_order, settings.mean, settings.std) == (order, (0, 0, 0), (1, 1, 1))

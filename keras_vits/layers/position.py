"""Absolute position embeddings."""

from typing import Any, cast

from keras import initializers, ops

from keras_vits.layers.base import SameShape, Shape

KINDS = ("learned", "sincos2d", "sincos1d")


def sincos_1d(positions: Any, width: int) -> Any:
    """(N,) -> (N,width): sin(n w_i), then cos(n w_i), w_i = 10000^(-i / (width / 2 - 1)).

    SimpleViT (arXiv 2205.01580); the frequencies are those of arXiv 1706.03762, section 3.5, but for the -1.
    """
    half = width // 2
    frequencies = 10000.0 ** -(ops.arange(half, dtype="float32") / max(half - 1, 1))
    angles = positions[:, None] * frequencies
    return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=1)


def sincos_2d(height: int, width: int, channels: int) -> Any:
    """-> (height * width, channels): `sincos_1d` of the column, then of the row. SimpleViT (arXiv 2205.01580)."""
    columns, rows = (sincos_1d(ops.arange(n, dtype="float32"), channels // 2) for n in (width, height))
    return ops.concatenate([ops.tile(columns, (height, 1)), ops.repeat(rows, width, axis=0)], axis=1)


class PositionEmbedding(SameShape):
    """(B,N,D) -> (B,N,D): adds a vector to every token. ViT (arXiv 2010.11929), equation 1.

    Args:
        kind: `"learned"`, `"sincos2d"` (fixed, of the token's row and column) or `"sincos1d"` (fixed, of its number).
        grid: (h,w) with N = h * w, for `"sincos2d"`.
    """

    def __init__(self, kind: str = "learned", grid: tuple[int, int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind, self.grid = kind, grid

    def build(self, shape: Shape) -> None:
        multiple = {"learned": 1, "sincos1d": 2, "sincos2d": 4}[self.kind]
        if shape[-1] % multiple:
            raise ValueError(
                f"{self.kind} positions need a width that is a multiple of {multiple}; received {shape[-1]}."
            )
        if self.kind == "learned":
            self.table = self.add_weight(
                shape=(1, *shape[1:]), initializer=initializers.RandomNormal(stddev=0.02), name="table"
            )

    def call(self, x: Any) -> Any:
        if self.kind == "learned":
            return x + self.table
        tokens, width = x.shape[1:]
        if self.kind == "sincos2d":
            table = sincos_2d(*cast(tuple[int, int], self.grid), width)
        else:
            table = sincos_1d(ops.arange(tokens, dtype="float32"), width)
        return x + ops.cast(table, x.dtype)

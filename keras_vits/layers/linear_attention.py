"""Attention whose cost is linear in the number of tokens N: no layer here makes a matrix (N,N).

Each takes the place of `MultiHeadAttention`: one dense layer computes queries, keys and values together, in this order,
a head sees d = D / heads channels of each, and one dense layer mixes the heads' outputs. Sums over tokens are float32
under a 16-bit policy.
"""

import math
from typing import Any

from keras import backend, initializers, layers, ops, random

from keras_vits.layers.base import SameShape, Shape


class LinearAttention(SameShape):
    """(B,N,D) -> (B,N,D): out(attend(q, k, v)), the base of the layers below.

    Args:
        heads: number of heads; must divide D.
        qkv_bias: whether the joint projection has a bias.
        dropout: probability of dropping an element of the output in training.
    """

    def __init__(self, heads: int, qkv_bias: bool = True, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads, self.qkv_bias, self.dropout = heads, qkv_bias, dropout

    def build(self, shape: Shape) -> None:
        width = shape[-1]
        if width % self.heads:
            raise ValueError(f"heads must divide the width; received heads={self.heads}, width={width}.")
        self.qkv = layers.Dense(self.qkv_width(width), use_bias=self.qkv_bias, name="qkv", dtype=self.dtype_policy)
        self.out = layers.Dense(width, name="out", dtype=self.dtype_policy)
        self.drop = layers.Dropout(self.dropout, name="drop", dtype=self.dtype_policy)
        self.qkv.build(shape)
        self.out.build(shape)

    def qkv_width(self, width: int) -> int:
        """Outputs of the joint projection, from D."""
        return 3 * width

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        """The heads' outputs (B,heads,N,d), from queries, keys and values of this shape."""
        raise NotImplementedError("A linear attention must define attend(q, k, v).")

    def call(self, x: Any) -> Any:
        tokens, width = x.shape[1:]
        qkv = wide(self.qkv(x))
        q, k, v = (
            ops.transpose(
                ops.reshape(qkv[..., i * width : (i + 1) * width], (-1, tokens, self.heads, width // self.heads)),
                (0, 2, 1, 3),
            )
            for i in range(3)
        )
        y = ops.reshape(ops.transpose(self.attend(q, k, v), (0, 2, 1, 3)), (-1, tokens, width))
        return self.drop(self.out(ops.cast(y, self.compute_dtype)))


def wide(x: Any) -> Any:
    """x in float32 or wider: a sum over thousands of tokens overflows, or stops growing, in 16 bits."""
    return ops.cast(x, backend.result_type(backend.standardize_dtype(x.dtype), "float32"))


LEAST_FEATURE = 1e-3  # queries and keys are divided by no less: half precision holds 1e-5 / LEAST_FEATURE / N
LEAST_DIVISOR = 2**-24  # the smallest number of half precision


def kernel_attention(q: Any, k: Any, v: Any, epsilon: float) -> Any:
    """q (k'v) / (q (k'1) + epsilon) of features q, k >= 0 (B,heads,N,features) and v (B,heads,N,d).

    Equation 5 of Katharopoulos et al., arXiv 2006.16236. A phone computes in half precision, in which these sums over N
    tokens overflow at 65504. So each query is divided by its largest feature, keys by their head's largest and by N,
    and epsilon by all three, which cancels. A divisor below 6e-8 of the largest possible one counts as 6e-8. The values
    are what is transposed: they have fewer channels than the keys may have features.
    """
    tokens = k.shape[2]
    q_most, k_most = (
        ops.maximum(ops.stop_gradient(ops.max(x, axis=axes, keepdims=True)), LEAST_FEATURE)
        for x, axes in ((q, -1), (k, (2, 3)))
    )
    q, k = q / q_most, k / k_most * (1 / tokens)
    context = ops.matmul(ops.transpose(v, (0, 1, 3, 2)), k)  # (B,heads,d,features)
    total = ops.sum(k, axis=2, keepdims=True)  # (B,heads,1,features)
    context, total = (ops.transpose(x, (0, 1, 3, 2)) for x in (context, total))
    divisor = ops.matmul(q, total)
    if epsilon:
        divisor = divisor + epsilon / (tokens * LEAST_FEATURE) * (LEAST_FEATURE / q_most) / k_most
    return ops.matmul(q, context) / ops.maximum(divisor, LEAST_DIVISOR)


class KernelAttention(LinearAttention):
    """(B,N,D) -> (B,N,D): out(q (k'v) / (q (k'1))) with q, k through elu(x) + 1.

    Transformers are RNNs (Katharopoulos et al., arXiv 2006.16236), equations 5 and 7; 1e-6 is added to the divisor.
    """

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        return kernel_attention(ops.elu(q) + 1, ops.elu(k) + 1, v, 1e-6)


class ReLULinearAttention(LinearAttention):
    """(B,N,D) -> (B,N,D): out(q (k'v) / (q (k'1))) with q, k through relu.

    EfficientViT (Cai et al., arXiv 2205.14756), equation 2; 1e-5 is added to the divisor, as in timm. The multi-scale
    tokens around it are in `models/efficientvit.py`.
    """

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        return kernel_attention(ops.relu(q), ops.relu(k), v, 1e-5)


class FavorAttention(LinearAttention):
    """(B,N,D) -> (B,N,D): out(f(q) (f(k)'v) / (f(q) (f(k)'1))), an estimate of softmax attention.

    f(x) = exp(e(x) - c) + 1e-6 with e(x) = w x / d^(1/4) - |x|^2 / (2 sqrt(d)), whose random rows w are orthogonal in
    groups of d. They are drawn once, never trained, and saved with the model. c, the largest e of a query's m rows, or
    of all rows of a head's keys, keeps the exponential at 1 or less. Without 1e-6, exp(-c) would cancel in the
    quotient, and the numbers exp(e) are the unbiased estimate of softmax attention's kernel (Performer, Choromanski et
    al., arXiv 2009.14794, lemma 1, equation 5 and section 2.4). With it, as in the authors' code, what is computed is
    exp(e) + 1e-6 exp(c): a constant is added to the features, which matters more the farther a row lies below the
    largest. Of 64 tokens with d = 16 and m = 64, normally distributed numbers q, k and v give a result that differs by
    1e-4 of its size from the plain estimator's, and q and k four times as large one that differs by 6 to 60 %,
    depending on the rows that were drawn.

    Args:
        heads: number of heads; must divide D.
        qkv_bias: whether the joint projection has a bias.
        dropout: probability of dropping an element of the output in training.
        features: m, number of rows w; d ln(d) by default (theorem 4). The error falls with 1 / sqrt(m).
        seed: of the rows w.
    """

    def __init__(
        self,
        heads: int,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        features: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(heads, qkv_bias, dropout, **kwargs)
        self.features, self.seed = features, seed

    def build(self, shape: Shape) -> None:
        super().build(shape)
        size = shape[-1] // self.heads
        self.projection = self.add_weight(
            shape=(size, self.features or max(1, math.ceil(size * math.log(size)))),
            initializer=self.draw,
            trainable=False,
            autocast=False,
            name="projection",
        )

    def draw(self, shape: tuple[int, int], dtype: Any = None) -> Any:
        """Rows w as columns (d,m): of random orthogonal matrices (d,d), as long as normal random vectors."""
        size, count = shape
        blocks = [
            initializers.Orthogonal(seed=self.seed + 1 + i)((size, size), dtype) for i in range(math.ceil(count / size))
        ]
        length = ops.norm(random.normal(shape, dtype=dtype, seed=self.seed), axis=0)
        return ops.concatenate(blocks, axis=1)[:, :count] * length

    def positive(self, x: Any, axes: int | tuple[int, ...]) -> Any:
        """f(x) (B,heads,N,m) of x (B,heads,N,d), scaled so that the largest value over the axes is 1."""
        x = x * x.shape[-1] ** -0.25
        exponent = ops.matmul(x, self.projection) - 0.5 * ops.sum(x * x, axis=-1, keepdims=True)
        return ops.exp(exponent - ops.stop_gradient(ops.max(exponent, axis=axes, keepdims=True))) + 1e-6

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        return kernel_attention(self.positive(q, -1), self.positive(k, (2, 3)), v, 0.0)


class EfficientAttention(LinearAttention):
    """(B,N,D) -> (B,N,D): out(softmax(q) (softmax(k)'v)): over the d channels of q, over the N tokens of k.

    Efficient Attention (Shen et al., arXiv 1812.01243), section 3.2, with the softmax normalisation.
    """

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        k = ops.softmax(ops.transpose(k, (0, 1, 3, 2)), axis=-1)
        return ops.matmul(ops.softmax(q, axis=-1), ops.matmul(k, v))


class CrossCovarianceAttention(LinearAttention):
    """(B,N,D) -> (B,N,D): out(softmax(t q'k) v), where a channel of q and k is a unit vector over tokens.

    Channels attend to channels of their head, and t is learned for each head. XCiT (El-Nouby et al., arXiv 2106.09681),
    section 3.2; as timm's XCA.
    """

    def build(self, shape: Shape) -> None:
        super().build(shape)
        self.temperature = self.add_weight(shape=(self.heads, 1, 1), initializer="ones", name="temperature")

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        q, k = (ops.normalize(x, axis=2, order=2, epsilon=1e-12) for x in (q, k))
        scores = ops.softmax(ops.matmul(ops.transpose(q, (0, 1, 3, 2)), k) * self.temperature, axis=-1)  # (B,heads,d,d)
        return ops.matmul(v, ops.transpose(scores, (0, 1, 3, 2)))


class LinformerAttention(LinearAttention):
    """(B,N,D) -> (B,N,D): out(softmax(q (E'k)' / sqrt(d)) F'v) with learned E, F (N,rank), which all heads share.

    N is fixed when the layer is built. Linformer (Wang et al., arXiv 2006.04768), equation 7.

    Args:
        heads: number of heads; must divide D.
        qkv_bias: whether the joint projection has a bias.
        dropout: probability of dropping an element of the output in training.
        rank: number of keys and values that the tokens are projected to.
    """

    def __init__(self, heads: int, qkv_bias: bool = True, dropout: float = 0.0, rank: int = 64, **kwargs: Any) -> None:
        super().__init__(heads, qkv_bias, dropout, **kwargs)
        self.rank = rank

    def build(self, shape: Shape) -> None:
        super().build(shape)
        if shape[1] is None:
            raise ValueError(f"Linformer needs a fixed number of tokens N; received the shape {tuple(shape)}.")
        self.key_projection, self.value_projection = (
            self.add_weight(shape=(shape[1], self.rank), initializer="glorot_uniform", name=f"{name}_projection")
            for name in ("key", "value")
        )

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        k = ops.matmul(ops.transpose(k, (0, 1, 3, 2)), self.key_projection)  # (B,heads,d,rank)
        v = ops.matmul(ops.transpose(v, (0, 1, 3, 2)), self.value_projection)
        scores = ops.softmax(ops.matmul(q * q.shape[-1] ** -0.5, k), axis=-1)  # (B,heads,N,rank)
        return ops.matmul(scores, ops.transpose(v, (0, 1, 3, 2)))


class SeparableSelfAttention(LinearAttention):
    """(...,N,D) -> (...,N,D): out(relu(v) * sum over N of softmax(q) k), where a token has one score q in each head.

    MobileViT v2 (Mehta and Rastegari, arXiv 2206.02680), section 3, which has one head. The score of a head weighs its
    d channels of k.
    """

    def qkv_width(self, width: int) -> int:
        return self.heads + 2 * width

    def call(self, x: Any) -> Any:
        width = x.shape[-1]
        qkv = self.qkv(x)
        scores = ops.softmax(ops.swapaxes(wide(qkv[..., : self.heads]), -1, -2))  # (...,heads,N)
        context = ops.matmul(scores, wide(qkv[..., self.heads : self.heads + width]))  # (...,heads,D)
        if self.heads > 1:  # a head's row holds every channel: keep its own d
            own = ops.repeat(ops.eye(self.heads, dtype=context.dtype), width // self.heads, axis=1)
            context = ops.sum(context * own, axis=-2, keepdims=True)
        y = ops.relu(qkv[..., self.heads + width :]) * ops.cast(context, self.compute_dtype)
        return self.drop(self.out(y))


ATTENTIONS = {
    "separable": SeparableSelfAttention,
    "cross_covariance": CrossCovarianceAttention,
    "kernel": KernelAttention,
    "relu_linear": ReLULinearAttention,
    "favor": FavorAttention,
    "linformer": LinformerAttention,
    "efficient": EfficientAttention,
}

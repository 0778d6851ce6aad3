"""How is attention computed on a grid of some thousand voxels without storing all of its weights?

`jax.nn.dot_product_attention` is used for small grids. On large ones it takes five times the memory, and a
checkpointed loop over its heads takes twice the time.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded_exp(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """exp(x), rounded to `dtype`. Its derivative is the rounded value, too: the backward pass of attention in
    bfloat16 then stores the weights once, where it would otherwise make them anew in float32 for each use."""
    return jnp.exp(x).astype(dtype)


@_rounded_exp.defjvp
def _(dtype: jnp.dtype, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value = _rounded_exp(*primals, dtype)
    return value, value * tangents[0].astype(dtype)


def attend(
    query: Float[Array, "n heads dim"], key: Float[Array, "n heads dim"], value: Float[Array, "n heads dim"],
    most: int = 2**26,
) -> Float[Array, "n heads dim"]:  # fmt: skip
    """softmax(Q K^T / sqrt(dim)) V, with logits, exponentials and sums in float32 for inputs of any type; the
    weights are rounded to the type of V.

    On a large grid the heads are processed one after the other, and a head of more than `most` weights in
    rows; the weights are recomputed in the backward pass. All of them together would be the network's
    largest array: 3840 x 3840 per head at 480 x 512. A row of ones beside V sums them in the same product.
    Keys and values have their voxels last, because on a CPU their gradients then take half the time.
    """
    if len(query) <= 1024:
        return jax.nn.dot_product_attention(query, key, value)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("attended"))
    def of_rows(
        query: Float[Array, "rows dim"], key: Float[Array, "dim n"], value: Float[Array, "dim n"]
    ) -> Float[Array, "rows dim"]:
        logits = jnp.matmul(query, key, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
        largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        weights = _rounded_exp(logits - checkpoint_name(largest, "attended"), value.dtype)
        value = jnp.concatenate([value, jnp.ones_like(value[:1])])
        total = jnp.einsum("rn,dn->rd", weights, value, preferred_element_type=jnp.float32)
        total = checkpoint_name(total, "attended")
        return (total[:, :-1] / total[:, -1:]).astype(query.dtype)

    def of_head(head: list[Float[Array, "n dim"]]) -> Float[Array, "n dim"]:
        query, key, value = head[0], head[1].T, head[2].T
        rows = most // len(query)
        if len(query) <= rows:
            return of_rows(query, key, value)
        wide = key.astype(jnp.float32), value.astype(jnp.float32)  # their gradients are summed over the rows

        def of_row(row: Float[Array, "dim"]) -> Float[Array, "dim"]:
            return of_rows(row[None], *(x.astype(query.dtype) for x in wide))[0]

        return jax.lax.map(of_row, query, batch_size=rows)

    heads = [jnp.moveaxis(x, 1, 0) for x in (query, key, value)]
    return jnp.moveaxis(jax.lax.map(of_head, heads), 0, 1)

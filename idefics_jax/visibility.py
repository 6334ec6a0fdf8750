"""What may see what, as a few integers a token: never a dense [T, S] array held by a caller."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("query_segments", "key_segments", "query_positions", "key_positions"),
    meta_fields=("window",),
)
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys a query sees: those of its own segment that are not padding (segment 0).

    With positions, only keys at its own position or before; with a window, only the last `window` of those.

    Attributes:
      query_segments: int32 [B, T].
      key_segments: int32 [B, S].
      query_positions: int32 [B, T], or None where order does not matter.
      key_positions: int32 [B, S], or None.
      window: length of the sliding window, or None.
    """

    query_segments: jax.Array
    key_segments: jax.Array
    query_positions: jax.Array | None = None
    key_positions: jax.Array | None = None
    window: int | None = None

    def mask(self, query_segments: jax.Array, query_positions: jax.Array | None) -> jax.Array:
        """Returns bool [B, T, S] for a block of queries."""
        queries, keys = query_segments[:, :, None], self.key_segments[:, None, :]
        seen = (queries == keys) & (keys > 0)
        if query_positions is not None:
            distance = query_positions[:, :, None] - self.key_positions[:, None, :]
            seen &= distance >= 0
            if self.window is not None:
                seen &= distance < self.window
        return seen

    def ranges(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (first, last, code), int32 [B, T], [B, T] and [B, S]: a query sees the keys whose code lies between.

        A key's code counts up through its segment and on through the next, so two comparisons say all that `mask`
        does. A padding query's range is empty. Segments times positions must stay below 2^31.
        """
        if self.query_positions is None:
            first, last, code = self.query_segments, self.query_segments, self.key_segments
        else:
            stride = 1 + jnp.maximum(jnp.max(self.query_positions), jnp.max(self.key_positions))
            start = self.query_segments * stride
            last, code = start + self.query_positions, self.key_segments * stride + self.key_positions
            first = start if self.window is None else jnp.maximum(start, last - self.window + 1)
        first = jnp.where(self.query_segments > 0, first, 1)
        last = jnp.where(self.query_segments > 0, last, 0)
        return first, last, jnp.where(self.key_segments > 0, code, -1)

"""Attention over the mesh's sequence axis: each device keeps its queries, keys and values go round in a ring.

Ring attention (Liu et al. 2023) around any (forward, backward) of kernels/attention.py; what a query has seen is put
together by the log-sum-exp. Tokens are dealt to the p devices like cards (Striped Attention: Brandon et al. 2023):
token t to device t mod p. So every device has the same work in every turn, under a causal mask and for packed
documents too, and of any device's keys a query still sees one range: the kernels serve as they are. (Of p unbroken
parts the first would wait half of the time; parts in zig-zag are two ranges, four calls a turn; to gather all keys
and values takes the memory that the axis is there to save, and kernels for T unlike S.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.masks import MASKED, Ranges
from sharding import along, constrain_residual, constrain_tokens


def turns_of(length: int) -> int:
    """Devices of the ring for rows of `length` tokens; 1 where the axis's square does not divide them: no ring then.

    The square, so that a device's tokens in order are a whole number from each stripe.
    """
    devices = along(jax.sharding.get_abstract_mesh(), "sequence")
    return devices if length % devices**2 == 0 else 1


def striped(x_BT: jax.Array, ring: int) -> jax.Array:
    """[B, T]: the tokens 0, p, 2p, ..., then 1, p + 1, ...: the first device's, the second's, ..."""
    return x_BT.reshape(x_BT.shape[0], -1, ring).swapaxes(1, 2).reshape(x_BT.shape)


def unstriped(x_BTD: jax.Array, ring: int) -> jax.Array:
    """The tokens of `striped` in order again; an all-to-all."""
    x = constrain_tokens(x_BTD.reshape(x_BTD.shape[0], ring, -1, x_BTD.shape[-1]), "sequence")
    return constrain_residual(constrain_tokens(x.swapaxes(1, 2), "sequence").reshape(x_BTD.shape))


def of_stripe(seen: Ranges, stripe: jax.Array, ring: int) -> Ranges:
    """The ranges of a stripe's own tokens."""
    return Ranges(*(x.reshape(x.shape[0], -1, ring)[:, :, stripe] for x in seen))


def within(seen: Ranges, stripe: jax.Array, ring: int) -> Ranges:
    """Ranges of tokens as ranges of the tokens of a stripe: its token i is token i p + stripe."""
    return Ranges((seen.first_BT - stripe + ring - 1) // ring, (seen.last_BT - stripe) // ring)


def ranges_in(
    turn: jax.Array | int, keys: Ranges, queries: Ranges, ring: int
) -> tuple[Ranges, Ranges]:
    """Of this device's queries the keys, and of the keys that are here in that turn the queries, that they see."""
    here = jax.lax.axis_index("sequence")
    whose = (here - turn) % ring
    return within(of_stripe(keys, here, ring), whose, ring), within(
        of_stripe(queries, whose, ring), here, ring
    )


def passed_on(tree: Any, ring: int) -> Any:
    """What the device before holds."""
    return jax.lax.ppermute(tree, "sequence", [(i, (i + 1) % ring) for i in range(ring)])


def put_together(
    seen: tuple[jax.Array, jax.Array], more: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(output [B, T, N, H], base-2 log-sum-exp [B, N, T]) over the keys of both."""
    lse_BNT = jnp.logaddexp2(seen[1], more[1])
    parts = [out * jnp.exp2(lse - lse_BNT).swapaxes(1, 2)[..., None] for out, lse in (seen, more)]
    return parts[0] + parts[1], lse_BNT


def ring_forward(
    attend: Callable, ring: int, q_BTNH, k_BSKH, v_BSKH, keys: Ranges, queries: Ranges, **options
):
    """As `attend`, a backend's forward, of this device's tokens of the sequence; the ranges are of all of it."""

    def seen(k_BSKH, v_BSKH, turn):
        out_BTNH, lse_BNT = attend(
            q_BTNH, k_BSKH, v_BSKH, *ranges_in(turn, keys, queries, ring), **options
        )
        return out_BTNH.astype(jnp.float32), jnp.where(
            lse_BNT > -MASKED / 2, MASKED, lse_BNT
        )  # nothing seen

    def turn(carry, i):
        key_value, total = carry
        return (passed_on(key_value, ring), put_together(total, seen(*key_value, i))), None

    (batch, length, heads, _), key_value = q_BTNH.shape, (k_BSKH, v_BSKH)
    nothing = jnp.zeros(q_BTNH.shape, jnp.float32), jnp.full((batch, heads, length), MASKED)
    (key_value, total), _ = jax.lax.scan(turn, (key_value, nothing), jnp.arange(ring - 1))
    out_BTNH, lse_BNT = put_together(total, seen(*key_value, ring - 1))
    return out_BTNH.astype(q_BTNH.dtype), jnp.where(lse_BNT < MASKED / 2, -MASKED, lse_BNT)


def ring_backward(
    attend: Callable, ring: int, q_BTNH, k_BSKH, v_BSKH, keys: Ranges, queries: Ranges, out_BTNH, lse_BNT, dout_BTNH,
    **options,
):  # fmt: skip
    """As `attend`, a backend's backward. Gradients of keys and values go round after them, a turn behind, and home."""

    def added(key_value, dkey_value, dq, turn):
        ranges = ranges_in(turn, keys, queries, ring)
        more = attend(q_BTNH, *key_value, *ranges, out_BTNH, lse_BNT, dout_BTNH, **options)
        dq, *dkey_value = (
            x + y.astype(jnp.float32) for x, y in zip((dq, *dkey_value), more, strict=True)
        )
        return dkey_value, dq

    def turn(carry, i):
        key_value, dkey_value, dq = carry
        return (
            passed_on(key_value, ring),
            *added(key_value, passed_on(dkey_value, ring), dq, i),
        ), None

    key_value = [k_BSKH, v_BSKH]
    dq, *dkey_value = (jnp.zeros(x.shape, jnp.float32) for x in (q_BTNH, *key_value))
    (key_value, dkey_value, dq), _ = jax.lax.scan(
        turn, (key_value, dkey_value, dq), jnp.arange(ring - 1)
    )
    dkey_value, dq = added(key_value, passed_on(dkey_value, ring), dq, ring - 1)
    dk, dv = passed_on(dkey_value, ring)
    return dq.astype(q_BTNH.dtype), dk.astype(k_BSKH.dtype), dv.astype(v_BSKH.dtype)

"""Attention over the mesh's sequence axis: queries stay, keys and values go round in a ring.

Ring attention (Liu et al. 2023) around any (forward, backward) of kernels/attention.py; what a
query has seen is put together by the log-sum-exp. Tokens are dealt to the p devices like cards
(Striped Attention: Brandon et al. 2023): token t to device t mod p, whose tokens are its stripe.
So every device has the same work in every turn, under a causal mask and for packed documents too,
and of any device's keys a query still sees one range: the kernels serve as they are. (Of p
unbroken parts the first would wait half of the time; parts in zig-zag are two ranges, four calls
a turn; to gather all keys and values takes the memory that the axis is there to save, and kernels
for T unlike S.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.masks import MASKED, Ranges
from sharding import along, constrain_residual, constrain_tokens

# ---- Stripes of tokens ----


def turns_of(length: int) -> int:
    """Return the devices of the ring for rows of `length` tokens; 1 is no ring.

    It is 1 where the square of the sequence axis does not divide the length: a device's tokens, in
    order, must be a whole number from each stripe.
    """
    devices = along(jax.sharding.get_abstract_mesh(), "sequence")
    return devices if length % devices**2 == 0 else 1


def striped(x_BT: jax.Array, ring: int) -> jax.Array:
    """Return [B, T] by stripes: the tokens 0, p, 2p, ..., then 1, p + 1, ..., and so on."""
    batch = x_BT.shape[0]
    cards = x_BT.reshape(batch, -1, ring)
    return cards.swapaxes(1, 2).reshape(x_BT.shape)


def unstriped(x_BTD: jax.Array, ring: int) -> jax.Array:
    """Return the tokens of `striped`, with a last axis D, in order again: an all-to-all."""
    batch, _, width = x_BTD.shape
    x = x_BTD.reshape(batch, ring, -1, width)
    x = constrain_tokens(x, "sequence")
    x = constrain_tokens(x.swapaxes(1, 2), "sequence")
    return constrain_residual(x.reshape(x_BTD.shape))


def of_stripe(seen: Ranges, stripe: jax.Array | int, ring: int) -> Ranges:
    """Return the ranges [B, T / p] of a stripe's own tokens, out of those of all tokens."""

    def own(x_BT):
        return x_BT.reshape(x_BT.shape[0], -1, ring)[:, :, stripe]

    return Ranges(own(seen.first_BT), own(seen.last_BT))


def within(seen: Ranges, stripe: jax.Array | int, ring: int) -> Ranges:
    """Return ranges of tokens as ranges of a stripe's tokens, whose i-th is token i p + stripe."""
    first = (seen.first_BT - stripe + ring - 1) // ring
    last = (seen.last_BT - stripe) // ring
    return Ranges(first, last)


def ranges_in(
    turn: jax.Array | int,
    keys: Ranges,
    queries: Ranges,
    ring: int,
) -> tuple[Ranges, Ranges]:
    """Return (the keys that this device's queries see, the queries that see the keys here).

    `keys` and `queries` are the ranges of all tokens; the result counts in tokens of a stripe. In
    turn `turn` a device has the keys of the device that many places before it.
    """
    here = jax.lax.axis_index("sequence")
    whose = (here - turn) % ring
    keys_here = within(of_stripe(keys, here, ring), whose, ring)
    queries_here = within(of_stripe(queries, whose, ring), here, ring)
    return keys_here, queries_here


# ---- The ring ----


def passed_on(tree: Any, ring: int) -> Any:
    """Return what the device before this one holds; every device passes `tree` on."""
    pairs = [(i, (i + 1) % ring) for i in range(ring)]
    return jax.lax.ppermute(tree, "sequence", pairs)


def put_together(
    seen: tuple[jax.Array, jax.Array],
    more: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Join two results over different keys into the result over the keys of both.

    Each is (output [B, T, N, H], base-2 log-sum-exp [B, N, T]); a row that saw nothing has -1e30.
    """
    lse_BNT = jnp.logaddexp2(seen[1], more[1])

    def share(part):
        out_BTNH, part_lse_BNT = part
        weights_BNT = jnp.exp2(part_lse_BNT - lse_BNT)
        return out_BTNH * weights_BNT.swapaxes(1, 2)[..., None]

    return share(seen) + share(more), lse_BNT


def ring_forward(
    attend: Callable,
    ring: int,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    keys: Ranges,
    queries: Ranges,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return what `attend`, a backend's forward, gives for this device's queries and all keys.

    q, k and v are this device's stripe of the tokens, `keys` and `queries` the ranges of all
    tokens; `options` go to `attend`. For use under shard_map over the sequence axis.
    """

    def seen_in(turn, k_BSKH, v_BSKH):
        ranges = ranges_in(turn, keys, queries, ring)
        out_BTNH, lse_BNT = attend(q_BTNH, k_BSKH, v_BSKH, *ranges, **options)
        # A backend says +1e30 where a row saw nothing; here it must count for nothing.
        lse_BNT = jnp.where(lse_BNT > -MASKED / 2, MASKED, lse_BNT)
        return out_BTNH.astype(jnp.float32), lse_BNT

    def one_turn(carry, turn):
        key_value, total = carry
        passed = passed_on(key_value, ring)
        total = put_together(total, seen_in(turn, *key_value))
        return (passed, total), None

    batch, length, heads, _ = q_BTNH.shape
    out = jnp.zeros(q_BTNH.shape, jnp.float32)
    lse = jnp.full((batch, heads, length), MASKED)
    start = ((k_BSKH, v_BSKH), (out, lse))
    (key_value, total), _ = jax.lax.scan(one_turn, start, jnp.arange(ring - 1))

    # The last turn, after which nothing is passed on.
    out_BTNH, lse_BNT = put_together(total, seen_in(ring - 1, *key_value))
    lse_BNT = jnp.where(lse_BNT < MASKED / 2, -MASKED, lse_BNT)
    return out_BTNH.astype(q_BTNH.dtype), lse_BNT


def ring_backward(
    attend: Callable,
    ring: int,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    keys: Ranges,
    queries: Ranges,
    out_BTNH: jax.Array,
    lse_BNT: jax.Array,
    dout_BTNH: jax.Array,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what `attend`, a backend's backward, gives for this device's tokens: dq, dk, dv.

    Arguments are as of `ring_forward`, with its results and the gradient of its output. Gradients
    of keys and values go round after them, a turn behind, and home.
    """

    def add(key_value, dkey_value, dq, turn):
        ranges = ranges_in(turn, keys, queries, ring)
        more = attend(q_BTNH, *key_value, *ranges, out_BTNH, lse_BNT, dout_BTNH, **options)
        dq_more, dk_more, dv_more = (x.astype(jnp.float32) for x in more)
        dk, dv = dkey_value
        return (dk + dk_more, dv + dv_more), dq + dq_more

    def one_turn(carry, turn):
        key_value, dkey_value, dq = carry
        passed = passed_on(key_value, ring)
        dkey_value, dq = add(key_value, passed_on(dkey_value, ring), dq, turn)
        return (passed, dkey_value, dq), None

    dq = jnp.zeros(q_BTNH.shape, jnp.float32)
    dk = jnp.zeros(k_BSKH.shape, jnp.float32)
    dv = jnp.zeros(v_BSKH.shape, jnp.float32)
    start = ((k_BSKH, v_BSKH), (dk, dv), dq)
    (key_value, dkey_value, dq), _ = jax.lax.scan(one_turn, start, jnp.arange(ring - 1))

    # The last turn; one more step brings the gradients of keys and values home.
    dkey_value, dq = add(key_value, passed_on(dkey_value, ring), dq, ring - 1)
    dk, dv = passed_on(dkey_value, ring)
    return dq.astype(q_BTNH.dtype), dk.astype(k_BSKH.dtype), dv.astype(v_BSKH.dtype)

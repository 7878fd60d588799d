"""Rotary position embedding (RoPE: Su et al. 2021), half-split, with linear and Llama 3.1 scaling."""

import jax
import jax.numpy as jnp

from presets import ModelConfig


def rope_frequencies(config: ModelConfig) -> jax.Array:
    """Angle per position of each of the H/2 rotated pairs, in radians (Su et al. 2021)."""
    exponents = jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width
    frequencies = config.rope_base**-exponents
    if config.rope_llama3 is None:
        return frequencies * config.rope_scale
    # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
    factor, low, high, context = config.rope_llama3
    turns = context * frequencies / (2 * jnp.pi)  # full rotations over the original context
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / factor) * config.rope_scale


def rope_turns(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each pair's angle, [B, T, 1, H/2] float32 each; computed once for all layers."""
    angles_BTH = positions_BT[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles_BTH)[:, :, None, :], jnp.sin(angles_BTH)[:, :, None, :]


def rotate(x_BTNH: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """RoPE, half-split: dimension i turns with i + H/2 (as in GPT-NeoX and Hugging Face's Llama).

    Weights whose convention turns 2i with 2i + 1 (Meta's, llama2.c's) need their q and k permuted.
    """
    (cos, sin), (first, second) = turns, jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)

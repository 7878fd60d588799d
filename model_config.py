"""The shape of a decoder: its configuration, and the shapes of published models."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from runtime.errors import UserError
from runtime.run_folder import load_model_config
from sharding import platform


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. `--model.preset=NAME` sets all of it; single fields then override."""

    preset: str = "world"
    """Name of the preset that the other fields started from."""
    vocab: int = 1280
    """Rows of the embedding; at least the tokenizer's size."""
    width: int = 128
    """Model width D."""
    mlp_width: int = 256
    """Hidden width F of SwiGLU."""
    layers: int = 4
    """Number of blocks L."""
    heads: int = 4
    """Query heads N."""
    kv_heads: int = 2
    """Key/value heads K; divides `heads`."""
    head_dim: int = 32
    """Width H of one head."""
    context: int = 256
    """Longest sequence, in tokens."""
    rope_base: float = 10_000.0
    """Base of RoPE's frequencies."""
    rope_scale: float = 1.0
    """Positions are multiplied by this (linear interpolation)."""
    rope_llama3: tuple[float, float, float, float] | None = None
    """Llama 3.1 frequency scaling: factor, low and high frequency factor, original context."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tied: bool = True
    """Unembed with the embedding's transpose."""
    qkv_bias: bool = False
    """Bias on q, k, v (Qwen 2)."""
    qk_norm: bool = False
    """RMSNorm on each q and k head before RoPE (Qwen 3)."""
    window: int | None = None
    """Sliding window of attention, in tokens (Mistral 7B v0.1)."""
    activation: Literal["silu", "gelu"] = "silu"
    """Of the gate in the feed-forward layers; gelu is its tanh approximation (Gemma)."""
    scale_embedding: bool = False
    """Multiply embedded tokens by sqrt(D) (Gemma)."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + their parameter, which starts at 0 (Gemma)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; auto is bfloat16 on accelerators and float32 on CPU. Parameters are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matmul outputs, or everything."""

    def __post_init__(self):
        for field in (
            "vocab",
            "width",
            "mlp_width",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "context",
        ):
            if getattr(self, field) < 1:
                raise UserError(f"--model.{field}={getattr(self, field)}: must be at least 1")
        if self.heads % self.kv_heads:
            raise UserError(
                f"--model.kv_heads={self.kv_heads}: must divide --model.heads={self.heads} without remainder"
            )
        if self.head_dim % 2:
            raise UserError(f"--model.head_dim={self.head_dim}: RoPE needs an even width")
        if self.rope_llama3 is not None:  # JSON has lists only
            object.__setattr__(self, "rope_llama3", tuple(self.rope_llama3))

    @staticmethod
    def from_preset(name: str) -> "ModelConfig":
        """The preset `name`; raises UserError with the known names."""
        if name not in PRESETS:
            raise UserError(f"--model.preset={name}: unknown; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The type of activations and of matmul operands."""
        if self.dtype == "auto":
            return jnp.dtype("float32" if platform() == "cpu" else "bfloat16")
        return jnp.dtype(self.dtype)


def _preset(name: str, *shape: int, **rest: Any) -> ModelConfig:
    fields = ("vocab", "width", "mlp_width", "layers", "heads", "kv_heads", "head_dim", "context")
    return ModelConfig(preset=name, **dict(zip(fields, shape, strict=True)), **rest)


# Shapes from the models' published configurations; tests/test_model.py checks the parameter counts.
PRESETS = {
    preset.preset: preset
    for preset in (
        ModelConfig(),
        _preset("tiny", 512, 32, 64, 2, 4, 2, 8, 128),
        _preset("stories260k", 512, 64, 172, 5, 8, 4, 8, 512),
        _preset(
            "llama3.2-1b", 128256, 2048, 8192, 16, 32, 8, 64, 131072,
            rope_base=500_000.0, rope_llama3=(32.0, 1.0, 4.0, 8192.0), remat="full",
        ),
        _preset(
            "llama3-8b", 128256, 4096, 14336, 32, 32, 8, 128, 8192,
            rope_base=500_000.0, tied=False, remat="full",
        ),
        _preset(
            "llama3-70b", 128256, 8192, 28672, 80, 64, 8, 128, 8192,
            rope_base=500_000.0, tied=False, remat="full",
        ),
        _preset(
            "qwen3-0.6b", 151936, 1024, 3072, 28, 16, 8, 128, 40960,
            rope_base=1_000_000.0, norm_eps=1e-6, qk_norm=True, remat="full",
        ),
        _preset("mistral-7b", 32000, 4096, 14336, 32, 32, 8, 128, 32768, tied=False, window=4096, remat="full"),
    )
}  # fmt: skip


def check_fit(config: ModelConfig, vocabulary: int, length: int) -> None:
    """Raises UserError where the tokenizer or sequences of `length` tokens do not fit the model."""
    if vocabulary > config.vocab:
        raise UserError(
            f"--model.vocab={config.vocab}: the tokenizer has {vocabulary} tokens; raise it to that"
        )
    if not 1 <= length <= config.context:
        raise UserError(
            f"sequences of {length} tokens: outside 1..{config.context}, --model.context; change one"
        )


def stored_model(run: str) -> ModelConfig:
    """Read the shape of the model of `run`, a run's folder.

    Raises UserError, naming the script that made the run, where there is no run, where it has
    fields that ModelConfig does not know, or where it was made with another model.py, a fork's.
    """
    return load_model_config(run, ModelConfig)

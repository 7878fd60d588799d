"""The shape of a decoder: its configuration, and the shapes of published models."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from runtime.errors import UserError, require
from runtime.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Range, check_ranges
from runtime.run_folder import load_model_config
from sharding import platform

RANGES = {
    "vocab": AT_LEAST_1,
    "width": AT_LEAST_1,
    "mlp_width": AT_LEAST_1,
    "layers": AT_LEAST_1,
    "heads": AT_LEAST_1,
    "kv_heads": AT_LEAST_1,
    "head_dim": AT_LEAST_1,
    "context": AT_LEAST_1,
    "window": AT_LEAST_1,
    "rope_base": AT_LEAST_1,
    "rope_local_base": AT_LEAST_1,
    "rope_scale": ABOVE_0,
    "rope_share": Range(low=0, high=1, without_low=True),
    "rope_llama3": ABOVE_0,
    "rope_yarn": ABOVE_0,
    "norm_eps": ABOVE_0,
    "experts_per_token": AT_LEAST_1,
    "router_loss_coef": AT_LEAST_0,
    "score_width": ABOVE_0,
    "attention_soft_cap": ABOVE_0,
    "logit_soft_cap": ABOVE_0,
}
"""Ranges of ModelConfig's numbers (runtime/ranges.py)."""
NEEDED = {
    "rope_local_base": "window",
    "window_pattern": "window",
    "qk_norm_over": "qk_norm",
    "experts_per_token": "experts",
    "router_norm": "experts",
    "router_loss_coef": "experts",
}
"""Fields of ModelConfig that nothing reads without another, and that one."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. `--model.preset=NAME` sets all of it; single fields then override."""

    # Sizes
    preset: str = "world"
    """Name of the preset that the other fields started from."""
    vocab: int = 1280
    """Rows of the embedding; at least the tokenizer's size."""
    width: int = 128
    """Model width D."""
    mlp_width: int = 256
    """Hidden width F of the feed-forward layers."""
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

    # Positions
    rope_base: float = 10_000.0
    """Base of RoPE's frequencies."""
    rope_local_base: float | None = None
    """Base in layers that have the window, where neither `rope_scale` nor another scaling applies
    (Gemma 3); None: as in the others."""
    rope_scale: float = 1.0
    """Positions are multiplied by this (linear interpolation)."""
    rope_llama3: tuple[float, float, float, float] | None = None
    """Llama 3.1 frequency scaling: factor, low and high frequency factor, original context."""
    rope_yarn: tuple[float, float, float, float, float] | None = None
    """YaRN: factor, rotations from which a pair is kept, rotations below which it is stretched
    whole, original context, and what cosines and sines are multiplied by."""
    rope_share: float = 1.0
    """Share of a head's width that RoPE turns, its first numbers (Phi 3, GPT-NeoX); the rest stays
    as it is."""

    # What models differ in
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with a bias (GPT-NeoX)."""
    norm_eps: float = 1e-5
    """Added to the mean square, or the variance, in norms."""
    tied: bool = True
    """Unembed with the embedding's transpose."""
    qkv_bias: bool = False
    """Bias on q, k, v (Qwen 2)."""
    o_bias: bool = False
    """Bias on the way back from the heads."""
    mlp_bias: bool = False
    """Biases of the feed-forward layers."""
    qk_norm: bool = False
    """RMSNorm on q and k before RoPE (Qwen 3)."""
    qk_norm_over: Literal["head", "heads"] = "head"
    """Numbers that this norm is over: each head's (Qwen 3), or those of all heads (OLMo 2)."""
    norms: Literal["before", "after", "both"] = "before"
    """Where a layer's norms are: before attention and the feed-forward layer, after them, or both
    (OLMo 2: after; Gemma 2: both)."""
    window: int | None = None
    """Sliding window of attention, in tokens (Mistral 7B v0.1); None: every earlier token."""
    window_pattern: tuple[bool, ...] = (True,)
    """Layers that have the window, a pattern repeated over them: True False is Gemma 2's."""
    score_width: float | None = None
    """Attention scores are divided by the square root of this; None: of head_dim (Gemma 2)."""
    attention_soft_cap: float | None = None
    """Scores s become cap tanh(s / cap); None: they stay (Gemma 2)."""
    logit_soft_cap: float | None = None
    """The same of the logits."""
    activation: Literal["silu", "gelu", "gelu_erf"] = "silu"
    """Of the feed-forward layers; gelu is its tanh approximation (Gemma), gelu_erf exact."""
    gated: bool = True
    """The activation gates another branch (SwiGLU); False: there is no other (GPT-NeoX)."""
    experts: int = 0
    """Experts E of each feed-forward layer (Mixtral, Qwen 3); 0: it is one network."""
    experts_per_token: int = 2
    """Experts that each token goes to."""
    router_norm: bool = True
    """The weights of a token's experts add up to 1; False: they stay shares among all experts."""
    router_loss_coef: float = 0.001
    """Coefficient of the loss that balances the experts' load; 0: there is none.
    Only train_lm.py and train_sft.py add it, and train_ppo.py for the text of --ptx_data."""
    parallel_residual: bool = False
    """The feed-forward layer reads a layer's input, not what attention made of it (GPT-NeoX)."""
    scale_embedding: bool = False
    """Multiply embedded tokens by sqrt(D) (Gemma)."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + their parameter, which starts at 0 (Gemma)."""

    # How it is computed; no parameter depends on it
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type; auto: bfloat16 on accelerators, float32 on CPU. Parameters are float32.
    float16 is finer than bfloat16 but ends at 65,504: updates that overflow are skipped."""
    remat: Literal["none", "dots", "full"] = "none"
    """Outputs that the backward pass recomputes: none, all but matmul outputs, or everything."""

    def __post_init__(self):
        # A stored config is JSON, which has lists only.
        for name in ("rope_llama3", "rope_yarn", "window_pattern"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        # Numbers that no model can have.
        check_ranges(self, RANGES, "model.")
        self._refuse_unread()
        # Each key/value head serves as many query heads; RoPE turns pairs.
        if self.heads % self.kv_heads:
            raise UserError(
                f"--model.kv_heads={self.kv_heads}: must divide --model.heads={self.heads} "
                "without remainder"
            )
        if self.head_dim % 2:
            raise UserError(f"--model.head_dim={self.head_dim}: RoPE needs an even width")
        if self.rope_width < 2 or self.rope_width % 2:
            raise UserError(
                f"--model.rope_share={self.rope_share}: RoPE needs an even width, not "
                f"{self.rope_width} of the {self.head_dim} numbers of a head"
            )
        if not any(self.window_pattern):
            raise UserError(
                f"--model.window_pattern={self.window_pattern}: no layer has the window; "
                "set --model.window=None"
            )
        self._check_experts()
        # Llama 3.1 interpolates from the low frequency factor up to the high one.
        if self.rope_llama3 is not None and not self.rope_llama3[1] < self.rope_llama3[2]:
            raise UserError(
                f"--model.rope_llama3={self.rope_llama3}: its low frequency factor must be below "
                "the high one"
            )
        # Both scale the same frequencies.
        if self.rope_yarn is not None and self.rope_llama3 is not None:
            raise UserError(
                f"--model.rope_yarn={self.rope_yarn}: not with --model.rope_llama3; "
                "set one of the two to None"
            )
        # YaRN stretches pairs of few rotations, and keeps those of many.
        if self.rope_yarn is not None and not self.rope_yarn[2] < self.rope_yarn[1]:
            raise UserError(
                f"--model.rope_yarn={self.rope_yarn}: its third number must be below its second"
            )

    def _refuse_unread(self) -> None:
        """Raise UserError for a field that would have no effect, rather than pass it over."""
        for name, needed in NEEDED.items():
            value = getattr(self, name)
            default = getattr(ModelConfig, name)
            require(
                bool(getattr(self, needed)) or value == default,
                f"--model.{name}={value}: not read without --model.{needed}; "
                f"set that, or this to {default}",
            )

    def _check_experts(self) -> None:
        """Raise UserError for experts that no layer can have."""
        # A token goes to different experts; each of them is a SwiGLU.
        if self.experts and self.experts_per_token > self.experts:
            raise UserError(
                f"--model.experts_per_token={self.experts_per_token}: more than "
                f"--model.experts={self.experts}; lower it"
            )
        if self.experts and (self.mlp_bias or not self.gated):
            raise UserError(
                f"--model.experts={self.experts}: experts are gated and without biases; "
                "leave --model.mlp_bias and --model.gated out"
            )

    @staticmethod
    def from_preset(name: str) -> "ModelConfig":
        """Return the preset `name`, a key of PRESETS; raise UserError with the known names."""
        if name not in PRESETS:
            raise UserError(f"--model.preset={name}: unknown; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @property
    def rope_width(self) -> int:
        """Return how many numbers of a head RoPE turns: a property."""
        return int(self.head_dim * self.rope_share)

    @property
    def windowed_layers(self) -> tuple[bool, ...]:
        """Return for each layer if it has the window: a property."""
        # As often as covers all layers; the last repetition is cut.
        repeats = -(-self.layers // len(self.window_pattern))
        pattern = self.window_pattern * repeats
        return tuple(
            self.window is not None and has_window for has_window in pattern[: self.layers]
        )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Return the type of activations and of matmul operands, by the field `dtype`: a property.

        `auto` goes by sharding.platform: float32 on a CPU, else bfloat16. Raises UserError for
        float16 on a TPU.
        """
        if self.dtype == "auto":
            return jnp.dtype("float32" if platform() == "cpu" else "bfloat16")
        if self.dtype == "float16" and platform() == "tpu":
            raise UserError("--model.dtype=float16: TPUs compute in bfloat16 or float32")
        return jnp.dtype(self.dtype)


# Shapes of the models' published configurations; tests/test_model.py counts their parameters.
_PRESETS = (
    # Ours, for the built-in world and for tests
    ModelConfig(),
    ModelConfig(
        preset="tiny",
        vocab=512,
        width=32,
        mlp_width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        context=256,
    ),
    # llama2.c
    ModelConfig(
        preset="stories260k",
        vocab=512,
        width=64,
        mlp_width=172,
        layers=5,
        heads=8,
        kv_heads=4,
        head_dim=8,
        context=512,
    ),
    # Llama 3 and 3.2
    ModelConfig(
        preset="llama3.2-1b",
        vocab=128256,
        width=2048,
        mlp_width=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        context=131072,
        rope_base=500_000.0,
        rope_llama3=(32.0, 1.0, 4.0, 8192.0),
        remat="full",
    ),
    # Llama 3 itself, whose context needs no scaling of positions
    ModelConfig(
        preset="llama3-8b",
        vocab=128256,
        width=4096,
        mlp_width=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        context=8192,
        rope_base=500_000.0,
        tied=False,
        remat="full",
    ),
    ModelConfig(
        preset="llama3-70b",
        vocab=128256,
        width=8192,
        mlp_width=28672,
        layers=80,
        heads=64,
        kv_heads=8,
        head_dim=128,
        context=8192,
        rope_base=500_000.0,
        tied=False,
        remat="full",
    ),
    # Others, and what sets each apart from Llama
    # Norms on queries and keys
    ModelConfig(
        preset="qwen3-0.6b",
        vocab=151936,
        width=1024,
        mlp_width=3072,
        layers=28,
        heads=16,
        kv_heads=8,
        head_dim=128,
        context=40960,
        rope_base=1_000_000.0,
        norm_eps=1e-06,
        qk_norm=True,
        remat="full",
    ),
    # A window in every layer
    ModelConfig(
        preset="mistral-7b",
        vocab=32000,
        width=4096,
        mlp_width=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        context=32768,
        tied=False,
        window=4096,
        remat="full",
    ),
    # Many small experts, of which each token goes to 8
    ModelConfig(
        preset="qwen3-30b-a3b",
        vocab=151936,
        width=2048,
        mlp_width=768,
        layers=48,
        heads=32,
        kv_heads=4,
        head_dim=128,
        context=40960,
        rope_base=1_000_000.0,
        norm_eps=1e-06,
        tied=False,
        qk_norm=True,
        experts=128,
        experts_per_token=8,
        remat="full",
    ),
    # Few large experts, of which each token goes to 2
    ModelConfig(
        preset="mixtral-8x7b",
        vocab=32000,
        width=4096,
        mlp_width=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        context=32768,
        rope_base=1_000_000.0,
        tied=False,
        experts=8,
        router_loss_coef=0.02,
        remat="full",
    ),
    # As many key/value heads as query heads, and a window
    ModelConfig(
        preset="phi3-mini",
        vocab=32064,
        width=3072,
        mlp_width=8192,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=96,
        context=4096,
        tied=False,
        window=2047,
        remat="full",
    ),
    # GPT-NeoX: LayerNorm, biases, parallel branches, RoPE on a quarter of each head
    ModelConfig(
        preset="pythia-1b",
        vocab=50304,
        width=2048,
        mlp_width=8192,
        layers=16,
        heads=8,
        kv_heads=8,
        head_dim=256,
        context=2048,
        rope_share=0.25,
        norm="layer",
        tied=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        activation="gelu_erf",
        gated=False,
        parallel_residual=True,
        remat="full",
    ),
    # A window in every other layer, norms on both sides, soft caps
    ModelConfig(
        preset="gemma2-2b",
        vocab=256000,
        width=2304,
        mlp_width=9216,
        layers=26,
        heads=8,
        kv_heads=4,
        head_dim=256,
        context=8192,
        norm_eps=1e-06,
        norms="both",
        window=4096,
        window_pattern=(True, False),
        score_width=256.0,
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
        activation="gelu",
        scale_embedding=True,
        zero_centered_norm=True,
        remat="full",
    ),
    # A window in five layers of six, with a base of RoPE of their own
    ModelConfig(
        preset="gemma3-1b",
        vocab=262144,
        width=1152,
        mlp_width=6912,
        layers=26,
        heads=4,
        kv_heads=1,
        head_dim=256,
        context=32768,
        rope_base=1_000_000.0,
        rope_local_base=10_000.0,
        norm_eps=1e-06,
        qk_norm=True,
        norms="both",
        window=512,
        window_pattern=(True, True, True, True, True, False),
        score_width=256.0,
        activation="gelu",
        scale_embedding=True,
        zero_centered_norm=True,
        remat="full",
    ),
    # Norms after the layers; those on queries and keys are over all heads
    ModelConfig(
        preset="olmo2-7b",
        vocab=100352,
        width=4096,
        mlp_width=11008,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        context=4096,
        rope_base=500_000.0,
        norm_eps=1e-06,
        tied=False,
        qk_norm=True,
        qk_norm_over="heads",
        norms="after",
        remat="full",
    ),
)
PRESETS = {preset.preset: preset for preset in _PRESETS}
"""Configurations by the name of the preset."""


def check_fit(config: ModelConfig, vocabulary: int, length: int) -> None:
    """Raise UserError unless `vocabulary` tokens and rows of `length` tokens fit the model.

    `vocabulary`, the tokenizer's size, may be at most `config.vocab`; `length` from 1 to
    `config.context`.
    """
    # Every token needs a row of the embedding, every position a place in the context.
    if vocabulary > config.vocab:
        raise UserError(
            f"--model.vocab={config.vocab}: the tokenizer has {vocabulary} tokens; "
            "raise it to that"
        )
    if not 1 <= length <= config.context:
        raise UserError(
            f"sequences of {length} tokens: outside 1..{config.context}, --model.context; "
            "change one"
        )


def stored_model(run: str) -> ModelConfig:
    """Read the shape of the model of `run`, a run's folder, from its config.json alone.

    Any script's run will do. Fields that it lacks take their defaults. Raises UserError where
    there is no run or a damaged one, and, naming what made it, where it has fields that
    ModelConfig does not know or was made with another model.py, a fork's.
    """
    return load_model_config(run, ModelConfig)

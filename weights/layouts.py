"""How weights lie in Hugging Face's files: their names there, their axes, and what is joined."""

from typing import NamedTuple


class Layout(NamedTuple):
    """How a weight lies here and in Hugging Face's files, in the letters of model.py's legend.

    Weights of ours with the same name of theirs share that tensor: one behind another along its
    first axis, in the order of the table.
    """

    ours: str
    """Axes of ours, without the layer's."""
    name: str
    """Their name of the tensor, with a place for the layer's number."""
    theirs: tuple[str, ...]
    """Their axes; one of theirs may join two of ours."""


LAYER = "model.layers.{}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."

LAYOUTS = {
    "decoder/embed": Layout("VD", "model.embed_tokens.weight", ("V", "D")),
    "decoder/final_norm": Layout("D", "model.norm.weight", ("D",)),
    "decoder/layers/attention_norm": Layout("D", LAYER + "input_layernorm.weight", ("D",)),
    "decoder/layers/mlp_norm": Layout("D", LAYER + "post_attention_layernorm.weight", ("D",)),
    "decoder/layers/attention/q": Layout("DNH", ATTENTION + "q_proj.weight", ("NH", "D")),
    "decoder/layers/attention/k": Layout("DKH", ATTENTION + "k_proj.weight", ("KH", "D")),
    "decoder/layers/attention/v": Layout("DKH", ATTENTION + "v_proj.weight", ("KH", "D")),
    "decoder/layers/attention/o": Layout("NHD", ATTENTION + "o_proj.weight", ("D", "NH")),
    "decoder/layers/attention/q_bias": Layout("NH", ATTENTION + "q_proj.bias", ("NH",)),
    "decoder/layers/attention/k_bias": Layout("KH", ATTENTION + "k_proj.bias", ("KH",)),
    "decoder/layers/attention/v_bias": Layout("KH", ATTENTION + "v_proj.bias", ("KH",)),
    "decoder/layers/attention/q_norm": Layout("H", ATTENTION + "q_norm.weight", ("H",)),
    "decoder/layers/attention/k_norm": Layout("H", ATTENTION + "k_norm.weight", ("H",)),
    "decoder/layers/attention/q_heads_norm": Layout("NH", ATTENTION + "q_norm.weight", ("NH",)),
    "decoder/layers/attention/k_heads_norm": Layout("KH", ATTENTION + "k_norm.weight", ("KH",)),
    "decoder/layers/mlp/gate": Layout("DF", MLP + "gate_proj.weight", ("F", "D")),
    "decoder/layers/mlp/up": Layout("DF", MLP + "up_proj.weight", ("F", "D")),
    "decoder/layers/mlp/down": Layout("FD", MLP + "down_proj.weight", ("D", "F")),
    "unembed": Layout("DV", "lm_head.weight", ("V", "D")),
}
"""By the path of a parameter of ours: Llama's, of which the other families' tables say where they
differ."""

NORMS_AFTER = {
    "decoder/layers/attention_out_norm": Layout(
        "D", LAYER + "post_attention_layernorm.weight", ("D",)
    ),
    "decoder/layers/mlp_norm": Layout("D", LAYER + "pre_feedforward_layernorm.weight", ("D",)),
    "decoder/layers/mlp_out_norm": Layout(
        "D", LAYER + "post_feedforward_layernorm.weight", ("D",)
    ),
}
"""Norms of layers that have some after attention and the feed-forward layer (OLMo 2, Gemma 2)."""

PHI3 = {
    "decoder/layers/attention/q": Layout("DNH", ATTENTION + "qkv_proj.weight", ("NH", "D")),
    "decoder/layers/attention/k": Layout("DKH", ATTENTION + "qkv_proj.weight", ("KH", "D")),
    "decoder/layers/attention/v": Layout("DKH", ATTENTION + "qkv_proj.weight", ("KH", "D")),
    "decoder/layers/mlp/gate": Layout("DF", MLP + "gate_up_proj.weight", ("F", "D")),
    "decoder/layers/mlp/up": Layout("DF", MLP + "gate_up_proj.weight", ("F", "D")),
}
"""One matrix for q, k and v, and one for gate and up."""

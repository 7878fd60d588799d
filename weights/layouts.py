"""How weights lie in Hugging Face's files: their names there, their axes, and what is joined."""

from typing import NamedTuple


class Layout(NamedTuple):
    """How a weight lies here and in Hugging Face's files, in the letters of model.py's legend.

    Weights of ours with the same name of theirs share that tensor: one behind another along its
    first axis, in the order of the table.
    """

    ours: str
    """Axes of ours, without the layer's and the expert's."""
    name: str
    """Their name of the tensor, with a place for the layer's number, and one for the expert's."""
    theirs: tuple[str, ...]
    """Their axes; one of theirs may join two of ours."""
    takes_turns: bool = False
    """Weights that share a tensor lie one behind another within each head, not as wholes."""


LAYER = "model.layers.{}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."

LAYOUTS = {
    # The embedding, and norms
    "decoder/embed": Layout("VD", "model.embed_tokens.weight", ("V", "D")),
    "decoder/final_norm": Layout("D", "model.norm.weight", ("D",)),
    "decoder/layers/attention_norm": Layout("D", LAYER + "input_layernorm.weight", ("D",)),
    "decoder/layers/mlp_norm": Layout("D", LAYER + "post_attention_layernorm.weight", ("D",)),
    # Attention: weights, biases, norms of each head's queries and keys, norms over all heads
    "decoder/layers/attention/q": Layout("DNH", ATTENTION + "q_proj.weight", ("NH", "D")),
    "decoder/layers/attention/k": Layout("DKH", ATTENTION + "k_proj.weight", ("KH", "D")),
    "decoder/layers/attention/v": Layout("DKH", ATTENTION + "v_proj.weight", ("KH", "D")),
    "decoder/layers/attention/o": Layout("NHD", ATTENTION + "o_proj.weight", ("D", "NH")),
    "decoder/layers/attention/q_bias": Layout("NH", ATTENTION + "q_proj.bias", ("NH",)),
    "decoder/layers/attention/k_bias": Layout("KH", ATTENTION + "k_proj.bias", ("KH",)),
    "decoder/layers/attention/v_bias": Layout("KH", ATTENTION + "v_proj.bias", ("KH",)),
    "decoder/layers/attention/o_bias": Layout("D", ATTENTION + "o_proj.bias", ("D",)),
    "decoder/layers/attention/q_norm": Layout("H", ATTENTION + "q_norm.weight", ("H",)),
    "decoder/layers/attention/k_norm": Layout("H", ATTENTION + "k_norm.weight", ("H",)),
    "decoder/layers/attention/q_heads_norm": Layout("NH", ATTENTION + "q_norm.weight", ("NH",)),
    "decoder/layers/attention/k_heads_norm": Layout("KH", ATTENTION + "k_norm.weight", ("KH",)),
    # The feed-forward layer
    "decoder/layers/mlp/gate": Layout("DF", MLP + "gate_proj.weight", ("F", "D")),
    "decoder/layers/mlp/up": Layout("DF", MLP + "up_proj.weight", ("F", "D")),
    "decoder/layers/mlp/down": Layout("FD", MLP + "down_proj.weight", ("D", "F")),
    "decoder/layers/mlp/gate_bias": Layout("F", MLP + "gate_proj.bias", ("F",)),
    "decoder/layers/mlp/up_bias": Layout("F", MLP + "up_proj.bias", ("F",)),
    "decoder/layers/mlp/down_bias": Layout("D", MLP + "down_proj.bias", ("D",)),
    # The head, where it is not the embedding
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

NEOX_LAYER = "gpt_neox.layers.{}."
QKV = NEOX_LAYER + "attention.query_key_value."
NEOX = {
    # The embedding, and norms, which have biases
    "decoder/embed": Layout("VD", "gpt_neox.embed_in.weight", ("V", "D")),
    "decoder/final_norm": Layout("D", "gpt_neox.final_layer_norm.weight", ("D",)),
    "decoder/final_norm_bias": Layout("D", "gpt_neox.final_layer_norm.bias", ("D",)),
    "decoder/layers/attention_norm": Layout("D", NEOX_LAYER + "input_layernorm.weight", ("D",)),
    "decoder/layers/attention_norm_bias": Layout("D", NEOX_LAYER + "input_layernorm.bias", ("D",)),
    "decoder/layers/mlp_norm": Layout("D", NEOX_LAYER + "post_attention_layernorm.weight", ("D",)),
    "decoder/layers/mlp_norm_bias": Layout(
        "D", NEOX_LAYER + "post_attention_layernorm.bias", ("D",)
    ),
    # Attention: one tensor for q, k and v
    "decoder/layers/attention/q": Layout("DNH", QKV + "weight", ("NH", "D"), takes_turns=True),
    "decoder/layers/attention/k": Layout("DKH", QKV + "weight", ("KH", "D"), takes_turns=True),
    "decoder/layers/attention/v": Layout("DKH", QKV + "weight", ("KH", "D"), takes_turns=True),
    "decoder/layers/attention/q_bias": Layout("NH", QKV + "bias", ("NH",), takes_turns=True),
    "decoder/layers/attention/k_bias": Layout("KH", QKV + "bias", ("KH",), takes_turns=True),
    "decoder/layers/attention/v_bias": Layout("KH", QKV + "bias", ("KH",), takes_turns=True),
    "decoder/layers/attention/o": Layout(
        "NHD", NEOX_LAYER + "attention.dense.weight", ("D", "NH")
    ),
    "decoder/layers/attention/o_bias": Layout("D", NEOX_LAYER + "attention.dense.bias", ("D",)),
    # The feed-forward layer, which has no gate, and the head
    "decoder/layers/mlp/up": Layout("DF", NEOX_LAYER + "mlp.dense_h_to_4h.weight", ("F", "D")),
    "decoder/layers/mlp/up_bias": Layout("F", NEOX_LAYER + "mlp.dense_h_to_4h.bias", ("F",)),
    "decoder/layers/mlp/down": Layout("FD", NEOX_LAYER + "mlp.dense_4h_to_h.weight", ("D", "F")),
    "decoder/layers/mlp/down_bias": Layout("D", NEOX_LAYER + "mlp.dense_4h_to_h.bias", ("D",)),
    "unembed": Layout("DV", "embed_out.weight", ("V", "D")),
}
"""Names of its own, and q, k and v of one head after another."""


def _experts(folder: str, gate: str, up: str, down: str) -> dict[str, Layout]:
    """Return the layouts of a mixture of experts in which each expert has tensors of its own."""
    expert = folder + "experts.{}."
    return {
        "decoder/layers/mlp/router": Layout("DE", folder + "gate.weight", ("E", "D")),
        "decoder/layers/mlp/expert_gate": Layout("DF", f"{expert}{gate}.weight", ("F", "D")),
        "decoder/layers/mlp/expert_up": Layout("DF", f"{expert}{up}.weight", ("F", "D")),
        "decoder/layers/mlp/expert_down": Layout("FD", f"{expert}{down}.weight", ("D", "F")),
    }


MIXTRAL = _experts(LAYER + "block_sparse_moe.", "w1", "w3", "w2")
QWEN_MOE = _experts(MLP, "gate_proj", "up_proj", "down_proj")

PHI3 = {
    "decoder/layers/attention/q": Layout("DNH", ATTENTION + "qkv_proj.weight", ("NH", "D")),
    "decoder/layers/attention/k": Layout("DKH", ATTENTION + "qkv_proj.weight", ("KH", "D")),
    "decoder/layers/attention/v": Layout("DKH", ATTENTION + "qkv_proj.weight", ("KH", "D")),
    "decoder/layers/mlp/gate": Layout("DF", MLP + "gate_up_proj.weight", ("F", "D")),
    "decoder/layers/mlp/up": Layout("DF", MLP + "gate_up_proj.weight", ("F", "D")),
}
"""One matrix for q, k and v, and one for gate and up."""

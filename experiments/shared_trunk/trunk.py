"""Policy and value on one decoder: both losses from one pass over it, and one back.

Parameters are `{"policy": those of a LanguageModel, "value": {"head": [D], "bias": []}}`. So the
policy is a language model like any other, and the value head lies beside it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from model import LanguageOutput, Params
from objectives.likelihood import Apply, LossSum, hidden_logprobs
from objectives.policy import (
    Responses,
    clipped_surrogate,
    clipped_value_loss,
    masked,
    response_labels,
    response_states,
)
from objectives.unpadded import run_model


def with_value_head(policy: Params) -> Params:
    """Return the parameters of a trunk: `policy`, of a LanguageModel, and a value head of zeros.

    Zeros are what the critic of train_ppo.py starts with where no reward is a model: the first
    values are 0. A reward model's head would read the states of another decoder.
    """
    width = policy["decoder"]["embed"].shape[1]
    head_D = jnp.zeros(width, jnp.float32)
    return {"policy": policy, "value": {"head": head_D, "bias": jnp.float32(0.0)}}


def logprobs_and_values(
    apply: Apply, params: Params, batch: Responses, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Return each response token's log-probability, and the value of the state it is drawn in.

    [B, R] each, float32; nats at the sampling temperature, which must be above 0. One pass.
    `params`: of `with_value_head`; `apply` is that of a LanguageModel. Padding has both, too.
    """
    # Where the batch has a room, over its real tokens alone.
    output: LanguageOutput = run_model(apply, params["policy"], batch)

    # T is R + 1 from here on. The last position predicts nothing, and is no token's state.
    x_BTD = response_states(batch, output.x_BTD)
    labels_BT = response_labels(batch)
    logp_BT = hidden_logprobs(x_BTD, output.unembed_DV, labels_BT, temperature)
    values_BT = read_values(params["value"], x_BTD)
    return logp_BT[:, :-1], values_BT[:, :-1]


def read_values(head: Params, x_BTD: jax.Array) -> jax.Array:
    """Read the value of each state [B, T] from the decoder's last hidden states, in float32.

    `head`: `head` [D] and `bias`, as of model.ScalarModel.
    """
    # Accelerators would round the factors to half of float32's bits.
    x32_BTD = x_BTD.astype(jnp.float32)
    products_BT = jnp.einsum("BTD,D->BT", x32_BTD, head["head"], precision="highest")
    return products_BT + head["bias"]


def trunk_objective(
    apply: Apply,
    params: Params,
    batch: Responses,
    *,
    clip: float,
    value_clip: float,
    value_coef: float,
    temperature: float,
) -> LossSum:
    """Sum PPO's clipped surrogate and `value_coef` times the clipped square error of the values.

    Schulman et al. 2017, eq. 9, of one network. `batch` has `old_logp_BR`, `advantages_BR`,
    `old_values_BR` and `returns_BR`, [B, R], too. `clip`: of the ratio, on both sides;
    `value_clip`: of the value's change (objectives.policy.clipped_value_loss). The weight is the
    number of response tokens. Metrics are those of `clipped_surrogate`, and policy_loss,
    value_loss and square_error, which is not clipped and not halved.
    """
    # One pass for both.
    mask_BR = batch["mask_BR"]
    tokens = mask_BR.sum()
    logp_BR, values_BR = logprobs_and_values(apply, params, batch, temperature)

    # The policy's loss.
    losses_BR, metrics = clipped_surrogate(logp_BR, batch, clip, clip)
    policy_loss = masked(losses_BR, mask_BR).sum()

    # The values': 0 outside the mask, as all three are there.
    values_BR = masked(values_BR, mask_BR)
    returns_BR = masked(batch["returns_BR"], mask_BR)
    old_BR = masked(batch["old_values_BR"], mask_BR)
    value_loss = clipped_value_loss(values_BR, old_BR, returns_BR, value_clip).sum()
    square_error = jnp.square(values_BR - returns_BR).sum()

    more: dict[str, Any] = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "square_error": square_error,
    }
    metrics |= {name: (total, tokens) for name, total in more.items()}
    return policy_loss + value_coef * value_loss, (tokens, metrics)

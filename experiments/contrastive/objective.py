"""The loss of contrastive instructions: InfoNCE over the prompts that a response may answer."""

import jax
import jax.numpy as jnp
from jax import Array

from objectives import direct


def contrastive(logps_BC: Array, ranks_BC: Array, tokens_BC: Array) -> Array:
    """Return -log of the share of the true prompt among C prompts for one response, [B] nats.

    `logps_BC`: the response's log-probability after each prompt, a sum over tokens. `ranks_BC`: 1
    marks its own prompt, 0 an absent one. `tokens_BC` is not used. Zhang et al. 2023, contrastive
    instruction labelling.
    """
    # log sum over prompts, absent ones left out, less the true prompt's term.
    scores_BC = jnp.where(ranks_BC > 0, logps_BC, -jnp.inf)
    true_B = (logps_BC * direct.best(ranks_BC)).sum(1)
    return jax.nn.logsumexp(scores_BC, axis=1) - true_B

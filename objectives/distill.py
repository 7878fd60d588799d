"""Distillation: divergences between a teacher's and a student's next tokens, and the objective that sums them.

The divergences take logits [B, T, V] and a mask of the positions that count, and return nats [B, T], 0 elsewhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model import unembed
from objectives.likelihood import Apply, inputs, token_logprobs

Divergence = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def kl(logp_BTV: jax.Array, logq_BTV: jax.Array) -> jax.Array:
    """KL(P || Q) = sum_v p_v (log p_v - log q_v), [B, T] in nats, from log-probabilities."""
    return (jnp.exp(logp_BTV) * (logp_BTV - logq_BTV)).sum(-1)


def forward_kl(student_BTV: jax.Array, teacher_BTV: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """KL(teacher || student): covers all that the teacher may say.

    Less the teacher's entropy it is the cross-entropy with soft targets of Hinton et al. 2015, section 2, whose
    gradient is their eq. 2; Agarwal et al. 2024, section 2.
    """
    return kl(jax.nn.log_softmax(teacher_BTV), jax.nn.log_softmax(student_BTV)) * mask_BT


def reverse_kl(student_BTV: jax.Array, teacher_BTV: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """KL(student || teacher): seeks a mode of the teacher's (Agarwal et al. 2024, section 2)."""
    return kl(jax.nn.log_softmax(student_BTV), jax.nn.log_softmax(teacher_BTV)) * mask_BT


def jsd(
    student_BTV: jax.Array, teacher_BTV: jax.Array, mask_BT: jax.Array, *, beta: float
) -> jax.Array:
    """beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta teacher + (1 - beta) student; 0 < beta < 1.

    The generalised Jensen-Shannon divergence (Agarwal et al. 2024, eq. 1). Divided by beta it tends to the forward
    KL as beta tends to 0; divided by 1 - beta, to the reverse KL as beta tends to 1.
    """
    logp_BTV, logq_BTV = jax.nn.log_softmax(teacher_BTV), jax.nn.log_softmax(student_BTV)
    logm_BTV = jnp.logaddexp(logp_BTV + jnp.log(beta), logq_BTV + jnp.log1p(-beta))
    return (beta * kl(logp_BTV, logm_BTV) + (1 - beta) * kl(logq_BTV, logm_BTV)) * mask_BT


def distill_objective(
    apply: Apply,
    teacher_apply: Apply,
    params: dict[str, Any],
    batch: dict[str, jax.Array],
    *,
    divergence: Divergence,
    alpha: float,
    tau: float,
    labelled: bool = True,
):
    """alpha CE + (1 - alpha) tau^2 D(teacher, student), both at temperature tau in D; summed over tokens.

    Hinton et al. 2015, section 2: D's gradient falls as 1/tau^2, which the factor makes up for. `params`: of
    "student" and "teacher". Not `labelled` are the student's own samples, whose tokens are no targets: they have
    the second term alone (Agarwal et al. 2024, section 3; here a token's weight is the same in long responses).
    Vocabularies may be padded to different sizes: D is over the tokens that both have.
    """
    mask_BT = batch["loss_mask_BT"]
    student = apply(params["student"], *inputs(batch))
    teacher = teacher_apply(params["teacher"], *inputs(batch))
    logits_BTV = unembed(student.x_BTD, student.unembed_DV)
    teacher_BTV = unembed(teacher.x_BTD, teacher.unembed_DV)
    shared = min(logits_BTV.shape[-1], teacher_BTV.shape[-1])
    before_BT = jnp.pad(
        mask_BT[:, 1:], ((0, 0), (0, 1))
    )  # where the logits predict a token that counts
    pair = (logits_BTV[..., :shared] / tau, teacher_BTV[..., :shared] / tau)
    gap = divergence(*pair, before_BT).sum()
    nll = -(token_logprobs(logits_BTV, batch["tokens_BT"]) * mask_BT).sum()
    loss = (alpha * nll if labelled else 0.0) + (1 - alpha) * tau**2 * gap
    tokens = mask_BT.sum()
    return loss, (tokens, {"nll": (nll, tokens), "divergence": (gap, tokens)})

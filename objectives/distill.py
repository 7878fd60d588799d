"""Distillation: divergences between a teacher's and a student's next tokens, and the objective.

A divergence takes logits [B, T, V] of both and a mask [B, T] of the positions that count, and
returns nats [B, T], 0 elsewhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from model import unembed
from objectives.likelihood import Apply, LossSum, TokenBatch, inputs, token_logprobs

Divergence = Callable[[Array, Array, Array], Array]
"""divergence(student_BTV, teacher_BTV, mask_BT) -> [B, T]"""


def kl(logp_BTV: Array, logq_BTV: Array) -> Array:
    """Return KL(P || Q) = sum_v p_v (log p_v - log q_v), [B, T] nats, at every position.

    Arguments: log-probabilities of P and of Q, normalised over V and finite, not logits.
    """
    p_BTV = jnp.exp(logp_BTV)
    return (p_BTV * (logp_BTV - logq_BTV)).sum(-1)


def forward_kl(student_BTV: Array, teacher_BTV: Array, mask_BT: Array) -> Array:
    """Return KL(teacher || student), [B, T] nats, 0 where `mask_BT` is 0, from the logits of both.

    Logits [B, T, V], of one V, must be finite. `mask_BT`: 1 at positions that count, else 0.
    Gradients reach both: the caller keeps the teacher's out. The student learns to cover all that
    the teacher may say. Plus the teacher's entropy it is the cross-entropy with soft targets of
    Hinton et al. 2015, section 2, whose gradient is their eq. 2; Agarwal et al. 2024, section 2.
    """
    # The expectation is under the teacher: what it may say and the student would not costs.
    teacher_logp_BTV = jax.nn.log_softmax(teacher_BTV)
    student_logp_BTV = jax.nn.log_softmax(student_BTV)
    return kl(teacher_logp_BTV, student_logp_BTV) * mask_BT


def reverse_kl(student_BTV: Array, teacher_BTV: Array, mask_BT: Array) -> Array:
    """Return KL(student || teacher), [B, T] nats, 0 where `mask_BT` is 0, from the logits of both.

    Logits [B, T, V], of one V, must be finite. `mask_BT`: 1 at positions that count, else 0.
    Gradients reach both: the caller keeps the teacher's out. The student seeks a mode of the
    teacher. Agarwal et al. 2024, section 2.
    """
    # The expectation is under the student: what the teacher alone would say costs nothing.
    student_logp_BTV = jax.nn.log_softmax(student_BTV)
    teacher_logp_BTV = jax.nn.log_softmax(teacher_BTV)
    return kl(student_logp_BTV, teacher_logp_BTV) * mask_BT


def jsd(student_BTV: Array, teacher_BTV: Array, mask_BT: Array, *, beta: float) -> Array:
    """Return the generalised Jensen-Shannon divergence, [B, T] nats, from logits; 0 < `beta` < 1.

    beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta teacher + (1 - beta) student
    (Agarwal et al. 2024, eq. 1); 0 where `mask_BT` is 0. Gradients reach both. `beta` is not
    checked. Divided by beta it tends to the forward KL as beta tends to 0; divided by 1 - beta, to
    the reverse KL as beta tends to 1.
    """
    logp_BTV = jax.nn.log_softmax(teacher_BTV)
    logq_BTV = jax.nn.log_softmax(student_BTV)
    # The mixture in logs, so that no probability vanishes.
    weighted_p_BTV = logp_BTV + jnp.log(beta)
    weighted_q_BTV = logq_BTV + jnp.log1p(-beta)
    logm_BTV = jnp.logaddexp(weighted_p_BTV, weighted_q_BTV)
    from_teacher_BT = kl(logp_BTV, logm_BTV)
    from_student_BT = kl(logq_BTV, logm_BTV)
    return (beta * from_teacher_BT + (1 - beta) * from_student_BT) * mask_BT


def distill_objective(
    apply: Apply,
    teacher_apply: Apply,
    params: dict[str, Any],
    batch: TokenBatch,
    *,
    divergence: Divergence,
    alpha: float,
    tau: float,
    labelled: bool = True,
) -> LossSum:
    """Sum alpha CE + (1 - alpha) tau^2 D(teacher, student) over tokens, in nats.

    The weight is the number of tokens, those under the batch's `loss_mask_BT`, each counted at the
    position that predicts it. `params`: {"student", "teacher"}, whole parameters of two
    LanguageModels, whose functions are `apply` and `teacher_apply`; both are always run. Gradients
    reach both: the caller keeps the teacher's out. CE: the student's cross-entropy to the tokens
    of `batch`, at temperature 1. D is `divergence`: `forward_kl`, `reverse_kl`, or `jsd` with
    `beta` bound, on logits divided by `tau`; tau^2 makes up for its gradient, which falls as
    1/tau^2 (Hinton et al. 2015, section 2). Auxiliary losses of the models are not added.

    `labelled=False`, for the student's own samples, whose tokens are no targets, drops CE from the
    loss, not from the metrics, and keeps the factors of D (Agarwal et al. 2024, section 3; here a
    token weighs the same in responses of any length). Vocabularies may be padded to different
    sizes: D is over the ids that both have, each model normalised over them. Metrics, nats a
    token: `nll`, which is CE, and `divergence`, D without its factors.
    """
    # Logits of both; position t predicts token t + 1.
    student = apply(params["student"], *inputs(batch))
    teacher = teacher_apply(params["teacher"], *inputs(batch))
    student_BTV = unembed(student.x_BTD, student.unembed_DV)
    teacher_BTV = unembed(teacher.x_BTD, teacher.unembed_DV)

    # D at the positions that predict a token under the loss mask.
    mask_BT = batch["loss_mask_BT"]
    next_BT = mask_BT[:, 1:]
    predicts_BT = jnp.pad(next_BT, ((0, 0), (0, 1)))
    *_, student_vocab = student_BTV.shape
    *_, teacher_vocab = teacher_BTV.shape
    shared = min(student_vocab, teacher_vocab)
    soft_student_BTV = student_BTV[..., :shared] / tau
    soft_teacher_BTV = teacher_BTV[..., :shared] / tau
    gap = divergence(soft_student_BTV, soft_teacher_BTV, predicts_BT).sum()

    # Cross-entropy on the tokens themselves.
    logp_BT = token_logprobs(student_BTV, batch["tokens_BT"])
    nll = -(logp_BT * mask_BT).sum()
    # What the student sampled itself is no target for it.
    labels = alpha * nll if labelled else 0.0
    loss = labels + (1 - alpha) * tau**2 * gap
    tokens = mask_BT.sum()
    metrics = {"nll": (nll, tokens), "divergence": (gap, tokens)}
    return loss, (tokens, metrics)

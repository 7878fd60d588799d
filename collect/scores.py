"""Scores of rows by models, and by their length: what collect/select.py chooses by.

Each function returns one number a record of a source, [N] float64; nan where a record has none.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from collect.examples import Example, example_of, over_examples, record_example, texts_to_judge
from data.preferences import best_and_worst_response
from data.records import Record
from data.sources import Source
from data.tokenizer import Tokenizer
from model import LanguageModel, Params, init_and_apply
from model_config import ModelConfig
from objectives.likelihood import TokenBatch, following, hidden_logprobs, inputs, shifted
from objectives.policy import last_token
from responses import LoadedRun, in_parts
from rewards.judges import make_probability_of_a, request_text
from rewards.models import Prompt, make_scalars
from runtime.errors import UserError

QUESTION = """###
{prompt}

{response}
###
Does the text between the marks hold an informative example for training a helpful, honest and \
harmless assistant? It should be well written and to the point, and answer what is asked. \
Answer with yes or no."""
"""Asked of a model about a row (Ask-LLM, Sachdeva et al. 2024, figure 3, for alignment)."""
# Records read at a time.
RECORDS = 1024

Score = Callable[[list[Record]], np.ndarray]


def over_records(score: Score, source: Source, name: str) -> np.ndarray:
    """Return `score(records)`, [n, ...], of all records of `source`, read part by part."""
    found = []
    for start in in_parts(len(source), RECORDS, name, "row"):
        numbers = range(start, min(start + RECORDS, len(source)))
        found.append(score([source[i] for i in numbers]))
    return np.concatenate(found).astype(float)


# --- of a language model


def make_response_losses(
    config: ModelConfig, tokenizer: Tokenizer, length: int
) -> Callable[[Params, Sequence[Example]], np.ndarray]:
    """Make the measure of responses by a language model of shape `config`.

    Returns losses(params, examples) -> [n, 2]: the negative log-probability of each response, in
    nats, and its tokens. Examples have at most `length` tokens.
    """
    _, apply = init_and_apply(LanguageModel(config))

    @jax.jit
    def of_batch(params: Params, batch: TokenBatch) -> jax.Array:
        # The log-probability of each token, at the token's own index.
        output = apply(params, *inputs(batch))
        labels_BT = following(batch["tokens_BT"])
        logp_BT = shifted(hidden_logprobs(output.x_BTD, output.unembed_DV, labels_BT))

        # Summed over the response's.
        mask_BT = batch["loss_mask_BT"]
        loss_B = -(logp_BT * mask_BT).sum(1)
        tokens_B = mask_BT.sum(1)
        return jnp.stack([loss_B, tokens_B], axis=1)

    def losses(params: Params, examples: Sequence[Example]) -> np.ndarray:
        return over_examples(partial(of_batch, params), examples, length, tokenizer.pad)

    return losses


def perplexities(model: LoadedRun, source: Source, length: int) -> np.ndarray:
    """Return the perplexity of each response: exp of its mean loss a token, by `model`."""
    config, tokenizer, params = model
    losses = make_response_losses(config, tokenizer, length)

    def score(records: list[Record]) -> np.ndarray:
        examples = [record_example(record, tokenizer, length) for record in records]
        loss_N, tokens_N = losses(params, examples).T
        return np.exp(loss_N / tokens_N)

    return over_records(score, source, "perplexity")


def instruction_difficulties(model: LoadedRun, source: Source, length: int) -> np.ndarray:
    """Return loss(response given its prompt) / loss(response alone) of each row (Li et al. 2023).

    IFD, instruction-following difficulty: about 1 where the prompt does not help, far below 1
    where it says the response, above 1 where it misleads. nan without a prompt.
    """
    config, tokenizer, params = model
    losses = make_response_losses(config, tokenizer, length)

    def score(records: list[Record]) -> np.ndarray:
        # The same tokens of the response, after the prompt and after bos alone.
        given = [record_example(record, tokenizer, length) for record in records]
        alone = [Example([tokenizer.bos], example.response) for example in given]
        given_loss_N = losses(params, given)[:, 0]
        alone_loss_N = losses(params, alone)[:, 0]
        has_prompt_N = np.array([len(example.prompt) > 1 for example in given])
        return np.where(has_prompt_N, given_loss_N / alone_loss_N, np.nan)

    return over_records(score, source, "ifd")


def chances_of_yes(judge: LoadedRun, source: Source, question: str = QUESTION) -> np.ndarray:
    """Return P(yes), of yes or no, to `question` about each row (Ask-LLM).

    `question` holds {prompt} and {response}. Raises UserError where the judge's tokenizer does not
    tell the two answers apart.
    """
    probability_of_yes = make_probability_of_a(judge, "yes", "no", "--init")

    def score(records: list[Record]) -> np.ndarray:
        questions = []
        for record in records:
            prompt, response = texts_to_judge(record)
            asked = prompt if isinstance(prompt, str) else request_text(prompt)
            # Not by format, which would read the braces in texts.
            filled = question.replace("{response}", response, 1)
            filled = filled.replace("{prompt}", asked, 1)
            questions.append(filled)
        return probability_of_yes(questions)

    return over_records(score, source, "ask_llm")


def lengths(tokenizer: Tokenizer, source: Source) -> np.ndarray:
    """Return the tokens of each response."""

    def score(records: list[Record]) -> np.ndarray:
        tokens = []
        for record in records:
            _, response = texts_to_judge(record)
            tokens.append(len(tokenizer.encode(response)))
        return np.array(tokens)

    return over_records(score, source, "length")


# --- of pairs: the best response of a comparison and the worst; nan where all tie


def implicit_margins(
    policy: LoadedRun, reference: LoadedRun, source: Source, length: int
) -> np.ndarray:
    """Return DPO's implicit margin of each comparison over beta, in nats.

    log p(best) / p_ref(best) - log p(worst) / p_ref(worst), p of `policy` (Rafailov et al. 2023,
    section 4). The two runs have one tokenizer; raises UserError otherwise.
    """
    tokenizer = policy.tokenizer
    if reference.tokenizer.sha256 != tokenizer.sha256:
        raise UserError("--reference: another tokenizer than --init; name a run with the same")
    runs = (policy, reference)
    measures = [make_response_losses(run.config, tokenizer, length) for run in runs]

    def score(records: list[Record]) -> np.ndarray:
        # log p / p_ref of the best responses, then of the worst.
        prompts = [record["prompt"] for record in records]
        ratios = []
        for texts in zip(*map(extremes, records), strict=True):
            pairs = zip(prompts, texts, strict=True)
            examples = [example_of(*pair, tokenizer, length) for pair in pairs]
            losses = []
            for measure, run in zip(measures, runs, strict=True):
                losses.append(measure(run.params, examples)[:, 0])
            # A loss is the negative of a log-probability.
            own, theirs = losses
            ratios.append(theirs - own)
        best, worst = ratios
        return np.where(ties(records), np.nan, best - worst)

    return over_records(score, source, "implicit margin")


def reward_margins(models: Sequence[LoadedRun], source: Source, length: int) -> np.ndarray:
    """Return each reward model's score of the best response less that of the worst, [M, N].

    `models`: M of them. Rows are cut to `length` tokens as in training.
    """
    measures = [make_rewards(model, length) for model in models]

    def score(records: list[Record]) -> np.ndarray:
        prompts = [record["prompt"] for record in records]
        best, worst = zip(*map(extremes, records), strict=True)
        margins = [rewards(prompts, best) - rewards(prompts, worst) for rewards in measures]
        margin_NM = np.stack(margins, axis=1)
        return np.where(ties(records)[:, None], np.nan, margin_NM)

    return over_records(score, source, "reward").T


def make_rewards(
    model: LoadedRun, length: int
) -> Callable[[Sequence[Prompt], Sequence[str]], np.ndarray]:
    """Make rewards(prompts, responses) -> [n], the scores of texts by a reward model."""
    tokenizer = model.tokenizer
    scalars = make_scalars(model.config)

    @jax.jit
    def of_batch(params: Params, batch: TokenBatch) -> jax.Array:
        return last_token(scalars(params, batch), batch["segment_ids_BT"])

    def rewards(prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        pairs = zip(prompts, responses, strict=True)
        examples = [example_of(*pair, tokenizer, length) for pair in pairs]
        measure = partial(of_batch, model.params)
        return over_examples(measure, examples, length, tokenizer.pad)

    return rewards


def extremes(record: Record) -> tuple[str, str]:
    """Return the best and the worst response of a comparison; the best twice where all tie."""
    best, worst = best_and_worst_response(record)
    return best, best if worst is None else worst


def ties(records: Sequence[Record]) -> np.ndarray:
    """Return where all responses of a comparison tie, [n] bool."""
    found = []
    for record in records:
        _, worst = best_and_worst_response(record)
        found.append(worst is None)
    return np.array(found)


# --- uncertainty, for active learning


def entropy(p: np.ndarray) -> np.ndarray:
    """Return the entropy of a coin that shows heads with probability p, in nats."""
    return special.entr(p) + special.entr(1 - p)


def predictive_entropy(margins_MN: np.ndarray) -> np.ndarray:
    """Return the entropy of the mean preference of M reward models, [N] (Lewis and Gale 1994)."""
    return entropy(special.expit(margins_MN).mean(0))


def closeness(margins_MN: np.ndarray) -> np.ndarray:
    """Return minus the size of the mean margin, [N]: the closest pair has the highest."""
    return -np.abs(margins_MN.mean(0))


def disagreement(margins_MN: np.ndarray) -> np.ndarray:
    """Return the deviation of the margins over M reward models, [N] (Seung et al. 1992)."""
    return margins_MN.std(0)


def bald(margins_MN: np.ndarray) -> np.ndarray:
    """Return the information that a label gives about which model is right, [N], in nats.

    The entropy of the mean preference less the mean entropy (Houlsby et al. 2011).
    """
    p_MN = special.expit(margins_MN)
    of_mean_N = entropy(p_MN.mean(0))
    mean_N = entropy(p_MN).mean(0)
    return of_mean_N - mean_N


UNCERTAINTIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "entropy": predictive_entropy,
    "margin": closeness,
    "disagreement": disagreement,
    "bald": bald,
}
"""Measures of uncertainty by the margins [M, N] of M reward models."""

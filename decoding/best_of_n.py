"""Best-of-n: of n samples the one that a reward likes best; what the gold program says of it, and the KL it costs.

python -m decoding.best_of_n --policy=runs/align/sft --reward=runs/align/rm --n=64
python -m decoding.best_of_n --policy=runs/maths --data=maths.jsonl --reward=tasks.answers:number --n=16
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from data.batches import encode_prompt, pad_prompts
from data.sources import open_source
from data.tokenizer import Tokenizer
from evaluation.gold import CRITERIA, gold_rows
from evaluation.intervals import Interval, mean, share
from model import LanguageModel, init_and_apply
from model_config import check_fit, stored_model
from objectives.imitate import best_of_n_kl
from responses import in_parts
from rewards.scorer import make_scorer
from rollout import make_rollout
from runtime import flags
from runtime.errors import UserError
from sampling import SamplingConfig
from sharding import MeshConfig, abstract, make_mesh, to_mesh
from tasks import world
from train_state import load_params


@dataclasses.dataclass(frozen=True)
class Config:
    policy: str = "runs/align/sft"
    """Run to sample from."""
    reward: str = "runs/align/rm"
    """What chooses: a run of train_rm.py, module:function, called with (response, record), or http://<rewards/serve.py>."""
    data: str = "world"
    """Held-out prompts of: world, a .jsonl file, or tfds:<name>."""
    n: int = 16
    """Samples a prompt; reported are the best of the first 1, 2, 4, ... and of all."""
    prompts: int = 500
    temperature: float = 1.0
    max_prompt: int = 32
    """Longest prompt, in tokens."""
    max_new_tokens: int = 24
    """Longest response, in tokens."""
    seed: int = 0


def sampled(
    config: Config, records: list[dict[str, Any]], mesh: Any
) -> tuple[np.ndarray, list[list[str]]]:
    """The rewards of the responses to `records`, [P, N], and their texts."""
    model, tokenizer = (
        stored_model(config.policy),
        Tokenizer.load(config.policy),
    )
    check_fit(model, tokenizer.size, config.max_prompt + config.max_new_tokens)
    models, score = make_scorer([config.reward], tokenizer, mesh)
    init, apply = init_and_apply(LanguageModel(model))
    params = load_params(
        config.policy, shapes=abstract(jax.eval_shape(init, jax.random.key(0)), mesh)
    )
    rollout = make_rollout(
        apply,
        model,
        SamplingConfig(config.temperature, max_new_tokens=config.max_new_tokens),
        eos=tokenizer.eos,
        pad=tokenizer.pad,
        n=config.n,
    )
    devices, rewards, texts = mesh.shape["data"], [], []
    rows = devices * max(1, 512 // (config.n * devices))
    for start in in_parts(len(records), rows, "sample"):
        part = records[start : start + rows]
        asked = [*part, *[part[0]] * (rows - len(part))]
        tokens = [
            row
            for record in asked
            for row in encode_prompt(record, tokenizer, config.max_prompt)[0]
        ]
        batch = to_mesh(pad_prompts(tokens, config.max_prompt, tokenizer.pad, fixed=True), mesh)
        batch = rollout(params, batch, jax.random.fold_in(jax.random.key(config.seed), start))
        scores, _ = score(models, batch, asked)
        rewards.append(np.asarray(scores[config.reward]).reshape(rows, config.n)[: len(part)])
        decoded = [tokenizer.decode(row.tolist()) for row in np.asarray(batch["response_BR"])]
        texts += [decoded[i * config.n : (i + 1) * config.n] for i in range(len(part))]
    return np.concatenate(rewards), texts


def main(config: Config) -> dict[int, dict[str, Interval]]:
    """Prints a row for each number of samples; returns them: reward and, in the world, gold, with 95 % intervals."""
    if config.n < 1 or config.prompts < 1:
        raise UserError(f"--n={config.n}, --prompts={config.prompts}: must be at least 1")
    mesh = make_mesh(MeshConfig())
    source = open_source(config.data, "prompt", "heldout", seed=config.seed)
    records = [source[i] for i in range(min(config.prompts, len(source)))]
    rewards_PN, texts = sampled(config, records, mesh)
    in_world = config.data == "world"
    requests = (
        [world.prompt(i, split="heldout", seed=config.seed) for i in range(len(records))]
        if in_world
        else []
    )
    table = {}
    print(
        f"{'n':>5}{'KL bound':>9}{'reward':>14}"
        + "".join(f"{name:>13}" for name in CRITERIA if in_world)
    )
    for n in sorted({*(1 << k for k in range(config.n.bit_length())), config.n}):
        best_P = rewards_PN[:, :n].argmax(1)
        row = {"reward": mean(rewards_PN[np.arange(len(records)), best_P])}
        if in_world:
            rows = gold_rows(requests, [texts[p][i] for p, i in enumerate(best_P)])
            row |= {name: share([r[name] for r in rows]) for name in CRITERIA}
        table[n] = row
        cells = "".join(
            f"{f'{value:.3f} ±{(high - low) / 2:.3f}':>13}" for value, (low, high) in row.values()
        )
        print(f"{n:5}{best_of_n_kl(n):9.3f} {cells}")
    print(
        f"{len(records)} held-out prompts, 95 % intervals; KL of the best of n to the policy: at most, in nats"
    )
    return table


if __name__ == "__main__":
    flags.run(main, Config)

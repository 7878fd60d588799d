"""Train and measure every method on the built-in world, from one SFT model and set of comparisons.

    python -m experiments.methods.run --align=runs/align{seed} --seeds 0 1 2 3 4
    python -m experiments.methods.run --methods dpo --seeds 0 --tune --flags=--beta=0.05

Writes a line a run to results.jsonl; what that has already is not run again. `--align` are runs of
`make align`. Training updates take about as many FLOPs as PPO's, so steps differ; a reward model's
own training is counted apart.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import train_dpo
from data.tokenizer import Tokenizer
from decoding import best_of_n
from evaluation.gold import CRITERIA, gold_rows, make_kl_sampler, summarise
from experiments.child import check_ended
from experiments.hindsight.batches import HELPFUL
from experiments.quark.quark import conditioned
from model_config import ModelConfig, stored_model
from objectives import imitate
from planning.programs import forward_flops
from responses import load_run
from rewards.scorer import is_function
from runtime import flags
from runtime.errors import UserError
from runtime.rows import read_rows
from runtime.run_folder import load_config
from sampling import SamplingConfig
from sharding import MeshConfig, make_mesh
from tasks import world
from train_state import load_params

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
DIRECT = ("train_dpo.py", "--length=32")  # as of the reward model: the same comparisons fit
# Name -> script and the flags that are not its defaults, {rm} the reward model; empty where no
# model is trained.
METHODS = {
    "sft": (),
    "best_of_16": (),
    "ppo": ("train_ppo.py",),
    "dpo": (*DIRECT, "--loss=dpo", "--steps=240", "--beta=0.5", "--optimizer.lr=3e-4"),
    "kto": (*DIRECT, "--loss=kto", "--steps=384", "--beta=0.5", "--optimizer.lr=3e-4"),
    "grpo": ("train_grpo.py", "--method=grpo", "--steps=56"),
    "rloo": ("train_grpo.py", "--method=rloo", "--steps=56"),
    "raft": ("train_raft.py", "--method=raft", "--steps=20"),
    "ipo": (*DIRECT, "--loss=ipo", "--steps=240", "--optimizer.lr=3e-4"),
    "cdpo": (*DIRECT, "--loss=cdpo", "--steps=240", "--beta=0.5", "--optimizer.lr=3e-4"),
    "orpo": (*DIRECT, "--loss=orpo", "--steps=320", "--beta=1", "--optimizer.lr=3e-4"),
    "simpo": (*DIRECT, "--loss=simpo", "--steps=320", "--beta=2"),
    "robust_dpo": (
        *DIRECT,
        "--loss=robust_dpo",
        "--steps=240",
        "--beta=0.5",
        "--optimizer.lr=3e-4",
    ),
    "slic": (*DIRECT, "--loss=slic", "--steps=240", "--beta=0.5", "--optimizer.lr=3e-4"),
    "slic_hf": (*DIRECT, "--loss=slic_hf", "--steps=320", "--optimizer.lr=3e-4"),
    "cpo": (*DIRECT, "--loss=cpo", "--steps=320", "--optimizer.lr=3e-4"),
    "rrhf": (*DIRECT, "--loss=rrhf", "--steps=320", "--optimizer.lr=3e-4"),
    "contrastive": ("experiments/contrastive/train_dpo.py", "--length=32", "--steps=320"),
    "unlikelihood": ("experiments/unlikelihood/train_dpo.py", "--length=32", "--steps=320"),
    "figa": ("experiments/figa/train_dpo.py", "--length=32", "--steps=320"),
    "hindsight": ("experiments/hindsight/train_dpo.py", "--length=72", "--steps=568"),
    "dr_grpo": ("train_grpo.py", "--method=dr_grpo", "--steps=56"),
    "dapo": ("train_grpo.py", "--method=dapo", "--steps=56"),
    "gspo": ("train_grpo.py", "--method=gspo", "--steps=56"),
    "reinforce_pp": ("train_grpo.py", "--method=reinforce_pp", "--steps=56"),
    "online_dpo": ("experiments/online_dpo/train_grpo.py", "--steps=56"),
    "gated": (
        "train_grpo.py",
        "--steps=56",
        "--reward",
        "{rm}",
        "tasks.rules:harmless",
        "--combine=gated",
        "--gate=1",
    ),
    "rules": ("train_grpo.py", "--steps=56", "--reward", "tasks.rules:all_kept"),
    "rejection": ("train_raft.py", "--method=rejection", "--steps=20"),
    "expert": ("train_raft.py", "--method=expert", "--threshold=2", "--steps=13"),
    "quark": ("experiments/quark/train_raft.py", "--batch_size=512", "--epochs=1", "--steps=9"),
}
RECORDED_AS = {
    "contrastive": "train_dpo.py --length=32 --loss=contrastive --steps=320",
    "unlikelihood": "train_dpo.py --length=32 --loss=unlikelihood --steps=320",
    "figa": "train_dpo.py --length=32 --loss=figa --steps=320",
    "hindsight": "train_dpo.py --length=72 --loss=hindsight --steps=568",
}
"""`flags` of the rows of results.jsonl that were made when these were losses of train_dpo.py."""
BEST_OF = 16
MAX_PROMPT, MAX_NEW = 32, 24  # as evaluate.py


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = tuple(METHODS)
    """Names of the methods that are run."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds that each method is run with."""
    align: str = "runs/align{seed}"
    """Runs of `make align`, of which lm, sft, rm and comparisons.jsonl are read."""
    out: str = "runs/methods"
    """Folder for the runs."""
    tune: bool = False
    """Judge on the prompts of the seed itself, which are for choices, and write tuning.jsonl."""
    flags: str = ""
    """More flags of the script (--tune only)."""
    n: int = 1000
    """Prompts of the evaluation."""


# --- cost: matmuls as forward_flops counts them, of all tokens passed, padding too;
# a backward pass is two forward passes


def sampling_flops(c: ModelConfig, config: dict[str, Any], rows: int) -> float:
    """Count FLOPs of prefilling prompts once and decoding `rows` responses to full length."""
    prompt, new = config["max_prompt"], config["max_new_tokens"]
    prefill = forward_flops(c, rows // (config.get("samples_per_prompt") or 1), prompt, 1)
    decoded = forward_flops(c, rows, prompt + new, new) - forward_flops(c, rows, prompt, 0)
    return prefill + decoded


def training_flops(run: str) -> float:
    """Count the training FLOPs of a finished run, from its settings and what it logged."""
    config = load_config(run)
    rows = read_rows(run)
    c = stored_model(run)
    # A fork is counted as the script it is a copy of; one that differs is told apart below.
    fork, _, script = config["script"].rpartition("/")
    is_online_dpo = fork == "experiments/online_dpo" or config.get("method") == "online_dpo"
    batch, steps = config["batch_size"], config["steps"]
    if script == "train_rm":  # four responses a prompt; logits of the best one only
        length = config["length"]
        count = 4 * batch
        return steps * 3 * forward_flops(c, count, length, length / 4 if config["lm_coef"] else 0)
    if script == "train_dpo":
        passes = direct_passes(fork, config.get("loss"))
        return steps * passes * forward_flops(c, batch, config["length"], config["length"])
    length = config["max_prompt"] + config["max_new_tokens"]
    new = config["max_new_tokens"]
    policy = forward_flops(c, batch, length, new + 1)
    scalar = forward_flops(c, batch, length, 0)
    rewards = config["reward"]
    models = sum(
        not is_function(name) for name in ([rewards] if isinstance(rewards, str) else rewards)
    )
    sampled = sampling_flops(c, config, batch)
    # Rollout; policy, reference, reward and value; updates of policy and value.
    if script == "train_ppo":
        return steps * (
            sampled + 2 * policy + (models + 1) * scalar + config["epochs"] * 3 * (policy + scalar)
        )
    gold_rows = sampled + 2 * policy + models * scalar  # rollout; policy, reference and rewards
    whole = forward_flops(c, 1, length, length)  # logits of the prompt too
    if script == "train_grpo":
        update = batch * whole if is_online_dpo else policy
        return (
            sum(row["rounds"] for row in rows) * gold_rows + steps * config["epochs"] * 3 * update
        )
    passes = 3 + (config["kl_coef"] > 0)  # of train_raft; its KL needs the reference
    return (
        steps * gold_rows
        + sum(row["updates"] for row in rows) * config["minibatch_size"] * passes * whole
    )


def direct_passes(fork: str, loss: str | None) -> int:
    """Return how often a direct method passes a row of a prompt forward; back counts as two.

    `fork`: the folder of the script, empty for the root's. `loss`: of train_dpo.py; None for its
    forks. The reference counts in a second epoch too.
    """
    # Hindsight has one row of both responses.
    if fork == "experiments/hindsight":
        return 3
    if loss == "kto":  # the best response and the worst; one to another prompt, never passed back
        return 3 * 2 + 1 + (2 + 1)
    if loss is None:
        return 3 * 4
    settings = train_dpo.Config(loss=loss, beta=1.0)
    return 3 * 4 + 4 * train_dpo.make_objective(settings, None).needs_reference


# --- one run


def with_suffix(prompts: dict[str, jax.Array], suffix: list[int]) -> dict[str, jax.Array]:
    """Return left-padded prompts with the tokens of `suffix` at the end of the user's turn."""
    tokens_BT, rows = prompts["tokens_BT"], prompts["tokens_BT"].shape[0]
    added_BT = jnp.broadcast_to(jnp.array(suffix, jnp.int32), (rows, len(suffix)))
    return {
        "tokens_BT": jnp.concatenate([tokens_BT[:, :-1], added_BT, tokens_BT[:, -1:]], axis=1),
        "segment_ids_BT": jnp.pad(
            prompts["segment_ids_BT"], ((0, 0), (0, len(suffix))), constant_values=1
        ),
        "positions_BT": jnp.concatenate(
            [
                prompts["positions_BT"],
                prompts["positions_BT"][:, -1:] + 1 + jnp.arange(len(suffix)),
            ],
            axis=1,
        ),
    }


def command(config: Config, method: str, seed: int, run: pathlib.Path) -> list[str]:
    """Return the command that trains `method` into `run`."""
    align = config.align.format(seed=seed)
    script, *options = [word.format(rm=f"{align}/rm") for word in METHODS[method]]
    common = [
        f"--init={align}/sft",
        f"--run={run}",
        f"--seed={seed}",
        "--eval_every=0",
        "--save_every=100000",
    ]
    if "--reward" not in options:
        common += [
            f"--data={align}/comparisons.jsonl"
            if script.endswith("train_dpo.py")
            else f"--reward={align}/rm"
        ]
    return [sys.executable, str(ROOT / script), *common, *options, *config.flags.split()]


def train(words: list[str], run: pathlib.Path) -> dict[str, float]:
    """Run a command from the start unless it is done; return its seconds, CPU seconds, peak MB."""
    cost = run / "cost.json"
    if not cost.exists():
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        log = run.parent / f"{run.name}.log"
        began = time.monotonic()
        with log.open("w") as file:
            # A fork takes modules from beside itself, and all others from the root.
            paths = {**os.environ, "PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=paths)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        code = process.returncode
        check_ended(code, f"{log}: the run ended with {code}; its last lines say why")
        seconds = {
            "seconds": time.monotonic() - began,
            "cpu_seconds": used.ru_utime + used.ru_stime,
        }
        cost.write_text(json.dumps({**seconds, "peak_mb": used.ru_maxrss / 1e3}))
    return json.loads(cost.read_text())


def best_of(
    config: Config, seed: int, requests: list[world.Request], judge_seed: int
) -> tuple[list[str], list, list, list[tuple[float, float]]]:
    """Sample BEST_OF responses of the SFT model to each request; take the one of highest reward.

    Returns texts, lengths, KL (its upper bound), and for the best of the first 1, 2, 4, ...
    responses the KL and the share that passes everything.
    """
    align = config.align.format(seed=seed)
    folders = {"policy": f"{align}/sft", "reward": f"{align}/rm"}
    settings = best_of_n.Config(
        **folders, n=BEST_OF, prompts=len(requests), max_prompt=MAX_PROMPT, seed=judge_seed
    )
    records = [{"prompt": [{"role": "user", "content": r.text}]} for r in requests]
    scored = best_of_n.sample_and_score(settings, records, make_mesh(MeshConfig()))
    curve = []
    for n in (1 << k for k in range(BEST_OF.bit_length())):
        chosen_P = scored.ranks_PN[:, :n].argmax(1)
        best = [row[i] for row, i in zip(scored.texts, chosen_P, strict=True)]
        share = sum(row["all"] for row in gold_rows(requests, best)) / len(best)
        curve.append((imitate.best_of_n_kl(n), share))
    encode = Tokenizer.load(f"{align}/sft").encode
    return best, [len(encode(text)) + 1 for text in best], [curve[-1][0]] * len(best), curve


def responses_of(
    config: Config,
    method: str,
    seed: int,
    run: pathlib.Path,
    requests: list[world.Request],
    judge_seed: int,
) -> tuple[list[str], list, list]:
    """Return texts, lengths and KL to the SFT model of a policy's responses."""
    sft = config.align.format(seed=seed) + "/sft"
    model, tokenizer, reference = load_run(sft)
    params = load_params(str(run)) if METHODS[method] else reference
    condition = {}
    if method == "quark":  # what it learnt is asked for by its best quantile
        best = tokenizer.encode(str(load_config(str(run))["quantiles"]))[0]
        condition = {"condition": partial(conditioned, system=tokenizer.system, word=best)}
    if method == "hindsight":
        condition = {"condition": partial(with_suffix, suffix=tokenizer.encode(f"\n{HELPFUL}"))}
    measure = make_kl_sampler(
        model, SamplingConfig(1.0, max_new_tokens=MAX_NEW), tokenizer, MAX_PROMPT, **condition
    )
    return zip(*measure(params, reference, [r.text for r in requests], judge_seed), strict=True)


def row_of(config: Config, method: str, seed: int) -> dict[str, Any]:
    """Train and measure one method with one seed; return its row of results.jsonl."""
    align = config.align.format(seed=seed)
    # Name the run, so that it is never taken for another's.
    words = [*METHODS[method][1:], *config.flags.split()]
    name = "_".join([method, *(word.lstrip("-") for word in words), str(seed)])
    run = pathlib.Path(config.out) / name
    cost = {}
    if METHODS[method]:
        cost = train(command(config, method, seed, run), run)
        cost["training_flops"] = training_flops(str(run))
    is_direct = METHODS[method][:1] and METHODS[method][0].endswith("train_dpo.py")
    sees_reward_model = not is_direct and method not in ("sft", "rules")
    models = [f"{align}/{name}" for name in ("round1/rm", "rm")] if sees_reward_model else []
    cost["reward_model_flops"] = sum(training_flops(path) for path in models)
    c = stored_model(f"{align}/sft")
    several = BEST_OF if method == "best_of_16" else 1
    asked = {"max_prompt": MAX_PROMPT, "max_new_tokens": MAX_NEW, "samples_per_prompt": several}
    scoring = forward_flops(c, several, MAX_PROMPT + MAX_NEW, 0) if several > 1 else 0.0
    cost["response_flops"] = sampling_flops(c, asked, several) + scoring
    judge_seed = seed if config.tune else 1000 + seed
    requests = [world.prompt(i, split="heldout", seed=judge_seed) for i in range(config.n)]
    if method == "best_of_16":
        texts, lengths, kls, cost["curve"] = best_of(config, seed, requests, judge_seed)
    else:
        texts, lengths, kls = responses_of(config, method, seed, run, requests, judge_seed)
    summary = summarise(gold_rows(requests, texts), lengths, kls)
    settings = {
        "flags": " ".join([*METHODS[method], *config.flags.split()]),
        "prompts_seed": judge_seed,
    }
    return {"method": method, "seed": seed, **settings, **cost, **summary}


def main(config: Config) -> list[dict[str, Any]]:
    """Add the rows that are missing to results.jsonl or tuning.jsonl; return the new ones."""
    if unknown := set(config.methods) - METHODS.keys():
        raise UserError(
            f"--methods: {', '.join(sorted(unknown))} unknown; choose of {', '.join(METHODS)}"
        )
    if config.flags and not config.tune:
        raise UserError("--flags: for --tune only; settings that are kept belong into METHODS")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    path = HERE / ("tuning.jsonl" if config.tune else "results.jsonl")
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    make_mesh(MeshConfig())
    new = []
    for seed in config.seeds:
        for method in config.methods:
            settings = " ".join([*METHODS[method], *config.flags.split()])
            recorded = (settings, None if config.flags else RECORDED_AS.get(method))
            if any(
                (row["method"], row["seed"]) == (method, seed) and row["flags"] in recorded
                for row in done
            ):
                continue
            row = row_of(config, method, seed)
            with path.open("a") as file:
                file.write(json.dumps(row, default=float) + "\n")
            new.append(row)
            shown = {
                name: row.get(name, 0.0)
                for name in (*CRITERIA, "kl", "length", "seconds", "peak_mb")
            }
            print(
                f"{method} {seed} {config.flags}: "
                + ", ".join(f"{name} {x:.3f}" for name, x in shown.items())
            )
    return new


if __name__ == "__main__":
    flags.run(main, Config)

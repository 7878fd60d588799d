"""The peers: transformers' Llama with our weights, CTranslate2, and TRL's PPO.

Each function returns calls that a side times. Needs `pip install -r requirements-bench.txt`.
"""

import copy
import json
import os
import pathlib
import queue
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.absent import standing_in
from benchmarks.side_by_side import random_params

with standing_in():
    from model_config import ModelConfig
    from weights.convert import write_tensors
    from weights.families import config_of

# JAX makes the weights on the GPU and gives the memory back at once.
os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
PAD, BOS, EOS = 0, 1, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SCRATCH = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Folder for weights on their way from us to them; memory, where the system has such a folder."""


def write_llama(folder: str, model: ModelConfig) -> None:
    """Write the parameters of `random_params` and their config.json as a Hugging Face folder."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = pathlib.Path(folder)
    write_tensors(path, random_params(model), model, "float32", 1 << 40)
    content = config_of(model, SimpleNamespace(bos=BOS, eos=EOS, pad=PAD, ends=[EOS]), "float32")
    (path / "config.json").write_text(json.dumps(content))


def llama(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Return the LlamaForCausalLM with the parameters of `random_params`, on the device."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        write_llama(folder, model)
        net = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return net.to(DEVICE)


def wait() -> None:
    """Wait until the GPU has done what it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def need_compiler() -> None:
    """Raise RuntimeError where there is no C++ compiler, which torch.compile calls."""
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        raise RuntimeError("torch.compile needs a C++ compiler, and there is none")


def trainer(
    model: ModelConfig, tokens_BT: np.ndarray, lr: float, compiled: bool
) -> Callable[[], float]:
    """Return a function that makes one step on `tokens_BT`, and returns its loss.

    A step is loss, gradients, clipping and fused AdamW. `compiled`: under torch.compile.
    """
    net = llama(model)
    tokens = torch.tensor(tokens_BT, dtype=torch.long, device=DEVICE)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr, (0.9, 0.95), 1e-8, weight_decay=0.1, fused=True
    )
    net.train()
    forward = net
    if compiled:
        need_compiler()
        forward = torch.compile(net)

    def step() -> float:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


SAMPLED = {
    "do_sample": True,
    "top_k": 0,
    "top_p": 1.0,
    "temperature": 1.0,
    "pad_token_id": PAD,
}
"""Draw at temperature 1 from all tokens."""


def samplers(
    model: ModelConfig, prompts_BT: np.ndarray, every_new: Sequence[int], compiled: bool
) -> list[Callable[[], None]]:
    """Return for each of `every_new` a call that samples so many tokens after each prompt.

    `compiled`: with a static cache and a compiled step of decoding.
    """
    net = llama(model, DTYPE).eval()
    prompts = torch.tensor(prompts_BT, dtype=torch.long, device=DEVICE)
    mask_BT = torch.ones_like(prompts)
    options = {**SAMPLED, "eos_token_id": None}
    if compiled:
        need_compiler()
        compile_config = transformers.CompileConfig(dynamic=False)
        # By itself it compiles on accelerators alone.
        compile_config._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": compile_config}

    @torch.no_grad()
    def sample(new: int) -> None:
        out = net.generate(prompts, attention_mask=mask_BT, max_new_tokens=new, **options)
        wait()
        assert out.shape[1] == prompts.shape[1] + new

    return [partial(sample, new) for new in every_new]


def ending_sampler(
    model: ModelConfig, prompts_BT: np.ndarray, limit: int, rows: int, eos: np.ndarray
) -> Callable[[], float]:
    """Return a call that samples up to one of `eos` after each prompt, `rows` prompts at a time.

    It returns how many tokens it sampled.
    """
    net = llama(model, DTYPE).eval()
    prompts = torch.tensor(prompts_BT, dtype=torch.long, device=DEVICE)
    ends = torch.tensor(eos, device=DEVICE)
    options = {**SAMPLED, "eos_token_id": eos.tolist(), "max_new_tokens": limit}

    @torch.no_grad()
    def call() -> float:
        torch.manual_seed(0)
        tokens = 0
        for part in prompts.split(rows):
            out = net.generate(part, attention_mask=torch.ones_like(part), **options)
            response = out[:, part.shape[1] :]
            # Those before the first end, and that end.
            ended = torch.isin(response, ends).long()
            before = ended.cumsum(1) - ended == 0
            tokens += int(before.sum())
        return tokens

    return call


def ctranslate2_sampler(model: ModelConfig) -> Callable[..., float]:
    """Return sample(prompts [B, T], new, eos=None, rows=0), which returns how many tokens it drew.

    It draws up to one of `eos`, or exactly `new` tokens; `rows` prompts at a time, or all.
    CTranslate2 knows tokens by their words: <0>, <1>, ...
    """
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        write_llama(folder, model)
        words_of(model).save_pretrained(folder)
        TransformersConverter(folder).convert(f"{folder}/converted")
        net = ctranslate2.Generator(
            f"{folder}/converted",
            device=DEVICE,
            compute_type="bfloat16" if DEVICE == "cuda" else "float32",
            intra_threads=len(os.sched_getaffinity(0)) if DEVICE == "cpu" else 1,
        )

    def sample(
        prompts_BT: np.ndarray, new: int, eos: np.ndarray | None = None, rows: int = 0
    ) -> float:
        prompts = [[f"<{token}>" for token in row] for row in prompts_BT.tolist()]
        results = net.generate_batch(
            prompts,
            max_batch_size=rows,
            max_length=new,
            min_length=new if eos is None else 0,
            end_token=[EOS] if eos is None else eos.tolist(),
            sampling_topk=0,
            sampling_temperature=1.0,
            include_prompt_in_result=False,
        )
        # The token that ends a response is not among the result's, but was drawn.
        return sum(min(len(result.sequences_ids[0]) + 1, new) for result in results)

    return sample


def words_of(model: ModelConfig) -> Any:
    """Return a tokenizer with a word for each token, which some peers ask for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"<{i}>": i for i in range(model.vocab)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<3>")),
        pad_token=f"<{PAD}>",
        bos_token=f"<{BOS}>",
        eos_token=f"<{EOS}>",
    )


class Paced(transformers.TrainerCallback):
    """Hold a trainer after each iteration until the next is asked for."""

    def __init__(self):
        self.go = queue.Queue()
        self.done = queue.Queue()

    def on_step_end(self, args, state, control, **_):
        wait()
        self.done.put(None)
        self.go.get()

    def __call__(self) -> None:
        """Run one iteration; raise what it raises."""
        self.go.put(None)
        if (fault := self.done.get()) is not None:
            raise fault


def ppo(prompts_PT: np.ndarray, model: ModelConfig, asked: Any) -> Callable[[], None]:
    """Return a call of an iteration of TRL's PPOTrainer, in a thread that waits between calls.

    The first call sets it up. `asked`: a ppo.Iteration. The rewards are a random model's.
    """
    from datasets import Dataset

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    # Those of transformers, about what TRL calls.
    warnings.simplefilter("ignore", FutureWarning)
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    # Models: policy and reference, value and reward.
    policy = llama(model)
    one_number = copy.deepcopy(policy.config)
    one_number.num_labels = 1
    scalar = transformers.LlamaForSequenceClassification(one_number).to(DEVICE)

    tokenizer = words_of(model)
    paced = Paced()
    options = PPOConfig(
        tempfile.mkdtemp(),
        # The method.
        num_ppo_epochs=asked.epochs,
        num_mini_batches=asked.minibatches,
        response_length=asked.new,
        stop_token_id=asked.eos if asked.eos >= 0 else None,
        temperature=asked.temperature,
        optim="adamw_torch_fused",
        learning_rate=1e-5,
        # Batches: one device, a mini-batch a step.
        per_device_train_batch_size=asked.batch // asked.minibatches,
        gradient_accumulation_steps=asked.minibatches,
        local_rollout_forward_batch_size=asked.batch,
        total_episodes=10_000 * asked.batch,
        bf16=DEVICE == "cuda",
        use_cpu=DEVICE == "cpu",
        # No reports, samples or checkpoints.
        num_sample_generations=0,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    prompts = {"input_ids": prompts_PT.tolist()}
    train = PPOTrainer(
        args=options,
        processing_class=tokenizer,
        model=policy,
        ref_model=copy.deepcopy(policy),
        reward_model=scalar,
        value_model=copy.deepcopy(scalar),
        train_dataset=Dataset.from_dict(prompts),
        eval_dataset=Dataset.from_dict(prompts),
        callbacks=[paced],
    )
    train.remove_callback(transformers.PrinterCallback)

    def silent(*_: Any) -> None:
        """Print nothing."""

    train.accelerator.print = silent

    def work() -> None:
        paced.go.get()
        try:
            train.train()
        # Handed over: the benchmark's own thread must end.
        except BaseException as fault:
            paced.done.put(fault)

    threading.Thread(target=work, daemon=True).start()
    return paced

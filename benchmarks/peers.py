"""The peers: a transformers Llama with our weights, and TRL's PPO, paced from outside.

Each function returns calls for `side_by_side.apart`. Needs `pip install -r
requirements-bench.txt`.
"""

import copy
import json
import os
import pathlib
import queue
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.side_by_side import random_params
from model_config import ModelConfig
from weights.convert import write_tensors
from weights.families import config_of

PAD, BOS, EOS = 0, 1, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def llama(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Return the LlamaForCausalLM with the parameters of `random_params`, on the device."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = SimpleNamespace(bos=BOS, eos=EOS, pad=PAD)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tensors(folder, random_params(model), model, "float32", 1 << 40)
        content = config_of(model, tokenizer, "float32")
        (folder / "config.json").write_text(json.dumps(content))
        net = transformers.LlamaForCausalLM.from_pretrained(name, dtype=dtype)
    return net.to(DEVICE)


def wait() -> None:
    """Wait until the GPU has done what it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def trainer(model: ModelConfig, tokens_BT: np.ndarray, lr: float) -> list[Callable[[], float]]:
    """Return one call: a step on the same batch, which returns the loss.

    A step is loss, gradients, clipping and fused AdamW.
    """
    net = llama(model)
    tokens = torch.tensor(tokens_BT, dtype=torch.long, device=DEVICE)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr, (0.9, 0.95), 1e-8, weight_decay=0.1, fused=True
    )
    net.train()

    def step() -> float:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = net(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return [step]


def samplers(model: ModelConfig, asked: list[tuple[np.ndarray, int]]) -> list[Callable[[], None]]:
    """Return for each (prompts [B, T], new) a call that samples `new` tokens after each prompt.

    Exactly so many, at temperature 1 from all tokens.
    """
    net = llama(model, DTYPE).eval()
    options = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "pad_token_id": PAD,
        "eos_token_id": None,
    }

    @torch.no_grad()
    def sample(prompts_BT: torch.Tensor, new: int) -> None:
        mask_BT = torch.ones_like(prompts_BT)
        out = net.generate(prompts_BT, attention_mask=mask_BT, max_new_tokens=new, **options)
        wait()
        assert out.shape[1] == prompts_BT.shape[1] + new

    calls = []
    for prompts_BT, new in asked:
        prompts = torch.tensor(prompts_BT, dtype=torch.long, device=DEVICE)
        calls.append(partial(sample, prompts, new))
    return calls


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


def ppo(prompts_PT: np.ndarray, config: Any) -> list[Callable[[], None]]:
    """Return one call: an iteration of TRL's PPOTrainer, in a thread that waits between calls.

    The first call sets it up. `config` has model, batch_size, max_new_tokens, minibatches, epochs
    and temperature. The rewards are a random model's.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    # Those of transformers, about what TRL calls.
    warnings.simplefilter("ignore", FutureWarning)
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    # Models: policy and reference, value and reward.
    model = config.model
    policy = llama(model)
    one_number = copy.deepcopy(policy.config)
    one_number.num_labels = 1
    scalar = transformers.LlamaForSequenceClassification(one_number).to(DEVICE)

    # TRL asks for a tokenizer: a word for each token.
    words = {f"<{i}>": i for i in range(model.vocab)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<3>")),
        pad_token="<0>",
        eos_token="<2>",
    )

    paced = Paced()
    options = PPOConfig(
        tempfile.mkdtemp(),
        # The method.
        num_ppo_epochs=config.epochs,
        num_mini_batches=config.minibatches,
        response_length=config.max_new_tokens,
        temperature=config.temperature,
        optim="adamw_torch_fused",
        learning_rate=1e-5,
        # Batches: one device, a mini-batch a step.
        per_device_train_batch_size=config.batch_size // config.minibatches,
        gradient_accumulation_steps=config.minibatches,
        local_rollout_forward_batch_size=config.batch_size,
        total_episodes=10_000 * config.batch_size,
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
    return [paced]

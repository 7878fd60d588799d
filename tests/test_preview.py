"""Dry runs: what is told is true, and nothing is written."""

import dataclasses
import re
import sys

import jax
import numpy as np
import pytest
from running import run

import train_ppo
import train_rm
import train_sft
from data.batches import chat_batches, prompt_batches
from data.sources import open_source
from data.tokenizer import Tokenizer
from model import LanguageModel, init_and_apply
from model_config import PRESETS
from planning.dry_run import decoded, describe, preview_items
from sharding import MeshConfig, abstract, make_mesh

TINY = [
    "--model.preset=tiny",
    "--batch_size=8",
    "--length=256",
    "--dry_run",
    "--mesh.data=2",
    "--mesh.fsdp=2",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [
        message["content"]
        for i in range(200)
        for message in open_source("world", "chat", "train")[i]["messages"]
    ]
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer"), 400)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
@pytest.mark.parametrize("script", [train_sft, pytest.param(train_rm, marks=pytest.mark.slow)])
def test_a_dry_run_tells_shapes_and_writes_nothing(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(script, *TINY, "--mesh.tensor=2", f"--run={tmp_path}/run") == {}
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert re.search(
        r"decoder/layers/attention/q +float32\[2,32,4,8\] +\(-, fsdp, tensor, -\)", out
    )
    shapes = [
        (2, 32, 4, 8),
        (2, 32, 2, 8),
        (2, 32, 2, 8),
        (2, 4, 8, 32),
        (2, 32, 64),
        (2, 32, 64),
        (2, 64, 32),
    ]
    count = (
        512 * 32 + 32 + 2 * 2 * 32 + sum(map(np.prod, shapes)) + (33 if script is train_rm else 0)
    )
    assert f"parameters  {count:,} float32" in out
    assert "\x1b[32m" in out and "padding" in out and "<|assistant|>" in out


def test_a_dry_run_counts_prompt_and_response(tokenizer, capsys):
    prompts = prompt_batches(
        open_source("world", "prompt", "train"), tokenizer, batch_size=8, length=20
    )
    leaf = jax.device_put(np.zeros(2), jax.NamedSharding(make_mesh(MeshConfig()), jax.P(None)))
    online = train_ppo.Config(run="r", steps=2, batch_size=8, max_prompt=20, max_new_tokens=24)
    preview_items(online, {"params": {"w": leaf}}, prompts, tokenizer)
    out = capsys.readouterr().out
    assert (
        "8 sequences of 44: 352 tokens a step" in out
        and "tokens_BT, prompts: the run samples responses" in out
    )


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
def test_a_size_that_an_axis_does_not_divide_is_told_with_the_next_that_it_does():
    mesh = make_mesh(MeshConfig(1, 2, 4))

    def told(**fields):
        model = dataclasses.replace(PRESETS["tiny"], **fields)
        init, _ = init_and_apply(LanguageModel(model))
        params = abstract(jax.eval_shape(init, jax.random.key(0)), mesh)
        text = describe("x", params, (), batch_size=8, length=8, steps=1)
        return " ".join(text.split())

    assert "does not divide" not in told(kv_heads=4)  # control
    text = told(kv_heads=4, vocab=513)
    assert "--mesh.tensor=4 does not divide --model.vocab=513: each of its devices holds" in text
    assert "all of decoder/embed; --model.vocab=516 or --mesh.tensor=3 would fit" in text
    assert "does not divide" not in told(kv_heads=4, vocab=516)
    # One note an axis: of the largest that it leaves whole.
    text = told(kv_heads=4, vocab=513, width=33, mlp_width=66)
    assert text.count("--mesh.tensor=4 does not") == text.count("--mesh.fsdp=2 does not") == 1
    assert "--model.width=34" in text
    # Heads too; what is small is not worth a line.
    assert "--model.heads=8 or --mesh.tensor=3" in told(heads=6, kv_heads=2, mlp_width=8, vocab=8)


def test_what_is_green_is_what_the_loss_is_of(tokenizer, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    batch = next(
        chat_batches(open_source("world", "chat", "train"), tokenizer, batch_size=8, length=64)
    )
    names = ("tokens_BT", "loss_mask_BT", "segment_ids_BT")
    for tokens, mask, segments in zip(*(batch[name] for name in names), strict=True):
        text = decoded(tokens, mask, segments, tokenizer)
        green = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", text)).replace("</s>", "")
        assert green == "".join(tokenizer.decode([t]) for t in tokens[mask > 0])
        assert text.count(" | ") == len(set(segments.tolist())) - 1
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b" not in decoded(tokens, mask, segments, tokenizer) and "[" in decoded(
            tokens, mask, segments, tokenizer
        )
        monkeypatch.delenv("NO_COLOR")
        # Nor into a pipe.
        monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
        assert "\x1b" not in decoded(tokens, mask, segments, tokenizer)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

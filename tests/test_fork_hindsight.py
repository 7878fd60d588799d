"""Chain of hindsight (experiments/hindsight): conversations, hidden tokens, a policy's words."""

import jax
import numpy as np
import pytest
from preference_cases import comparison_rows, loss_and_slope, mean_so_far, slope_of, token_logps
from running import rows_of, run, write

from data.batches import chat_batches
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from experiments.hindsight import train_dpo as hindsight_script
from experiments.hindsight.batches import HELPFUL, UNHELPFUL, hide_past_tokens, hindsight_chains
from model_config import ModelConfig
from objectives.likelihood import likelihood_objective
from responses import make_sampler
from runtime.run_folder import load_config
from sampling import SamplingConfig
from train_state import load_params


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Make a run on pairs of white (chosen) and black, with a tenth of past tokens hidden."""
    folder = tmp_path_factory.mktemp("hindsight")
    rows = [{"prompt": f"colour {i}", "chosen": "white", "rejected": "black"} for i in range(40)]
    data = write(folder / "pairs.jsonl", rows)
    argv = ["--model.preset=tiny", "--model.vocab=296", f"--data={data}", f"--run={folder}/run"]
    argv += ["--batch_size=8", "--length=64", "--optimizer.warmup=0", "--optimizer.lr=1e-2"]
    argv += ["--mesh.data=1", "--mesh.fsdp=8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUMB_CACHE", str(folder / "cache"))
        run(hindsight_script, *argv, "--hidden_share=0.1", "--steps=60", "--eval_every=0")
    return folder / "run"


def test_the_words_switch_the_response(finished):
    """Trained on chains of helpful and unhelpful answers, the policy gives the one asked for."""
    model = ModelConfig(**load_config(str(finished))["model"])
    tokenizer = Tokenizer.load(finished)
    respond = make_sampler(model, SamplingConfig(0.0, max_new_tokens=12), tokenizer)
    prompts = [tokenizer.prompt(f"colour 3\n{words}") for words in (HELPFUL, UNHELPFUL)]
    responses = respond(load_params(str(finished)), prompts, jax.random.key(0))
    assert [tokenizer.decode(tokens) for tokens in responses] == ["white", "black"]
    assert rows_of(finished)[-1]["loss"] < rows_of(finished)[0]["loss"]


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.train(["name a colour red 1 blue 2", HELPFUL, UNHELPFUL] * 9, tmp_path, 296)


@pytest.fixture
def chains():
    """Return two chains of one comparison of three responses."""
    record = {
        "prompt": [{"role": "user", "content": "q"}],
        "responses": ["bad", "good", "mid"],
        "ranking": [3, 1, 2],
    }
    return hindsight_chains(Source("tests", range(2), lambda i: record))


def test_chains_count_responses_only(chains, tokenizer):
    words = {"good": HELPFUL, "bad": UNHELPFUL}
    for i, order in ((0, ["good", "bad"]), (1, ["bad", "good"])):
        turns = chains[i]["messages"]
        assert [turn["content"] for turn in turns[1::2]] == order
        assert turns[0]["content"] == f"q\n{words[order[0]]}"
        assert turns[2]["content"] == words[order[1]]
        tokens, mask = tokenizer.chat(turns)
        assert tokenizer.decode(np.array(tokens)[np.array(mask) > 0]) == "".join(order)


def test_hidden_tokens_are_not_looked_at_and_predict_nothing(chains, tokenizer):
    batch = next(chat_batches(chains, tokenizer, batch_size=2, length=128))
    hidden = hide_past_tokens(batch, 0.3, np.random.default_rng(0))
    gone = (hidden["segment_ids_BT"] == 0) & (batch["segment_ids_BT"] > 0)
    assert 0.2 < gone.sum() / (batch["segment_ids_BT"] > 0).sum() < 0.4
    assert not (gone & (batch["positions_BT"] == 0)).any()
    assert (hidden["loss_mask_BT"][:, 1:][gone[:, :-1]] == 0).all()
    kept = ~np.pad(gone, ((0, 0), (1, 0)))[:, :-1]
    np.testing.assert_array_equal(hidden["loss_mask_BT"][kept], batch["loss_mask_BT"][kept])


def test_the_loss_on_its_own_batches_equals_loops(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    source = open_source(
        str(write(tmp_path / "c.jsonl", comparison_rows())), "comparison", "train"
    )
    batch = next(chat_batches(hindsight_chains(source), tokenizer, batch_size=8, length=64))
    table, direction = np.random.default_rng(0).normal(size=(2, tokenizer.size, tokenizer.size))

    def in_loops(table):
        rows = zip(batch["tokens_BT"], batch["loss_mask_BT"], strict=True)
        return -sum(sum(token_logps(table, *row).values()) for row in rows)

    def objective(params, batch):
        return likelihood_objective(mean_so_far, params, batch)

    loss, weight, slope = loss_and_slope(objective, table, batch, direction)
    np.testing.assert_allclose(loss, in_loops(table), rtol=1e-6)
    np.testing.assert_allclose(slope, slope_of(in_loops, table, direction), rtol=2e-5)
    assert weight == batch["loss_mask_BT"].sum() > 0

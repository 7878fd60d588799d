"""A large model that is trained with the built-in world's defaults is told so, before step 1."""

import dataclasses

import pytest
from running import run

import train_distill
import train_grpo
import train_ppo
import train_sft
from lora import LoraConfig
from model_config import PRESETS
from planning import world_defaults
from planning.world_defaults import defaults_left, world_defaults_note


def large(script, **fields):
    """Return a script's config for a model of 8 billion parameters, of which none is made."""
    return script.Config(init="runs/llama", model=PRESETS["llama3-8b"], **fields)


def test_a_large_model_names_each_flag_that_nobody_set():
    note = world_defaults_note(large(train_sft), [])
    assert note.startswith("runs/llama has 8.03 billion parameters, and --optimizer.lr=0.002, ")
    assert "--batch_size=8, --length=256 are the defaults for the built-in world" in note
    # Prompts and responses have lengths of their own, and a critic a rate of its own.
    left = defaults_left(large(train_ppo), [])
    names = [flag.split("=")[0] for flag in left]
    assert names == [
        "--optimizer.lr",
        "--value_optimizer.lr",
        "--batch_size",
        "--max_prompt",
        "--max_new_tokens",
    ]
    assert "--value_optimizer.lr" not in str(defaults_left(large(train_grpo), []))


def test_what_is_set_is_not_named():
    config = large(train_sft, length=2048, batch_size=512)
    assert defaults_left(config, []) == ["--optimizer.lr=0.002"]
    assert "--optimizer.lr=0.002 is the default" in world_defaults_note(config, [])
    # A value that was given is meant, also where it is the default.
    assert world_defaults_note(config, ["--optimizer.lr=0.002"]) == ""
    assert world_defaults_note(large(train_sft), ["--optimizer.lr", "1", "--batch-size=8"]) != ""
    assert defaults_left(large(train_sft), ["--batch-size=8", "--length", "256"]) == [
        "--optimizer.lr=0.002"
    ]


def test_own_samples_have_lengths_of_their_own():
    names = [flag.split("=")[0] for flag in defaults_left(large(train_distill, on_policy=0.5), [])]
    assert names == ["--optimizer.lr", *(f"--{name}" for name in world_defaults.SIZES)]


def test_a_preset_is_named_where_it_makes_the_model_and_adapters_have_no_rate_named():
    preset = ["--model.preset=llama3-8b"]
    assert world_defaults_note(large(train_sft), preset).startswith("llama3-8b has 8.03 billion")
    assert world_defaults_note(large(train_sft), [*preset, "--init=runs/llama"]).startswith(
        "runs/"
    )
    adapters = large(train_ppo, lora=LoraConfig(rank=8))
    assert defaults_left(adapters, []) == [
        flag for flag in defaults_left(large(train_ppo), []) if "optimizer" not in flag
    ]


def test_a_fork_with_other_fields_is_told_what_it_has():
    @dataclasses.dataclass
    class Fork:
        """A script with one size, which lacks a default elsewhere, and no --init."""

        rounds: int
        model: object = PRESETS["llama3-8b"]
        batch_size: int = 4

    fork = Fork(rounds=3)
    assert defaults_left(fork, []) == ["--batch_size=4"]
    assert world_defaults_note(fork, []).startswith("the model has 8.03 billion parameters")
    assert world_defaults_note(Fork(rounds=3, batch_size=64), []) == ""
    # A model of the fork's own, which cannot be counted here.
    assert world_defaults_note(Fork(rounds=3, model={"layers": 4}), []) == ""


def test_a_small_model_is_told_nothing():
    small = dataclasses.replace(large(train_sft), model=PRESETS["tiny"])
    assert world_defaults_note(small, []) == ""


@pytest.mark.parametrize(
    "more", [["--dry_run"], pytest.param([], id="run", marks=pytest.mark.slow)]
)
def test_a_run_says_it_at_its_start(more, tmp_path, capsys, monkeypatch):
    flags = ["--model.preset=tiny", "--steps=1", "--length=64", "--batch_size=8", *more]
    flags += ["--eval_every=0", f"--run={tmp_path}/run"]
    monkeypatch.setattr("sys.argv", ["train_sft.py", *flags])
    monkeypatch.setattr(world_defaults, "LARGE", 1000)
    run(train_sft, *flags)
    told = " ".join(capsys.readouterr().out.split())
    note = told.partition(" note ")[2].partition(" compile ")[0]
    assert "--optimizer.lr=0.002 is the default for the built-in world" in note
    assert "--batch_size" not in note and "--length" not in note

"""Numbers out of their range are refused in one line, in every script, and nothing is written."""

import dataclasses
import importlib
import math
import pathlib
import typing

import jax
import pytest
from running import fails

import train_ppo
import train_sft
from lora import LoraConfig
from model_config import ModelConfig
from runtime.errors import UserError
from runtime.guard import GuardConfig
from runtime.hosts import HostsConfig
from runtime.ranges import SCRIPTS, OutOfRange, Range, check_ranges
from sampling import SamplingConfig
from train_step import OptimizerConfig

ROOT = pathlib.Path(__file__).parents[1]
MODULES = ("train_*", "generate", "evaluate", "collect/*", "decoding/*", "rewards/serve")
TAKE_INF = {"clip", "clip_high", "value_clip", "kl_limit"}
"""Fields whose infinity is no limit."""
PARTS = (ModelConfig, OptimizerConfig, LoraConfig, GuardConfig, SamplingConfig)
"""Configs with tables of their own."""
TAKE_NEGATIVE = {"gate", "floor", "missing_eos_score", "threshold"}
"""Fields in units of a score."""


def configs():
    """Yield (name, config) of every script, and of the configs within them."""
    for pattern in MODULES:
        for path in sorted(ROOT.glob(f"{pattern}.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = importlib.import_module(name)
            if hasattr(module, "Config"):
                yield name, module.Config()
    for part in PARTS:
        yield part.__name__, part()


CONFIGS = dict(configs())


def numeric_fields(config):
    """Yield (name, is_float, is_tuple) of the fields of `config` that take numbers."""
    for name, kind in typing.get_type_hints(type(config)).items():
        kinds = {kind, *typing.get_args(kind)}
        is_tuple = any(typing.get_origin(k) is tuple for k in kinds)
        inner = {a for k in kinds for a in (k, *typing.get_args(k))}
        if float in inner or int in inner:
            yield name, float in inner, is_tuple


def is_refused(config, name, value):
    """Tell if `config` with `value` in the field `name` is refused under that name."""
    try:
        changed = dataclasses.replace(config, **{name: value})
        if not isinstance(config, PARTS):
            check_ranges(changed, SCRIPTS)
    except OutOfRange as fault:
        assert fault.field == name
        return True
    return False


@pytest.mark.parametrize("script", CONFIGS)
def test_no_number_is_nan_or_negative_by_chance(script):
    config = CONFIGS[script]
    passed = set()
    for name, is_float, is_tuple in numeric_fields(config):
        values = [-1, -(2**40)]
        if is_float:
            values = [math.nan, -math.inf, math.inf]
            values += [] if name in TAKE_NEGATIVE | {"weights"} else [-1.0, -1e-9]
            values = [v for v in values if v != math.inf or name not in TAKE_INF]
        for value in values:
            given = (value,) * 4 if is_tuple else value
            if not is_refused(config, name, given):
                passed.add((name, value))
    assert passed == set()


@pytest.mark.parametrize("name", ["count", "index", "stall"])
def test_counts_of_hosts_have_ranges(name):
    HostsConfig(**{name: 1})
    with pytest.raises(OutOfRange, match=rf"--hosts\.{name}=-7: must be"):
        HostsConfig(**{name: -7})


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (OptimizerConfig, {"clip": 0.0}),
        (OptimizerConfig, {"beta1": 1.0}),
        (OptimizerConfig, {"beta2": 2.0}),
        (OptimizerConfig, {"final_lr": 1.5}),
        (OptimizerConfig, {"eps": 0.0}),
        (OptimizerConfig, {"lr": 0.0}),
        (ModelConfig, {"window": 0}),
        (ModelConfig, {"rope_scale": 0.0}),
        (ModelConfig, {"rope_base": 0.0}),
        (ModelConfig, {"norm_eps": 0.0}),
        (ModelConfig, {"rope_llama3": (0.0, 0.0, 0.0, 0.0)}),
        (ModelConfig, {"rope_llama3": (8.0, 4.0, 1.0, 8192.0)}),
        (ModelConfig, {"rope_share": 0.0}),
        (ModelConfig, {"experts_per_token": 0}),
        (ModelConfig, {"experts": 1}),
        (ModelConfig, {"experts": 4, "gated": False}),
        (ModelConfig, {"window_pattern": (False,)}),
        (ModelConfig, {"window_pattern": (True, False)}),
        (ModelConfig, {"rope_local_base": 100.0}),
        (ModelConfig, {"qk_norm_over": "heads"}),
        (ModelConfig, {"experts_per_token": 1}),
        (ModelConfig, {"router_norm": False}),
        (ModelConfig, {"router_loss_coef": 0.0}),
        (ModelConfig, {"attention_soft_cap": 0.0}),
        (ModelConfig, {"rope_yarn": (4.0, 32.0, 1.0, 64.0, 0.0)}),
        (ModelConfig, {"rope_yarn": (4.0, 1.0, 32.0, 64.0, 1.0)}),
        (LoraConfig, {"alpha": 0.0}),
        (GuardConfig, {"window": 0}),
        (GuardConfig, {"skip": 0}),
        (SamplingConfig, {"top_p": 0.0}),
    ],
)
def test_values_that_would_train_nothing_or_attend_to_nothing_are_refused(make, fields):
    make()
    with pytest.raises(UserError, match=rf"--(\w+\.)?{next(iter(fields))}="):
        make(**fields)


def test_infinity_is_no_clipping():
    assert OptimizerConfig(clip=math.inf).clip == math.inf


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (
            train_sft,
            ["--seed=4294967303"],
            "--seed=4294967303: must be at least 0 and at most 4294",
        ),
        (train_sft, ["--seed=-1"], "--seed=-1: must be at least 0"),
        (
            train_sft,
            ["--optimizer.clip=0"],
            "--optimizer.clip=0.0: must be above 0 (inf: no limit)",
        ),
        (train_ppo, ["--value_optimizer.clip=0"], "--value_optimizer.clip=0.0: must be above 0"),
        (train_ppo, ["--kl_coef=nan"], "--kl_coef=nan: must be at least 0"),
        (
            train_sft,
            ["--optimizer.name=adafactor", "--optimizer.beta1=0.9"],
            "--optimizer.beta1: adafactor does not use it",
        ),
    ],
)
def test_a_flag_is_named_and_nothing_is_written(script, flags, words, capsys, tmp_path):
    line = fails(script, [*flags, f"--run={tmp_path}/run"], capsys)
    assert words in line and not list(tmp_path.iterdir())


def test_every_seed_in_range_is_another_one():
    largest = int(SCRIPTS["seed"].high)
    seeds = (0, 1, 7, 2**31, largest - 1, largest)
    keys = {tuple(map(int, jax.random.key_data(jax.random.key(seed)))) for seed in seeds}
    assert len(keys) == len(seeds)


def test_a_range_says_what_it_admits():
    share = Range(low=0, high=1, without_low=True)
    assert str(share) == "above 0 and at most 1"
    assert [share.admits(x) for x in (0, 1e-9, 1, 1.1, math.nan)] == [0, 1, 1, 0, 0]
    assert str(Range()) == "a finite number" and not Range().admits(math.inf)


@pytest.mark.parametrize("temperature", [1e-7, 1e-38, 5e-324])
def test_a_temperature_near_0_is_0(temperature):
    assert SamplingConfig(temperature=temperature).temperature == 0
    assert SamplingConfig(temperature=1e-3).temperature == 1e-3

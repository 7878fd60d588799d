"""What cannot fit the memory is refused before anything is allocated, with what would fit."""

import dataclasses
import re

import jax
import pytest
from running import fails
from test_model import PUBLISHED, VARIANTS

import train_dpo
import train_grpo
import train_rm
import train_sft
from model import LanguageModel, init_and_apply
from model_config import PRESETS
from planning import memory
from planning.memory import check_memory, needed_bytes, parameter_count
from runtime.errors import UserError
from sharding import MeshConfig, make_mesh

SFT = train_sft.Config()
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.fixture
def mesh(monkeypatch):
    """Return a mesh of one device, on a machine of 23 GB."""
    import jax

    monkeypatch.setattr(memory, "memory_of_host", lambda: 23e9)
    monkeypatch.setattr(memory, "memory_of_device", lambda device: 23e9)
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def with_preset(name, config=SFT):
    return dataclasses.replace(config, model=PRESETS[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_counted_as_they_are_published(name):
    assert parameter_count(PRESETS[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_counted_as_they_are_made(name):
    for over in ("head", "heads"):
        config = dataclasses.replace(VARIANTS[name], qk_norm=True, qk_norm_over=over)
        init, _ = init_and_apply(LanguageModel(config))
        shapes = jax.eval_shape(init, jax.random.key(0))
        assert parameter_count(config) == sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "config",
    [
        with_preset("llama3-8b"),
        with_preset("llama3-8b", train_rm.Config()),
        with_preset("llama3-8b", train_dpo.Config()),
        with_preset("llama3-8b", train_grpo.Config()),
        dataclasses.replace(SFT, model=dataclasses.replace(SFT.model, vocab=10**9)),
        dataclasses.replace(SFT, batch_size=2**22),
        dataclasses.replace(SFT, batch_size=10**8),
        dataclasses.replace(SFT, model=dataclasses.replace(SFT.model, layers=10**6)),
    ],
)
def test_what_cannot_fit_is_refused(config, mesh, capsys):
    with pytest.raises(UserError, match=r"GB.*; (give|take) "):
        check_memory(config, mesh)
    # A dry run allocates nothing: it is told.
    check_memory(dataclasses.replace(config, dry_run=True), mesh)
    assert capsys.readouterr().err.startswith("note: ")


@pytest.mark.parametrize("script", [train_sft, train_rm, train_dpo, train_grpo])
@pytest.mark.parametrize("name", ["world", "tiny", "qwen3-0.6b"])
def test_what_fits_is_let_pass(script, name, mesh):
    check_memory(with_preset(name, script.Config()), mesh)


def test_each_flag_that_is_named_makes_it_fit(mesh):
    config = dataclasses.replace(SFT, batch_size=2**20)
    with pytest.raises(UserError) as fault:
        check_memory(config, mesh)
    parts = int(re.search(r"--microbatches=(\d+)", str(fault.value))[1])
    check_memory(dataclasses.replace(config, microbatches=parts), mesh)
    with pytest.raises(UserError):  # control: it is the fewest
        check_memory(dataclasses.replace(config, microbatches=parts // 2), mesh)

    big = with_preset("llama3.2-1b")
    big = dataclasses.replace(big, model=dataclasses.replace(big.model, layers=26))
    with pytest.raises(UserError, match=r"--optimizer.name=adafactor, or --model.preset=llama3"):
        check_memory(big, mesh)
    optimizer = dataclasses.replace(big.optimizer, name="adafactor")
    check_memory(dataclasses.replace(big, optimizer=optimizer), mesh)

    # The model of --init is as large as it is; adapters on it have no optimiser's state.
    taken = dataclasses.replace(big, init="runs/big")
    with pytest.raises(UserError, match=r"--optimizer.name=adafactor, or --lora.rank=8$"):
        check_memory(taken, mesh)


def test_more_devices_hold_less_each():
    whole = sum(needed_bytes(with_preset("llama3-8b"), ONE).values())
    cut = sum(needed_bytes(with_preset("llama3-8b"), {**ONE, "fsdp": 8}).values())
    assert cut == pytest.approx(whole / 8, rel=0.1)
    copied = sum(needed_bytes(with_preset("llama3-8b"), {**ONE, "data": 8}).values())
    assert copied == pytest.approx(whole, rel=0.1)


def test_a_script_refuses_before_it_writes(tmp_path, capsys):
    flags = ["--batch_size=100000000", f"--run={tmp_path}/run"]
    assert "--batch_size=100000000" in fails(train_sft, flags, capsys)
    assert not list(tmp_path.iterdir())

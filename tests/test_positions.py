"""A model is trained on with positions read otherwise; what changes a parameter is refused."""

import dataclasses

import pytest
from running import rows_of, run

import train_sft
import train_state
from model_config import NEEDED, PRESETS, ModelConfig
from runtime.errors import UserError
from runtime.run_folder import load_config

OTHERS = {
    "vocab": 513,
    "width": 34,
    "mlp_width": 65,
    "layers": 3,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 10,
    "rope_share": 0.5,
    "qk_norm_over": "heads",
    "norms": "both",
    "norm": "layer",
    "o_bias": True,
    "mlp_bias": True,
    "gated": False,
    "experts": 4,
    "experts_per_token": 3,
    "router_norm": False,
    "parallel_residual": True,
    "score_width": 5.0,
    "attention_soft_cap": 50.0,
    "logit_soft_cap": 30.0,
    "norm_eps": 1e-6,
    "tied": False,
    "qkv_bias": True,
    "qk_norm": True,
    "activation": "gelu",
    "scale_embedding": True,
    "zero_centered_norm": True,
}
"""Another value of each field that parameters, or what they mean, depend on."""
POSITIONS = {
    "context": 512,
    "rope_base": 1e5,
    "rope_local_base": 2e4,
    "rope_scale": 0.5,
    "rope_llama3": (8.0, 1.0, 4.0, 64.0),
    "rope_yarn": (4.0, 32.0, 1.0, 64.0, 1.1),
    "window": 16,
    "window_pattern": (True, False),
}
"""Another value of each field that may change."""


def having_what_is_needed_by(name):
    """Return the tiny model with the field that `name` is not read without."""
    others = {"window": 8, "qk_norm": True, "experts": 8}
    needed = NEEDED.get(name)
    changed = {needed: others[needed]} if needed else {}
    return dataclasses.replace(PRESETS["tiny"], **changed)


def test_every_field_is_either_free_or_refused(monkeypatch, capsys):
    def refuse(stored, **changed):
        monkeypatch.setattr(train_state, "stored_model", lambda run: stored)
        train_state._refuse_other_shape("runs/x", dataclasses.replace(stored, **changed))

    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields == {*OTHERS, *POSITIONS, *train_state.NOT_COMPARED}
    for name, value in OTHERS.items():
        with pytest.raises(UserError, match=rf"--model\.{name}=.*: --init=runs/x has"):
            refuse(having_what_is_needed_by(name), **{name: value})
    assert capsys.readouterr().err == ""
    # Of a loss alone: what a pipeline needs to train another run's experts (layers.py).
    refuse(having_what_is_needed_by("router_loss_coef"), router_loss_coef=0.0)
    assert capsys.readouterr().err == ""
    for name, value in POSITIONS.items():
        refuse(having_what_is_needed_by(name), **{name: value})
        assert f"note: --model.{name}={value}: --init=runs/x has" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_goes_on_with_a_longer_context(tmp_path):
    flags = ["--batch_size=8", "--steps=2", "--optimizer.warmup=0", "--eval_every=0"]
    flags += ["--optimizer.lr=1e-2"]
    short = ["--model.preset=tiny", "--length=48", f"--run={tmp_path}/short"]
    run(train_sft, *flags, *short)
    longer = ["--length=160", "--model.context=160", "--model.rope_scale=0.3"]
    longer += ["--model.window=32", f"--init={tmp_path}/short", f"--run={tmp_path}/long"]
    run(train_sft, *flags, *longer)
    stored = load_config(f"{tmp_path}/long")["model"]
    assert (stored["context"], stored["rope_scale"], stored["window"]) == (160, 0.3, 32)
    # It starts from what the first run has learnt.
    first, other = (rows_of(tmp_path / name) for name in ("short", "long"))
    assert other[0]["loss"] < first[0]["loss"]

"""The count on paper against the compiler's, and against pairs counted one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import lact_flops
from jasr.layers.attention import visible
from jasr.systems.lact.model import LactConfig, LactCtc

MODEL = LactConfig(
    hidden_size=512,
    num_hidden_layers=3,
    num_attn_heads=8,
    intermediate_size=1024,
    audio_encoder_layers=2,
    subsampling=4,
    conv_kernel=15,
    lact_mode="bidirectional",
    lact_every=2,
    intermediate_ctc=(1,),
    self_conditioning=True,
    positions="none",
    window_size=0,
)


@pytest.mark.parametrize("changes", [dict(), dict(lact_mode="block"), dict(use_muon=True)], ids=str)
def test_count_is_the_compilers_without_what_is_elementwise(changes):
    config = LactConfig(**vars(MODEL) | dict(lact_chunk_size=400) | changes)
    mel, length = jnp.zeros((1, 1600, 80)), jnp.array([1600])
    model = LactCtc(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), mel, length)
    counted = jax.jit(model.apply).lower(variables, mel, length).cost_analysis()["flops"]
    assert 0.9 < sum(lact_flops.forward(config, 1600).values()) / counted < 1


@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize("mode", ["causal", "bidirectional", "block"])
def test_pairs_are_those_that_the_mask_allows(mode, window):
    config = LactConfig(lact_mode=mode, window_size=window, lact_chunk_size=7)
    chunk = 7 if mode == "block" else 0
    i = np.arange(30)
    seen = visible(i, i, causal=config.causal, window=window, chunk=chunk)
    assert lact_flops.visible_pairs(config, 30) == seen.sum()

"""Exports inside of a step, links to them, and a run that goes on from an earlier step."""

import os
import shutil

import jax
import numpy as np
import pytest

from jasr import checkpoint, settings, tree
from jasr.checkpoint import CheckpointError, Checkpoints
from jasr.systems import source
from jasr.systems.lact import original
from jasr.systems.lact.settings import LactConfig
from jasr.text import CharTokenizer
from tests.checkpoint.states import make_state

SMALL = LactConfig(
    hidden_size=16, num_hidden_layers=1, num_attn_heads=2, num_lact_heads=2, intermediate_size=16,
    ctc_vocab_size=29,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """(items, meta) of a step of a small LaCT model."""
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(x.dtype), original.shapes(SMALL)
    )
    tokenizer = CharTokenizer(original.LIBRISPEECH, "lower").to_dict()
    config = original.reference_config(settings.to_dict(SMALL))
    return variables, {"config": config, "tokenizer": tokenizer, "task": "lact"}


def exporting(directory, names=("lact",)):
    return Checkpoints(directory, export=names, exporter=source.exports("lact"))


def test_a_step_holds_its_export_and_a_link_names_it(model, tmp_path):
    items, meta = model
    with exporting(tmp_path / "checkpoints") as c:
        assert c.save(300, items, {**meta, "step": 300}, wait=True)
    step, link = tmp_path / "checkpoints" / "300", tmp_path / "exports" / "step_000300_lact"
    assert not checkpoint.verify(step)
    assert os.readlink(link) == "../checkpoints/300/export/model_lact"
    _, leaves = source.opened(str(link))
    want = tree.flatten(items)
    assert leaves.keys() == want.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, want[path])
    (step / "export" / "model_lact" / "vocab.txt").write_text("x")
    assert "export/model_lact/vocab.txt" in checkpoint.verify(step)[0]
    moved = shutil.copytree(tmp_path, tmp_path.with_name("moved"), symlinks=True)
    (moved / "exports" / link.name).unlink()
    shutil.copytree(moved / "checkpoints" / "300", moved / "checkpoints" / "400")
    exporting(moved / "checkpoints").close()
    assert {p.name for p in (moved / "exports").iterdir()} == {link.name, "step_000400_lact"}


def test_an_export_that_fails_is_a_save_that_failed(model, tmp_path):
    items, meta = model
    sections = {**meta["config"], "model": {**meta["config"]["model"], "subsampling": 4}}
    with exporting(tmp_path / "checkpoints") as c:
        c.save(1, items, meta, wait=True)
        with pytest.warns(RuntimeWarning, match="NOT be saved.*has no .'subsampling': 4"):
            c.save(2, items, {**meta, "config": sections}, wait=True)
        assert c.failures == 1 and c.steps() == [1]
    assert [p.name for p in (tmp_path / "exports").iterdir()] == ["step_000001_lact"]


def test_formats_and_options_of_exports_are_checked_by_name():
    with pytest.raises(ValueError, match="lact models have no format 'nemo'; .* have: lact"):
        source.parse_export("lact", "nemo")
    assert source.parse_export("parakeet", "hf:branch=ctc,modern_front_end") == (
        "hf",
        {"branch": "ctc", "modern_front_end": True},
    )
    for text in ("hf:branch=left", "hf:speed=3"):
        with pytest.raises(ValueError, match="config.checkpoint.export 'hf:"):
            source.parse_export("fastconformer", text)


def test_a_run_goes_on_from_an_earlier_step_once(run):
    steps = run / "checkpoints"
    with Checkpoints(steps, resume_step=20) as c:
        assert c.restore()[0] == 20 and c.steps() == [10, 20]
        (aside,) = run.glob("set_aside-20-*")
        assert [p.name for p in aside.iterdir()] == ["30"] and not checkpoint.verify(aside / "30")
        c.save(25, make_state(25), wait=True)
    with Checkpoints(steps, resume_step=20) as c:  # the same command again
        assert c.restore()[0] == 25
    with Checkpoints(steps, resume_step=7) as c, pytest.warns(RuntimeWarning, match="not used"):
        with pytest.raises(CheckpointError, match="7 is not"):
            c.restore()


def test_all_steps_stay_where_that_is_asked(run):
    with Checkpoints(run / "checkpoints", keep_latest=0, keep_best=0) as c:
        for step in (40, 50, 60):
            c.save(step, make_state(step), wait=True)
        assert c.steps() == [10, 20, 30, 40, 50, 60]

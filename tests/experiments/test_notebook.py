"""The notebook that restores a checkpoint without the training code runs from top to bottom."""

import json
import os

import jax
import numpy as np
import pytest

from jasr import checkpoint, text, tree
from jasr.systems import loading
from tests import tiny

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")


def make_run(run):
    """A run directory of two steps of an untrained model, with all that a real one holds."""
    config = json.loads(tiny.get_config().to_json())
    tokenizer = text.CharTokenizer.from_texts(["zero one two three four five six"], "lower")
    task = loading.build(config, tokenizer)
    batch = {"audio": np.zeros((1, 16000), np.float32), "audio_len": np.array([16000], np.int32)}
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
    with checkpoint.Checkpoints(run / "checkpoints") as store:
        for step in (10, 20):
            rng = np.random.default_rng(step)

            def leaf(x, rng=rng):
                return rng.standard_normal(x.shape, np.float32) * np.float32(0.1)

            state = {k: jax.tree.map(leaf, v) for k, v in shapes.items()}
            state["batch_stats"] = jax.tree.map(np.abs, state["batch_stats"])
            state["ema"] = state["params"]
            meta = {"step": step, "config": config, "tokenizer": tokenizer.to_dict(), "task": "ctc"}
            assert store.save(step, state, meta, {"val_wer": 5 / step}, wait=True)


@pytest.mark.slow
def test_notebook_reads_averages_and_transcribes_a_run(root, tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    monkeypatch.setenv("JASR_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("JASR_AUDIO", str(root / "tests" / "data" / "valid" / "valid-00000.flac"))
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in paths if p))
    notebook = nbformat.read(root / "experiments" / "restore_checkpoint.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    printed = "".join(
        o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()) if "text" in o
    )
    assert "step     10: whole   val_wer 0.5000" in printed
    assert "ctc - step 20" in printed
    assert "numbers" in printed and "steps [10, 20]: the average is up to" in printed
    params = checkpoint.load_params(tmp_path / "run" / "average-notebook")
    two = [tree.flatten(checkpoint.load_params(tmp_path / "run", s)) for s in (10, 20)]
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_allclose(leaf, 0.3 * two[0][path] + 0.7 * two[1][path], atol=1e-6)


def test_a_damaged_step_is_left_as_a_whole_when_a_model_is_loaded(tmp_path):
    """Parameters of one step with the tokenizer or statistics of another would be worse."""
    make_run(tmp_path / "run")
    steps = checkpoint.find_steps(tmp_path / "run")
    (steps[20] / "ema" / "manifest.ocdbt").write_bytes(b"cut")
    with pytest.warns(RuntimeWarning, match="/20: ema/manifest.ocdbt has 3 bytes"):
        _, variables, meta = loading.load(tmp_path / "run")
    assert meta["step"] == 10
    for item, name in (("ema", "params"), ("batch_stats", "batch_stats")):
        want = tree.flatten(checkpoint.load_params(tmp_path / "run", 10, item))
        for path, leaf in tree.flatten(variables[name]).items():
            np.testing.assert_array_equal(leaf, want[path])


def test_notebook_is_committed_without_outputs(root):
    notebook = nbformat.read(root / "experiments" / "restore_checkpoint.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count")

"""Runs of revision 3cb5ced go on, score, average and export to the numbers they had there.

tests/goldens/past holds four runs and what that revision's code made of them (make.py there). Only
commands and functions for users are called here, but for `plan_of` and `state_of`. Float32 sums are
taken in another order by another processor or on several devices, hence the tolerances.
"""

import functools
import hashlib
import json
import math
import runpy
import shutil
import tarfile

import jax
import numpy as np
import pytest

import jasr
from experiments import average, convert, evaluate
from experiments import train as training
from jasr import data, tree
from tests.goldens.past import make

pytest.importorskip("soundfile")
pytest.importorskip("sentencepiece")


@pytest.fixture(autouse=True)
def little_optimisation(monkeypatch):
    """Programs here run a few times: compiling them is what takes long."""
    options = {"xla_backend_optimization_level": 0}
    compiled = functools.partialmethod(jax.stages.Lowered.compile, compiler_options=options)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)


@pytest.fixture
def past(goldens):
    return goldens / "past"


@pytest.fixture
def expected(past):
    return json.loads((past / "expected.json").read_text())


@pytest.fixture
def manifests(root, monkeypatch):
    """The folder of the runs' recordings becomes the current one: their paths are relative."""
    monkeypatch.chdir(root)
    return make.VALID


def unpack(past, name, folder):
    with tarfile.open(past / f"{name}.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder / name


def moved(workdir, step, path):
    """Writes a new place of the original that a run's frozen weights came from into a step."""
    folder = workdir / "checkpoints" / str(step)
    meta, sealed = folder / "meta" / "metadata", folder / "jasr_manifest.json"
    values = json.loads(meta.read_text())
    values["frozen_from"]["path"] = str(path)
    meta.write_text(json.dumps(values))
    body = json.loads(sealed.read_text())
    del body["sha256"]
    body["files"]["meta/metadata"] = [
        meta.stat().st_size,
        hashlib.sha256(meta.read_bytes()).hexdigest(),
    ]
    name = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    sealed.write_text(json.dumps({**body, "sha256": name}))


def plan_of(train_data):
    """What make.py kept of the plan of an opened training set: three epochs."""
    plan, rows, position = train_data.plan, [], 0
    while plan.locate(position)[0] < 3:
        epoch, bucket, members = plan.batch(position)
        rows.append([epoch, bucket, [drawn(row, train_data) for row in members]])
        position += 1
    return {
        "fingerprint": train_data.fingerprint,
        "shapes": [list(shape) for shape in plan.shapes],
        "batches": len(rows),
        "first_batch": rows[0],
        "rows": make.digest(rows),
    }


def drawn(row, train_data):
    """[utterances, speeds, samples of silence before each] of a row."""
    words, layout = np.asarray(row.words, np.uint64), train_data.layout
    gaps = layout.gaps(words).tolist() if train_data.cfg.concat > 1 else [0] * len(words)
    return [list(row.items), layout.speeds(words).tolist(), [0, *gaps[1:]]]


def state_of(path, folder):
    """{key: array} of the weights in a .nemo, by its keys alone: no model is built of them."""
    from jasr.interop import torch_file

    with tarfile.open(path) as tar:
        name = next(n for n in tar.getnames() if n.endswith("model_weights.ckpt"))
        tar.extract(name, folder, filter="data")
    return torch_file.read(folder / name)


def check_sums(found, wanted, rtol=1e-6):
    """Names and shapes are equal; a sum may differ by `rtol` of the magnitudes that it adds up."""
    assert found.keys() == wanted.keys()
    for name, (shape, total, size) in wanted.items():
        assert found[name][0] == shape, name
        np.testing.assert_allclose(found[name][1:], [total, size], 0, rtol * size, err_msg=name)


def params(path):
    return make.sums(tree.flatten(jasr.load_params(str(path))))


def check_scores(checkpoint, manifest, report, wanted):
    line = [f"--checkpoint={checkpoint}", f"--manifest={manifest}", f"--output={report}"]
    assert evaluate.main(line) == 0
    assert make.scores(report) == wanted


def place(name, past, root, folder):
    """(run directory, its config) as its owner finds them after the recordings, the tokenizer and
    the original of its frozen weights were moved."""
    workdir = unpack(past, name, folder)
    config = json.loads((workdir / "config.json").read_text())
    if name == "from_nemo":
        original = folder / "tiny.nemo"
        original.write_bytes((root / make.ARCHIVE).read_bytes())
        moved(workdir, 4, original)
        config["init"]["path"] = str(original)
    if name == "hybrid":
        config["text"]["path"] = str(workdir / "tokenizer" / "tokenizer.model")
    for key in ("train", "valid"):
        config["data"][key] = [str(root / path) for path in config["data"][key]]
    return workdir, config


@pytest.mark.parametrize("name", ["lact", "hybrid", "from_nemo"])
def test_a_run_goes_on_as_it_would_have(name, past, expected, root, tmp_path, monkeypatch):
    wanted = expected[name]
    workdir, config = place(name, past, root, tmp_path)
    check_sums(params(workdir), wanted["params"])
    check_scores(workdir, root / make.VALID, tmp_path / "report.json", wanted["evaluate"])
    opened, real = [], data.open_train
    monkeypatch.setattr(
        data, "open_train", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1]
    )
    results = training.train(config, workdir)
    assert plan_of(opened[0]) == wanted["plan"]
    found = {k: v for k, v in make.losses(workdir).items() if int(k) > 4}
    assert found.keys() == wanted["losses"].keys()
    for step, loss in wanted["losses"].items():
        assert math.isclose(found[step], loss, rel_tol=2e-4), (step, found[step], loss)
    assert results.get("val_wer") == wanted["val_wer"]
    check_sums(params(workdir), wanted["after"], rtol=1e-3)  # Adam's small steps, once more


def test_an_average_is_scored_and_made_again(past, expected, root, tmp_path, capsys):
    workdir, wanted = unpack(past, "plain", tmp_path), expected["average"]
    old, new = workdir / "average-2_4", tmp_path / "again"
    check_sums(params(old), wanted["params"])
    check_scores(old, root / make.VALID, tmp_path / "report.json", wanted["evaluate"])
    line = [f"--checkpoint_dir={workdir}", "--steps", "2", "4", "--weights", "0.3", "0.7"]
    assert average.main([*line, f"--output={new}"]) == 0
    check_sums(params(new), wanted["params"])


def test_a_hybrid_is_exported_under_the_same_keys(past, expected, tmp_path, capsys):
    workdir, target = unpack(past, "hybrid", tmp_path), tmp_path / "out.nemo"
    assert convert.main([str(workdir), str(target)]) == 0
    check_sums(make.sums(state_of(target, tmp_path)), expected["hybrid"]["export"])


def test_lact_is_converted_with_the_weights_that_it_did_not_save(past, expected, tmp_path, capsys):
    workdir, target = unpack(past, "lact", tmp_path), tmp_path / "whole"
    assert convert.main([str(workdir), str(target)]) == 0
    shutil.rmtree(workdir)  # the kept copy of the frozen weights, too
    check_sums(params(target), expected["lact"]["export"])


@pytest.mark.parametrize("name", make.PLANS)
def test_batches_are_planned_as_they_were(name, expected, manifests):
    sources = tuple(zip(make.SETS, (2.0, 1.0), strict=True)) if name == "weighted" else make.SETS
    config = data.DataConfig(train=sources, **make.PLANS[name])
    layout = data.AudioText(config, config.sample_rate, lambda text: list(map(ord, text)))
    opened = data.open_train(config, layout, 3, version=2)
    assert plan_of(opened) == expected["plans"][name]


def test_from_pretrained_hears_what_evaluate_heard(past, expected, root, tmp_path):
    workdir = unpack(past, "lact", tmp_path)
    recording = next((root / "tests" / "data" / "valid").glob("*-00000.flac"))
    [result] = jasr.from_pretrained(str(workdir)).transcribe([str(recording)])
    assert result["text"] == expected["lact"]["evaluate"]["texts"][0][1]


RECIPES = {
    "ctc": """
    config.model.update(
        hidden_size=16, num_hidden_layers=1, num_attn_heads=2, num_lact_heads=2,
        intermediate_size=16, subsampling=4, lact_mode="bidirectional",
    )""",
    "parakeet": """
    config.text.update(kind="sentencepiece", path="{tokenizer}")
    config.model.encoder.update(
        n_layers=1, d_model=16, n_heads=2, subsampling_conv_channels=4, dropout=0.0,
    )
    config.model.kind = config.loss.kind = "ctc"
""",
}


@pytest.mark.parametrize("task", RECIPES)
def test_a_users_config_file_still_trains(task, past, manifests, tmp_path):
    tokenizer = unpack(past, "hybrid", tmp_path) / "tokenizer" / "tokenizer.model"
    path = tmp_path / "recipe.py"
    path.write_text(
        f"""
from configs.common import default


def get_config():
    config = default("{task}")
    config.task = "{task}"
    config.data.update(
        train=("tests/data/train.jsonl",), num_buckets=1, bucket_batch_size=(8,)
    )
    config.train.update(steps=1, log_every=1)
{RECIPES[task].format(tokenizer=tokenizer)}
    return config.lock()
"""
    )
    training.train(runpy.run_path(str(path))["get_config"](), tmp_path / "run")
    assert math.isfinite(make.losses(tmp_path / "run")["1"])

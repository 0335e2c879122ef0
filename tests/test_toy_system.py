"""A system of a few hundred lines goes through the general rooms and commands (`tests/toy.py`)."""

import json
import math

import jax
import numpy as np
import pytest

from configs import common, foreign
from experiments import average, convert, evaluate
from experiments.checks import numerics
from experiments.train import train
from jasr import checkpoint, data, settings, sharding, text, tree
from jasr.interop import safetensors_file
from jasr.recognition import generation
from jasr.recognition.recognizer import Recognizer
from jasr.systems import catalogue, loading
from tests import tiny, toy
from tests.tiny import DATA

ANSWERS = ("one", "four six")


@pytest.fixture(autouse=True)
def row(monkeypatch):
    """One more row of the catalogue."""
    monkeypatch.setitem(catalogue.SYSTEMS, "toy", "tests.toy:SYSTEM")


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """A source of eight lines with two turns each, and beside it a LaCT run, "lact"."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]
    path = tmp_path_factory.mktemp("dialogues") / "train.jsonl"
    lines = []
    for n in range(8):
        pair = rows[n : n + 2]
        heard = {
            "audio": [str(DATA / row["audio_filepath"]) for row in pair],
            "seconds": [row["duration"] for row in pair],
        }
        turns = [{**heard, "text": answer} for answer in ANSWERS]
        lines.append(json.dumps({"id": f"d{n}", "turns": turns}))
    path.write_text("\n".join(lines) + "\n")
    lact, tokenizer = json.loads(tiny.get_config().to_json()), common_tokenizer()
    task = loading.build(lact, tokenizer)
    drawn = jax.jit(task.init)(jax.random.key(3), task.layout.empty((1, 16000, 4)))
    meta = {"config": lact, "task": "lact", "tokenizer": tokenizer.to_dict()}
    loading.save(path.with_name("lact"), meta, drawn)
    return path


def common_tokenizer():
    return text.CharTokenizer((text.BLANK, *sorted(set("".join(ANSWERS)))))


def config(dialogues, **train):
    c = common.default("toy")
    c.model.ears.update(tiny.get_config().model)
    c.init.update(path=f"ears={dialogues.with_name('lact')}", freeze=("ears/.*",))
    c.data.update(train=(str(dialogues),), valid=(f"same={dialogues}",), num_threads=0)
    c.data.update(
        concat=2, concat_duration=12.0, num_buckets=1, bucket_batch_size=(4,), token_multiple=4
    )
    c.text.vocabulary = tuple(sorted(set("".join(ANSWERS))))
    c.optim.update(
        lr=0.05, schedule="constant", warmup_steps=0, ema=0.5, decay_rules=((".*", 0.0),)
    )
    c.train.update(steps=6, log_every=1, eval_every=3, **train)
    c.checkpoint.update(metric="val_perplexity", keep_latest=5, export=("pair",))
    c.mesh.update(
        data=4 if jax.device_count() == 8 else 1, tensor=2 if jax.device_count() == 8 else 1
    )
    return json.loads(c.to_json())


@pytest.fixture(scope="module")
def run(dialogues, tmp_path_factory):
    """A run of six steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(catalogue.SYSTEMS, "toy", "tests.toy:SYSTEM")
        workdir = tmp_path_factory.mktemp("toy")
        train(config(dialogues), workdir)
    return workdir


def lines(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_is_measured(run):
    losses = [row["loss"] for row in lines(run) if "loss" in row]
    assert losses[-1] < losses[0] and "turns_per_s" in lines(run)[0]
    last = lines(run)[-1]
    assert last["val_perplexity"] == last["val_perplexity/same"] > 1
    assert {"val_loss", "val_exact"} <= set(last)


def test_rows_hold_two_items_of_two_pieces_and_a_draw(dialogues):
    task = loading.build(config(dialogues), common_tokenizer())
    cfg = data.DataConfig(
        train=(str(dialogues),),
        concat=2,
        concat_duration=12.0,
        num_buckets=1,
        bucket_batch_size=(4,),
        num_threads=0,
    )
    trained = data.open_train(cfg, task.layout, seed=0)
    assert [len(bucket) for bucket in trained.shapes] == [4]  # rows and three axes
    seen = [batch for (_, _, batch), _ in zip(trained.iterate(), range(8), strict=False)]
    ends = np.concatenate([(b["tokens"] == task.ids[1]).sum(1) for b in seen])
    greeted = np.concatenate([(b["tokens"] == task.ids[0]).sum(1) for b in seen])
    assert set(ends) <= {0, 1, 2} and 2 in ends and len(set(greeted)) > 1
    assert all(b["level"].shape[1] >= 4 for b in seen)


def test_it_resumes_bit_for_bit(run, dialogues, tmp_path):
    asked = iter([False, False, False, True])
    train(config(dialogues), tmp_path, stop=lambda: next(asked))
    assert checkpoint.load_meta(tmp_path)["step"] == 4
    train(config(dialogues), tmp_path)
    for item in ("params", "ema", "opt_state", "counters"):
        a, b = (checkpoint.load_params(x, item=item) for x in (run, tmp_path))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_divisors_of_a_batch_are_those_of_its_micro_batches(dialogues):
    task = loading.build(config(dialogues), common_tokenizer())
    batch = task.layout.empty((4, 0, 6, 4))
    batch["index"][:3], batch["token_len"][:3] = range(3), (5, 2, 1)
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    keys = {"augment": jax.random.key(1), "dropout": jax.random.key(2)}
    divisors = task.divisors(batch)
    assert {k: float(v) for k, v in divisors.items()} == {"tokens": 8, "rows": 3}
    whole = task.loss(variables, batch, divisors, keys, 0)[0]
    parts = [{k: v[r : r + 1] for k, v in batch.items()} for r in range(4)]
    cut = [task.loss(variables, part, divisors, keys, 0)[0] for part in parts]
    np.testing.assert_allclose(sum(cut), whole, rtol=1e-6)


def test_it_generates_transcribes_and_is_evaluated(run, tmp_path):
    task, variables, meta = loading.load(run)
    variables = jax.device_put(variables)
    batch = task.layout.empty((2, 0, 4, 2))
    batch["index"][0] = 0
    stepper = loading.verb(task, "generate")
    found = generation.generate(
        stepper, variables, batch, key=jax.random.key(0), max_steps=5,
        until=lambda out: out["token"] == task.ids[1],
    )  # fmt: skip
    assert len(generation.emitted(stepper, found)) == 2 and found.length[1] == 0
    result = Recognizer(task, variables, meta=meta).transcribe(np.zeros(16000, np.float32))
    assert isinstance(result["text"], str) and result["coverage"]["uncovered"] == []
    with pytest.raises(ValueError, match="does not stream; what it does: transcribe, generate"):
        loading.verb(task, "stream")
    report = tmp_path / "report.json"
    manifest = DATA / "valid.jsonl"
    assert (
        evaluate.main([f"--checkpoint={run}", f"--manifest={manifest}", f"--output={report}"]) == 0
    )
    assert math.isfinite(json.loads(report.read_text())["wer"])


def test_it_is_averaged_and_its_old_name_is_read(run, tmp_path, capsys):
    made = tmp_path / "made"
    given = [f"--checkpoint_dir={run}", "--top_n=2", "--metric=val_perplexity"]
    assert average.main([*given, f"--output={made}"]) == 0
    assert loading.load(made)[0].model.config.width == 8
    assert catalogue.get("plaything").name == "toy"


def flat(path):
    return tree.flatten(loading.load(path)[1])


def test_its_ears_are_a_lact_runs_and_are_named_instead_of_written(run, dialogues):
    given = tree.flatten(loading.load(dialogues.with_name("lact"))[1]["params"]["model"])
    found = {p: x for p, x in flat(run).items() if p.startswith("params/ears/")}
    assert found
    for path, leaf in found.items():
        theirs = path.replace("params/ears", "audio_feature_extractor")
        np.testing.assert_array_equal(leaf, given[theirs])
    step = checkpoint.find_step(run)
    (origin,) = [checkpoint.load_meta(step)["frozen_from"]]
    assert {f"params/{p}" for p in origin["leaves"]} == set(found)
    assert not (step / "frozen").exists() and (run / "frozen_from-ears").is_dir()


def test_its_original_is_two_files_that_stack_cut_and_tie(run, dialogues, tmp_path, capsys):
    (exported,) = checkpoint.find_step(run).glob("export/*")
    words, cell = (safetensors_file.read(exported / name) for name in toy.FILES)
    np.testing.assert_array_equal(words["embed.weight"], words["head.weight"])
    ours = flat(run)
    np.testing.assert_array_equal(cell["sides.1.weight"], ours["params/loudness"][1])
    whole = np.concatenate([ours["params/mix"], ours["params/listen"]]).T
    np.testing.assert_array_equal(cell["cell.weight"], whole)
    back, again = tmp_path / "back", tmp_path / "again_pair"
    assert convert.main([str(exported), str(back)]) == 0
    assert convert.main([str(back), str(again)]) == 0
    assert capsys.readouterr().out.endswith("again_pair: a pair of files\n")
    for path in (exported, back, again):
        found = flat(path)
        assert found.keys() == ours.keys()
        for name, leaf in ours.items():
            np.testing.assert_array_equal(found[name], leaf)
    other = {**words, "head.weight": words["head.weight"] + 1}
    safetensors_file.write(again / toy.FILES[0], other)
    with pytest.raises(ValueError, match="head.weight .* differs from embed.weight"):
        loading.load(again)


def test_its_numbers_are_checked(run):
    task, variables, _ = loading.load(run)
    batch = numerics.make_batch(task, numerics.probes(toy.RATE, 0.5)[:3], toy.RATE)
    check = numerics.checked(task, train=True)
    assert check(variables, batch)[0] == ""
    variables["params"]["mix"] = np.full_like(variables["params"]["mix"], np.nan)
    assert check(variables, batch)[0].startswith("nan generated by primitive")


def test_a_recipe_of_its_toolkit_is_a_config(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("plaything:\n  width: 6\n  rate: 0.5\n")
    with pytest.warns(UserWarning, match="nothing else is read"):
        made = foreign.get_config(path)
    assert (made.task, made.model.width, made.optim.lr) == ("toy", 6, 0.5)
    path.write_text("plaything:\n  depth: 6\n")
    with pytest.raises(settings.RecipeError, match="recipe.yaml: plaything.depth is not known"):
        foreign.get_config(path)


def test_the_mesh_changes_no_loss(run, dialogues, tmp_path):
    one = config(dialogues)
    one["mesh"] = {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    one["data"]["bucket_batch_size"] = [jax.device_count()]
    sharding.make_mesh(sharding.MeshConfig(**one["mesh"]))
    one["train"]["steps"] = 1
    train(one, tmp_path)
    assert math.isfinite(lines(tmp_path)[0]["loss"])

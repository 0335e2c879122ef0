"""A system of a few hundred lines goes through the general rooms and commands (`tests/toy.py`)."""

import json
import math

import jax
import numpy as np
import pytest

from configs import common
from experiments import average, evaluate
from experiments.train import train
from jasr import checkpoint, data, sharding
from jasr.recognition import generation
from jasr.recognition.recognizer import Recognizer
from jasr.systems import catalogue, loading
from tests.tiny import DATA

ANSWERS = ("one", "four six")


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """One more row of the catalogue."""
    monkeypatch.setitem(catalogue.SYSTEMS, "toy", "tests.toy:SYSTEM")


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """A source of eight lines with two turns each."""
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
    return path


def config(dialogues, **train):
    c = common.default("toy")
    c.data.update(train=(str(dialogues),), valid=(f"same={dialogues}",), num_threads=0)
    c.data.update(
        concat=2, concat_duration=12.0, num_buckets=1, bucket_batch_size=(4,), token_multiple=4
    )
    c.text.vocabulary = tuple(sorted(set("".join(ANSWERS))))
    c.optim.update(
        lr=0.05, schedule="constant", warmup_steps=0, ema=0.5, decay_rules=((".*", 0.0),)
    )
    c.train.update(steps=6, log_every=1, eval_every=3, **train)
    c.checkpoint.update(metric="val_perplexity", keep_latest=5)
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


def common_tokenizer():
    from jasr import text

    return text.CharTokenizer((text.BLANK, *sorted(set("".join(ANSWERS)))))


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


def test_the_mesh_changes_no_loss(run, dialogues, tmp_path):
    one = config(dialogues)
    one["mesh"] = {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    one["data"]["bucket_batch_size"] = [jax.device_count()]
    sharding.make_mesh(sharding.MeshConfig(**one["mesh"]))
    one["train"]["steps"] = 1
    train(one, tmp_path)
    assert math.isfinite(lines(tmp_path)[0]["loss"])

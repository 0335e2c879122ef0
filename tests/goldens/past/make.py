"""Made the runs of this folder with the code of revision 3cb5ced, once; later code cannot.

    PYTHONPATH=. python make.py /tmp/past OUTPUT        # in a checkout of that revision

Four tiny runs stopped at step 4 of 8, packed, and in expected.json what that code made of them:
the plan of their data, the losses of steps 5 to 8, error rates and texts, averages and exports.
`tests/test_past.py` asks the same of today's code.
"""

import hashlib
import json
import pathlib
import shutil
import sys
import tarfile

import numpy as np

VALID = "tests/data/valid.jsonl"
ARCHIVE = "tests/goldens/nemo/archives/tiny_ctc_gzip.nemo"
SETS = ("tests/data/train.jsonl", VALID)
PLANS = {  # settings of data besides the runs', of which the plan alone is kept
    "estimated": {"num_buckets": 3, "batch_duration": 20.0, "speeds": (0.9, 1.0, 1.1)},
    "joined": {"num_buckets": 2, "concat": 3, "concat_duration": 8.0, "batch_duration": 30.0},
    "explicit": {"bucket_duration_bins": ((2.0, 40), (4.0, 60)), "bucket_batch_size": (4, 2)},
    "weighted": {"bucket_batch_size": (5,), "speeds": (0.9, 1.1), "concat": 2},
}


def sums(flat):
    """{name: [shape, sum, sum of magnitudes]} of flat {name: array}; sums in float64."""
    wide = {name: np.asarray(x, np.float64) for name, x in flat.items()}
    return {n: [list(x.shape), x.sum(), np.abs(x).sum()] for n, x in sorted(wide.items())}


def digest(rows):
    """A name of what JSON can hold."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def losses(workdir):
    """{step: loss} of a run's log."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {str(e["step"]): e["loss"] for e in found if "loss" in e}


def scores(report):
    """What `experiments.evaluate --output` says that does not depend on the clock."""
    report = json.loads(pathlib.Path(report).read_text())
    texts = [[u["ref"], u["hyp"]] for u in report["utterances"]]
    return {"wer": report["wer"], "cer": report["cer"], "texts": texts}


def plan_of(train_data):
    """What is kept of the plan of an opened training set: three epochs."""
    plan, rows, position = train_data.loader.plan, [], 0
    while plan.locate(position)[0] < 3:
        epoch, bucket, members = plan.batch(position)
        rows.append([epoch, bucket, [[*map(list, row)] for row in members]])
        position += 1
    return {
        "fingerprint": train_data.fingerprint,
        "shapes": [list(shape) for shape in plan.shapes],
        "batches": len(rows),
        "first_batch": rows[0],
        "rows": digest(rows),
    }


def plans():
    """{name: its plan} of PLANS, with characters as tokens."""
    from jasr import data

    found = {}
    for name, given in PLANS.items():
        sources = tuple(zip(SETS, (2.0, 1.0))) if name == "weighted" else SETS
        config = data.DataConfig(train=sources, **given)
        found[name] = plan_of(data.open_train(config, lambda text: list(map(ord, text)), 3))
    return found


def base(task):
    from configs import common

    config = common.default(task)
    config.data.train, config.data.valid = ("tests/data/train.jsonl",), (VALID,)
    config.data.update(speeds=(0.9, 1.0, 1.1), concat=2, concat_share=0.7, num_threads=1)
    config.data.update(num_buckets=1, bucket_batch_size=(8,))
    config.front_end.n_mels = 16
    config.spec_augment.update(freq_masks=1, freq_width=4, time_masks=1, time_width=0.05)
    config.optim.update(lr=1e-3, schedule="constant", warmup_steps=2, eps=1e-4)
    config.train.update(steps=8, log_every=1, eval_every=8)
    return config


def lact():
    config = base("ctc")
    config.model.update(
        audio_feature_dim=16, n_mels=16, hidden_size=16, num_hidden_layers=2, num_attn_heads=2,
        num_lact_heads=2, intermediate_size=16, audio_encoder_layers=2, subsampling=4,
        conv_kernel=3, lact_mode="bidirectional", lact_every=2, positions="none", window_size=0,
        initializer_range=0.3, dropout=0.1,
    )  # fmt: skip
    config.optim.ema = 0.9
    return config


def frozen(origin):
    config = lact()
    config.init.update(
        path=str(origin), freeze=("model/layers_0/.*", "model/audio_feature_extractor/.*")
    )
    return config


def hybrid(tokenizer):
    config = base("parakeet")
    config.data.valid = ()
    config.text.update(kind="sentencepiece", path=str(tokenizer))
    config.model.kind = "hybrid"
    config.model.encoder.update(
        feat_in=16, n_layers=1, d_model=16, n_heads=2, subsampling_factor=4,
        subsampling_conv_channels=4, conv_kernel_size=3, dropout=0.1, padding_counts=False,
    )  # fmt: skip
    config.model.decoder.update(pred_hidden=8)
    config.model.joint.update(joint_hidden=8)
    return config


def from_nemo(archive):
    from jasr.models.parakeet import ParakeetConfig

    from jasr import settings
    from jasr.interop import originals

    config = base("parakeet")
    given = originals.find(archive).load_meta(archive)["config"]
    model = settings.to_dict(settings.build(ParakeetConfig, given["model"], "model"))
    config.model.update(model)
    for name in ("front_end", "loss"):
        config[name].update(given[name])
    config.text.kind = "init"
    config.init.update(path=str(archive), freeze=("encoder/.*",))
    return config


def trained(config, workdir, until):
    """Trains to step `until`, where it is asked to stop."""
    from experiments import train

    asked = iter(range(1, 100))
    return train.train(json.loads(config.to_json()), workdir, lambda: next(asked) >= until)


def facts(workdir):
    """What the old code makes of a run stopped at step 4; it trains on in a copy."""
    import jasr
    from experiments import evaluate, train
    from jasr import data, tree

    config = json.loads((workdir / "config.json").read_text())
    again = workdir.with_name(workdir.name + "-again")
    shutil.copytree(workdir, again)
    opened, real = [], data.open_train
    data.open_train = lambda *a, **k: opened.append(real(*a, **k)) or opened[-1]
    results = train.train(config, again)
    data.open_train = real
    report = workdir.with_suffix(".json")
    line = [f"--checkpoint={workdir}", f"--manifest={VALID}", f"--output={report}"]
    assert evaluate.main(line) == 0
    return {
        "plan": plan_of(opened[0]),
        "losses": {k: v for k, v in losses(again).items() if int(k) > 4},
        "val_wer": results.get("val_wer"),
        "evaluate": scores(report),
        "params": sums(tree.flatten(jasr.load_params(str(workdir)))),
        "after": sums(tree.flatten(jasr.load_params(str(again)))),
    }


def pack(workdir, output):
    """The run without its caches and Orbax's empty folders, as one file without dates."""

    def clean(entry):
        entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
        return None if "quarantine" in entry.name else entry

    with tarfile.open(output / f"{workdir.name}.tar.xz", "w:xz", preset=9) as tar:
        tar.add(workdir, workdir.name, filter=clean)


def main(folder, output):
    import jasr
    from experiments import average, convert, evaluate, train_tokenizer
    from jasr import tree
    from jasr.interop import nemo

    folder, output, expected = pathlib.Path(folder), pathlib.Path(output), {"plans": plans()}
    folder.mkdir()
    archive = folder / "tiny.nemo"
    shutil.copy(ARCHIVE, archive)
    line = [SETS[0], "--vocab_size=24", f"--output={folder / 'hybrid' / 'tokenizer'}"]
    assert train_tokenizer.main([*line, "--normalisation=none", "--allow_smaller"]) == 0

    origin = lact()
    origin.train.update(steps=4, save_every=2)
    origin.data.valid, origin.optim.name = (), "sgd"  # without large moments
    trained(origin, folder / "plain", 4)
    made = ["--checkpoint_dir", str(folder / "plain"), "--steps", "2", "4", "--weights", "0.3"]
    assert average.main([*made, "0.7"]) == 0
    mean, report = folder / "plain" / "average-2_4", folder / "average.json"
    line = [f"--checkpoint={mean}", f"--manifest={VALID}", f"--output={report}"]
    assert evaluate.main(line) == 0
    flat = tree.flatten(jasr.load_params(str(mean)))
    expected["average"] = {"params": sums(flat), "evaluate": scores(report)}

    configs = {
        "lact": frozen(folder / "plain"),
        "hybrid": hybrid(folder / "hybrid/tokenizer/tokenizer.model"),
        "from_nemo": from_nemo(archive),
    }
    for name, config in configs.items():
        trained(config, folder / name, 4)
        expected[name] = facts(folder / name)
    assert convert.main([str(folder / "hybrid"), str(folder / "hybrid.nemo")]) == 0
    expected["hybrid"]["export"] = sums(nemo.state_dict(nemo.read(str(folder / "hybrid.nemo"))))
    assert convert.main([str(folder / "lact"), str(folder / "whole")]) == 0
    expected["lact"]["export"] = sums(tree.flatten(jasr.load_params(str(folder / "whole"))))
    for name in ("plain", *configs):
        pack(folder / name, output)
    (output / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

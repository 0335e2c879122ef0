"""The loop: it learns, resumes bit for bit, and gives the same numbers on any mesh."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from experiments.checks import checkpoint as checkpoint_check
from experiments.train import train
from jasr import checkpoint, data, settings, text, tree
from jasr.systems import source
from jasr.training import start
from tests import tiny
from tests.children import environment


def losses(workdir):
    rows = map(json.loads, (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in rows if "loss" in r}


def config(arg="", **changes):
    c = tiny.get_config(arg)
    with c.unlocked():
        for key, value in changes.items():
            section, _, name = key.partition("__")
            c[section][name] = value
    return c


def run(workdir, c):
    return train(c, workdir)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """A run of 20 steps on one device of the eight."""
    workdir = tmp_path_factory.mktemp("one")
    env = environment()
    command([tiny_flag(), f"--workdir={workdir}"], env)
    return workdir


def tiny_flag(arg=""):
    return "--config=tests/tiny.py" + (f":{arg}" if arg else "")


def command(args, env=None):
    return subprocess.run(
        [sys.executable, "-m", "experiments.train", *args],
        env=env, check=True, capture_output=True, text=True,
    )  # fmt: skip


def test_loss_falls(one_device):
    found = losses(one_device)
    assert list(found) == list(range(1, 21))
    assert np.mean([found[s] for s in (18, 19, 20)]) < 0.7 * found[1]


def test_run_leaves_metrics_config_and_checkpoints(one_device):
    rows = [json.loads(x) for x in (one_device / "metrics.jsonl").read_text().splitlines()]
    validated = [r for r in rows if "val_wer" in r]
    assert [r["step"] for r in validated] == [10, 20]
    assert json.loads((one_device / "config.json").read_text())["task"] == "lact"
    meta = checkpoint.load_meta(one_device)
    assert meta["position"] == 20 and meta["tokenizer"]["kind"] == "char"
    assert set(checkpoint.load_params(one_device)) == {"model", "ctc_head"}


@pytest.mark.parametrize("mesh", [dict(data=8), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_any_mesh_gives_the_losses_of_one_device(tmp_path, one_device, mesh):
    c = config(**{f"mesh__{k}": v for k, v in mesh.items()})
    run(tmp_path, c)
    ours, theirs = losses(tmp_path), losses(one_device)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def processes(command, devices=1, status=0):
    """Outputs of Python run with `command(address, number)` as processes 0 and 1 of one job."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, *command(address, number)],
            cwd=pathlib.Path(tiny.__file__).parent.parent,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        for number in range(2)
    ]
    outputs = [p.communicate()[0] for p in both]
    assert [p.returncode for p in both] == [status] * 2, "\n".join(x[-3000:] for x in outputs)
    return outputs


def trained_by_two(workdir, *flags, seeds=(0, 0), **more):
    """Outputs of the training command, run as two processes of one job."""

    def command(address, number):
        me = [
            f"--coordinator={address}",
            f"--process_id={number}",
            f"--config.seed={seeds[number]}",
        ]
        train = ["-m", "experiments.train", tiny_flag(), f"--workdir={workdir}"]
        return [*train, "--num_processes=2", *flags, *me]

    return processes(command, **more)


def test_two_processes_of_different_configs_both_say_so_and_leave(tmp_path):
    for said in trained_by_two(tmp_path, seeds=(0, 1), status=1):
        assert "error: the processes of this run do not agree" in said
        assert "config but for paths: " in said and "Traceback" not in said


def test_two_processes_of_two_devices_give_the_losses_of_one_device(tmp_path, one_device):
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.data=2")
    trained_by_two(tmp_path, *mesh, "--config.train.eval_every=20", devices=2)
    ours, theirs = losses(tmp_path), losses(one_device)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_stopped_and_resumed_run_equals_the_whole_one_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    c = config("dropout", train__steps=8, data__valid=())
    run(whole, c)
    asked = iter([False, False, True])
    train(c, parts, stop=lambda: next(asked))
    assert checkpoint.load_meta(parts)["step"] == 3
    run(parts, c)
    for item in ("params", "ema", "opt_state", "counters"):
        same(checkpoint.load_params(whole, item=item), checkpoint.load_params(parts, item=item))
    assert losses(whole) == losses(parts)


def test_sigterm_saves_the_step_and_leaves(tmp_path):
    env = environment()
    args = ["--config.train.steps=1000000", "--config.data.valid=()", f"--workdir={tmp_path}"]
    run = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", tiny_flag(), *args],
        env=env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    told = next(line for line in run.stderr if "loss" in line)
    run.send_signal(signal.SIGTERM)
    told += run.communicate()[1]
    assert run.returncode == 0, told[-3000:]
    meta = checkpoint.load_meta(tmp_path)
    assert meta["step"] == meta["position"] == max(losses(tmp_path)) > 0
    assert f"asked to stop: step {meta['step']} is saved" in told


TWO_PROCESSES = """
import os, pathlib, sys, traceback, types
sys.excepthook = lambda *e: (traceback.print_exception(*e), sys.stderr.flush(), os._exit(1))
from jasr import compilation_cache, sharding
me, root = int(sys.argv[2]), pathlib.Path(sys.argv[3])
sharding.init_distributed(sys.argv[1], 2, me)
compilation_cache.enable()
import numpy as np
import pytest
from experiments.train import train
from jasr.training.guards import check_failed
from tests.training.test_train import config
from tests.tiny import DATA
c = config(data__train=(str(DATA / ("train.jsonl", "valid.jsonl")[me]),))
with pytest.raises(ValueError, match="training data .* on process 0; .* on process 1"):
    train(c, root / "other")
seen = []
tally = lambda: np.array([3 * me, 10, 0])
check_failed(types.SimpleNamespace(tally=tally, judge=lambda *x: seen.append(x)))
assert seen == [(3, 20, 0, 2)], seen
small = dict(model__num_hidden_layers=1, model__lact_every=1, model__use_muon=False)
c = config("dropout", train__steps=4, data__valid=(), **small)
train(c, root / "whole")
asked = iter([False, True])
train(c, root / "parts", stop=lambda: me == 0 and next(asked))
train(c, root / "parts")
"""


@pytest.mark.slow
def test_two_processes_stop_resume_and_fail_together(tmp_path):
    """One is asked to stop, both do; they notice different data and share failure counts."""
    processes(lambda address, number: ["-c", TWO_PROCESSES, address, str(number), str(tmp_path)])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert list(checkpoint.find_steps(parts)) == [2, 4]
    for item in ("params", "ema", "opt_state", "counters"):
        same(checkpoint.load_params(whole, item=item), checkpoint.load_params(parts, item=item))
    assert losses(whole) == losses(parts)


def test_changed_data_or_model_or_tokenizer_is_refused_at_resume(tmp_path):
    run(tmp_path, config(train__steps=1, data__valid=()))
    characters = checkpoint.load_meta(tmp_path)["tokenizer"]["vocabulary"]
    with pytest.raises(start.StartError, match="tokenizer"):
        c = config(train__steps=2, text__vocabulary=tuple(characters[:0:-1]))
        train(c, tmp_path, allow_data_change=True)
    changed = r"config.data.bucket_batch_size \(it was .*\[16\]\), or pass --allow_data_change"
    with pytest.raises(start.StartError, match=changed):
        run(tmp_path, config(train__steps=2, data__bucket_batch_size=(16,)))
    with pytest.raises(start.StartError, match=r"differs .* model.rope_theta \(10000.0 -> 1"):
        run(tmp_path, config(train__steps=2, model__rope_theta=1e5))
    meta = checkpoint.load_meta(tmp_path)
    harmless = json.loads(config(model__dropout=0.1, model__remat=True).to_json())
    tokenizer = text.from_dict(meta["tokenizer"])
    data = types.SimpleNamespace(facts=lambda: meta["plan"])
    start.check_resume(meta, data, tokenizer, harmless, allow_data_change=False)
    other = {**harmless, "optim": {**harmless["optim"], "name": "adamw8bit"}}
    with pytest.raises(start.StartError, match=r"optim.name \(adamw -> adamw8bit\)"):
        start.check_resume(meta, data, tokenizer, other, allow_data_change=False)


def test_a_complete_run_says_so_before_anything_is_compiled(tmp_path, caplog, monkeypatch):
    run(tmp_path, config(train__steps=1))
    monkeypatch.setattr("jasr.training.loop.compile_step", None)
    with caplog.at_level("INFO", "jasr.train"):
        again = run(tmp_path, config(train__steps=1))
    assert "complete at step 1 (config.train.steps is 1)" in caplog.text
    assert again == checkpoint.load_metrics(tmp_path / "checkpoints" / "1") and "val_wer" in again


def test_a_run_whose_last_validation_failed_is_validated_when_started_again(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no validation today")

    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="today"):
        m.setattr("jasr.training.validation.validate", fail)
        run(tmp_path, config(train__steps=1))
    assert checkpoint.load_meta(tmp_path)["step"] == 1
    assert "val_wer" in run(tmp_path, config(train__steps=1))


def test_steps_are_not_lost_with_what_fails_between_two_saves(tmp_path, monkeypatch):
    counts = iter([None, None, data.DataError("too many utterances")])

    def check_failed(loader):
        if fault := next(counts):
            raise fault

    monkeypatch.setattr("jasr.training.guards.check_failed", check_failed)
    with pytest.raises(data.DataError, match="too many"):
        run(tmp_path, config(data__valid=()))
    assert checkpoint.load_meta(tmp_path)["step"] == 3


def test_run_starts_from_given_weights_and_freezes_by_rule(tmp_path, one_device):
    given = tmp_path / "given"
    shutil.copytree(one_device, given)
    c = config(
        train__steps=2, data__valid=(), init__path=str(given), init__freeze=("model/.*",),
        init__drop=("ctc_head/.*",), optim__ema=0.0,
    )  # fmt: skip
    run(tmp_path / "first", c)
    shutil.rmtree(given)  # as its run does with an old step
    workdir = (tmp_path / "first").rename(tmp_path / "moved")
    assert set(checkpoint.load_params(workdir)) == {"ctc_head"}  # adapters only
    from jasr.systems import loading

    _, variables, _ = loading.load(workdir)
    before = checkpoint.load_params(one_device)
    same(variables["params"]["model"], before["model"])
    assert not np.array_equal(
        variables["params"]["ctc_head"]["kernel"], before["ctc_head"]["kernel"]
    )
    run(workdir, config(**{**_sections(c), "train__steps": 3}))  # resumes with frozen ones
    kept = source.resolve(workdir / "frozen_from", "ema")
    named = checkpoint.load_meta(workdir)["frozen_from"]
    assert kept.items() <= named.items() and set(named["leaves"]) <= set(tree.flatten(before))
    assert checkpoint_check.check(workdir) == 0
    third = tmp_path / "third"  # adapters on adapters
    run(third, config(**{**_sections(c), "train__steps": 1, "init__path": str(workdir)}))
    other = {"params": {"ctc_head": {"kernel": np.zeros(3)}}, "ema": before}
    checkpoint.save_step(workdir / "frozen_from", other)
    with pytest.raises(checkpoint.CheckpointError, match="frozen ones .* checksum changed"):
        loading.load(workdir)
    shutil.rmtree(workdir)
    same(loading.load(third)[1]["params"]["model"], before["model"])


def _sections(c):
    return {
        "init__path": c.init.path, "init__freeze": c.init.freeze, "init__drop": c.init.drop,
        "optim__ema": 0.0, "data__valid": (),
    }  # fmt: skip


def test_weights_of_another_tokenizer_are_refused(tmp_path, one_device):
    c = config(init__path=str(one_device), text__vocabulary=tuple(" zyxwvutsrqponmlkjihgfedcba"))
    with pytest.raises((start.StartError, tree.TreeError), match="tokenizer|fit"):
        run(tmp_path, c)
    meta = checkpoint.load_meta(one_device)
    backwards = tuple(meta["tokenizer"]["vocabulary"][:0:-1])
    c = config(init__path=str(one_device), text__vocabulary=backwards)
    with pytest.raises(start.StartError, match="tokenizer"):
        run(tmp_path, c)


def test_the_tokenizer_of_the_given_weights_is_taken_and_kept(tmp_path, one_device):
    words, saved = start.TextConfig(kind="init"), checkpoint.load_meta(one_device)["tokenizer"]
    given = start.InitConfig(path=str(one_device))
    assert start.make_tokenizer(words, None, given, tmp_path / "none").to_dict() == saved
    gone = start.InitConfig(path=str(tmp_path / "gone"))
    assert start.make_tokenizer(words, None, gone, one_device / "checkpoints").to_dict() == saved
    with pytest.raises(ValueError, match="config.init.path: set it"):
        start.make_tokenizer(words, None)


def test_weights_that_mean_something_else_are_refused_unless_the_change_is_named(
    tmp_path, one_device
):
    changes = dict(
        train__steps=1, data__valid=(), init__path=str(one_device), model__rope_theta=2.0,
        model__norm_eps=1e-5, model__dropout=0.2, front_end__dither=1e-5, init__drop=(),
    )  # fmt: skip
    with pytest.raises(start.StartError) as e:
        run(tmp_path, config(**changes))
    told = str(e.value)
    assert "model.rope_theta (10000.0 -> 2.0), model.norm_eps (1e-06 -> 1e-05). Take" in told
    allowed = ("model.rope_theta", "model.norm_eps")
    assert told.endswith(f'--config.init.allow_changes="{allowed}"')
    with pytest.raises(tree.TreeError, match="nothing"):  # on to what comes next
        changes["init__drop"] = ("nothing",)
        run(tmp_path, config(**changes, init__allow_changes=allowed))


def test_misspelt_config_key_is_named(tmp_path):
    plain = json.loads(config().to_json())
    plain["model"]["hiden_size"] = 3
    with pytest.raises(settings.SettingsError, match="config.model.hiden_size.*'hidden_size'"):
        train(plain, tmp_path)
    plain = json.loads(config().to_json()) | {"modle": {}}
    with pytest.raises(settings.SettingsError, match="config.modle.*model"):
        train(plain, tmp_path)


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path):
    c = config(
        optim__lr=float("inf"), optim__max_bad_steps=3, train__steps=10, train__log_every=4,
        data__valid=(),
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="4 steps in a row up to step 4"):
        run(tmp_path, c)
    assert checkpoint.load_meta(tmp_path)["step"] == 4  # for `doctor numerics`


def test_zero_updates_are_refused(tmp_path):
    c = config(model__lact_mode="causal", model__lact_chunk_size=4096)
    with pytest.raises(ValueError, match="never be updated"):
        run(tmp_path, c)

"""NeMo's recipe of fine-tuning as --config: every key is mapped, without effect, or refused."""

import copy
import json
import subprocess
import sys

import pytest

from configs import foreign
from experiments import train as training
from jasr import checkpoint, settings
from jasr.interop import plain_yaml
from jasr.systems import catalogue, loading
from jasr.systems.fastconformer import nemo, nemo_recipe
from jasr.systems.fastconformer.nemo_recipe_keys import IDLE, KNOWN
from jasr.text.sentencepiece_model import UNKNOWN, Model, Piece
from jasr.training import optim, step
from tests.systems.fastconformer.nemo_models import tokenizer_of

pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def archive(goldens):
    return str(goldens / "nemo" / "archives" / "tiny_ctc_gzip.nemo")


@pytest.fixture
def recipe(archive, root):
    """A mapping with the keys of NeMo's example, on the tests' recordings."""
    data = root / "tests" / "data"
    loader = {"sample_rate": "${model.sample_rate}", "num_workers": 8, "pin_memory": True}
    sched = {"name": "CosineAnnealing", "warmup_steps": 1, "warmup_ratio": None, "min_lr": 1e-6}
    kept = {"monitor": "val_wer", "mode": "min", "save_top_k": 5, "always_save_nemo": True}
    return {
        "name": "tuning",
        "init_from_nemo_model": archive,
        "model": {
            "sample_rate": 16000,
            "train_ds": {
                "manifest_filepath": str(data / "train.jsonl"), **loader, "batch_size": 4,
                "shuffle": True, "max_duration": 20, "min_duration": 0.1, "is_tarred": False,
                "tarred_audio_filepaths": None, "shuffle_n": 2048,
                "bucketing_strategy": "fully_randomized", "bucketing_batch_size": None,
            },
            "validation_ds": {
                "manifest_filepath": str(data / "valid.jsonl"), **loader, "batch_size": 16,
                "shuffle": False, "use_start_end_token": False,
            },
            "test_ds": {"manifest_filepath": None, **loader},
            "char_labels": {"update_labels": False, "labels": None},
            "tokenizer": {"update_tokenizer": False, "dir": None, "type": "bpe"},
            "spec_augment": {
                "_target_": "nemo.collections.asr.modules.SpectrogramAugmentation",
                "freq_masks": 2, "time_masks": 10, "freq_width": 27, "time_width": 0.05,
            },
            "optim": {
                "name": "adamw", "lr": 1e-4, "betas": [0.9, 0.98], "weight_decay": 1e-3,
                "sched": sched,
            },
        },
        "trainer": {
            "devices": 2, "num_nodes": 1, "max_epochs": 3, "max_steps": -1,
            "val_check_interval": 1.0, "accelerator": "auto",
            "strategy": {"gradient_as_bucket_view": True}, "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.0, "precision": 32, "log_every_n_steps": 10,
            "enable_progress_bar": True, "num_sanity_val_steps": 0, "check_val_every_n_epoch": 1,
            "sync_batchnorm": True, "enable_checkpointing": False, "logger": False,
            "benchmark": False,
        },
        "exp_manager": {
            "exp_dir": None, "name": "${name}", "create_tensorboard_logger": True,
            "create_checkpoint_callback": True, "checkpoint_callback_params": kept,
            "resume_if_exists": False, "resume_ignore_no_checkpoint": False,
            "create_wandb_logger": False, "wandb_logger_kwargs": {"name": None, "project": None},
        },
    }  # fmt: skip


def changed(recipe, dotted, value):
    new = copy.deepcopy(recipe)
    *outer, last = dotted.split(".")
    section = new
    for name in outer:
        section = section.setdefault(name, {})
    section[last] = value
    return new


def written(recipe, path):
    path.write_bytes(plain_yaml.dump(recipe))
    return str(path)


def test_the_example_becomes_a_config_whose_sections_are_all_valid(recipe, tmp_path):
    with pytest.warns(UserWarning) as notes:
        config = foreign.get_config(written(recipe, tmp_path / "a.yaml"))
    plain = json.loads(config.to_json())
    assert plain["task"] == "fastconformer" and plain["text"]["kind"] == "init"
    assert plain["model"]["kind"] == "ctc" and plain["model"]["encoder"]["feat_in"] == 40
    for name, cls in catalogue.sections(catalogue.get("fastconformer")).items():
        settings.build(cls, plain[name], name)
    run = settings.build(step.RunConfig, plain["train"], "train")
    lines = len(open(recipe["model"]["train_ds"]["manifest_filepath"]).readlines())
    assert (run.epochs, run.log_every, run.eval_every) == (3.0, 10, round(lines / 16))
    opt = settings.build(optim.OptimConfig, plain["optim"], "optim")
    assert (opt.lr, opt.b2, opt.eps, opt.weight_decay) == (1e-4, 0.98, 1e-8, 1e-3)
    assert (opt.schedule, opt.warmup_steps, opt.decay_steps) == ("CosineAnnealing", 1, 0)
    assert opt.decay_rules == ((".*", 1.0),) and opt.clip_norm == 0 and opt.accumulate == 2
    assert plain["data"]["bucket_batch_size"] == [16]  # 4 on 2 devices, twice
    assert plain["spec_augment"]["style"] == "nemo" and plain["spec_augment"]["time_width"] == 0.05
    kept = settings.build(checkpoint.CheckpointConfig, plain["checkpoint"], "checkpoint")
    assert (kept.metric, kept.keep_best) == ("val_wer", 5)
    said = "\n".join(str(note.message) for note in notes)
    assert "no effect here: name, model.sample_rate" in said and "trainer.accelerator" in said
    assert plain["checkpoint"]["export"] == ["nemo"] and "about" in said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("trainer.max_epoch", 3, "trainer.max_epoch is not known here (did you mean max_epochs?)"),
        ("model.encoder", {"n_layers": 4}, "model.encoder is not known here"),
        ("model.train_ds.shuffle", False, "model.train_ds.shuffle must be one of True"),
        ("model.train_ds.is_tarred", True, "model.train_ds.is_tarred must be one of False"),
        ("model.train_ds.batch_size", 0, "model.train_ds.batch_size must be at least 1, got 0"),
        ("model.optim.lr", "fast", "model.optim.lr must be float, got str 'fast'"),
        ("model.optim.name", "novograd", "model.optim.name must be one of 'adamw'"),
        ("model.optim.sched.name", "Cyclic", "NeMo's schedule 'Cyclic' is not here"),
        (
            "model.optim.sched",
            {"name": "CosineAnnealing", "warmup_ratio": 0.1},
            "needs trainer.max",
        ),
        ("model.char_labels.update_labels", True, "char_labels.update_labels must be one of False"),
        ("model.tokenizer.type", "wpe", "model.tokenizer.type must be one of 'bpe'"),
        ("model.spec_augment.rect_masks", 2, "model.spec_augment.rect_masks must be one of 0"),
        ("model.validation_ds.sample_rate", 8000, "model.validation_ds.sample_rate differs"),
        ("trainer.max_steps", 100, "give either max_epochs or max_steps"),
        ("trainer.precision", 16, "trainer.precision must be one of"),
        ("trainer.sync_batchnorm", False, "trainer.sync_batchnorm: here batch statistics"),
        ("init_from_nemo_model", None, "init_from_nemo_model is not given"),
        ("init_from_pretrained_model", "nvidia/x", "nothing is downloaded here"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(recipe, key, value, said):
    with pytest.raises(ValueError) as error:
        nemo_recipe.recipe(changed(recipe, key, value))
    assert said in str(error.value)


def test_all_that_is_wrong_is_said_at_once(recipe):
    wrong = changed(changed(recipe, "model.foo", 1), "trainer.num_nodes", 0)
    with pytest.raises(ValueError, match="model.foo is not known here; trainer.num_nodes must be"):
        nemo_recipe.recipe(wrong)


def test_other_files_are_no_recipes_of_it():
    for other in ({}, [], {"model": {"pretrained_llm": "x"}}, {"model": {"encoder": {}}}):
        assert nemo_recipe.recipe(other) is None


def test_steps_several_sets_half_precision_and_ema(recipe):
    for key, value in {
        "trainer.max_epochs": -1, "trainer.max_steps": 500, "trainer.val_check_interval": 40,
        "trainer.precision": "bf16", "trainer.devices": "auto",
        "model.validation_ds.manifest_filepath": "a/x.json,b/x.json",
        "exp_manager.ema": {"enable": True, "decay": 0.99}, "model.spec_augment": None,
    }.items():  # fmt: skip
        recipe = changed(recipe, key, value)
    changes, notes = nemo_recipe.recipe(recipe)
    assert changes["train.steps"] == 500 and changes["train.eval_every"] == 20
    assert changes["model.encoder.dtype"] == "bfloat16" and changes["optim.ema"] == 0.99
    assert changes["data.valid"] == ("x-0=a/x.json", "x-1=b/x.json")
    assert changes["checkpoint.metric"] == "val_wer/x-0"
    assert changes["data.bucket_batch_size"] == (8,) and "trainer.devices" in notes[1]


def test_a_new_tokenizer_draws_what_nemo_draws(recipe, goldens, tmp_path):
    path = tmp_path / "tokenizer.model"
    changed_to = {"update_tokenizer": True, "dir": str(tmp_path), "type": "bpe"}
    recipe = changed(recipe, "model.tokenizer", changed_to)
    path.write_bytes(tokenizer_of(goldens, tmp_path))
    same, _ = nemo_recipe.recipe(recipe)
    assert same["init.drop"] == () and "tokenizer.model" in same["init.allow_changes"]
    path.write_bytes(Model((Piece.of("<unk>", 0, UNKNOWN), Piece.of("a")), ()).to_bytes())
    other, _ = nemo_recipe.recipe(recipe)
    assert other["init.drop"] == ("decoder/.*",) and "init.allow_changes" not in other
    assert other["text.path"] == str(path) and other["text.kind"] == "sentencepiece"


def test_every_key_stands_in_the_table_of_the_docs(root):
    table = (root / "docs" / "nemo_recipe.md").read_text("utf-8")
    assert [key for key in sorted(KNOWN.keys() | IDLE) if f"`{key}`" not in table] == []


def test_a_yaml_is_written_out_as_the_argument_of_the_foreign_config():
    line = training.written_out(
        ["train", "--config=a.yaml", "--config", "b.yml", "--workdir=c.yaml"]
    )
    assert line[1].startswith("--config=/") and line[1].endswith("configs/foreign.py:a.yaml")
    assert line[3].endswith("configs/foreign.py:b.yml") and line[4] == "--workdir=c.yaml"
    plain = ["train", "--config=configs/quickstart.py", "--config", "x.py:y"]
    assert training.written_out(plain) == plain


def test_a_run_starts_from_the_yaml_for_as_many_epochs_as_it_says(recipe, tmp_path):
    recipe = changed(recipe, "trainer.max_epochs", 2)
    recipe = changed(recipe, "model.train_ds.batch_size", 16)
    with pytest.warns(UserWarning, match="no effect here"):
        config = foreign.get_config(written(recipe, tmp_path / "a.yaml"))
    config.data.train = config.data.valid
    config.data.update(num_buckets=1, max_bad_share=1.0)
    training.train(config, tmp_path / "run")
    assert checkpoint.load_meta(tmp_path / "run")["step"] == 2
    assert loading.load(tmp_path / "run")[0].config.kind == "ctc"
    exported = next((tmp_path / "run" / "checkpoints" / "2" / "export").glob("*.nemo"))
    assert nemo.read(str(exported)).kind == "ctc"  # always_save_nemo


def test_the_command_names_the_key_that_is_wrong(recipe, root, tmp_path):
    path = written(changed(recipe, "trainer.max_epoch", 3), tmp_path / "a.yaml")
    line = [sys.executable, "-m", "experiments.train", f"--config={path}", "--workdir=none"]
    ran = subprocess.run(line, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith(f"error: {path}: trainer.max_epoch is not known here")
    assert ran.stderr.count("\n") == 1

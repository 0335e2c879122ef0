"""Keys of NeMo's speech_to_text_finetune.yaml: their types and limits, and those without effect.

A key is one of KEYS, of ONLY, of which no other value can be followed, or of IDLE, or it is not
known. docs/nemo_recipe.md has the table.
"""

import dataclasses
import difflib
from typing import Any, NamedTuple

from jasr import settings


class Key(NamedTuple):
    """NeMo's default of a key, the setting of ours that its value is, if it is one as it stands,
    and its limits (`settings.field`)."""

    default: Any
    ours: str
    rules: dict


def key(default=None, ours="", **rules):
    """A `Key`; limits of 0 are none in NeMo's loaders."""
    return Key(default, ours, rules)


_TRAIN, _VALID, _KEPT = "model.train_ds", "model.validation_ds", "checkpoint_callback_params"
_KEPT, _EMA, _OPTIM = f"exp_manager.{_KEPT}", "exp_manager.ema", "model.optim"
KEYS = {
    "init_from_nemo_model": key(""),
    "init_from_pretrained_model": key(""),
    f"{_TRAIN}.manifest_filepath": key(),
    f"{_TRAIN}.sample_rate": key(16000, "data.sample_rate", least=1),
    f"{_TRAIN}.batch_size": key(1, least=1),  # of each device, for each of the accumulated ones
    f"{_TRAIN}.min_duration": key(0.0, "data.min_duration", least=0),
    f"{_TRAIN}.max_duration": key(0.0, "data.max_duration", least=0),
    f"{_TRAIN}.num_workers": key(0, least=0),
    f"{_VALID}.manifest_filepath": key(),
    f"{_VALID}.sample_rate": key(16000, least=1),
    "model.tokenizer.update_tokenizer": key(False),
    "model.tokenizer.dir": key(""),
    # the defaults of SpectrogramAugmentation
    "model.spec_augment.freq_masks": key(0, least=0),
    "model.spec_augment.time_masks": key(0, least=0),
    "model.spec_augment.freq_width": key(10, least=0),
    "model.spec_augment.time_width": key(least=0),  # frames, or a share of them
    "model.spec_augment.mask_value": key(0.0),
    # those of torch.optim.AdamW
    f"{_OPTIM}.name": key("adamw", "optim.name", choices=("adamw", "adamw8bit")),
    f"{_OPTIM}.lr": key(1e-3, "optim.lr", above=0),
    f"{_OPTIM}.sched": key(),  # see `schedules.from_nemo`
    f"{_OPTIM}.betas": key((0.9, 0.999), least=0, below=1),
    f"{_OPTIM}.eps": key(1e-8, "optim.eps", above=0),
    f"{_OPTIM}.weight_decay": key(0.01, "optim.weight_decay", least=0),
    # -1 and 0 are no limit
    "trainer.devices": key(-1, least=-1),
    "trainer.num_nodes": key(1, least=1),
    "trainer.max_epochs": key(-1, least=-1),
    "trainer.max_steps": key(-1, least=-1),
    "trainer.val_check_interval": key(above=0),  # batches, or a share of an epoch
    "trainer.check_val_every_n_epoch": key(1, least=1),
    "trainer.accumulate_grad_batches": key(1, "optim.accumulate", least=1),
    "trainer.gradient_clip_val": key(0.0, "optim.clip_norm", least=0),
    "trainer.precision": key("32", choices=("32", "32-true", "bf16", "bf16-mixed")),
    "trainer.log_every_n_steps": key(50, "train.log_every", least=1),
    "trainer.sync_batchnorm": key(False),
    f"{_KEPT}.monitor": key("val_loss"),
    f"{_KEPT}.mode": key("min", "checkpoint.mode", choices=("min", "max")),
    f"{_KEPT}.save_top_k": key(3, "checkpoint.keep_best", least=0),
    f"{_KEPT}.always_save_nemo": key(False),
    f"{_EMA}.enable": key(False),
    f"{_EMA}.decay": key(0.999, least=0, below=1),
}
ONLY = {
    f"{_TRAIN}.shuffle": True,
    f"{_TRAIN}.is_tarred": False,
    f"{_TRAIN}.trim_silence": False,
    f"{_TRAIN}.use_lhotse": False,
    f"{_TRAIN}.use_start_end_token": False,
    f"{_TRAIN}.max_utts": 0,
    f"{_VALID}.trim_silence": False,
    "model.char_labels.update_labels": False,  # vocabularies of letters are not among these models
    "model.tokenizer.type": "bpe",
    "model.spec_augment.rect_masks": 0,
    "model.spec_augment.use_vectorized_code": True,
    f"{_OPTIM}.amsgrad": False,
    f"{_OPTIM}.maximize": False,
    "trainer.gradient_clip_algorithm": "norm",
    "trainer.limit_train_batches": 1.0,
    "trainer.limit_val_batches": 1.0,
    "trainer.overfit_batches": 0.0,
    "trainer.fast_dev_run": False,
    f"{_EMA}.every_n_steps": 1,
    f"{_EMA}.validate_original_weights": False,
}
KNOWN = KEYS | {name: key(value, choices=(value,)) for name, value in ONLY.items()}
SECTIONS = {}  # {section: its keys}
for _name in KNOWN:
    _section, _, _last = _name.rpartition(".")
    SECTIONS.setdefault(_section, []).append(_last)
OPEN = ("model", "exp_manager")  # sections that only hold others
# Keys, or whole sections, that change no result: names of files, speed, what is printed.
_LOADER = "pin_memory persistent_workers prefetch_factor"
IDLE = frozenset(
    f"{where}.{name}".lstrip(".")
    for where, names in {
        "": "name hydra",
        "model": "sample_rate test_ds log_prediction compute_eval_loss",
        _TRAIN: f"{_LOADER} shuffle_n bucketing_strategy",
        _VALID: f"{_LOADER} batch_size shuffle use_start_end_token is_tarred num_workers",
        "model.char_labels": "labels",
        "model.spec_augment": "_target_ rect_time rect_freq use_numba_spec_augment",
        _OPTIM: "_target_ foreach fused capturable",
        "trainer": "accelerator strategy enable_progress_bar num_sanity_val_steps logger benchmark "
        "enable_checkpointing enable_model_summary deterministic profiler detect_anomaly "
        "use_distributed_sampler inference_mode default_root_dir",
        "exp_manager": "exp_dir name explicit_log_dir version use_datetime_version files_to_copy "
        "create_tensorboard_logger summary_writer_kwargs create_checkpoint_callback "
        "create_wandb_logger wandb_logger_kwargs create_mlflow_logger mlflow_logger_kwargs "
        "create_dllogger_logger dllogger_logger_kwargs create_clearml_logger "
        "clearml_logger_kwargs create_neptune_logger neptune_logger_kwargs log_step_timing "
        "step_timing_kwargs log_local_rank_0_only log_global_rank_0_only seconds_to_sleep "
        "log_tflops_per_sec_per_gpu resume_if_exists resume_past_end resume_ignore_no_checkpoint",
        _KEPT: "save_nemo_on_train_end dirpath filename prefix postfix save_last save_best_model "
        "verbose every_n_epochs save_weights_only auto_insert_metric_name model_parallel_size",
        _EMA: "cpu_offload",
    }.items()
    for name in names.split()
)


def read(given):
    """({key: its value, or NeMo's default}, keys without effect) of resolved YAML."""
    own, idle, problems, found = {where: {} for where in SECTIONS}, [], [], {}

    def walk(where, section):
        known = SECTIONS.get(where, ())
        for last, value in section.items():
            name = f"{where}.{last}" if where else str(last)
            if value is None:
                continue
            if name in IDLE:
                idle.append(name)
            elif (name in SECTIONS or name in OPEN) and isinstance(value, dict):
                walk(name, value)
            elif last in known:
                own[where][last] = value
            else:
                near = difflib.get_close_matches(str(last), known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                problems.append(f"{name} is not known here{hint}")

    walk("", given)
    _one_kind(own["trainer"])
    for where, names in SECTIONS.items():
        keys = {last: KNOWN[f"{where}.{last}".lstrip(".")] for last in names}
        fields = [(n, Any, settings.field(k.default, **k.rules)) for n, k in keys.items()]
        section = dataclasses.make_dataclass("Section", fields)
        try:
            values = vars(settings.build(section, own[where], where or "the recipe"))
            found |= {f"{where}.{last}".lstrip("."): value for last, value in values.items()}
        except settings.SettingsError as e:
            problems.append(str(e))
    if problems:
        raise ValueError("; ".join(problems))
    return found, idle


def _one_kind(trainer):
    """Values of Lightning's that have several types, in one."""
    devices = trainer.get("devices", -1)
    if isinstance(devices, list):
        trainer["devices"] = len(devices)
    elif devices == "auto":
        trainer["devices"] = -1
    if isinstance(trainer.get("precision"), int):
        trainer["precision"] = str(trainer["precision"])

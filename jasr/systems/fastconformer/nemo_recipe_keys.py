"""Keys of NeMo's speech_to_text_finetune.yaml: their types and limits, and those without effect.

A key is a field of its section here, where `only` says that nothing else can be followed, or one of
IDLE, or it is not known. docs/nemo_recipe.md has the table.
"""

import collections
import dataclasses
import difflib

from jasr import settings


def only(value):
    """A key that may say nothing but `value`."""
    return settings.field(value, choices=(value,))


@settings.section
class TrainData:
    """`model.train_ds`; limits of 0 are none. What it does not say has NeMo's default."""

    manifest_filepath: str | list | None = None
    sample_rate: int = settings.field(16000, least=1)
    batch_size: int = settings.field(1, least=1)  # of each device, for each of the accumulated ones
    min_duration: float = settings.field(0.0, least=0)
    max_duration: float = settings.field(0.0, least=0)
    num_workers: int = settings.field(0, least=0)
    shuffle: bool = only(True)
    is_tarred: bool = only(False)
    trim_silence: bool = only(False)
    use_lhotse: bool = only(False)
    use_start_end_token: bool = only(False)
    max_utts: int = only(0)


@settings.section
class ValidData:
    """`model.validation_ds`."""

    manifest_filepath: str | list | None = None
    sample_rate: int = settings.field(16000, least=1)
    trim_silence: bool = only(False)


@settings.section
class Labels:
    """`model.char_labels`: vocabularies of letters are not among these models."""

    update_labels: bool = only(False)


@settings.section
class Tokenizer:
    """`model.tokenizer`."""

    update_tokenizer: bool = False
    dir: str = ""
    type: str = only("bpe")


@settings.section
class Augment:
    """`model.spec_augment` with the defaults of SpectrogramAugmentation."""

    freq_masks: int = settings.field(0, least=0)
    time_masks: int = settings.field(0, least=0)
    freq_width: int = settings.field(10, least=0)
    time_width: int | float | None = settings.field(None, least=0)  # frames, or a share of them
    rect_masks: int = only(0)
    use_vectorized_code: bool = only(True)
    mask_value: float = 0.0


@settings.section
class Optim:
    """`model.optim` with the defaults of torch.optim.AdamW."""

    name: str = settings.field("adamw", choices=("adamw", "adamw8bit"))
    lr: float = settings.field(1e-3, above=0)
    sched: dict | None = None  # see `schedules.from_nemo`
    betas: tuple = settings.field((0.9, 0.999), least=0, below=1)
    eps: float = settings.field(1e-8, above=0)
    weight_decay: float = settings.field(0.01, least=0)
    amsgrad: bool = only(False)
    maximize: bool = only(False)


@settings.section
class Trainer:
    """`trainer`; -1 and 0 are no limit."""

    devices: int = settings.field(-1, least=-1)
    num_nodes: int = settings.field(1, least=1)
    max_epochs: int = settings.field(-1, least=-1)
    max_steps: int = settings.field(-1, least=-1)
    val_check_interval: int | float | None = settings.field(None, above=0)  # batches, share: float
    check_val_every_n_epoch: int = settings.field(1, least=1)
    accumulate_grad_batches: int = settings.field(1, least=1)
    gradient_clip_val: float = settings.field(0.0, least=0)
    gradient_clip_algorithm: str = only("norm")
    precision: str = settings.field("32", choices=("32", "32-true", "bf16", "bf16-mixed"))
    log_every_n_steps: int = settings.field(50, least=1)
    sync_batchnorm: bool = False
    limit_train_batches: float = only(1.0)
    limit_val_batches: float = only(1.0)
    overfit_batches: float = only(0.0)
    fast_dev_run: bool = only(False)


@settings.section
class Kept:
    """`exp_manager.checkpoint_callback_params`."""

    monitor: str = "val_loss"
    mode: str = settings.field("min", choices=("min", "max"))
    save_top_k: int = settings.field(3, least=0)
    always_save_nemo: bool = False


@settings.section
class Average:
    """`exp_manager.ema`."""

    enable: bool = False
    decay: float = settings.field(0.999, least=0, below=1)
    every_n_steps: int = only(1)
    validate_original_weights: bool = only(False)


@settings.section
class Top:
    """What stands above the sections."""

    init_from_nemo_model: str = ""
    init_from_pretrained_model: str = ""


SECTIONS = {
    "": Top,
    "model.train_ds": TrainData,
    "model.validation_ds": ValidData,
    "model.char_labels": Labels,
    "model.tokenizer": Tokenizer,
    "model.spec_augment": Augment,
    "model.optim": Optim,
    "trainer": Trainer,
    "exp_manager.checkpoint_callback_params": Kept,
    "exp_manager.ema": Average,
}
OPEN = ("model", "exp_manager")  # sections that only hold others
# Keys, or whole sections, that change no result: names of files, speed, what is printed.
_LOADER = "pin_memory persistent_workers prefetch_factor"
IDLE = frozenset(
    f"{where}.{key}".lstrip(".")
    for where, keys in {
        "": "name hydra",
        "model": "sample_rate test_ds log_prediction compute_eval_loss",
        "model.train_ds": f"{_LOADER} shuffle_n bucketing_strategy",
        "model.validation_ds": f"{_LOADER} batch_size shuffle use_start_end_token is_tarred "
        "num_workers",
        "model.char_labels": "labels",
        "model.spec_augment": "_target_ rect_time rect_freq use_numba_spec_augment",
        "model.optim": "_target_ foreach fused capturable",
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
        "exp_manager.checkpoint_callback_params": "save_nemo_on_train_end dirpath "
        "filename prefix postfix save_last save_best_model verbose every_n_epochs "
        "save_weights_only auto_insert_metric_name model_parallel_size",
        "exp_manager.ema": "cpu_offload",
    }.items()
    for key in keys.split()
)


def read(given):
    """({section: its settings}, keys without effect) of resolved YAML."""
    own, idle, problems, read = collections.defaultdict(dict), [], [], {}

    def walk(where, section):
        known = [f.name for f in dataclasses.fields(SECTIONS[where])] if where in SECTIONS else []
        for key, value in section.items():
            name = f"{where}.{key}" if where else str(key)
            if value is None:
                continue
            if name in IDLE:
                idle.append(name)
            elif (name in SECTIONS or name in OPEN) and isinstance(value, dict):
                walk(name, value)
            elif key in known:
                own[where][key] = value
            else:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                problems.append(f"{name} is not known here{hint}")

    walk("", given)
    _one_kind(own["trainer"])
    for where, cls in SECTIONS.items():
        try:
            read[where] = settings.build(cls, own[where], where or "the recipe")
        except settings.SettingsError as e:
            problems.append(str(e))
    if problems:
        raise ValueError("; ".join(problems))
    return read, idle


def _one_kind(trainer):
    """Values of Lightning's that have several types, in one."""
    devices = trainer.get("devices", -1)
    if isinstance(devices, list):
        trainer["devices"] = len(devices)
    elif devices == "auto":
        trainer["devices"] = -1
    if isinstance(trainer.get("precision"), int):
        trainer["precision"] = str(trainer["precision"])

"""NeMo's speech_to_text_finetune.yaml as changes of a run's config.

Every key is mapped, listed as having no effect here, or refused, because leaving it out would
change what is trained: `nemo_recipe_keys` knows them, docs/nemo_recipe.md has the table.
"""

import base64
import os
import re

from jasr.interop import plain_yaml
from jasr.systems import catalogue, source
from jasr.systems.fastconformer import nemo_recipe_keys
from jasr.systems.fastconformer.nemo_recipe_keys import KEYS
from jasr.training import schedules


def recipe(mapping):
    """({"optim.lr": value} changes of the default config, notes) of a fine-tuning recipe of NeMo's.

    The model's own settings and front end are read from the file that it starts from. None: the
    mapping is something else.

    Raises:
      ValueError: names every key that is not known here or has a value that is not.
    """
    model = mapping.get("model") if isinstance(mapping, dict) else None
    if not isinstance(model, dict) or "train_ds" not in model:
        return None
    given = plain_yaml.resolve(mapping, [key for key in mapping if key != "hydra"])
    read, idle = nemo_recipe_keys.read(given)
    notes = [f"no effect here: {', '.join(idle)}"] if idle else []
    path, rows = _start(read), _rows(read, notes)
    meta = source.load_meta({"path": path}, read["model.tokenizer.update_tokenizer"])
    changes = {key.ours: read[name] for name, key in KEYS.items() if key.ours}
    changes |= _model(read, path, meta["config"]) | _tokenizer(read, meta) | _augment(read, meta)
    return changes | _data(read, rows) | _optimizer(read) | _rhythm(read, rows, notes), notes


def _start(read):
    """The path of what training starts from."""
    path, name = read["init_from_nemo_model"], read["init_from_pretrained_model"]
    if name and (path or not os.path.exists(name)):
        raise ValueError(
            f"init_from_pretrained_model {name}: nothing is downloaded here; name the .nemo in "
            "init_from_nemo_model alone"
        )
    if (path or name) in ("", plain_yaml.MISSING):
        raise ValueError("init_from_nemo_model is not given: the .nemo that training starts from")
    return path or name


def _model(read, path, config):
    """The start, with the settings of the model that is there."""
    if catalogue.today(config["task"]) != "fastconformer":
        raise ValueError(f"init_from_nemo_model {path} is a model of {config['task']}")
    found = {"init.path": path}
    for section in ("model", "front_end", "loss", "decoding"):
        found |= _flat(section, config.get(section, {}))
    half = read["trainer.precision"].startswith("bf16")
    return found | {"model.encoder.dtype": "bfloat16" if half else "float32"}


def _flat(where, value):
    if not isinstance(value, dict):
        return {where: _tuples(value)}
    return {
        k: v for name, inner in value.items() for k, v in _flat(f"{where}.{name}", inner).items()
    }


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _rows(read, notes):
    """Rows of a global batch: those of all devices and of all that is accumulated."""
    devices = read["trainer.devices"]
    if devices < 1:
        devices = 1
        notes.append(
            "trainer.devices does not say how many: config.data.bucket_batch_size is that of one"
        )
    devices *= read["trainer.num_nodes"]
    if devices > 1 and not read["trainer.sync_batchnorm"]:
        raise ValueError(
            "trainer.sync_batchnorm: here batch statistics are always those of all devices; set it "
            "to true"
        )
    return read["model.train_ds.batch_size"] * devices * read["trainer.accumulate_grad_batches"]


def _tokenizer(read, meta):
    """The text section; with a new tokenizer NeMo draws what change_vocabulary makes anew."""
    if not read["model.tokenizer.update_tokenizer"]:
        return {"text.kind": "init"}
    from jasr.text.sentencepiece_model import Model

    path = os.path.join(read["model.tokenizer.dir"], "tokenizer.model")
    old, new = meta["tokenizer"], Model.from_file(path)
    heads = {"ctc": ("decoder",), "hybrid": ("decoder", "joint", "ctc_decoder")}
    drawn = heads.get(meta["config"]["model"]["kind"], ("decoder", "joint"))
    found = {"text.kind": "sentencepiece", "text.path": path, "text.normalisation": "none"}
    same = old["kind"] == "sentencepiece" and len(new.pieces) == len(
        Model.from_bytes(base64.b64decode(old["model"])).pieces
    )
    if same:  # NeMo then puts the old weights back, but for the CTC head of a hybrid
        drawn = drawn[2:]
        found["init.allow_changes"] = ("tokenizer.model", "tokenizer.normalisation")
    return found | {"init.drop": tuple(f"{name}/.*" for name in drawn)}


def _augment(read, meta):
    """SpecAugment of the recipe, or else of the model that is trained on."""
    where = "model.spec_augment"
    keys = [name for name in KEYS if name.startswith(where)]
    if all(read[name] == KEYS[name].default for name in keys):
        if "spec_augment" in meta["config"]:
            return _flat("spec_augment", meta["config"]["spec_augment"])
        kept = meta.get("nemo", {}).get("config", {})
        section = kept.get("spec_augment") or (kept.get("model") or {}).get("spec_augment") or {}
        read, _ = nemo_recipe_keys.read({"model": {"spec_augment": section}})
    found = {name.removeprefix("model."): read[name] for name in keys}
    width, masks = read[f"{where}.time_width"], read[f"{where}.time_masks"]
    width = 10 if width is None else width
    if isinstance(width, int):  # frames, of which one is masked at most if there are 2
        width, masks = max(width, 2), masks * (width > 1)
    elif width > 1:
        raise ValueError(f"{where}.time_width {width}: a share of at most 1.0, or frames")
    more = {"style": "nemo", "time_masks": masks, "time_width": float(width)}
    return found | {f"spec_augment.{name}": value for name, value in more.items()}


def _data(read, rows):
    train, valid = (
        {key: read[f"model.{name}.{key}"] for key in ("manifest_filepath", "sample_rate")}
        for name in ("train_ds", "validation_ds")
    )
    if valid["manifest_filepath"] and valid["sample_rate"] != train["sample_rate"]:
        raise ValueError("model.validation_ds.sample_rate differs from model.train_ds.sample_rate")
    names = _paths(valid["manifest_filepath"])
    if len(names) > 1:
        names = tuple(f"{name}={path}" for name, path in zip(_set_names(names), names, strict=True))
    return {
        "data.train": _paths(train["manifest_filepath"]),
        "data.valid": names,
        "data.num_threads": max(1, read["model.train_ds.num_workers"]),
        "data.bucket_batch_size": (rows,),
    }


def _paths(given):
    """The manifests of "a.json,b.json", of a list, or of nothing."""
    parts = given.split(",") if isinstance(given, str) else given or ()
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"manifest_filepath {given!r}: one path, or a list of them")
    return tuple(part.strip() for part in parts if part != plain_yaml.MISSING)


def _set_names(paths):
    """A name for each validation set, of its file's."""
    stems = [re.sub(r"[^\w.-]", "_", os.path.basename(p).split(".")[0]) for p in paths]
    return [s if stems.count(s) == 1 else f"{s}-{n}" for n, s in enumerate(stems)]


def _optimizer(read):
    steps, found = read["trainer.max_steps"], {"schedule": "constant"}
    if sched := read["model.optim.sched"]:
        last = sched.get("max_steps") or 0
        ratios = [key for key, value in sched.items() if key.endswith("_ratio") and value]
        if ratios and max(steps, last) < 1:
            raise ValueError(f"model.optim.sched.{ratios[0]} needs trainer.max_steps")
        found = schedules.from_nemo(sched, max(steps, 0))
        found["decay_steps"] = max(last, 0)  # 0: all steps of the run
    found["b1"], found["b2"] = read["model.optim.betas"][:2]
    found["decay_rules"] = ((".*", 1.0),)
    found["ema"] = read["exp_manager.ema.decay"] if read["exp_manager.ema.enable"] else 0.0
    return {f"optim.{name}": value for name, value in found.items()}


def _rhythm(read, rows, notes):
    """Length of the run, when it is validated, and which steps are kept."""
    epochs, steps = read["trainer.max_epochs"], read["trainer.max_steps"]
    if (epochs > 0) == (steps > 0):
        raise ValueError("trainer: give either max_epochs or max_steps; the other one -1 or null")
    kept, every = "exp_manager.checkpoint_callback_params", read["trainer.val_check_interval"]
    sets, metric = _paths(read["model.validation_ds.manifest_filepath"]), read[f"{kept}.monitor"]
    found = {
        "checkpoint.metric": f"{metric}/{_set_names(sets)[0]}" if len(sets) > 1 else metric,
        "checkpoint.export": ("nemo",) if read[f"{kept}.always_save_nemo"] else (),
    }
    found |= {"train.steps": steps} if steps > 0 else {"train.epochs": float(epochs)}
    if isinstance(every, int):
        steps = every // read["trainer.accumulate_grad_batches"]
        return found | {"train.eval_every": max(1, steps)}
    manifests = _paths(read["model.train_ds.manifest_filepath"])
    if not manifests or not all(map(os.path.isfile, manifests)):
        notes.append(
            "trainer.val_check_interval: how long an epoch is, is not known; set "
            "config.train.eval_every"
        )
        return found
    share = (every or 1.0) * read["trainer.check_val_every_n_epoch"]
    steps = max(1, round(share * sum(map(_lines, manifests)) / rows))
    notes.append(f"trainer.val_check_interval: {share:g} of an epoch is about {steps} steps")
    return found | {"train.eval_every": steps}


def _lines(path):
    with open(path, "rb") as f:
        return sum(1 for line in f if line.strip())

"""Another toolkit's YAML as a config: what `--config=recipe.yaml` of experiments.train stands for.

    python -m experiments.train --config=finetune.yaml --workdir=runs/a --config.optim.lr=1e-4

Each system reads the recipes of the toolkit that its models come from: NeMo's
speech_to_text_finetune.yaml (docs/nemo_recipe.md). A key that would change the result and is not
known is refused; those without an effect here are listed.
"""

import warnings

from configs import common


def get_config(path):
    """The config of a YAML file.

    Raises:
      ValueError: no system knows such a file, or one of its keys cannot be followed.
    """
    from jasr.interop import plain_yaml
    from jasr.systems import catalogue

    with open(path, "rb") as f:
        mapping = plain_yaml.load(f.read())
    for system in catalogue.every():
        found = system.recipe(mapping)
        if found is None:
            continue
        changes, notes = found
        config = common.default(system.name)
        config.update_from_flattened_dict(changes)
        for note in notes:
            warnings.warn(f"{path}: {note}", stacklevel=2)
        return config.lock()
    raise ValueError(f"{path}: no recipe that a system here knows (docs/nemo_recipe.md)")

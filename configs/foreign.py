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
      settings.RecipeError: no system knows such a file, or one of its keys cannot be followed.
    """
    from jasr import settings
    from jasr.interop import plain_yaml
    from jasr.systems import catalogue

    try:
        with open(path, "rb") as f:
            mapping = plain_yaml.load(f.read())
        found = {system.name: system.recipe(mapping) for system in catalogue.every()}
        name = next((name for name, recipe in found.items() if recipe), None)
        if name is None:
            raise ValueError("no recipe that a system here knows (docs/nemo_recipe.md)")
        changes, notes = found[name]
        config = common.default(name)
        config.update_from_flattened_dict(changes)
    except ValueError as e:
        raise settings.RecipeError(f"{path}: {e}") from e
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return config.lock()

"""What recipes share: every setting with its default, from the dataclasses that own them."""

from ml_collections import ConfigDict


def default(task="lact"):
    """A ConfigDict of a run with all defaults; recipes change what they need and lock it.

    task: a system of `jasr.systems.catalogue`: "lact" is LaCT ASR, "fastconformer" CTC, RNN-T, TDT
      and hybrid models. Names of earlier revisions ("ctc", "parakeet") are read.
    """
    from jasr import checkpoint, settings, sharding
    from jasr.data import DataConfig
    from jasr.systems import catalogue
    from jasr.training import optim, start, step

    def section(cls):
        return ConfigDict(settings.to_dict(cls()))

    system = catalogue.get(task)
    config = ConfigDict()
    config.task = system.name
    config.seed = 0
    config.data = section(DataConfig)
    config.text = section(start.TextConfig)
    for name, cls in catalogue.sections(system).items():
        config[name] = section(cls)
    config.optim = section(optim.OptimConfig)
    config.train = section(step.RunConfig)
    config.checkpoint = section(checkpoint.CheckpointConfig)
    config.mesh = section(sharding.MeshConfig)
    config.init = section(start.InitConfig)
    return config

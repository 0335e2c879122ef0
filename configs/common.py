"""What recipes share: every setting with its default, from the dataclasses that own them."""

from ml_collections import ConfigDict


def default():
    """A ConfigDict of a CTC run with all defaults; recipes change what they need and lock it."""
    from jasr import augment, checkpoint, optim, settings, sharding, start, step
    from jasr.audio import FrontEndConfig
    from jasr.data import DataConfig
    from jasr.models.lact import LactConfig
    from jasr.tasks.ctc import CtcLossConfig

    def section(cls):
        return ConfigDict(settings.to_dict(cls()))

    config = ConfigDict()
    config.task = "ctc"
    config.seed = 0
    config.data = section(DataConfig)
    config.text = section(start.TextConfig)
    config.front_end = section(FrontEndConfig)
    config.spec_augment = section(augment.SpecAugmentConfig)
    config.wave_augment = section(augment.WaveAugmentConfig)
    config.model = section(LactConfig)
    config.loss = section(CtcLossConfig)
    config.optim = section(optim.OptimConfig)
    config.train = section(step.RunConfig)
    config.checkpoint = section(checkpoint.CheckpointConfig)
    config.mesh = section(sharding.MeshConfig)
    config.init = section(start.InitConfig)
    return config

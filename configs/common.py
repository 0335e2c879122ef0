"""What recipes share: every setting with its default, from the dataclasses that own them."""

from ml_collections import ConfigDict


def default(task="ctc"):
    """A ConfigDict of a run with all defaults; recipes change what they need and lock it.

    task: "ctc" is LaCT ASR with CTC, "parakeet" FastConformer with CTC, RNN-T, TDT or hybrid heads.
    """
    from jasr import augment, checkpoint, optim, settings, sharding, start, step
    from jasr.audio import FrontEndConfig
    from jasr.data import DataConfig

    def section(cls):
        return ConfigDict(settings.to_dict(cls()))

    config = ConfigDict()
    config.task = task
    config.seed = 0
    config.data = section(DataConfig)
    config.text = section(start.TextConfig)
    config.front_end = section(FrontEndConfig)
    config.spec_augment = section(augment.SpecAugmentConfig)
    config.wave_augment = section(augment.WaveAugmentConfig)
    if task == "parakeet":
        from jasr.models.parakeet import ParakeetConfig
        from jasr.tasks.parakeet_config import DecodingConfig, LossConfig

        config.model, config.loss = section(ParakeetConfig), section(LossConfig)
        config.decoding = section(DecodingConfig)
    else:
        from jasr.models.lact import LactConfig
        from jasr.tasks.ctc import CtcLossConfig

        config.model, config.loss = section(LactConfig), section(CtcLossConfig)
    config.optim = section(optim.OptimConfig)
    config.train = section(step.RunConfig)
    config.checkpoint = section(checkpoint.CheckpointConfig)
    config.mesh = section(sharding.MeshConfig)
    config.init = section(start.InitConfig)
    return config

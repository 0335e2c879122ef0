"""What recipes share: every setting with its default, from the dataclasses that own them."""

from ml_collections import ConfigDict


def default(task="ctc"):
    """A ConfigDict of a run with all defaults; recipes change what they need and lock it.

    task: "ctc" is LaCT ASR with CTC, "parakeet" FastConformer with CTC, RNN-T, TDT or hybrid heads.
    """
    from jasr import checkpoint, settings, sharding
    from jasr.audio import FrontEndConfig, augment
    from jasr.data import DataConfig
    from jasr.training import optim, start, step

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
        from jasr.systems.fastconformer.model import ParakeetConfig
        from jasr.systems.fastconformer.settings import DecodingConfig, LossConfig

        config.model, config.loss = section(ParakeetConfig), section(LossConfig)
        config.decoding = section(DecodingConfig)
    else:
        from jasr.systems.lact.model import LactConfig
        from jasr.systems.lact.task import CtcLossConfig

        config.model, config.loss = section(LactConfig), section(CtcLossConfig)
    config.optim = section(optim.OptimConfig)
    config.train = section(step.RunConfig)
    config.checkpoint = section(checkpoint.CheckpointConfig)
    config.mesh = section(sharding.MeshConfig)
    config.init = section(start.InitConfig)
    return config

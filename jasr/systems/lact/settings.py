"""Settings of LaCT ASR, the published sizes, and how many fast-weight updates a configuration
makes."""

from jasr import settings
from jasr.layers import fast_weights
from jasr.losses.reduction import REDUCTIONS

MODES = ("reference", "causal", "bidirectional", "block")


@settings.section
class LactConfig:
    """Every field of LaCTASRConfig and its parent LaCTSWIGLUConfig that acts, with their defaults,
    then our own.

    Upstream's `None` is written 0 (`intermediate_size` 0 = derived from `hidden_ratio`). Fields
    that only choose a kernel or serve a tokenizer upstream (`fuse_*`, `use_cache`,
    `tie_word_embeddings`, `*_token_id`, `vocab_size`) have no meaning here. Lengths and chunks
    count encoder frames: 100 / subsampling a second.
    """

    # audio and convolutions
    audio_feature_dim: int = 80
    sample_rate: int = settings.field(16000, meaning=False)
    hop_length: int = settings.field(160, meaning=False)
    win_length: int = settings.field(400, meaning=False)
    n_mels: int = settings.field(80, meaning=False)
    n_fft: int = settings.field(512, meaning=False)
    audio_encoder_layers: int = 2
    audio_encoder_dropout: float = settings.field(0.1, least=0, below=1, meaning=False)
    # CTC
    ctc_vocab_size: int = settings.field(32, meaning=False)
    ctc_blank_id: int = settings.field(0, meaning=False)
    use_ctc: bool = settings.field(True, choices=(True,), meaning=False)
    # an attention decoder; upstream has none either
    use_attention: bool = settings.field(False, choices=(False,))
    # transformer
    hidden_size: int = settings.field(768, least=1)
    num_hidden_layers: int = settings.field(12, least=1)
    num_attn_heads: int = settings.field(12, least=1)
    qkv_bias: bool = False
    attn_qk_norm: bool = False
    window_size: int = 4096  # keys a query reads on each side, itself included; 0 = all
    rope_theta: float = 10000.0
    max_position_embeddings: int = settings.field(16384, meaning=False)
    hidden_ratio: int = settings.field(4, meaning=False)
    intermediate_size: int = settings.field(0, meaning=False)
    hidden_act: str = settings.field("swish", choices=("swish", "silu"), meaning=False)
    # 0 = 1/sqrt(fan in), branches end in zeros
    initializer_range: float = settings.field(0.006, meaning=False)
    elementwise_affine: bool = True
    norm_eps: float = 1e-6
    # fast weights
    num_lact_heads: int = settings.field(4, least=1)
    inter_multi: float = 1.0
    lact_chunk_size: int = settings.field(4096, least=1)
    use_muon: bool = False
    use_momentum: bool = True
    lr_dim: int = settings.field(1, choices=(1,))
    lr_parameterization: str = settings.field("mamba", choices=("mamba",))
    learnable_ttt_scale: bool = True
    ttt_loss_type: str = settings.field("dot_product", choices=("dot_product",))
    ttt_prenorm: bool = False
    ttt_nope: bool = False
    qkv_silu: bool = True
    no_v_silu: bool = False
    w0_w2_low_rank: int = -1
    fw_init_gain: float = settings.field(0.5, meaning=False)
    # ours
    fw_base_lr: float = 0.001  # hard-coded upstream
    lact_mode: str = settings.field("reference", choices=MODES)
    lact_every: int = settings.field(1, least=0)  # blocks n, 2n, ... have the fast branch; 0 = none
    # "off" = initial weights only, "no_branch" = attention only
    lact_updates: str = settings.field("on", choices=("on", "off", "no_branch"))
    subsampling: int = settings.field(1, choices=(1, 2, 4))
    conv_kernel: int = 0
    intermediate_ctc: tuple = ()  # after how many blocks
    self_conditioning: bool = False
    dropout: float = settings.field(0.0, least=0, below=1, meaning=False)
    batch_norm: str = settings.field("masked", choices=("masked", "reference"), meaning=False)
    positions: str = settings.field("sinusoidal", choices=("sinusoidal", "none"))
    dtype: str = settings.field("float32", choices=("float32", "bfloat16"), meaning=False)
    remat: bool = settings.field(False, meaning=False)  # recompute each block in the backward pass

    def __post_init__(self):
        for name in ("num_attn_heads", "num_lact_heads"):
            if self.hidden_size % (size := getattr(self, name)):
                raise ValueError(
                    f"LactConfig.hidden_size {self.hidden_size} is not a multiple of {name} {size}"
                )
        if self.head_dim % 2:
            raise ValueError(
                f"LactConfig: rotary positions need an even head dim, got {self.head_dim}"
            )
        if self.subsampling > 2**self.audio_encoder_layers:
            raise ValueError(
                f"LactConfig.subsampling {self.subsampling} needs one convolution per factor of 2; "
                f"audio_encoder_layers is {self.audio_encoder_layers}"
            )
        last = self.num_hidden_layers - 1
        if any(not 0 < n <= last for n in self.intermediate_ctc):
            raise ValueError(
                f"LactConfig.intermediate_ctc {self.intermediate_ctc} must lie between 1 and "
                f"num_hidden_layers - 1 = {last}"
            )

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attn_heads

    @property
    def fast_head_dim(self):
        return self.hidden_size // self.num_lact_heads

    @property
    def mlp_size(self):
        """Width of the gated MLP: as given, or 2/3 of hidden_ratio * hidden_size rounded up to a
        multiple of 256."""
        return self.intermediate_size or 256 * -(
            -int(self.hidden_size * self.hidden_ratio * 2 / 3) // 256
        )

    @property
    def causal(self):
        return self.lact_mode != "bidirectional"

    def has_lact(self, block):
        """Whether block number `block` (from 0) has the fast-weight branch."""
        return self.lact_every > 0 and (block + 1) % self.lact_every == 0

    @property
    def any_lact(self):
        return 0 < self.lact_every <= self.num_hidden_layers


@settings.section
class CtcLossConfig:
    """How utterance losses become one number.

    reduction: "mean" = mean over utterances of loss / tokens (torch's CTCLoss mean, LaCT),
    "mean_batch" = mean over utterances, "mean_volume" = sum of losses / sum of tokens (NeMo).
    """

    reduction: str = settings.field("mean", choices=REDUCTIONS)
    # share of the intermediate CTC losses, if the model has any
    intermediate_weight: float = settings.field(0.3, least=0, most=1)
    # augmentation strength rises linearly from 0 over so many steps
    ramp_steps: int = settings.field(0, least=0)


def encoder_frames(config, frames):
    """Encoder frames that come out for `frames` mel frames (numbers or arrays): ceil(frames /
    subsampling)."""
    return -(-frames // config.subsampling)


def num_updates(config, mel_len):
    """Fast-weight updates of each layer for utterances of i32[B] mel frames: i32[B]."""
    order = {"bidirectional": "full", "block": "block"}.get(config.lact_mode, "shifted")
    if config.lact_updates != "on" or not config.any_lact:
        order = "off"
    length = encoder_frames(config, mel_len)
    return fast_weights.count_updates(length, config.lact_chunk_size, order)


def check_updates(config, frames):
    """Refuses a configuration whose fast weights would never be updated. frames: longest
    utterance, in mel frames.

    The published LaCT-ASR runs are such a configuration: chunks of 4096 frames on utterances of at
    most 2001, hence zero updates and a static SwiGLU in place of the fast weights.
    `lact_mode="reference"` keeps it.

    Raises:
      ValueError: no update would happen, with the largest chunk that makes at least one.
    """
    if config.lact_mode != "causal" or config.lact_updates != "on" or not config.any_lact:
        return
    length = encoder_frames(config, frames)
    if length <= config.lact_chunk_size:
        raise ValueError(
            f"lact_chunk_size {config.lact_chunk_size} is not below the longest utterance "
            f"({length} encoder frames from {frames} mel frames): the fast weights would "
            f"never be updated. Use lact_chunk_size < {length} (half of it or less is sensible), "
            'lact_mode="bidirectional", lact_every=0 for no fast weights, or '
            'lact_mode="reference" to insist'
        )


_SHIPPED = dict(use_muon=True, audio_encoder_dropout=0.1, max_position_embeddings=16384)
# The three config files of the original repository (its logs print 88,558,800 and 311,165,808
# parameters with 29 characters).
BASE = dict(_SHIPPED, w0_w2_low_rank=32, rope_theta=1e6, initializer_range=0.02)
IMPROVED = dict(
    _SHIPPED,
    hidden_size=1024,
    num_hidden_layers=18,
    num_attn_heads=16,
    num_lact_heads=8,
    intermediate_size=4096,
    hidden_ratio=0,
    audio_encoder_layers=3,
    audio_encoder_dropout=0.15,
    attn_qk_norm=True,
    rope_theta=500000.0,
    initializer_range=0.006,
)
LARGE = dict(
    _SHIPPED,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attn_heads=16,
    num_lact_heads=8,
    audio_encoder_layers=3,
    w0_w2_low_rank=32,
    rope_theta=1e6,
    initializer_range=0.02,
    max_position_embeddings=32768,
)

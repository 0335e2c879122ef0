"""Settings of NeMo's ConformerEncoder, and the lengths that follow."""

from jasr import settings

SUBSAMPLING = ("dw_striding", "striding", "stacking", "stacking_norm")
ATTENTION = ("rel_pos", "rel_pos_local_attn", "abs_pos")
POWERS = tuple(2**n for n in range(11))


@settings.section
class FastConformerConfig:
    """NeMo's ConformerEncoder: its keys and defaults, then our own.

    Contexts count encoder frames to the left and to the right, -1 = all. A key that only chooses a
    kernel upstream has no field. Lists become tuples.
    """

    feat_in: int = settings.field(80, least=1)
    n_layers: int = settings.field(17, least=1, most=500)
    d_model: int = settings.field(512, least=1)
    feat_out: int = -1  # a projection after the last layer, if above 0 and not d_model
    # subsampling
    subsampling: str = "striding"
    # 1 = a linear map of every frame
    subsampling_factor: int = settings.field(4, choices=POWERS)
    subsampling_conv_channels: int = -1  # -1 = d_model
    causal_downsampling: bool = False
    # fewer frames after a layer
    reduction: str | None = settings.field(None, choices=(None, "pooling", "striding"))
    reduction_position: int | None = None  # after which layer; -1 = after everything
    reduction_factor: int = settings.field(1, choices=POWERS)
    # layers
    ff_expansion_factor: int = settings.field(4, least=1)
    n_heads: int = settings.field(4, least=1)
    self_attention_model: str = settings.field("rel_pos", choices=ATTENTION)
    att_context_size: tuple = (-1, -1)  # or several pairs: drawn in training, the first otherwise
    att_context_probs: tuple = settings.field((), meaning=False)
    att_context_style: str = settings.field("regular", choices=("regular", "chunked_limited"))
    xscaling: bool = True
    untie_biases: bool = True
    conv_kernel_size: int = 31
    conv_norm_type: str = "batch_norm"  # layer_norm, instance_norm, group_normN
    conv_context_size: str | tuple | None = None  # "causal" or (left, right); None = centred
    use_bias: bool = True
    # in local attention: frames that read all and are read by all
    global_tokens: int = settings.field(0, least=0)
    global_tokens_spacing: int = settings.field(1, least=1)
    global_attn_separate: bool = False
    dropout: float = settings.field(0.1, least=0, below=1, meaning=False)
    dropout_pre_encoder: float = settings.field(0.1, least=0, below=1, meaning=False)
    dropout_emb: float = settings.field(0.1, least=0, below=1, meaning=False)
    dropout_att: float = settings.field(0.0, least=0, below=1, meaning=False)
    stochastic_depth_drop_prob: float = settings.field(0.0, least=0, below=1, meaning=False)
    stochastic_depth_mode: str = settings.field(
        "linear", choices=("linear", "uniform"), meaning=False
    )
    stochastic_depth_start_layer: int = settings.field(1, least=1, meaning=False)
    # ours
    masked_subsampling: bool = True  # NeMo >= 2.5; False lets padding into the last 1-3 frames
    # As NeMo, padded frames count in the statistics of a convolution's norm (batch norm while it
    # trains, group and instance norm always) and in the lengths of stacked frames. False makes
    # results independent of padding there too.
    padding_counts: bool = settings.field(True, meaning=False)
    # local attention that all layers read layer 0's position biases for, as after a change from
    # attention over all frames
    tied_local_biases: bool = settings.field(False, meaning=False)
    dtype: str = settings.field("float32", choices=("float32", "bfloat16"), meaning=False)
    remat: bool = settings.field(False, meaning=False)  # recompute each layer in the backward pass

    def __post_init__(self):
        for name in ("att_context_size", "att_context_probs", "conv_context_size"):
            object.__setattr__(self, name, _tuples(getattr(self, name)))
        for name, good, wanted in self._rules():
            if not good:
                raise settings.SettingsError(
                    f"FastConformerConfig.{name} must be {wanted}, got {getattr(self, name)!r}"
                )

    def _rules(self):
        """(field, whether its value is good, what it must be); each may rely on those before."""
        known = self.subsampling in SUBSAMPLING or self.subsampling_factor == 1  # NeMo: unread then
        yield "subsampling", known, f"one of {SUBSAMPLING}"
        yield "d_model", self.d_model % self.n_heads == 0, "a multiple of n_heads"
        yield "d_model", self.d_model % 2 == 0, "even"
        yield "conv_kernel_size", self.conv_kernel_size % 2 == 1, "odd"
        place = not self.has_reduction or self.reduction_position in range(-1, self.n_layers)
        yield "reduction_position", place, "-1 or the number of a layer"
        kind, norms = self.conv_norm_type, ("batch_norm", "layer_norm", "instance_norm")
        groups = kind.removeprefix("group_norm")
        if groups != kind and groups.isdigit():
            good = int(groups) > 0 and self.d_model % int(groups) == 0
            yield "conv_norm_type", good, "group_normN with N a divisor of d_model"
        else:
            yield "conv_norm_type", kind in norms, f"one of {norms} or group_normN"
        around = self.conv_context
        good = isinstance(around, tuple) and len(around) == 2 and min(around) >= 0
        good = good and sum(around) + 1 == self.conv_kernel_size
        wanted = "'causal', or (left, right) with left + right + 1 = conv_kernel_size"
        yield "conv_context_size", good, wanted
        probs = self.att_context_probs
        good = not probs or (len(probs) == len(self.contexts) and abs(sum(probs) - 1) < 1e-6)
        yield "att_context_probs", good, "one probability per context, with sum 1"
        for context in self.contexts:
            good = len(context) == 2 and min(context) >= -1
            yield "att_context_size", good, "(left, right), each at least -1"
            left, right = context
            if self.is_local:
                good = min(left, right) >= 0 and max(left, right) > 0
                yield "att_context_size", good, "limited to both sides in local attention"
            elif self.att_context_style == "chunked_limited" and right >= 0 and left > 0:
                wanted = "(left, right) with left a multiple of right + 1 in the chunked style"
                yield "att_context_size", left % (right + 1) == 0, wanted
        good = self.global_tokens == 0 or self.is_local
        yield "global_tokens", good, "0 without local attention"

    @property
    def head_dim(self):
        return self.d_model // self.n_heads

    @property
    def out_dim(self):
        """Channels of the encoder's output."""
        return self.feat_out if self.feat_out > 0 else self.d_model

    @property
    def conv_channels(self):
        """Channels of the subsampling's convolutions."""
        given = self.subsampling_conv_channels
        return self.d_model if given == -1 else given

    @property
    def contexts(self):
        """All (left, right) contexts of the attention; evaluation uses the first."""
        size = self.att_context_size
        return size if isinstance(size[0], tuple) else (size,)

    @property
    def context_probs(self):
        """With what probability training draws each of `contexts`."""
        return self.att_context_probs or (1 / len(self.contexts),) * len(self.contexts)

    @property
    def conv_context(self):
        """Frames before and after a frame that the depthwise convolution reads."""
        if self.conv_context_size == "causal":
            return self.conv_kernel_size - 1, 0
        if self.conv_context_size is None:
            return ((self.conv_kernel_size - 1) // 2,) * 2
        return self.conv_context_size

    @property
    def is_local(self):
        """Whether the attention is a band (NeMo's Longformer style)."""
        return self.self_attention_model == "rel_pos_local_attn"

    @property
    def tied_biases(self):
        """Whether all layers share the position biases; they are layer 0's then."""
        shares = self.self_attention_model == "rel_pos" or self.tied_local_biases
        return not self.untie_biases and shares

    @property
    def has_reduction(self):
        return self.reduction is not None and self.reduction_factor > 1

    def drop_layer(self, layer):
        """With what probability training skips layer number `layer` (stochastic depth)."""
        start, p = self.stochastic_depth_start_layer, self.stochastic_depth_drop_prob
        if layer < start:
            return 0.0
        if self.stochastic_depth_mode == "uniform":
            return p
        return p * (layer - start + 1) / (self.n_layers - start)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def halved(length, times, causal=False):
    """Frames that `times` convolutions of stride 2 leave of `length` (numbers or arrays).

    ceil(length / 2) each, or length // 2 + 1 of a causal one; nothing stays nothing.
    """
    for _ in range(times):
        length = (length // 2 + 1) * (length > 0) if causal else -(-length // 2)
    return length


def subsampled_lengths(config, mel_len, frames=None):
    """Frames after the subsampling; the arguments of `output_lengths`."""
    factor = config.subsampling_factor
    if factor == 1:
        return mel_len
    if config.subsampling.startswith("stacking"):
        if config.padding_counts and frames is not None:
            return (mel_len + -frames % factor) // factor * (mel_len > 0)
        return -(-mel_len // factor)
    return halved(mel_len, factor.bit_length() - 1, config.causal_downsampling)


def reduced_lengths(config, length):
    """Frames that the reduction leaves of `length` encoder frames."""
    if config.reduction == "pooling":
        return length // config.reduction_factor
    return halved(length, config.reduction_factor.bit_length() - 1)


def output_lengths(config, mel_len, frames=None):
    """Encoder frames of `mel_len` mel frames (a number or i32[B]).

    frames: width of the mel array they lie in. Only stacked frames need it, where NeMo's count
    depends on it (`padding_counts`); without it an utterance counts as if it were alone.
    """
    length = subsampled_lengths(config, mel_len, frames)
    return reduced_lengths(config, length) if config.has_reduction else length

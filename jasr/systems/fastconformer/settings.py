"""Settings of NeMo's recognisers besides their model: config.loss and config.decoding."""

import math

from jasr import settings
from jasr.decoding.transducer import STRATEGIES
from jasr.losses.reduction import REDUCTIONS
from jasr.losses.transducer import check_durations

BRANCHES = ("transducer", "ctc")
# a file of NeMo's may say sum: it is decoded, and refused where it is to be trained
REDUCED = (*REDUCTIONS, "sum")


@settings.section
class LossConfig:
    """NeMo's losses and how utterance losses become one number.

    reduction: see `losses.reduction`; NeMo's is mean_batch. sigma and omega: see `tdt_loss`; omega
    is drawn once a step, as NeMo does. ctc_weight: a hybrid's loss is (1 - weight) times the
    transducer's plus weight times CTC's.
    """

    kind: str = settings.field("tdt", choices=("ctc", "rnnt", "tdt"), meaning=True)
    reduction: str = settings.field("mean_batch", choices=REDUCED)
    durations: tuple = settings.field(  # frames, in the order of the TDT outputs
        (0, 1, 2, 3, 4), meaning=lambda loss: loss.kind == "tdt"
    )
    sigma: float = settings.field(0.02, least=0)
    omega: float = settings.field(0.1, least=0, most=1)
    fastemit_lambda: float = settings.field(0.0, least=0)
    clamp: float = -1.0  # of the gradient of the joint's token logits; 0 or less: none
    ctc_weight: float = settings.field(0.3, least=0, most=1)
    ctc_reduction: str = settings.field("mean_batch", choices=REDUCED)
    # augmentation strength rises linearly from 0 over so many steps
    ramp_steps: int = settings.field(0, least=0)

    def __post_init__(self):
        if self.kind == "tdt":
            check_durations(self.durations, "config.loss.durations")


@settings.section
class DecodingConfig:
    """How a transducer is decoded; see `decoding.transducer.greedy` and `beam.beam_search`."""

    strategy: str = settings.field("greedy_batch", choices=(*STRATEGIES, "beam"))
    # labels at one frame, at most; 0 = no limit (10 with a beam)
    max_symbols: int = settings.field(10, least=0)
    branch: str = settings.field("transducer", choices=BRANCHES)  # of a hybrid
    beam: int = settings.field(4, least=1)  # hypotheses that a beam search keeps
    # log-probability by which it tries worse symbols than the best
    expansion_gamma: float = settings.field(2.3, least=0, below=math.inf)
    length_normalised: bool = True  # it takes the best by score / labels

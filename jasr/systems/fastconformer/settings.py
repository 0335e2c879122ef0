"""Settings of NeMo's recognisers besides their model: config.loss and config.decoding."""

import dataclasses
import math

from jasr import settings
from jasr.decoding.transducer import STRATEGIES
from jasr.losses.reduction import REDUCTIONS
from jasr.losses.transducer import check_durations

BRANCHES = ("transducer", "ctc")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """NeMo's losses and how utterance losses become one number.

    reduction: see `inputs.reduced`; NeMo's default is mean_batch. sigma and omega: see `tdt_loss`;
    omega is drawn once a step, as NeMo does. ctc_weight: a hybrid's loss is (1 - weight) times the
    transducer's plus weight times CTC's.
    """

    kind: str = settings.field("tdt", meaning=True)  # "ctc" | "rnnt" | "tdt"
    reduction: str = "mean_batch"
    durations: tuple = settings.field(  # frames, in the order of the TDT outputs
        (0, 1, 2, 3, 4), meaning=lambda loss: loss.kind == "tdt"
    )
    sigma: float = 0.02
    omega: float = 0.1
    fastemit_lambda: float = 0.0
    clamp: float = -1.0  # of the gradient of the joint's token logits; 0 or less: none
    ctc_weight: float = 0.3
    ctc_reduction: str = "mean_batch"
    ramp_steps: int = 0  # augmentation strength rises linearly from 0 over so many steps

    def __post_init__(self):
        if self.kind not in ("ctc", "rnnt", "tdt"):
            raise ValueError(f"config.loss.kind {self.kind!r}: choose ctc, rnnt or tdt")
        for name in ("reduction", "ctc_reduction"):
            # a file of NeMo's may say sum: it is decoded, and refused where it is to be trained
            if getattr(self, name) not in (*REDUCTIONS, "sum"):
                raise ValueError(
                    f"config.loss.{name} {getattr(self, name)!r}: choose {', '.join(REDUCTIONS)}"
                )
        most = {"omega": 1, "ctc_weight": 1, "sigma": math.inf, "fastemit_lambda": math.inf}
        for name, limit in most.items():
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(
                    f"config.loss.{name} {getattr(self, name)!r}: must be within 0 and {limit}"
                )
        if self.kind == "tdt":
            check_durations(self.durations, "config.loss.durations")


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How a transducer is decoded; see `decoding.transducer.greedy` and `beam.beam_search`."""

    strategy: str = "greedy_batch"  # "greedy_batch" | "greedy" | "beam"
    max_symbols: int = 10  # labels at one frame, at most; 0 = no limit (10 with a beam)
    branch: str = "transducer"  # of a hybrid: "transducer" | "ctc"
    beam: int = 4  # hypotheses that a beam search keeps
    expansion_gamma: float = 2.3  # log-probability by which it tries worse symbols than the best
    length_normalised: bool = True  # it takes the best by score / labels

    def __post_init__(self):
        strategies = (*STRATEGIES, "beam")
        if self.strategy not in strategies:
            raise ValueError(
                f"config.decoding.strategy {self.strategy!r}: choose {', '.join(strategies)}"
            )
        if self.branch not in BRANCHES:
            raise ValueError(f"config.decoding.branch {self.branch!r}: choose transducer or ctc")
        if self.beam < 1 or self.max_symbols < 0 or not 0 <= self.expansion_gamma < math.inf:
            raise ValueError(
                "config.decoding: beam must be at least 1, max_symbols and expansion_gamma not "
                f"negative, got {self.beam}, {self.max_symbols}, {self.expansion_gamma}"
            )

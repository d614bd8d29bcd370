"""What a model is made of and how it is trained, as plain values."""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from .values import LARGEST, Config, at_most, one_of, positive


@dataclass(frozen=True)
class MambaConfig(Config):
    """The selective mixer (Mamba, sections 3.4 and 3.6); what the paper's tables 7 to 10 vary is a value here."""

    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    # rank of the projection to delta, in each block where there are several; None is d_model / 16 in all
    dt_rank: int | None = None
    # which of delta, B and C depend on the input (table 7)
    selective: tuple[str, ...] = ("delta", "B", "C")
    # blocks of channels, each of which chooses delta, B and C by its own channels alone (B2S6, 2505.09022, section 6)
    heads: int = 1
    # add to B, in every channel, what no input chooses (B2S6, algorithm 2)
    B_bias: bool = False
    # s4d-real: -(n + 1); s4d-lin: -1/2 + n i, complex; constant: -1/2; random: -exp(N(0, 1)) (table 8)
    a_init: str = "s4d-real"
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    discretization: str = "euler"

    def __post_init__(self) -> None:
        one_of("mamba.a_init", self.a_init, ("s4d-real", "s4d-lin", "constant", "random"))
        one_of("mamba.dt_init", self.dt_init, ("random", "constant"))
        one_of("mamba.discretization", self.discretization, ("euler", "zoh"))
        for name in self.selective:
            one_of("mamba.selective", name, ("delta", "B", "C"))
        positive("mamba", self, "d_state", "d_conv", "expand", "heads", "dt_min", "dt_max")
        if self.dt_rank is not None:
            positive("mamba", self, "dt_rank")
        if self.heads > 1 and not self.selective:
            raise ValueError("mamba.heads: blocks choose delta, B or C, of which mamba.selective names none")
        if self.B_bias and "B" not in self.selective:
            raise ValueError(
                "mamba.B_bias: a B that is not in mamba.selective is already learnt in every channel; leave it out"
            )
        if self.a_init == "s4d-lin" and self.d_state % 2:
            raise ValueError(f"mamba.d_state: must be even for the complex A of s4d-lin, not {self.d_state}")


@dataclass(frozen=True)
class S4DConfig(Config):
    """The time-invariant mixer (S4D, 2206.11893), the control beside the selective one."""

    # mamba: the Mamba block with S4D for its scan; s4: the layer of S4 and SaShiMi (2202.09729), without a convolution,
    # on d_model channels, to which their feed-forward is the backbone's d_mlp
    block: str = "mamba"
    # real numbers in the state of a channel; a complex one is two. S4D and SaShiMi have 64
    d_state: int = 16
    # s4d-lin: -1/2 + pi n i; s4d-inv: -1/2 + N/pi (N/(2n + 1) - 1) i; s4d-real: -(n + 1), the only real one (table 1)
    a_init: str = "s4d-lin"
    d_conv: int = 4
    expand: int = 2
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    discretization: str = "zoh"

    def __post_init__(self) -> None:
        one_of("s4d.block", self.block, ("mamba", "s4"))
        one_of("s4d.a_init", self.a_init, ("s4d-lin", "s4d-inv", "s4d-real"))
        one_of("s4d.discretization", self.discretization, ("euler", "zoh"))
        positive("s4d", self, "d_state", "d_conv", "expand", "dt_min", "dt_max")
        if self.a_init != "s4d-real" and self.d_state % 2:
            raise ValueError(
                f"s4d.d_state: must be even for the complex A of {self.a_init}, not {self.d_state}"
            )


@dataclass(frozen=True)
class AttentionConfig(Config):
    """Softmax attention, the control that keeps all it has seen; with its MLP, the Transformer++ of Mamba's paper."""

    # channels of a head; a narrower model has one head
    d_head: int = 64
    # how many tokens back one sees, itself included; a state has room for as many from the start. Where the backbone is
    # bidirectional, as many ahead
    window: int = 4096

    def __post_init__(self) -> None:
        positive("attention", self, "d_head", "window")
        if self.d_head % 2:
            raise ValueError(f"attention.d_head: must be even, channels turn in pairs, not {self.d_head}")


@dataclass(frozen=True)
class LSTMConfig(Config):
    """The recurrent network of 1997, a control."""

    # cells of a layer, in units of d_model
    expand: int = 1

    def __post_init__(self) -> None:
        positive("lstm", self, "expand")


@dataclass(frozen=True)
class BackboneConfig(Config):
    """A row of blocks: their number and width, and which mixer each has."""

    d_model: int = 768
    n_layers: int = 24
    # mixers in the order of the layers, repeated to n_layers: "mamba", "s4d", "mamba*7 + attention", "lstm"
    pattern: str = "mamba"
    # width of the gated MLP after every mixer, 0 for none; null gives attention one of its own and other mixers none
    d_mlp: int | None = None
    # mix from both sides: tied shares the projections between the directions (Caduceus), untied shares nothing; either
    # way attention is one mixer, which looks to both sides at once
    bidirectional: str | None = None
    # read both strands of DNA with the same weights: reverse complement in, reverse complement out (Caduceus-PS)
    reverse_complement: bool = False
    # rms; layer; batch, over all positions of a batch while training (norms.py)
    norm: str = "rms"
    # norm what a layer reads; false norms the stream after what a layer adds, as some models of long sequences do
    prenorm: bool = True
    norm_eps: float = 1e-5
    # how much of what a mixer or MLP adds to the stream is left out while training
    dropout: float = 0.0
    # what every channel of that counts at first, a factor that is learnt (LayerScale, 2103.17239); null is 1, for good
    layer_scale: float | None = None
    # recompute each block in the backward: less memory, a third more time
    checkpoint_activations: bool = False
    mamba: MambaConfig = field(default_factory=MambaConfig)
    s4d: S4DConfig = field(default_factory=S4DConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    lstm: LSTMConfig = field(default_factory=LSTMConfig)

    def __post_init__(self) -> None:
        at_most("backbone.n_layers", self.n_layers, _DEEPEST)
        positive("backbone", self, "d_model", "n_layers", "norm_eps")
        if self.d_mlp:
            positive("backbone", self, "d_mlp")
        one_of("backbone.norm", self.norm, ("rms", "layer", "batch"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"backbone.dropout: must be from 0 to below 1, not {self.dropout}")
        if self.layer_scale is not None:
            positive("backbone", self, "layer_scale")
        if self.norm == "batch" and self.checkpoint_activations:
            raise ValueError(
                "backbone.checkpoint_activations: what is recomputed would count twice in the statistics of norm: "
                "batch; take layer or rms, or leave it out"
            )
        if self.bidirectional is not None:
            one_of("backbone.bidirectional", self.bidirectional, ("tied", "untied"))
        d_inner = self.mamba.expand * self.d_model
        if "mamba" in self.mixers and d_inner % self.mamba.heads:
            raise ValueError(
                f"backbone.mamba.heads: must divide the {d_inner} channels, expand * d_model, not {self.mamba.heads}"
            )

    @property
    def causal(self) -> bool:
        """Whether no position sees what comes after it, so that there is a state to go on from."""
        return self.bidirectional is None and not self.reverse_complement

    @property
    def mixers(self) -> list[str]:
        """The name of every layer's mixer."""
        names: list[str] = []
        for part in self.pattern.split("+"):
            name, star, count = (piece.strip() for piece in part.partition("*"))
            one_of("backbone.pattern", name, MIXERS)
            if star and not (count.isdecimal() and len(count) < 10):
                raise ValueError(
                    f"backbone.pattern: must read like 'mamba' or 'mamba*7 + other', not {self.pattern!r}"
                )
            names += [name] * min(int(count or 1), self.n_layers - len(names))
        if not names:
            raise ValueError(f"backbone.pattern: {self.pattern!r} names no mixer")
        return [names[i % len(names)] for i in range(self.n_layers)]

    def mlp_width(self, mixer: str) -> int:
        """The width of the MLP that follows a mixer of this name, 0 where none does.

        Of its own attention has 8/3 d_model, rounded up to a multiple of 128 as in the reference package: 12 d_model^2
        weights in all, about those of two layers of Mamba (Mamba, section 3.4).
        """
        if self.d_mlp is not None:
            return self.d_mlp
        return -(-8 * self.d_model // (3 * 128)) * 128 if mixer == "attention" else 0

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "backbone") -> Self:
        """Build from plain values; `size` names a row of SIZES that the other values override.

        With `pool` among them it is a U-Net's config.
        """
        if "pool" in values and cls is BackboneConfig:
            return UNetConfig.from_dict(values, where)  # type: ignore[return-value]
        return super().from_dict(_unfold(values, where), where)

    @classmethod
    def problems(cls, values: dict[str, Any], where: str = "backbone") -> list[str]:
        if "pool" in values and cls is BackboneConfig:
            return UNetConfig.problems(values, where)
        return super().problems(_unfold(values, where), where)


@dataclass(frozen=True)
class UNetConfig(BackboneConfig):
    """Stages of blocks at falling rates and back (unet.py); every other value is that of each stage's backbone.

    `d_model` is the width of the outermost stage, `n_layers` are those of one stage.
    """

    d_model: int = 64
    n_layers: int = 8
    # how many positions of a stage the next inner one has as one
    pool: tuple[int, ...] = (4, 4)
    # what the width, and that of MLPs, grows by from a stage to the next inner one
    widen: int = 2
    # what is different in a stage, from the outermost to the innermost: [{pattern: s4d}] is outside alone,
    # [{}, {}, {d_mlp: 0}] in the third
    stages: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal:
            raise ValueError(
                "backbone.pool: a U-Net steps from sample to sample; leave out bidirectional and reverse_complement"
            )
        if not self.prenorm:
            raise ValueError("backbone.prenorm: the stages of a U-Net share one stream; leave it at true")
        few = 0 < len(self.pool) < LARGEST.bit_length()
        if not (few and min(self.pool) >= 2 and self.period <= LARGEST):
            raise ValueError(
                f"backbone.pool: must be factors of 2 or more with a product of {LARGEST} at most, not "
                f"{list(self.pool)}"
            )
        positive("backbone", self, "widen")
        if len(self.stages) > len(self.pool) + 1:
            raise ValueError(
                f"backbone.stages: there are {len(self.pool) + 1} for these factors of pool, not {len(self.stages)}"
            )
        levels = [self.stage(i).n_layers for i in range(len(self.pool) + 1)]
        at_most("backbone.n_layers: those of all stages", 2 * sum(levels) - levels[-1], _DEEPEST)

    @property
    def period(self) -> int:
        """After how many positions the innermost stage has moved on by one."""
        return math.prod(self.pool)

    def stage(self, i: int) -> BackboneConfig:
        """What stage i is made of; 0 is the outermost."""
        values = self.to_dict()
        for name in ("pool", "widen", "stages"):
            del values[name]
        for name in ("d_model", "d_mlp"):
            if values[name] is not None:
                values[name] *= self.widen**i
        for name, value in (self.stages[i] if i < len(self.stages) else {}).items():
            if name in _OF_ALL_STAGES:
                raise ValueError(
                    f"backbone.stages.{i}.{name}: is the same in every stage; give backbone.{name}"
                )
            values[name] = {**values[name], **value} if isinstance(value, dict) and name in values else value
        return BackboneConfig.from_dict(values, f"backbone.stages.{i}")


# of layers, as LARGEST is of any size
_DEEPEST = 1 << 10
# what a stage of a U-Net has as the others do
_OF_ALL_STAGES = ("size", "pool", "bidirectional", "reverse_complement", "prenorm")

MIXERS = ("mamba", "s4d", "attention", "lstm")

# the paper's DNA models (table 13), the released state-spaces models, and Transformer++ of table 12
SIZES: dict[str, dict[str, int | str]] = {
    "mamba-250k": {"d_model": 64, "n_layers": 8},
    "mamba-700k": {"d_model": 96, "n_layers": 10},
    "mamba-1.4m": {"d_model": 128, "n_layers": 12},
    "mamba-3.5m": {"d_model": 192, "n_layers": 14},
    "mamba-7m": {"d_model": 256, "n_layers": 16},
    "mamba-19m": {"d_model": 384, "n_layers": 20},
    "mamba-41m": {"d_model": 512, "n_layers": 24},
    "mamba-130m": {"d_model": 768, "n_layers": 24},
    "mamba-370m": {"d_model": 1024, "n_layers": 48},
    "mamba-790m": {"d_model": 1536, "n_layers": 48},
    "mamba-1.4b": {"d_model": 2048, "n_layers": 48},
    "mamba-2.8b": {"d_model": 2560, "n_layers": 64},
    "transformer-125m": {"d_model": 768, "n_layers": 12, "pattern": "attention"},
    "transformer-350m": {"d_model": 1024, "n_layers": 24, "pattern": "attention"},
}


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """AdamW and its schedule; the defaults are those of the paper's improved recipe (Mamba, appendix E.2.1)."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    # cosine: down to min_lr at the trainer's last step; constant: lr after the warm-up
    schedule: str = "cosine"
    warmup_steps: int = 0
    min_lr: float = 1e-5
    # each layer's rate is this times that of the layer above it; for fine-tuning
    layer_decay: float = 1.0
    # the rate of what makes delta is this times that of the rest; below 1, long sequences train more steadily (B2S6,
    # 2505.09022, section 6). Where delta, B and C share x_proj, as in the reference's layout, that keeps the full rate
    delta_lr: float = 1.0
    # and that of A; S4's recipes have 1e-3 for it, whatever the rest has
    A_lr: float = 1.0
    # an anomaly is a step whose loss or gradient is not finite or, unless this is null, a spike: a gradient of so many
    # times the norm of the last ones, or a loss above them by so many times their mean deviation
    spike: float | None = None
    # skip: leave an anomaly out, and stop at the third in a row; stop: at the first
    anomaly: str = "skip"

    def __post_init__(self) -> None:
        one_of("optimizer.schedule", self.schedule, ("cosine", "constant"))
        one_of("optimizer.anomaly", self.anomaly, ("skip", "stop"))
        if self.spike is not None and self.spike <= 1:
            raise ValueError(f"optimizer.spike: must be above 1, as in 10, not {self.spike}")
        positive("optimizer", self, "lr", "eps", "layer_decay", "delta_lr", "A_lr")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: must be from 0 to below 1, not {list(self.betas)}")
        for name in ("weight_decay", "warmup_steps", "min_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name}: must be 0 or more, not {getattr(self, name)}")


def _unfold(values: dict[str, Any], where: str) -> dict[str, Any]:
    rest = {key: value for key, value in values.items() if key != "size"}
    if values.get("size") is None:
        return rest
    if not isinstance(values["size"], str) or values["size"] not in SIZES:
        raise ValueError(f"{where}.size: {values['size']!r} is none of {', '.join(SIZES)}")
    return {**SIZES[values["size"]], **rest}

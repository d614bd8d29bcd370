"""Fine-tuning: start from another model's weights, and train all of them, a part, or small differences to them."""

from typing import Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from .frontends import TokenEmbedding, padded
from .heads import TokenHead
from .lora import attach, matrices, size
from .norms import statistics
from .optim import HEADS, depths
from .values import nearest

# what need not be the pretrained model's: what reads the backbone, and the vectors of classes that it starts with
_OWN = (*HEADS, "classes")
# how many parameters that do not fit are named
_NAMED = 3


class Transfer(NamedTuple):
    """What became of every part: lines for a reader, and the parameters that start anew, by name."""

    lines: list[str]
    fresh: list[str]


@torch.no_grad()
def transfer(
    model: nn.Module, weights: dict[str, Tensor], tokens: list[tuple[int, int]] | None = None
) -> Transfer:
    """Copy another model's weights into a model, by name; what reads the backbone, and vectors of classes, may be new.

    Args:
        model: what gets them.
        weights: a state dict.
        tokens: where the vocabularies differ, the pairs of tokens (here, there) that are the same: their rows are
            copied, others start anew. None where they are the same.

    Raises:
        ValueError: when frontend or backbone are not those of the weights; it has a line for every part.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    resized = [m.weight for m in model.modules() if isinstance(m, TokenEmbedding | TokenHead)]
    parts: dict[str, _Part] = {}
    fresh: list[str] = []
    for parameter, called in names.items():
        part = parts.setdefault(called[0].partition(".")[0], _Part())
        name = next((name for name in called if name in weights), called[0])
        given = weights.get(name)
        rows = tokens if any(parameter is weight for weight in resized) else None
        if given is not None and rows is not None and given.shape[1:] == parameter.shape[1:]:
            here, there = torch.tensor(rows, dtype=torch.long).reshape(-1, 2).unbind(1)
            parameter[here] = given[there].to(parameter)
            part.rows = len(rows)
            if padded(len(rows)) == len(parameter):
                continue
        elif given is not None and given.shape == parameter.shape:
            parameter.copy_(given)
            part.loaded.append(parameter)
            continue
        elif not all(name.startswith(_OWN) for name in called):
            there_is = "is not there" if given is None else f"is {tuple(given.shape)} there"
            part.wrong.append(f"{name} is {tuple(parameter.shape)} here and {there_is}")
        else:
            part.new.append(parameter)
        fresh += called
    usual = statistics(model)
    for name in usual.keys() & weights.keys():
        usual[name].copy_(weights[name])
    known = {name for called in names.values() for name in called} | usual.keys()
    for name in weights.keys() - known:
        part = parts.setdefault(name.partition(".")[0], _Part())
        if name.startswith(_OWN):
            part.left.append(weights[name])
        else:
            part.wrong.append(f"{name} is {tuple(weights[name].shape)} there and not here")
    lines = [f"  {name:12} {part.describe()}" for name, part in parts.items()]
    if any(part.wrong for part in parts.values()):
        raise ValueError("\n".join(lines))
    return Transfer(lines, fresh)


class _Part:
    """What became of the parameters of a child of a model."""

    def __init__(self) -> None:
        self.loaded: list[Tensor] = []
        self.new: list[Tensor] = []
        self.left: list[Tensor] = []
        self.wrong: list[str] = []
        self.rows: int | None = None

    def describe(self) -> str:
        said = [
            f"{word} {len(tensors)} tensor{'s' * (len(tensors) > 1)}, {sum(t.numel() for t in tensors):,} parameters"
            for word, tensors in (("loaded", self.loaded), ("new", self.new), ("left out", self.left))
            if tensors
        ]
        if self.rows is not None:
            said.append(f"the rows of {self.rows:,} tokens loaded, any others new")
        if self.wrong:
            others = len(self.wrong) - _NAMED
            more = [f"and {others} more"] if others > 0 else []
            said.append("does not fit: " + "; ".join(sorted(self.wrong)[:_NAMED] + more))
        return "; ".join(said)


class FineTuning(L.Callback):
    """Which of the weights that a model starts with are trained.

    Args:
        mode: full, all; head, only what reads the backbone; gradual, that first, then layer after layer from the
            output down (Howard and Ruder, 1801.06146); lora, low-rank differences to every matrix (lora.py).
            What starts anew is trained in each.
        rank, alpha: of lora; the difference is multiplied by alpha / rank.
        targets: of lora, the modules to adapt by the last part of their name (in_proj, x_proj, dt_proj, out_proj,
            conv1d, embedding) and what shares their weight; null is every module with a matrix.
        unfreeze_every: of gradual, the steps after which the next layer joins.
        fresh: the parameters that start anew; the verb `finetune` finds them.
    """

    def __init__(
        self,
        mode: Literal["full", "head", "gradual", "lora"] = "full",
        rank: int = 8,
        alpha: float = 16.0,
        targets: list[str] | None = None,
        unfreeze_every: int = 100,
        fresh: list[str] | None = None,
    ) -> None:
        for name, value in (("rank", rank), ("alpha", alpha), ("unfreeze_every", unfreeze_every)):
            if value <= 0:
                raise ValueError(f"finetune.{name}: must be above 0, not {value}")
        self.mode, self.rank, self.alpha, self.targets = mode, rank, alpha, targets
        self.unfreeze_every, self.fresh = unfreeze_every, fresh or []
        self._prepared: nn.Module | None = None

    def prepare(self, model: nn.Module) -> None:
        """Freeze what is not trained and put the adapters on; a second call for the same model does nothing."""
        if self._prepared is model:
            return
        self._prepared = model
        if self.mode in ("full", "gradual"):
            return
        named = list(model.named_parameters(remove_duplicate=False))
        kept = [p for name, p in named if name in self.fresh]
        targets = self._targets(model, kept) if self.mode == "lora" else []
        if self.mode == "head":
            kept += [p for name, p in named if name.startswith(HEADS)]
        model.requires_grad_(False)
        for parameter in kept:
            parameter.requires_grad_(True)
        if targets:
            attach(model, self.rank, self.alpha, targets)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.prepare(pl_module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # gradients are left out and not switched off: DistributedDataParallel fixes what has one when it starts
        if self.mode == "gradual":
            depth, reached = depths(pl_module), trainer.global_step // self.unfreeze_every
            top = max(depth.values())
            for name, parameter in pl_module.named_parameters():
                if depth[name] < top - reached and name not in self.fresh:
                    parameter.grad = None

    def _targets(self, model: nn.Module, kept: list[nn.Parameter]) -> list[str]:
        """The modules to adapt: those that are meant and what shares their weight, but for what is trained as it is."""
        found = dict(matrices(model))
        kinds = {name.rpartition(".")[2] for name in found}
        for target in self.targets or []:
            if target not in kinds:
                raise ValueError(
                    f"finetune.targets: {target!r} is none of {', '.join(sorted(kinds))}{nearest(target, kinds)}"
                )
        meant = {
            module.weight
            for name, module in found.items()
            if self.targets is None or name.rpartition(".")[2] in self.targets
        }
        return [name for name, module in found.items() if module.weight in meant.difference(kept)]


def describe(model: nn.Module) -> str:
    """How many parameters are trained, beside how many the model has."""
    total, count = size(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"trains {count:,} parameters, {100 * count / total:.3g} % of the model's {total:,}"

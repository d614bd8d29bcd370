"""Steps whose loss or gradient is not finite, or a spike: left out, or the end of the run.

What decides is computed where the step is, from numbers that all ranks have alike, so that they decide alike; the host
reads it a step later, so that a GPU is never waited for.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import OptimizerConfig

# how many steps in a row may be left out
MAX_SKIPPED = 2
# over how many steps the usual loss and gradient are taken, and after how many they are known
SETTLING = 50


@dataclass(frozen=True)
class _Step:
    """A step that the host has not looked at yet."""

    number: int
    # the folder of its run, and the samples that it read, in words
    run: str
    batch: str
    # (2, 2): its loss and the norm of its gradient, and the largest of either with which it is taken
    measured: Tensor
    copied: torch.cuda.Event | None

    def problem(self) -> str:
        """What is wrong with it, or nothing."""
        if self.copied is not None:
            self.copied.synchronize()
        (loss, norm), limits = self.measured.tolist()
        found = ""
        for what, value, limit in zip(("loss", "norm of its gradient"), (loss, norm), limits, strict=True):
            if not math.isfinite(value):
                found = f"the {what} is not finite ({value})"
            elif value > limit:
                found = (
                    f"the {what} is {value:.4g}, more than the {limit:.4g} that model.optimizer.spike allows"
                )
            if found:
                return found if what == "loss" else f"the loss is {loss:.4g}, but {found}"
        return ""


class Guard:
    """Say of every step whether it is taken, as OptimizerConfig has it by `spike` and `anomaly`.

    A spike is a norm of the gradient of more than `spike` times its running mean, or a loss that lies above its own by
    more than `spike` times its running mean deviation. These go with the checkpoint, so that a run that goes on decides
    as one that never stopped.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self.spike, self.stops = config.spike, config.anomaly == "stop"
        # steps in a row that were left out
        self.skipped = 0
        # (3,): the running means of the loss, of how far it is from that, and of the norm; and of how many steps
        self.usual: Tensor | None = None
        self.count = 0
        self._steps: deque[_Step] = deque()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "usual": self.usual, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.usual, self.count = state["skipped"], state["usual"], state["count"]

    def admit(self, number: int, loss: Tensor, norm: Tensor, *, run: str, batch: str) -> Tensor:
        """1.0 where a step has to be left out, else 0.0, on the device of its loss and norm, scalars both.

        Args:
            number: of the step; 1 is the first.
            loss, norm: the same on every rank.
            run, batch: for what there is to say of it: the folder of the run; which samples the step read, or nothing.
        """
        values = torch.stack([loss.detach().float(), norm.detach().float()])
        limits = self._limits(values)
        taken = (values.isfinite() & (values <= limits)).all()
        measured, copied = torch.stack([values, limits]), None
        if measured.is_cuda:
            measured, copied = measured.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._steps.append(_Step(number, run, batch, measured, copied))
        return (~taken).float()

    def _limits(self, values: Tensor) -> Tensor:
        """The largest loss and norm (2,) with which a step is taken; takes these into what they come from."""
        if self.spike is None:
            return torch.full_like(values, torch.inf)
        usual = values.new_zeros(3) if self.usual is None else self.usual.to(values.device)
        mean, deviation, norm = usual.unbind()
        limits = torch.full_like(values, torch.inf)
        if self.count >= SETTLING:
            limits = torch.stack([mean + self.spike * deviation, self.spike * norm])
        # a spike counts as what is just allowed, and what is not finite not at all
        loss, allowed = values.minimum(limits).unbind()
        away = (loss - mean).abs() if self.count else torch.zeros_like(loss)
        seen = torch.stack([loss, away, allowed])
        self.count += 1
        change = torch.where(seen.isfinite(), seen - usual, 0)
        self.usual = usual + change / min(self.count, SETTLING)
        return limits

    def judge(self, later: int = 0) -> Iterator[tuple[int, str]]:
        """Of the steps not looked at yet, but for the `later` newest, those left out, and what to say of each.

        Raises:
            FloatingPointError: when one has to end the run.
        """
        while len(self._steps) > later:
            step = self._steps.popleft()
            problem = step.problem()
            if not problem:
                self.skipped = 0
                continue
            self.skipped += 1
            batch = f"its batch, {step.batch}," if step.batch else "its batch"
            look = f"{batch} is shown by\n  mambazoo replay {step.run} --step {step.number}"
            if self.stops:
                raise FloatingPointError(
                    f"step {step.number}: {problem}; {look}\nthe last checkpoint is whole; go on, and leave such steps "
                    f"out, with\n  mambazoo resume {step.run} model.optimizer.anomaly=skip"
                )
            if self.skipped > MAX_SKIPPED:
                raise FloatingPointError(
                    f"{self.skipped} steps in a row were left out, the last of them step {step.number}: {problem}; "
                    f"{look}\nthe last checkpoint is whole; lower model.optimizer.lr, or look at that batch"
                )
            yield step.number, f"step {step.number}: {problem}; it is left out; {look}"

"""Steps whose loss or gradient is not finite or leaps: which they are, and what is said of them."""

import math

import pytest
import torch
from mambazoo.zoo import guard
from mambazoo.zoo.config import OptimizerConfig
from mambazoo.zoo.guard import Guard
from torch import Tensor

# what steps measure where nothing happens
USUAL = [(2 + 0.1 * (-1) ** i, 0.5) for i in range(20)]


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SETTLING", 10)


def made(**values: object) -> Guard:
    return Guard(OptimizerConfig.from_dict(values))


def take(guard: Guard, steps: list[tuple[float, float]], first: int = 1) -> list[tuple[int, str]]:
    """Take steps of (loss, norm) one by one; return those left out with what is said of them."""
    said = []
    for number, (loss, norm) in enumerate(steps, first):
        left_out = guard.admit(
            number, torch.tensor(loss), torch.tensor(norm), run="runs/a/1", batch="samples 6 to 8"
        )
        found = list(guard.judge())
        assert [step for step, _ in found] == [number] * bool(left_out)
        said += found
    return said


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ((math.nan, math.nan), "the loss is not finite (nan)"),
        ((math.inf, 0.5), "the loss is not finite (inf)"),
        ((-math.inf, 0.5), "the loss is not finite (-inf)"),
        ((2.0, math.nan), "the loss is 2, but the norm of its gradient is not finite (nan)"),
        ((2.0, math.inf), "the loss is 2, but the norm of its gradient is not finite (inf)"),
    ],
)
def test_what_is_not_finite_is_left_out_from_the_first_step(step: tuple[float, float], what: str) -> None:
    [(number, said)] = take(made(), [step, *USUAL, (9.0, 90.0)])
    assert number == 1
    assert said == (
        f"step 1: {what}; it is left out; its batch, samples 6 to 8, is shown by\n  mambazoo replay runs/a/1 --step 1"
    )


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ((8.0, 0.5), "the loss is 8, more than the 3.049 that model.optimizer.spike allows"),
        ((2.0, 20.0), "the loss is 2, but the norm of its gradient is 20, more than the 5 that"),
        ((3.0, 4.8), None),
        ((-5.0, 0.0), None),
    ],
)  # fmt: skip
def test_a_spike_is_left_out_once_what_is_usual_is_known(step: tuple[float, float], what: str | None) -> None:
    watching = made(spike=10)
    said = take(watching, [*USUAL, *USUAL, step])
    assert [number for number, _ in said] == ([41] if what else [])
    assert all(what in text for _, text in said if what)
    # nor is the next one usual
    assert len(take(watching, [step])) == len(said)
    assert take(made(), [*USUAL, step]) == []


def test_the_third_in_a_row_stops_the_run() -> None:
    bad = (math.nan, 0.5)
    assert len(take(made(), [bad, bad, (2.0, 0.5), bad, bad])) == 4
    with pytest.raises(
        FloatingPointError, match="3 steps in a row were left out, the last of them step 3: the loss"
    ):
        take(made(), [bad, bad, bad])


@pytest.mark.parametrize(
    ("step", "what"), [((math.nan, 0.5), "the loss is not finite"), ((7.0, 0.5), "the loss is 7, more than the 3.049")]
)  # fmt: skip
def test_the_first_stops_the_run_where_that_is_asked_for(step: tuple[float, float], what: str) -> None:
    with pytest.raises(FloatingPointError) as error:
        take(made(spike=10, anomaly="stop"), [*USUAL, *USUAL, step])
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"step 41: {what}")
    assert lines[0].endswith("; its batch, samples 6 to 8, is shown by")
    assert lines[1] == "  mambazoo replay runs/a/1 --step 41"
    assert lines[3] == "  mambazoo resume runs/a/1 model.optimizer.anomaly=skip"


def test_what_is_usual_goes_with_the_checkpoint() -> None:
    whole, before = made(spike=10), made(spike=10)
    for watching in (whole, before):
        assert len(take(watching, [*USUAL, (math.nan, 0.5), (9.0, 0.5)])) == 2
    after = made(spike=10)
    after.load_state_dict(before.state_dict())
    assert after.skipped == 2
    rest = [*USUAL, (2.9, 0.5), (8.0, 0.5), (2.0, 60.0)]
    assert take(after, rest, 23) == take(whole, rest, 23)
    assert isinstance(whole.usual, Tensor)
    assert torch.equal(after.state_dict()["usual"], whole.usual)


def test_what_to_do_is_one_of_two() -> None:
    with pytest.raises(
        ValueError, match=r"optimizer.anomaly: must be one of skip, stop, not 'stip', did you mean"
    ):
        made(anomaly="stip")

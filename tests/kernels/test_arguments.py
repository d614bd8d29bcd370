"""What no operator takes: each is refused by the argument's name, ahead of any work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mambazoo.kernels.conv import causal_conv1d, causal_conv1d_update
from mambazoo.kernels.cross_entropy import linear_cross_entropy
from mambazoo.kernels.norm import rms_norm
from mambazoo.kernels.scan import selective_scan
from mambazoo.kernels.step import selective_state_update
from torch.autograd import forward_ad

Call = Callable[..., Any]
# b 2, l 5, d 6, n 4, k 3, v 7
SHAPES: dict[Call, dict[str, tuple[int, ...]]] = {
    selective_scan: {
        "u": (2, 5, 6), "delta": (2, 5, 6), "A": (6, 4), "B": (2, 5, 4), "C": (2, 5, 4), "D": (6,), "z": (2, 5, 6),
        "delta_bias": (6,), "B_bias": (6, 4), "initial_state": (2, 6, 4),
    },
    selective_state_update: {
        "state": (2, 6, 4), "u": (2, 6), "delta": (2, 6), "A": (6, 4), "B": (2, 4), "C": (2, 4), "D": (6,),
        "z": (2, 6), "delta_bias": (6,),
    },
    causal_conv1d: {"x": (2, 5, 6), "weight": (6, 3), "bias": (6,), "initial_state": (2, 2, 6)},
    causal_conv1d_update: {"x": (2, 6), "state": (2, 2, 6), "weight": (6, 3), "bias": (6,)},
    rms_norm: {"x": (2, 5, 6), "weight": (6,), "residual": (2, 5, 6), "gate": (2, 5, 6)},
    linear_cross_entropy: {"y": (5, 6), "weight": (7, 6)},
}  # fmt: skip
ARGUMENTS = [(call, name) for call, shapes in SHAPES.items() for name in shapes]


def arguments(call: Call) -> dict[str, Any]:
    given = {name: torch.randn(shape) for name, shape in SHAPES[call].items()}
    return given | ({"targets": torch.randint(7, (5,))} if call is linear_cross_entropy else {})


@pytest.mark.parametrize(("call", "name"), ARGUMENTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_what_would_lose_a_part_is_refused(call: Call, name: str) -> None:
    given = arguments(call)
    call(**given)
    wrong = [
        given[name].tolist(),
        given[name].long(),
        # a complex A is one; a narrow one is not
        given[name].to(torch.bfloat16 if name == "A" else torch.complex64),
        given[name].to(torch.float8_e5m2),
        given[name].to_sparse(),
    ]
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\b{name} "):
            call(**{**given, name: value})


@pytest.mark.parametrize("call", [causal_conv1d_update, selective_state_update])
def test_a_state_that_is_expanded_is_not_written_to(call: Call) -> None:
    given = arguments(call)
    given["state"] = given["state"][:1].expand_as(given["state"])
    with pytest.raises(ValueError, match=r"^state is expanded"):
        call(**given)


def test_a_token_takes_as_many_states_as_a_scan() -> None:
    for n in (0, 257):
        given = arguments(selective_state_update)
        given |= {name: torch.randn(*given[name].shape[:-1], n) for name in ("state", "A", "B", "C")}
        with pytest.raises(ValueError, match=f"A has n = {n}"):
            selective_state_update(**given)


@pytest.mark.parametrize("boundaries", [[0, 5], torch.tensor([0, 5]), torch.tensor([0.0, 5.0])], ids=repr)
def test_boundaries_are_whole_numbers_of_32_bits(boundaries: object) -> None:
    given = {name: x[:1] if x.ndim == 3 else x for name, x in arguments(causal_conv1d).items()}
    with pytest.raises(ValueError, match=r"^cu_seqlens must be"):
        causal_conv1d(**given, cu_seqlens=boundaries)


def test_targets_are_whole_numbers() -> None:
    given = arguments(linear_cross_entropy)
    for kind in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=r"^targets must be"):
            linear_cross_entropy(**{**given, "targets": given["targets"].to(kind)})


def test_transforms_are_refused_or_right() -> None:
    """A derivative in forward mode would be zero without a word."""
    given = arguments(selective_scan)
    u = given.pop("u")

    def scan(u: torch.Tensor, backend: str) -> torch.Tensor:
        return selective_scan(u, **given, backend=backend)[0]

    along = torch.randn_like(u)
    transforms: list[Callable[[Call], Any]] = [
        lambda f: torch.func.jvp(f, (u,), (along,))[1],
        lambda f: torch.func.vmap(f)(torch.stack([u, u])),
        lambda f: torch.func.grad(lambda u: f(u).sum())(u),
    ]
    for transform in transforms:
        with pytest.raises(ValueError, match=r"no rule for torch\.func"):
            transform(lambda u: scan(u, "torch"))
        assert transform(lambda u: scan(u, "reference")).abs().sum() > 0
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward mode"):
        scan(forward_ad.make_dual(u, along), "torch")

"""The loss without the logits: against the reference, chunk by chunk, under autocast and compilers."""

import pytest
import torch
import torch.nn.functional as F
from mambazoo.kernels import cross_entropy
from mambazoo.kernels.cross_entropy import _loss, chunk_rows, linear_cross_entropy
from torch import Tensor

from .problems import assert_close

F64 = torch.float64


def problem(*shape: int, d: int = 6, v: int = 16, vocab: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.randn(*shape, d, dtype=F64, requires_grad=True)
    weight = torch.randn(v, d, dtype=F64, requires_grad=True)
    targets = torch.randint(vocab, shape)
    targets[torch.rand(shape) < 0.3] = -100
    return y, weight, targets


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 300)])
def test_loss_matches_reference(
    shape: tuple[int, ...], weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # several chunks, the last of them short
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", 1)
    y, weight, targets = problem(*shape)
    counts = torch.rand(shape) if weighted else None
    (total, losses), (truth, rows) = (
        linear_cross_entropy(y, weight, targets, token_weights=counts, vocab_size=13, backend=name)
        for name in ("torch", "reference")
    )
    assert_close("total", total, truth, 1e-12)
    assert_close("losses", losses, rows, 1e-12)
    assert not losses.requires_grad
    found, expected = (torch.autograd.grad(0.7 * x, (y, weight)) for x in (total, truth))
    for name, a, b in zip(("dy", "dweight"), found, expected, strict=True):
        assert_close(name, a, b, 1e-12)
    assert torch.equal(found[1][13:], torch.zeros_like(found[1][13:]))


def test_the_reference_is_pytorchs() -> None:
    y, weight, targets = problem(3, 5)
    _, losses = linear_cross_entropy(y, weight, targets, vocab_size=13, backend="reference")
    expected = F.cross_entropy((y @ weight.T)[..., :13].flatten(0, 1), targets.flatten(), reduction="none")
    assert_close("losses", losses, expected.view(3, 5), 1e-12)


def test_only_gradients_that_are_wanted_are_taken() -> None:
    y, weight, targets = problem(3, 5)
    with torch.no_grad():
        assert not linear_cross_entropy(y, weight, targets)[0].requires_grad
    total, _ = linear_cross_entropy(y, weight.detach(), targets)
    total.backward()
    whole = torch.autograd.grad(linear_cross_entropy(y, weight, targets)[0], y)[0]
    assert torch.equal(y.grad, whole)
    assert weight.grad is None


@pytest.mark.parametrize("length", [0, 5])
def test_nothing_counts_where_all_is_ignored(length: int) -> None:
    y, weight, _ = problem(3, length)
    total, losses = linear_cross_entropy(y, weight, torch.full((3, length), -100))
    total.backward()
    assert total == 0
    assert not losses.any()
    assert not y.grad.any()
    assert not weight.grad.any()


def test_autocast_multiplies_in_bfloat16_and_keeps_the_rest() -> None:
    y, weight, targets = (x.detach().float() if x.is_floating_point() else x for x in problem(3, 5))
    y, weight = y.requires_grad_(), weight.requires_grad_()
    exact, _ = linear_cross_entropy(y, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, losses = linear_cross_entropy(y, weight, targets)
    low = F.cross_entropy(
        (y.bfloat16() @ weight.bfloat16().T).float().flatten(0, 1), targets.flatten(), reduction="sum"
    )
    assert total.dtype == losses.dtype == torch.float32
    assert_close("total", total, low, 1e-5)
    expected = torch.autograd.grad(exact, (y, weight))
    for name, a, b in zip(("dy", "dweight"), torch.autograd.grad(total, (y, weight)), expected, strict=True):
        assert a.dtype == torch.float32
        assert_close(name, a, b, 2e-2)


def test_chunks_are_even_and_stay_below_their_size() -> None:
    assert chunk_rows(32768, 50288 * 2, cross_entropy.CHUNK) == 8192
    assert chunk_rows(100, 257 * 4, cross_entropy.CHUNK) == 128
    assert chunk_rows(0, 257 * 4, cross_entropy.CHUNK) == 128


@pytest.mark.filterwarnings("ignore")
def test_the_operator_passes_opcheck_and_compiles() -> None:
    y, weight, targets = (x.detach().float() if x.is_floating_point() else x for x in problem(7))
    y, weight = y.requires_grad_(), weight.requires_grad_()
    for counts, wants in ((None, (True, True)), (torch.rand(7), (False, True)), (None, (True, False))):
        arguments = (y, weight, targets, counts, 13, -100, *wants, "torch")
        assert set(torch.library.opcheck(_loss, arguments).values()) == {"SUCCESS"}

    def step(y: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_cross_entropy(y, weight, targets, vocab_size=13)[0]

    expected = torch.autograd.grad(step(y, weight), (y, weight))
    found = torch.autograd.grad(
        torch.compile(step, fullgraph=True, backend="aot_eager")(y, weight), (y, weight)
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_vectors_without_channels_tell_words_apart_by_nothing() -> None:
    y, weight, targets = torch.randn(2, 3, 0, requires_grad=True), torch.randn(7, 0), torch.randint(7, (2, 3))
    total, _ = linear_cross_entropy(y, weight, targets)
    total.backward()
    torch.testing.assert_close(total, 6 * torch.tensor(7.0).log())


def test_wrong_arguments_are_named() -> None:
    y, weight, targets = problem(3, 5)
    with pytest.raises(ValueError, match="weight must be"):
        linear_cross_entropy(y, weight[:, 1:], targets)
    with pytest.raises(ValueError, match="targets must be"):
        linear_cross_entropy(y, weight, targets[1:])
    with pytest.raises(ValueError, match="token_weights must be"):
        linear_cross_entropy(y, weight, targets, token_weights=torch.ones(3))
    with pytest.raises(ValueError, match="vocab_size must be"):
        linear_cross_entropy(y, weight, targets, vocab_size=17)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    y, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    total, _ = linear_cross_entropy(y, weight, torch.randint(7, (5,)), backend="torch")
    (gradient,) = torch.autograd.grad(total.square(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        gradient.square().sum().backward()

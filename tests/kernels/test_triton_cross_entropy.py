"""The cross-entropy kernel against the reference, on a GPU or interpreted."""

import pytest
import torch
from mambazoo.kernels import cross_entropy
from mambazoo.kernels.cross_entropy import linear_cross_entropy

from .problems import DEVICE, assert_close, needs_triton

pytestmark = [needs_triton, pytest.mark.usefixtures("repeatable", "poisoned")]


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    # what PyTorch wants before it multiplies matrices in deterministic mode
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize(
    ("tokens", "d", "v", "vocab"), [(1, 8, 8, 2), (63, 24, 264, 257), (140, 5, 9000, 8999)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_matches_reference(
    tokens: int, d: int, v: int, vocab: int, weighted: bool, dtype: torch.dtype, tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cross_entropy, "CHUNK", 1)
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", 1)
    y = torch.randn(tokens, d).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(v, d).to(DEVICE, dtype).float().requires_grad_()
    targets = torch.randint(vocab, (tokens,))
    targets[1::3] = -100
    targets = targets.to(DEVICE)
    counts = torch.rand(tokens).to(DEVICE) if weighted else None
    wide = [x.detach().double().requires_grad_() for x in (y, weight)]
    options = {"token_weights": counts, "vocab_size": vocab}
    total, losses = linear_cross_entropy(y, weight, targets, backend="triton", **options)
    truth, rows = linear_cross_entropy(*wide, targets, backend="reference", **options)
    assert_close("total", total, truth, tolerance)
    assert_close("losses", losses, rows, tolerance)
    assert not losses[1::3].any()
    found, expected = torch.autograd.grad(total, (y, weight)), torch.autograd.grad(truth, wide)
    for name, a, b in zip(("dy", "dweight"), found, expected, strict=True):
        assert_close(name, a, b, tolerance)
    assert not found[1][vocab:].any()
    with torch.no_grad():
        again = linear_cross_entropy(y, weight, targets, backend="triton", **options)
    assert torch.equal(again[1], losses)


def test_large_logits_and_those_that_are_not_numbers() -> None:
    y = torch.eye(4, device=DEVICE)
    y[3] = float("nan")
    weight = torch.zeros(40, 4, device=DEVICE)
    weight[3, 0], weight[3, 1], weight[:, 2] = 3e4, -3e4, 1e4
    targets = torch.tensor([3, 2, 7, 3], device=DEVICE)
    _, losses = linear_cross_entropy(y, weight, targets, backend="triton")
    expected = torch.nn.functional.cross_entropy(y.detach() @ weight.T, targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=5e-3, equal_nan=True)
    assert losses.isnan().tolist() == [False, False, False, True]


def test_a_target_outside_the_vocabulary_reads_nothing_and_is_not_a_number() -> None:
    y, weight = torch.randn(3, 8, device=DEVICE, requires_grad=True), torch.randn(16, 8, device=DEVICE)
    targets = torch.tensor([3, 16, -7], device=DEVICE)
    total, losses = linear_cross_entropy(y, weight, targets, backend="triton")
    assert losses.isnan().tolist() == [False, True, True]
    total.backward()
    assert y.grad.isnan().any(1).tolist() == [False, True, True]

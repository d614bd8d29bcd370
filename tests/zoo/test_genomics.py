"""Models of genomes: the loss against plain PyTorch, metrics, what a model may not see, learning, saving."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mambazoo.checkpoints.io import from_pretrained, save_pretrained
from mambazoo.zoo.generate import Sampling, generate
from mambazoo.zoo.genomics import GenomeModel, targets_are_next_inputs
from mambazoo.zoo.heads import IGNORE
from torch import Tensor

# A, C, G, T, N and a mask
COMPLEMENT = [3, 2, 1, 0, 4, 5]
MASK = 5


def build(**backbone: Any) -> GenomeModel:
    return GenomeModel({"d_model": 16, "n_layers": 1, **backbone}, 6, COMPLEMENT)


def next_bases(b: int, l: int) -> dict[str, Tensor]:
    tokens = torch.randint(4, (b, l + 1))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def masked_bases(b: int, l: int) -> dict[str, Tensor]:
    tokens, hidden = torch.randint(4, (b, l)), torch.rand(b, l) < 0.15
    return {
        "inputs": tokens.masked_fill(hidden, MASK),
        "targets": tokens.masked_fill(~hidden, IGNORE),
    }


def hidden_pairs(b: int) -> dict[str, Tensor]:
    """Every base twice, the first of some pairs hidden: only what comes after tells it.

    inputs   ? A C C T T ? C ...
    targets  A . . . . . C . ...
    """
    tokens = torch.randint(4, (b, 12)).repeat_interleave(2, 1)
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden[:, ::6] = True
    return {"inputs": tokens.masked_fill(hidden, MASK), "targets": tokens.masked_fill(~hidden, IGNORE)}


def logged(model: GenomeModel, *batches: dict[str, Tensor]) -> dict[str, float]:
    values: dict[str, Any] = {}
    model.log = lambda name, value, **_: values.update({name: value})  # type: ignore[assignment, misc]
    for batch in batches:
        model.measure(batch, "val")
    model.on_validation_epoch_end()
    return {
        name: float(value.compute() if hasattr(value, "compute") else value) for name, value in values.items()
    }


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backbone", [{}, {"bidirectional": "tied", "reverse_complement": True}], ids=str)
def test_the_loss_is_the_weighted_mean_cross_entropy(backbone: dict[str, Any], weighted: bool) -> None:
    model, batch = build(**backbone), masked_bases(3, 30)
    counted = batch["targets"] != IGNORE
    weights = torch.where(torch.rand(3, 30) < 0.5, 0.1, 1.0) if weighted else torch.ones(3, 30)
    if weighted:
        batch["weights"] = weights
    losses = F.cross_entropy(model(batch["inputs"])[0][counted], batch["targets"][counted], reduction="none")
    expected = (losses * weights[counted]).sum() / weights[counted].sum()
    loss = model.training_loss(batch)
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_targets_of_no_weight_are_no_loss() -> None:
    batch = {**next_bases(1, 20), "weights": torch.zeros(1, 20)}
    assert build().training_loss(batch) == 0


def test_metrics_are_what_they_are_called() -> None:
    model, batches = build(), [masked_bases(2, 30), masked_bases(1, 50)]
    for batch in batches:
        batch["weights"] = torch.rand_like(batch["inputs"], dtype=torch.float32)
    values = logged(model, *batches)
    nll, loss, weight, hits, count = 0.0, 0.0, 0.0, 0, 0
    for batch in batches:
        counted = batch["targets"] != IGNORE
        logits, targets = model(batch["inputs"])[0][counted], batch["targets"][counted]
        losses, weights = F.cross_entropy(logits, targets, reduction="none"), batch["weights"][counted]
        nll, loss = nll + losses.sum().item(), loss + (losses * weights).sum().item()
        weight, count = weight + weights.sum().item(), count + len(targets)
        hits += int((logits.argmax(-1) == targets).sum())
    assert values == {
        "val/loss": pytest.approx(loss / weight, rel=1e-5),
        "val/perplexity": pytest.approx(math.exp(nll / count), rel=1e-5),
        "val/bits_per_base": pytest.approx(nll / count / math.log(2), rel=1e-5),
        "val/accuracy": pytest.approx(hits / count),
    }


def test_a_second_validation_starts_anew() -> None:
    model, batch = build(), next_bases(2, 30)
    first = logged(model, next_bases(2, 30), batch)["val/bits_per_base"]
    alone = logged(model, batch)["val/bits_per_base"]
    assert first != alone
    assert logged(model, batch)["val/bits_per_base"] == alone


@pytest.mark.parametrize("backbone", [{"bidirectional": "tied"}, {"reverse_complement": True}], ids=str)
def test_what_sees_the_next_base_may_not_be_asked_for_it(backbone: dict[str, Any]) -> None:
    tokens = torch.randint(4, (1, 41))
    packed = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:].clone(),
        "cu_seqlens": torch.tensor([0, 0, 10, 40, 40], dtype=torch.int32),
    }
    # the end of a sequence asks for a base that is not in the row
    packed["targets"][0, 9] = (packed["targets"][0, 9] + 1) % 4
    for batch in (next_bases(2, 30), packed):
        for use in (build(**backbone).training_loss, lambda b: build(**backbone).measure(b, "val")):
            with pytest.raises(
                ValueError, match=r"model\.backbone: .* sees the next base, .* choose masked targets"
            ):
                use(batch)


def test_masked_targets_are_told_from_next_ones() -> None:
    assert targets_are_next_inputs(next_bases(2, 30)) is True
    assert targets_are_next_inputs(masked_bases(4, 100)) is False
    # what is masked may be followed by its like
    assert targets_are_next_inputs(hidden_pairs(8)) is False
    same = masked_bases(4, 100)
    same = {"inputs": same["inputs"].clamp(max=0), "targets": same["targets"].clamp(max=0)}
    assert targets_are_next_inputs(same) is False
    assert targets_are_next_inputs(next_bases(1, 5)) is None
    ends_ignored = next_bases(2, 60)
    ends_ignored["targets"][:, 40:] = IGNORE
    assert targets_are_next_inputs(ends_ignored) is True


@pytest.mark.parametrize(
    ("backbone", "learns"),
    [({"bidirectional": "tied"}, True), ({"reverse_complement": True}, True), ({}, False)],
    ids=str,
)
def test_what_comes_after_is_learnt_by_what_sees_it(backbone: dict[str, Any], learns: bool) -> None:
    model = build(**backbone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(90):
        optimizer.zero_grad()
        model.training_loss(hidden_pairs(16)).backward()
        optimizer.step()
    values = logged(model, hidden_pairs(32))
    if learns:
        assert values["val/bits_per_base"] < 0.3
        assert values["val/accuracy"] > 0.95
    else:
        assert values["val/bits_per_base"] > 1.8


@torch.no_grad()
def test_step_repeats_forward_and_generates() -> None:
    model, tokens = build(n_layers=2).eval(), torch.randint(4, (2, 12))
    logits, _ = model(tokens)
    state = model.init_state(2)
    for t in range(12):
        row, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(row, logits[:, t], rtol=1e-5, atol=1e-5)
    written = list(generate(model, [[0, 1, 2], [3]], 5, Sampling(temperature=0)))
    assert len(written) == 5
    assert written[0][0] == int(model(torch.tensor([[0, 1, 2]]))[0][0, -1].argmax())


@torch.no_grad()
def test_saved_and_loaded_says_the_same(tmp_path: Path) -> None:
    model = GenomeModel(
        {"d_model": 16, "n_layers": 2, "bidirectional": "tied", "reverse_complement": True}, 6, COMPLEMENT
    ).eval()
    save_pretrained(model, None, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert isinstance(again, GenomeModel)
    tokens = torch.randint(6, (2, 9))
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert dict(again.hparams) == dict(model.hparams)
    assert again.hparams["complement"] == COMPLEMENT

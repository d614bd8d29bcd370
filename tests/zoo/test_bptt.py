"""Rows that are read in windows: the loss of the whole, gradients within windows."""

import pytest
import torch
from mambazoo.zoo.audio import WaveformModel
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.task import Batch
from mambazoo.zoo.tokens import TokenModel
from torch import Tensor

PATTERNS = ["mamba", "mamba + attention", "lstm", "s4d"]


def batch_of(length: int, labels: bool = False) -> dict[str, Tensor]:
    tokens = torch.randint(20, (3, length + 1))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:].clone(), "weights": torch.rand(3, length)}
    batch["targets"][0, ::7] = -100
    return {**batch, "labels": torch.tensor([0, 1, 1])} if labels else batch


def read(model: TokenModel, batch: Batch, bptt: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.bptt = bptt
    loss = model.training_loss(batch)
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()))
    return loss.detach(), dict(zip(names, gradients, strict=True))


def language(pattern: str) -> TokenModel:
    torch.manual_seed(0)
    return LanguageModel({"d_model": 16, "n_layers": 2, "pattern": pattern}, vocab_size=20).double()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("window", [1, 7, 16])
def test_the_loss_in_windows_is_that_of_the_whole(pattern: str, window: int) -> None:
    model, batch = language(pattern), batch_of(32)
    whole, _ = read(model, batch, None)
    windowed, _ = read(model, batch, window)
    torch.testing.assert_close(windowed, whole)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_stay_within_windows(pattern: str) -> None:
    model, batch = language(pattern), batch_of(24)
    _, whole = read(model, batch, None)
    _, one = read(model, batch, 24)
    _, cut = read(model, batch, 8)
    # by hand: each window from a state that is data
    state, losses = model.init_state(3), []
    for begin in range(0, 24, 8):
        part = {name: x[:, begin : begin + 8] for name, x in batch.items()}
        y, state = model.mix(part["inputs"], state=state)
        losses.append(model.head.loss(y, part["targets"], part["weights"])[0])
        state = model.detached(state)
    total = (batch["weights"] * (batch["targets"] != -100)).sum()
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(sum(losses) / total, list(parameters.values()))
    for name, by_hand in zip(parameters, expected, strict=True):
        torch.testing.assert_close(one[name], whole[name])
        torch.testing.assert_close(cut[name], by_hand)
    assert any(not torch.allclose(cut[name], whole[name], rtol=1e-3) for name in whole)


def test_sound_is_read_in_windows_through_its_pools_and_of_its_class() -> None:
    torch.manual_seed(0)
    backbone = {"d_model": 8, "n_layers": 1, "pool": [2, 2]}
    model = WaveformModel(backbone, vocab_size=20, num_classes=2).double()
    batch = batch_of(24, labels=True)
    whole, exact = read(model, batch, None)
    windowed, cut = read(model, batch, 6)
    torch.testing.assert_close(windowed, whole)
    # a class is known to every window, and learnt from all of them
    near = torch.nn.functional.cosine_similarity(
        cut["classes.weight"].flatten(), exact["classes.weight"].flatten(), 0
    )
    assert near > 0.8
    _, one = read(model, batch, 24)
    torch.testing.assert_close(one["classes.weight"], exact["classes.weight"])


def test_what_cannot_be_read_in_windows_is_said() -> None:
    small = {"d_model": 16, "n_layers": 1}
    with pytest.raises(ValueError, match=r"model\.bptt: must be 1 or more"):
        LanguageModel(small, 20, bptt=0)
    with pytest.raises(ValueError, match=r"model\.bptt: hands on"):
        TokenModel({**small, "bidirectional": "tied"}, 20, True, None, bptt=8)
    model = LanguageModel(small, 20, bptt=8)
    packed = {**batch_of(16), "cu_seqlens": torch.tensor([0, 16], dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"data\.packing=false"):
        model.training_loss(packed)

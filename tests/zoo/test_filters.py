"""A classifier's ear for sound: which bands it hears and when, what training leaves out, and that models keep it."""

from pathlib import Path

import pytest
import torch
from mambazoo.checkpoints.io import from_pretrained, save_pretrained
from mambazoo.zoo.classification import SequenceClassifier
from mambazoo.zoo.finetune import transfer
from mambazoo.zoo.frontends import Filterbank
from mambazoo.zoo.norms import statistics
from mambazoo.zoo.optim import cast
from torch import Tensor


def build() -> SequenceClassifier:
    return SequenceClassifier({"d_model": 16, "n_layers": 1}, None, 2, patch=320, filters=12)


@torch.no_grad()
def test_filters_hear_what_is_loud_and_when_however_loud_it_is() -> None:
    bank, t = Filterbank(20, 320, 8).eval(), torch.arange(4000) / 8000
    # what the 6th and the 14th filter are for, in cycles a sample
    middles = [(9 ** (place / 21) - 1) / 16 for place in (6, 14)]
    low, high = (torch.sin(2 * torch.pi * middle * 8000 * t) for middle in middles)
    # the lower tone in the first half, the higher one in the second
    x = torch.where(t < 0.25, low, high)[None]
    energies = bank._energies(x)[0]
    # padded to a whole vector, of four
    assert energies.shape == (20, 52)
    loudest = energies.argmax(0)
    assert (loudest[3:22] == 5).all()
    assert (loudest[28:47] == 13).all()
    # a complex filter of weight 1 hears half of a sine's level
    assert energies[5, 10].item() == pytest.approx(0.25, rel=0.01)
    samples = x[..., None]
    torch.testing.assert_close(bank(0.1 * samples), bank(samples), rtol=1e-2, atol=1e-3)
    silence = bank(torch.zeros(1, 8000, 1))
    torch.testing.assert_close(silence[:, 3:-3], silence[:, 3:4].expand(-1, 19, -1))
    assert [bank(torch.zeros(1, l, 1)).shape[1] for l in (1, 320, 321, 8000)] == [1, 1, 2, 25]


@pytest.mark.parametrize(("size", "step"), [(320, 8), (64, 1), (28, 1), (8, 1), (4, 1), (440, 11), (400, 10)])
def test_filters_are_centred_on_what_they_stand_for(size: int, step: int) -> None:
    bank = Filterbank(6, size, 4)
    assert bank.step == step
    x = torch.zeros(1, 9 * size)
    x[0, 4 * size + bank.hop // 2] = 1
    energies = bank._energies(x).sum(1)[0]
    assert energies.argmax() == 16
    torch.testing.assert_close(energies[15], energies[17], rtol=0.3, atol=0)


def test_what_is_left_out_of_training_are_stretches_and_other_ones_in_every_row() -> None:
    bank = Filterbank(40, 320, 8)
    torch.manual_seed(0)
    y = torch.ones(400, 40, 100)
    for axis, most in ((1, bank.BANDS), (2, bank.TIMES)):
        kept = bank._kept(y, axis, most)
        assert kept.shape == ((400, 40, 1) if axis == 1 else (400, 1, 100))
        left_out = 1 - kept.flatten(1)
        stretches = (left_out.diff(dim=1) > 0).sum(1) + (left_out[:, 0] > 0)
        assert {1, 2} <= set(stretches.tolist()) <= {0, 1, 2}
        # two of half the most on average, which seldom overlap
        assert left_out.mean().item() == pytest.approx(most, rel=0.1)
        assert left_out.mean(1).max() <= 2 * most + 2 / kept.numel() * 400
        # the ends are left out as well as the middle
        assert left_out.mean(0).min() > 0
    seen: list[Tensor] = []
    bank.convolutions[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    x = torch.randn(50, 32000, 1)
    bank(x)
    bank.eval()(x)
    training, evaluation = ((maps[:, 0] == 0) for maps in seen)
    assert training.all(2).any()
    assert training.all(1).any()
    assert not evaluation.any()


def test_silence_has_gradients_and_filters_want_rows_of_one_length() -> None:
    model = build()
    inputs = torch.randn(2, 800, 1)
    inputs[1] = 0
    model(inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(
        ValueError, match=r"model.filters: hears what pads a row too; give rows of one length"
    ):
        model(inputs, torch.tensor([800, 400]))


@pytest.mark.parametrize(("filters", "samples"), [(40, 3200), (12, 3100), (1, 320)])
def test_the_maps_that_are_counted_are_those_that_are_made(filters: int, samples: int) -> None:
    bank, made = Filterbank(filters, 320, 8).eval(), []
    for convolution in bank.convolutions:
        convolution.conv.register_forward_hook(lambda _, arguments, y: made.append(y.numel()))
    bank(torch.randn(1, samples, 1))
    assert bank.maps(samples) == made


@torch.no_grad()
def test_a_vector_stands_for_its_own_samples() -> None:
    bank, x = Filterbank(12, 320, 8).eval(), torch.zeros(2, 9 * 320, 1)
    # a click in the middle of the sixth, beside one far from it
    x[:, 20] = 1
    x[1, 5 * 320 + 160] = 1
    difference = (bank(x)[1] - bank(x)[0]).norm(dim=1)
    assert difference[3:].argmax() == 2


def test_wavelets_are_not_learnt_and_norms_keep_what_is_usual(tmp_path: Path) -> None:
    model = build()
    names = {*dict(model.named_parameters()), *model.state_dict()}
    assert not names & {"patches.filters", "patches.window"}
    assert "patches.convolutions.4.norm.running_mean" in statistics(model)
    x = torch.randn(3, 3200, 1)
    model(x)
    model.eval()
    save_pretrained(model, None, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert torch.equal(again(x), model(x))
    other = build().eval()
    transfer(other, dict(model.state_dict()))
    assert torch.equal(other(x), model(x))


@torch.no_grad()
def test_energies_keep_their_precision_where_weights_and_samples_do_not(tmp_path: Path) -> None:
    model = build().eval()
    x = torch.randn(3, 3200, 1)
    expected = model(x)
    save_pretrained(model, None, tmp_path / "model")
    half = from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    seen: list[Tensor] = []
    half.patches.convolutions[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    torch.testing.assert_close(half(x).float(), expected, rtol=0.05, atol=0.02)
    model.patches.convolutions[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.02)
    # rounded once, at the end
    assert torch.equal(seen[0], seen[1].bfloat16())
    assert cast(build(), torch.bfloat16).patches.filters.dtype == torch.float32


def test_one_position_is_no_batch_to_norm_by() -> None:
    with pytest.raises(
        ValueError, match=r"model.filters: while training, batches are normed, of which one position"
    ):
        build()(torch.randn(1, 300, 1))
    build()(torch.randn(2, 300, 1))

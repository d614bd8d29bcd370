"""The norms there are and dropout: what they compute, what training and evaluation see, and that models keep them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from mambazoo.checkpoints.io import build as load
from mambazoo.checkpoints.io import read, save_pretrained
from mambazoo.zoo.averaging import Average
from mambazoo.zoo.backbone import Backbone
from mambazoo.zoo.classification import SequenceClassifier
from mambazoo.zoo.config import BackboneConfig
from mambazoo.zoo.finetune import transfer
from mambazoo.zoo.generate import Sampling, generate
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.norms import BatchNorm, LayerNorm, RMSNorm, statistics
from mambazoo.zoo.optim import decays
from mambazoo.zoo.unet import UNet
from torch import Tensor, nn
from torch.utils.data import DataLoader

EXACT = {"rtol": 1e-9, "atol": 1e-11}
KINDS = ("layer", "batch")


def values(norm: str, **others: Any) -> dict[str, Any]:
    return {"d_model": 16, "n_layers": 2, "norm": norm, **others}


def build(norm: str, **others: Any) -> Backbone:
    """A backbone that has seen some batches, so that what is usual of them is not what it starts with."""
    model = Backbone(BackboneConfig.from_dict(values(norm, **others))).double()
    with torch.no_grad():
        for _ in range(3):
            model(2 * random(4, 9, 32 if others.get("reverse_complement") else 16) + 1)
    return model.eval()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("ours", "theirs"), [(LayerNorm, nn.LayerNorm), (BatchNorm, nn.BatchNorm1d)])
def test_a_norm_is_that_of_pytorch_after_the_addition(ours: Any, theirs: Any) -> None:
    norm, other, x, residual = (
        ours(6, 1e-4).double(),
        theirs(6, eps=1e-4).double(),
        random(3, 7, 6),
        random(3, 7, 6),
    )
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(norm.state_dict(), strict=False)
    for training in (True, False):
        for module in (norm, other):
            module.train(training)
        y, stream = norm(x, residual)
        torch.testing.assert_close(stream, x + residual)
        torch.testing.assert_close(y, other((x + residual).flatten(0, 1)).view_as(y))
        alone, stream = norm(x)
        torch.testing.assert_close(alone, other(x.flatten(0, 1)).view_as(y))
        assert torch.equal(stream, x)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(name))


def test_the_stream_stays_in_float32() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16)
    for norm in (RMSNorm(6, 1e-5), LayerNorm(6, 1e-5), BatchNorm(6, 1e-5), BatchNorm(6, 1e-5).bfloat16()):
        y, stream = norm(x, torch.randn(2, 5, 6))
        assert (y.dtype, stream.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("prenorm", [True, False])
@torch.no_grad()
def test_evaluation_steps_hands_on_and_packs_as_ever(norm: str, prenorm: bool) -> None:
    model, x = build(norm, d_mlp=24, prenorm=prenorm), random(1, 13, 16)
    whole, _ = model(x, state=model.init_state(1))
    y, state = model(x[:, :5], state=model.init_state(1))
    rows = [y]
    for t in range(5, 13):
        row, state = model.step(x[:, t], state)
        rows.append(row[:, None])
    torch.testing.assert_close(torch.cat(rows, 1), whole, **EXACT)
    bounds = [0, 4, 4, 13]
    packed, _ = model(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, end in pairwise(bounds):
        if end > start:
            torch.testing.assert_close(packed[:, start:end], model(x[:, start:end])[0], **EXACT)
    x[:, 9:] += 1
    torch.testing.assert_close(model(x)[0][:, :9], whole[:, :9], **EXACT)


@pytest.mark.parametrize("norm", ["rms", *KINDS])
def test_a_norm_may_come_after_what_it_norms(norm: str) -> None:
    model, x = build(norm, d_mlp=24, prenorm=False, dropout=0.2, layer_scale=0.3), random(2, 9, 16)
    assert not any(name.startswith("norm_f") for name, _ in model.named_parameters())
    expected = x
    for block in model.layers:
        for own, layer in ((block.norm, block.mixer), (block.norm2, lambda x, mlp=block.mlp: (mlp(x), None))):
            expected, _ = own(expected + 0.3 * layer(expected)[0])
    y, _ = model(x)
    torch.testing.assert_close(y, expected)
    saving = build(norm if norm != "batch" else "rms", d_mlp=24, prenorm=False, checkpoint_activations=True)
    saving.train()(x)[0].sum().backward()
    assert all(p.grad is not None for p in saving.parameters())


@pytest.mark.parametrize("norm", KINDS)
@torch.no_grad()
def test_a_unet_steps_as_it_reads(norm: str) -> None:
    stages = [{}, {"layer_scale": 0.3}]
    config = BackboneConfig.from_dict({**values(norm, n_layers=1), "pool": [2], "stages": stages})
    model, x = UNet(config).double(), random(2, 8, 16)  # type: ignore[arg-type]
    model(random(3, 8, 16))
    model.eval()
    whole, _ = model(x)
    state, rows = model.init_state(2), []
    for t in range(8):
        row, state = model.step(x[:, t], state)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, 1), whole, **EXACT)


@pytest.mark.parametrize("norm", KINDS)
@torch.no_grad()
def test_both_sides_and_both_strands(norm: str) -> None:
    model, x = build(norm, bidirectional="tied", reverse_complement=True), random(2, 9, 32)

    def other_strand(x: Tensor) -> Tensor:
        return x.flip(1).roll(16, -1)

    for _ in range(2):
        torch.testing.assert_close(model(other_strand(x))[0], other_strand(model(x)[0]), **EXACT)
        # statistics over both strands are those of the other strand too
        model.train()


@torch.no_grad()
def test_padding_of_a_classifier_counts_in_nothing_but_training() -> None:
    model = SequenceClassifier(values("batch", bidirectional="tied"), 6, 3)
    x, lengths = torch.randint(4, (2, 12)), torch.tensor([12, 7])
    before = {name: buffer.clone() for name, buffer in statistics(model).items()}
    model(x, lengths)
    assert before
    assert all(not torch.equal(buffer, before[name]) for name, buffer in statistics(model).items())
    model.eval()
    expected = model(x, lengths)
    x[1, 7:] = 5
    torch.testing.assert_close(model(x, lengths), expected)
    torch.testing.assert_close(model(x[1:, :7]), expected[1:])


def test_a_step_while_training_is_refused() -> None:
    model = build("batch").train()
    with pytest.raises(ValueError, match=r"takes no steps; call model.eval\(\) first"):
        model.step(random(1, 16), model.init_state(1))
    language = LanguageModel(values("batch"), 20)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        list(generate(language, [[1, 2, 3]], 3, Sampling()))
    assert len(list(generate(language.eval(), [[1, 2, 3]], 3, Sampling()))) == 3


def test_a_batch_that_is_not_finite_is_forgotten() -> None:
    norm = BatchNorm(4, 1e-5)
    norm(torch.randn(2, 3, 4))
    before = norm.running_mean.clone()
    norm(torch.full((2, 3, 4), float("nan")))
    assert torch.equal(norm.running_mean, before)


def test_a_frozen_norm_keeps_its_statistics_in_training() -> None:
    model, x = build("batch"), random(2, 9, 16)
    expected, before = model(x)[0], {name: buffer.clone() for name, buffer in statistics(model).items()}
    model.requires_grad_(False).train()
    assert torch.equal(model(x)[0], expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in statistics(model).items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"norm": "btach"},
            "backbone.norm: must be one of rms, layer, batch, not 'btach', did you mean 'batch'",
        ),
        ({"prenorm": False, "pool": [2]}, "backbone.prenorm: the stages of a U-Net share one stream"),
        ({"dropout": 1.0}, "backbone.dropout: must be from 0 to below 1"),
        ({"dropout": -0.1}, "backbone.dropout: must be from 0 to below 1"),
        ({"layer_scale": 0.0}, "backbone.layer_scale: must be above 0"),
        ({"norm": "batch", "checkpoint_activations": True}, "would count twice in the statistics"),
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackboneConfig.from_dict(wrong)


@pytest.mark.parametrize("norm", KINDS)
def test_norms_do_not_decay(norm: str) -> None:
    names = {name for name, p in build(norm).named_parameters() if "norm" in name and not decays(name, p)}
    assert names == {
        f"{place}.{own}"
        for place in ("layers.0.norm", "layers.1.norm", "norm_f")
        for own in ("weight", "bias")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", KINDS)
def test_compiles_and_exports_as_one_graph(norm: str) -> None:
    model, x = build(norm, prenorm=norm == "layer").float(), torch.randn(2, 11, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (False, True):
        model.train(training)
        expected, _ = model(x)
        y, _ = compiled(x)
        torch.testing.assert_close(y, expected)
    y.sum().backward()
    model.eval()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x)[0], model(x)[0])
    torch._dynamo.reset()


def test_dropout_leaves_out_what_is_added_while_training() -> None:
    model, x = build("rms", dropout=0.5, d_mlp=24), random(1, 9, 16)
    plain = build("rms", d_mlp=24)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x)[0], plain(x)[0])
    model.train()
    torch.manual_seed(0)
    first = model(x)[0]
    assert not torch.equal(model(x)[0], first)
    torch.manual_seed(0)
    assert torch.equal(model(x)[0], first)
    # the stream itself loses nothing: a block adds a mixer's output, of which about a half is zero
    block = model.layers[0]
    block.mlp = nn.Identity()
    block.norm2.forward = lambda x, residual: (torch.zeros_like(x), x)
    _, added, _ = block(x, None)
    assert (added == 0).double().mean().item() == pytest.approx(0.5, abs=0.15)


def test_dropout_with_recomputation_draws_the_same_again() -> None:
    model, x = build("layer", dropout=0.5).train(), random(2, 9, 16)
    saving = build("layer", dropout=0.5, checkpoint_activations=True).train()
    saving.load_state_dict(model.state_dict())
    for one in (model, saving):
        torch.manual_seed(0)
        one(x)[0].square().sum().backward()
    for a, b in zip(model.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("norm", KINDS)
@torch.no_grad()
def test_a_saved_model_has_its_statistics(norm: str, tmp_path: Path) -> None:
    model, x = LanguageModel(values(norm), 20), torch.randint(20, (2, 9))
    model(x)
    save_pretrained(model.eval(), {"kind": "bytes"}, tmp_path / "model")
    again = load(read(str(tmp_path / "model"))).eval()
    assert torch.equal(again(x)[0], model(x)[0])
    # another task starts with them too
    classifier = SequenceClassifier(values(norm), 20, 3).eval()
    transfer(classifier, model.state_dict())
    assert torch.equal(classifier.backbone(model.embedding(x))[0], model.backbone(model.embedding(x))[0])
    # and a norm of another kind does not fit
    with pytest.raises(ValueError, match="norm"):
        transfer(SequenceClassifier(values("rms"), 20, 3), model.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_statistics_are_averaged_with_the_weights(tmp_path: Path) -> None:
    rows = [torch.randint(20, (2, 9)) for _ in range(4)]
    loader = DataLoader([{"inputs": row[:, :-1], "targets": row[:, 1:]} for row in rows], batch_size=None)
    seen, validated, saved = [], [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            seen.append(module.backbone.norm_f.running_mean.clone())
            trainer.save_checkpoint(tmp_path / "a.ckpt")
            saved.append(torch.load(tmp_path / "a.ckpt", weights_only=True))

        def on_validation_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            validated.append(module.backbone.norm_f.running_mean.clone())

    torch.manual_seed(0)
    model = LanguageModel(values("batch"), 20, optimizer={"lr": 0.1, "schedule": "constant"})
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, val_check_interval=2,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[Average(0.3), Watch()],
    )  # fmt: skip
    trainer.fit(model, loader, loader)
    average, name = torch.zeros(16), "backbone.norm_f.running_mean"
    for step, (now, checkpoint) in enumerate(zip(seen, saved, strict=True), 1):
        kept = min(0.3, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * now
        torch.testing.assert_close(checkpoint["state_dict"][name], average)
        assert torch.equal(checkpoint["trained"][name], now)
    torch.testing.assert_close(validated[-1], average)

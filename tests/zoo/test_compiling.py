"""Compiled training: the same parameters under the same names, the same losses, and plain words where it cannot be."""

from typing import Any

import lightning as L
import pytest
import torch
from mambazoo.zoo.classification import SequenceClassifier
from mambazoo.zoo.compiling import Compile, pad_sequences
from mambazoo.zoo.graphs import Graphs
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.task import Task
from torch.utils.data import DataLoader

from .test_training import batches, build


def train(
    callback: Compile, model: LanguageModel, accelerator: str = "cpu", *others: L.Callback, **values: Any
) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    trainer = L.Trainer(
        max_steps=3, accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback, *others], **values,
    )  # fmt: skip
    trainer.fit(model, DataLoader(batches(9), batch_size=None))
    return model.state_dict()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Trace and differentiate as compilers do, but generate no code, which takes minutes."""
    calls: list[Any] = []
    compile_ = torch.compile

    def trace(model: Any, **options: Any) -> Any:
        calls.append(options)
        return compile_(model, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", trace)
    return calls


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_is_training(quick: list[Any], checkpointing: bool) -> None:
    values = {"d_model": 16, "n_layers": 2, "checkpoint_activations": checkpointing}
    models = [LanguageModel(values, vocab_size=20) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain = train(Compile(), models[0], accumulate_grad_batches=2)
    assert quick == []
    compiled = train(Compile("default"), models[1], accumulate_grad_batches=2)
    assert quick[-1] == {"mode": "default", "fullgraph": True}
    assert list(compiled) == list(plain)
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_packed_batches_of_any_number_of_sequences_run_compiled(quick: list[Any]) -> None:
    model, compiled = build(), build()
    compiled.load_state_dict(model.state_dict())
    compiled.backbone.compile()
    for bounds in ([0, 12], [0, 5, 12], [0, 1, 2, 12], [0, 2, 4, 6, 12]):
        rows = torch.randint(20, (1, 13))
        batch = {"inputs": rows[:, :-1], "targets": rows[:, 1:], "cu_seqlens": torch.tensor(bounds).int()}
        losses = [one.training_loss(batch) for one in (model, compiled)]
        torch.testing.assert_close(*losses)
        found = [
            torch.autograd.grad(loss, list(one.parameters()))
            for loss, one in zip(losses, (model, compiled), strict=True)
        ]
        torch.testing.assert_close(*found)
        # empty sequences at the end change nothing
        pad_sequences(batch)
        assert (len(batch["cu_seqlens"]) - 1).bit_count() == 1
        torch.testing.assert_close(model.training_loss(batch), losses[0])


class Gradients(L.Callback):
    """Keep what the optimiser is given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, model: L.LightningModule, optimizer: Any) -> None:
        self.seen.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))


def compare_gradients(mode: str, accelerator: str, accumulate: int) -> None:
    models = [build(optimizer={"schedule": "constant"}) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    watchers = [Gradients(), Gradients()]
    for own, model, watcher in zip((None, mode), models, watchers, strict=True):
        train(Compile(own), model, accelerator, watcher, accumulate_grad_batches=accumulate)
    assert len(watchers[0].seen) == 3
    for plain, compiled in zip(watchers[0].seen, watchers[1].seen, strict=True):
        assert (plain - compiled).norm() < 1e-2 * plain.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_compiled_gradients_are_gradients(quick: list[Any], accumulate: int) -> None:
    compare_gradients("default", "cpu", accumulate)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "graphs"])
def test_gradients_on_a_gpu_are_gradients(mode: str, accumulate: int) -> None:
    compare_gradients(mode, "gpu", accumulate)


def rows(l: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(l // 2, l + 1, (4,), generator=generator)
    inputs = torch.randint(20, (4, l), generator=generator)
    return {"inputs": inputs, "lengths": lengths, "labels": torch.randint(3, (4,), generator=generator)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "backbone",
    [{}, {"pattern": "s4d", "norm": "batch"}, {"pattern": "attention"}, {"pool": [2], "bidirectional": None}],
    ids=str,
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_graphs_of_many_shapes_train_to_the_same_bits(backbone: dict[str, Any], precision: str) -> None:
    values = {"d_model": 32, "n_layers": 2, "bidirectional": "tied", "dropout": 0.1, **backbone}
    shapes = [(48, 0), (64, 1), (48, 2), (48, 3), (80, 4), (64, 5)]
    found = []
    for mode in (None, "graphs"):
        torch.manual_seed(0)
        model = SequenceClassifier(values, vocab_size=20, num_classes=3)
        trainer = L.Trainer(
            max_steps=len(shapes), accelerator="gpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[Compile(mode)], precision=precision,
            gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(model, DataLoader([rows(*shape) for shape in shapes], batch_size=None))
        assert "forward" not in vars(model.backbone)
        found.append(model.cpu().state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_is_not_replayed_before_its_gradients_are_taken() -> None:
    model = build().cuda()
    model.backbone.forward = Graphs(model.backbone)
    x = torch.randn(2, 12, model.backbone.config.d_model, device="cuda", requires_grad=True)
    other = torch.randn_like(x).requires_grad_()
    first, second = model.backbone(x)[0], model.backbone(other)[0]
    assert type(first.grad_fn).__name__ == "_ReplayBackward" != type(second.grad_fn).__name__
    expected = [torch.autograd.grad(model.backbone.forward.run(z)[0].sum(), z)[0] for z in (x, other)]
    for y, z, gradient in zip((first, second), (x, other), expected, strict=True):
        assert torch.equal(torch.autograd.grad(y.sum(), z, retain_graph=True)[0], gradient)
    with pytest.raises(RuntimeError, match="takes the gradient of a batch once"):
        first.sum().backward()


def test_graphs_leave_a_cpu_as_it_is() -> None:
    lstm = LanguageModel({"d_model": 16, "n_layers": 2, "pattern": "mamba + lstm"}, vocab_size=20)
    for model in (build(), lstm):
        train(Compile("graphs"), model)
        assert "forward" not in vars(model.backbone)


class NoBackbone(Task):
    def __init__(self) -> None:
        super().__init__(None)
        self.weight = torch.nn.Parameter(torch.ones(()))


@pytest.mark.filterwarnings("ignore")
def test_where_it_cannot_run_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="mode: must be null or one of default, reduce-overhead, graphs, not 'fast'"
    ):
        Compile("fast")
    with pytest.raises(ValueError, match="reduce-overhead captures CUDA graphs and cannot run on cpu"):
        train(Compile("reduce-overhead"), build())
    with pytest.raises(ValueError, match="NoBackbone has no backbone"):
        train(Compile("default"), NoBackbone())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LSTM cannot be compiled; set it to null"):
        train(
            Compile("default"),
            LanguageModel({"d_model": 16, "n_layers": 2, "pattern": "mamba + lstm"}, vocab_size=20),
        )

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"torch.compile does not work here \(no compiler\); set it to null"):
        train(Compile("default"), build())


def test_gradients_that_a_graph_owns_are_copied_before_more_are_added() -> None:
    model, callback = build(), Compile("reduce-overhead")
    model.training_loss(batches(1)[0]).backward()
    before = {name: p.grad for name, p in model.named_parameters()}
    callback.on_after_backward(L.Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=2), model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not before[name]
        assert torch.equal(parameter.grad, before[name])

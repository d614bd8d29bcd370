"""What every task does around its loss: groups of parameters, the schedule, guarded gradients, metrics."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from mambazoo.zoo import guard
from mambazoo.zoo.config import OptimizerConfig
from mambazoo.zoo.heads import IGNORE
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.optim import cast, learning_rate, parameter_groups
from torch.utils.data import DataLoader


def build(**values: object) -> LanguageModel:
    return LanguageModel({"d_model": 16, "n_layers": 2}, vocab_size=20, **values)  # type: ignore[arg-type]


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    rows = [torch.randint(20, (2, 9)) for _ in range(count)]
    return [{"inputs": row[:, :-1], "targets": row[:, 1:], "bytes": torch.tensor(16)} for row in rows]


def trainer(steps: int, precision: Any = "32-true") -> L.Trainer:
    return L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, precision=precision,
    )  # fmt: skip


def test_only_matrices_decay() -> None:
    model = build()
    decaying, rest = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {".".join(names[id(p)].split(".")[-2:]) for p in decaying["params"]}
    assert kinds == {
        "embedding.weight", "in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight",
    }  # fmt: skip
    kinds = {".".join(names[id(p)].split(".")[-2:]) for p in rest["params"]}
    assert kinds == {"norm_f.weight", "norm.weight", "mixer.A_log", "mixer.D", "conv1d.bias", "dt_proj.bias"}


def test_the_schedule_warms_up_and_falls_to_its_end() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, min_lr=0.1)
    rates = [learning_rate(step, config, 110) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    constant = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(step, constant, 5) for step in range(5)] == [0.5, 1, 1, 1, 1]


def test_the_state_space_stays_in_float32() -> None:
    model = cast(build(), torch.bfloat16)
    kept = {name.rpartition("mixer.")[2] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_proj.bias"}
    assert model(torch.randint(20, (1, 7)))[0].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("warmup", "said"), [(3, True), (2, False)])
def test_a_warmup_that_never_ends_is_said(
    warmup: int, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(optimizer={"warmup_steps": warmup})
    trainer(3).fit(model, DataLoader(batches(3), batch_size=None))
    assert ("warmup_steps: 3 of 3 steps; the learning rate only rises" in capsys.readouterr().out) == said


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_float16_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.precision: must be bf16-mixed or 32-true, not 16-true"):
        trainer(1, "16-true").fit(build(), DataLoader(batches(1), batch_size=None))


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out() -> None:
    class Faulty(LanguageModel):
        def training_loss(self, batch: object) -> torch.Tensor:
            loss = super().training_loss(batch)  # type: ignore[arg-type]
            return loss * float("nan") if self.global_step == 1 else loss

    model = Faulty({"d_model": 16, "n_layers": 2}, vocab_size=20, optimizer={"schedule": "constant"})
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *args: object) -> None:
            seen.append(model.embedding.weight.detach().clone())

    run = trainer(3)
    run.callbacks.append(Watch())  # type: ignore[attr-defined]
    run.fit(model, DataLoader(batches(3), batch_size=None))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert seen[2].isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_three_such_steps_in_a_row_stop_the_run_and_are_named() -> None:
    model = build(optimizer={"lr": 1e-3})
    with torch.no_grad():
        model.head.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="3 steps in a row were left out, the last of them step 3"):
        trainer(5).fit(model, DataLoader(batches(5), batch_size=None))


@pytest.mark.filterwarnings("ignore")
def test_a_spike_is_left_out_once_what_is_usual_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spiky(LanguageModel):
        def training_loss(self, batch: object) -> torch.Tensor:
            return super().training_loss(batch) * (1e3 if self.global_step == 5 else 1)  # type: ignore[arg-type]

    model = Spiky(
        {"d_model": 16, "n_layers": 2}, vocab_size=20, optimizer={"schedule": "constant", "spike": 10}
    )
    seen, said = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, *args: object) -> None:
            seen.append(model.embedding.weight.detach().clone())

    monkeypatch.setattr(model, "print", said.append)
    monkeypatch.setattr(guard, "SETTLING", 4)
    run = trainer(8)
    run.callbacks.append(Watch())  # type: ignore[attr-defined]
    run.fit(model, DataLoader(batches(8), batch_size=None))
    assert [step for step in range(2, 9) if torch.equal(seen[step - 2], seen[step - 1])] == [6]
    [message] = said
    assert message.startswith("step 6: the loss is ")
    assert "that model.optimizer.spike allows" in message


def test_a_batch_with_nothing_to_predict_counts_for_nothing() -> None:
    model = build()
    inputs = torch.randint(20, (1, 4))
    model.log = lambda *args, **options: None  # type: ignore[method-assign]
    model.measure({"inputs": inputs, "targets": inputs}, "val")
    before = model.nll.compute()
    model.measure({"inputs": inputs, "targets": torch.full_like(inputs, -100)}, "val")
    assert torch.equal(model.nll.compute(), before)


def test_metrics_are_what_they_are_called() -> None:
    model = build()
    targets = torch.tensor([[3, 4, IGNORE, 5]])
    batch = {"inputs": torch.randint(20, (1, 4)), "targets": targets, "bytes": torch.tensor(7)}
    logits = model(batch["inputs"])[0].double().log_softmax(-1)
    nll = -(logits[0, 0, 3] + logits[0, 1, 4] + logits[0, 3, 5])
    logged = {}
    model.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[assignment, misc]
    model.measure(batch, "val")
    model.on_validation_epoch_end()
    assert logged["val/loss"].compute().item() == pytest.approx(nll.item() / 3, rel=1e-5)
    assert logged["val/bits_per_byte"].compute().item() == pytest.approx(
        nll.item() / math.log(2) / 7, rel=1e-5
    )
    assert float(logged["val/perplexity"]) == pytest.approx(math.exp(nll.item() / 3), rel=1e-5)


def test_packed_rows_lose_what_stacked_rows_lose() -> None:
    model, rows = build(), torch.randint(20, (3, 9))
    stacked = {"inputs": rows[:, :-1], "targets": rows[:, 1:]}
    packed = {
        "inputs": rows[:, :-1].reshape(1, -1),
        "targets": rows[:, 1:].reshape(1, -1),
        "cu_seqlens": torch.tensor([0, 8, 16, 24], dtype=torch.int32),
    }
    torch.testing.assert_close(model.training_loss(packed), model.training_loss(stacked))
    a, b = model.predict_step(packed, 0), model.predict_step(stacked, 0)
    assert [row["tokens"] for row in a] == [row["tokens"] for row in b] == [8, 8, 8]
    assert [row["nll"] for row in a] == pytest.approx([row["nll"] for row in b], rel=1e-5)

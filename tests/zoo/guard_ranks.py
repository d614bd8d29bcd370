"""A loss that is not finite on one of two ranks, whose parameters are shared out; test_parallel.py runs it."""

import os

import lightning as L
import torch
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.sharding import FullySharded
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader


class Faulty(LanguageModel):
    def training_loss(self, batch: object) -> torch.Tensor:
        loss = super().training_loss(batch)  # type: ignore[arg-type]
        return loss * float("nan") if self.global_step == 1 and self.global_rank == 1 else loss


class Watch(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, *args: object) -> None:
        gradients = [p.grad.full_tensor() for p in model.parameters() if isinstance(p.grad, DTensor)]
        self.norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        torch.testing.assert_close(
            trainer.callback_metrics["train/gradient_norm"], self.norm, equal_nan=True, atol=0.0, rtol=1e-5
        )
        weight = model.backbone.layers[0].mixer.in_proj.weight
        assert isinstance(weight, DTensor)
        assert len(weight.to_local()) == len(weight) // 2
        seen.append(weight.full_tensor().detach().clone())


def fit(anomaly: str) -> None:
    global model
    model = Faulty(
        {"d_model": 16, "n_layers": 2}, vocab_size=20, optimizer={"schedule": "constant", "anomaly": anomaly}
    )
    rows = [torch.randint(20, (2, 9)) for _ in range(3)]
    batches = [{"inputs": row[:, :-1], "targets": row[:, 1:]} for row in rows]
    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", devices=2, strategy=FullySharded(), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, callbacks=[Watch()],
    )  # fmt: skip
    trainer.fit(model, DataLoader(batches, batch_size=None))


torch.manual_seed(0)
seen: list[torch.Tensor] = []
fit("skip")
# every rank leaves the step out
assert torch.equal(seen[0], seen[1])
assert not torch.equal(seen[1], seen[2])
assert seen[2].isfinite().all()
# or stops at it
problem = ""
try:
    fit("stop")
except FloatingPointError as error:
    problem = str(error)
assert problem.startswith("step 2: the loss is not finite")
os._exit(0)

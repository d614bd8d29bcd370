"""Telling whole sequences apart: a class for each, from a pooled backbone; beside the scores, what guessing reaches."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import (
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)

from .config import BackboneConfig
from .frontends import Filterbank, Patches, TokenEmbedding
from .heads import IGNORE, POOLINGS, pool
from .ranks import ranks, sum_over_ranks
from .strands import complement_table, reverse_complement
from .task import Batch, Task
from .unet import build_backbone
from .values import nearest

# classes whose confusion matrix has room in memory
_MOST = 1 << 12


class SequenceClassifier(Task):
    """A class for each of inputs (b, l), which labels (b,) name; lengths (b,) says where padding at the end begins.

    Inputs are tokens or, of samples of sound and the like, numbers (b, l, features). Embedding and backbone carry the
    names they have in a GenomeModel or LanguageModel, so that a pretrained one fits.
    Sequences never see their padding, but for what it counts in a norm over the batch (norms.py).

    Args:
        backbone: the fields of BackboneConfig, or {"size": "mamba-1.4m"} and what differs from it; or, with `pool`,
            those of UNetConfig.
        vocab_size, num_classes, complement: a recipe leaves these to the data module; vocab_size is null where inputs
            are numbers; complement is needed for a backbone that reads both strands and for average_strands.
        features: how many numbers an input has.
        patch: how many neighbouring inputs the backbone sees as one vector.
        filters: of samples of sound, through so many filters, rather than as they are (frontends.Filterbank); patch is
            then a multiple of 4.
        pooling: masked (the mean over a sequence's own positions), max (the largest of each number over these), mean
            (over padding too), or last.
        classes: the name of each class, by which predictions call it; a recipe leaves them to the data module, and null
            is numbers from 0.
        class_weights: what a sequence of each class counts in the loss.
        average_strands: when measuring and predicting, average the logits of a sequence and its reverse complement
            (Caduceus-PH, 2403.03234).
        optimizer: the fields of OptimizerConfig.
    """

    CONFIGS: ClassVar = {**Task.CONFIGS, "backbone": BackboneConfig}
    complement: Tensor
    class_weights: Tensor

    def __init__(
        self,
        backbone: dict[str, Any],
        vocab_size: int | None,
        num_classes: int,
        complement: list[int] | None = None,
        features: int = 1,
        patch: int = 1,
        filters: int | None = None,
        pooling: str = "masked",
        classes: list[str] | None = None,
        class_weights: list[float] | None = None,
        average_strands: bool = False,
        optimizer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(optimizer)
        config = BackboneConfig.from_dict(backbone, "model.backbone")
        if not 2 <= num_classes <= _MOST:
            raise ValueError(f"model.num_classes: must be from 2 to {_MOST}, not {num_classes}")
        if patch < 1 or features < 1:
            raise ValueError(f"model.patch, model.features: must be 1 or more, not {patch} and {features}")
        if filters is not None and (filters < 1 or vocab_size is not None or features != 1):
            raise ValueError(
                "model.filters: must be 1 or more, for sound as numbers (data.encoding=float); not "
                f"{filters} beside {f'{features} features' if vocab_size is None else f'{vocab_size} codes'}"
            )
        if config.reverse_complement and (patch > 1 or vocab_size is None):
            raise ValueError(
                "model.backbone.reverse_complement: is for one base after the other; leave out model.patch"
            )
        if pooling not in POOLINGS:
            raise ValueError(
                f"model.pooling: must be one of {', '.join(POOLINGS)}, not {pooling!r}{nearest(pooling, POOLINGS)}"
            )
        if classes is not None and not len(set(classes)) == len(classes) == num_classes:
            raise ValueError(
                f"model.classes: must be {num_classes} names, one for each class, not {len(classes)}, "
                f"{len(set(classes))} of them different"
            )
        if class_weights is not None and (len(class_weights) != num_classes or min(class_weights) <= 0):
            raise ValueError(
                f"model.class_weights: must be {num_classes} numbers above 0, one for each class, not {class_weights}"
            )
        self.save_hyperparameters(
            {
                "backbone": config.to_dict(),
                "vocab_size": vocab_size,
                "num_classes": num_classes,
                "complement": complement,
                "features": features,
                "patch": patch,
                "filters": filters,
                "pooling": pooling,
                "classes": classes,
                "class_weights": class_weights,
                "average_strands": average_strands,
                "optimizer": self.optimizer_config.to_dict(),
            },
            logger=False,
        )
        self.pooling, self.average_strands = pooling, average_strands
        self.classes = classes or [str(i) for i in range(num_classes)]
        table = None
        if config.reverse_complement or average_strands:
            table = complement_table(complement, vocab_size or 0)
        self.register_buffer("complement", table, persistent=False)
        weights = torch.ones(num_classes) if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.embedding: TokenEmbedding | None = None
        if vocab_size is not None:
            strands = table if config.reverse_complement else None
            self.embedding = TokenEmbedding(vocab_size, config.d_model, strands)
        self.patches: Patches | Filterbank | None = None
        if filters is not None:
            self.patches = Filterbank(filters, patch, config.d_model)
        elif patch > 1 or vocab_size is None:
            self.patches = Patches(features if vocab_size is None else config.d_model, patch, config.d_model)
        self.backbone = build_backbone(config)
        self.classifier = nn.Linear(config.d_model, num_classes)
        self.loss = MeanMetric().set_dtype(torch.float64)
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.f1 = MulticlassF1Score(num_classes, average="macro")
        self.mcc = MulticlassMatthewsCorrCoef(num_classes)
        self.auroc = MulticlassAUROC(num_classes, average="macro")

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (b, num_classes) of inputs (b, l), of which the first lengths (b,) count."""
        # padding that is pooled is part of the sequence
        lengths = None if self.pooling == "mean" else lengths
        if lengths is not None and isinstance(self.patches, Filterbank):
            raise ValueError(
                "model.filters: hears what pads a row too; give rows of one length, without lengths"
            )
        x, config = inputs if self.embedding is None else self.embedding(inputs), self.backbone.config
        if self.patches is not None:
            if lengths is not None:
                # one that the end falls into has nothing behind it
                inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
                x, lengths = x * inside.unsqueeze(-1), -(-lengths // self.patches.size)
            x = self.patches(x)
        # a causal model does not see what pads its rows
        y, _ = self.backbone(x) if config.causal else self.backbone(x, lengths=lengths)
        return self.classifier(pool(y, self.pooling, lengths, strands=config.reverse_complement))

    def predict(self, batch: Batch) -> Tensor:
        """Logits (b, num_classes) as they are measured: averaged over strands where that is asked for."""
        inputs, lengths = batch["inputs"], batch.get("lengths")
        logits = self(inputs, lengths)
        if not self.average_strands:
            return logits
        other = reverse_complement(inputs, self.complement, lengths=lengths)
        return (logits + self(other, lengths)) / 2

    def training_loss(self, batch: Batch) -> Tensor:
        labels = batch["labels"]
        total = self._cross_entropy(self(batch["inputs"], batch.get("lengths")), labels)
        return total * ranks() / sum_over_ranks(self._weight(labels))

    def measure(self, batch: Batch, stage: str) -> None:
        logits, labels = self.predict(batch), batch["labels"]
        weight = self._weight(labels)
        # a batch of stand-ins, without a label, counts for nothing
        self.loss.update(self._cross_entropy(logits, labels) / weight.clamp(min=1e-6), weight)
        self.log(f"{stage}/loss", self.loss, on_epoch=True, prog_bar=True)
        known = labels != IGNORE
        p, labels = logits.float().softmax(-1)[known], labels[known]
        for metric in (self.confusion, self.f1, self.mcc, self.auroc):
            metric.update(p, labels)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """For each sequence of a batch the likeliest class, by its name, and the probability of every one."""
        rows = self.predict(batch).float().softmax(-1).tolist()
        return [
            {
                "class": self.classes[row.index(max(row))],
                "probabilities": dict(zip(self.classes, row, strict=True)),
            }
            for row in rows
        ]

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        """Log accuracy, macro F1, MCC and AUROC, and the accuracy of always guessing the most frequent class."""
        confusion = self.confusion.compute().double()
        total, of_class = confusion.sum(), confusion.sum(1)
        self.log(f"{stage}/accuracy", confusion.trace() / total, prog_bar=True)
        self.log(f"{stage}/majority", of_class.max() / total)
        self.log(f"{stage}/f1", self.f1.compute())
        self.log(f"{stage}/mcc", self.mcc.compute())
        # the area under a curve is not defined where a class does not occur
        if bool((of_class > 0).all()):
            self.log(f"{stage}/auroc", self.auroc.compute())
        for metric in (self.confusion, self.f1, self.mcc, self.auroc):
            metric.reset()

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.float(), labels, weight=self.class_weights, reduction="sum", ignore_index=IGNORE
        )

    def _weight(self, labels: Tensor) -> Tensor:
        """What the labels that there are count together."""
        return self.class_weights[labels[labels != IGNORE]].sum()

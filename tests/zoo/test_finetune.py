"""Starting from other weights: what is copied and what is not, which parameters are trained when, and how fast."""

from typing import Any

import lightning as L
import pytest
import torch
from mambazoo.zoo.classification import SequenceClassifier
from mambazoo.zoo.config import OptimizerConfig
from mambazoo.zoo.finetune import FineTuning, describe, transfer
from mambazoo.zoo.genomics import GenomeModel
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.optim import build_optimizer, depths
from torch import Tensor, nn
from torch.utils.data import DataLoader

SIZE = {"d_model": 16, "n_layers": 3}


def language(vocab_size: int = 20, **values: Any) -> LanguageModel:
    return LanguageModel({**SIZE, **values.pop("backbone", {})}, vocab_size, **values)


def batches(count: int, vocab_size: int = 20) -> DataLoader[Any]:
    rows = [torch.randint(vocab_size, (2, 9)) for _ in range(count)]
    return DataLoader([{"inputs": row[:, :-1], "targets": row[:, 1:]} for row in rows], batch_size=None)


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_all_of_the_same_model_is_loaded() -> None:
    one, other = language(), language()
    result = transfer(other, one.state_dict())
    assert result.fresh == []
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    embedding, backbone = result.lines
    assert embedding.split() == ["embedding", "loaded", "1", "tensor,", "384", "parameters"]
    assert backbone.split()[:4] == ["backbone", "loaded", "31", "tensors,"]


@pytest.mark.parametrize("kind", [LanguageModel, GenomeModel])
def test_a_backbone_moves_under_another_head(kind: Any) -> None:
    model, classifier = kind(SIZE, 20), SequenceClassifier(SIZE, 20, 3)
    result = transfer(classifier, model.state_dict())
    assert torch.equal(classifier.embedding.weight, model.embedding.weight)
    assert torch.equal(classifier.backbone.norm_f.weight, model.backbone.norm_f.weight)
    assert result.fresh == ["classifier.weight", "classifier.bias"]
    said = {line.split()[0]: line for line in result.lines}
    assert "new 2 tensors, 51 parameters" in said["classifier"]
    assert "left out 1 tensor" in said["head"]


def test_a_head_of_other_classes_starts_anew() -> None:
    two, three = SequenceClassifier(SIZE, 20, 2), SequenceClassifier(SIZE, 20, 3)
    before = three.classifier.weight.clone()
    assert transfer(three, two.state_dict()).fresh == ["classifier.weight", "classifier.bias"]
    assert torch.equal(three.classifier.weight, before)
    assert transfer(SequenceClassifier(SIZE, 20, 2), two.state_dict()).fresh == []


@pytest.mark.parametrize("tied", [True, False])
def test_rows_go_with_their_tokens(tied: bool) -> None:
    old, new = language(20, tie_embeddings=tied), language(30, tie_embeddings=tied)
    before = new.head.weight.clone()
    result = transfer(new, old.state_dict(), [(0, 7), (5, 3), (29, 0)])
    for here, there in ((0, 7), (5, 3), (29, 0)):
        assert torch.equal(new.embedding.weight[here], old.embedding.weight[there])
        assert torch.equal(new.head.weight[here], old.head.weight[there])
    assert torch.equal(new.head.weight[1], before[1])
    assert result.fresh == ["embedding.weight", "head.weight"]
    assert "the rows of 3 tokens loaded, any others new" in result.lines[0]
    # where every row is filled nothing starts anew
    assert transfer(language(16), old.state_dict(), [(i, i) for i in range(16)]).fresh == []


def test_what_does_not_fit_is_shown_by_part() -> None:
    cases = {
        "embedding.weight is (24, 8) here and is (24, 16) there": language(backbone={"d_model": 8}),
        "backbone.layers.3.mixer.A_log is (32, 16) here and is not there": language(backbone={"n_layers": 4}),
        "backbone.layers.2.mixer.A_log is (32, 16) there and not here": language(backbone={"n_layers": 2}),
        "mixer.A_log is (32, 8) here and is (32, 16) there": language(backbone={"mamba": {"d_state": 8}}),
    }
    weights = language().state_dict()
    for message, model in cases.items():
        with pytest.raises(ValueError, match="does not fit") as error:
            transfer(model, weights)
        assert message in str(error.value)
        # a line for each part, and no more of what is wrong than one reads
        assert len(str(error.value).splitlines()) <= 3
        assert str(error.value).count(" here") + str(error.value).count(" there and not") <= 12


@pytest.mark.parametrize(
    ("mode", "trained"),
    [("full", {"classifier", "backbone", "embedding"}), ("head", {"classifier"}), ("gradual", None)],
)
def test_what_is_trained_is_what_the_mode_says(mode: Any, trained: set[str] | None) -> None:
    model = SequenceClassifier(SIZE, 20, 2)
    FineTuning(mode).prepare(model)
    parts = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert parts == (trained or {"classifier", "backbone", "embedding"})


def test_the_head_of_a_language_model_is_the_embedding_that_it_shares() -> None:
    model = language()
    FineTuning("head").prepare(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["embedding.weight"]
    assert describe(model).startswith("trains 384 parameters, ")


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_what_starts_anew_is_trained_as_it_is(mode: Any) -> None:
    old, new = language(20), language(30)
    result = transfer(new, old.state_dict(), [(i, i) for i in range(20)])
    FineTuning(mode, rank=2, fresh=result.fresh).prepare(new)
    assert isinstance(new.embedding.weight, nn.Parameter)
    assert new.embedding.weight.requires_grad
    assert not new.backbone.norm_f.weight.requires_grad


def test_depth_counts_from_the_input() -> None:
    depth = depths(SequenceClassifier(SIZE, 20, 2))
    assert {depth[name] for name in depth if name.startswith("embedding")} == {0}
    for i in range(3):
        assert {depth[name] for name in depth if f".layers.{i}." in name} == {i + 1}
    assert depth["backbone.norm_f.weight"] == depth["classifier.weight"] == 4
    # what is shared with the output is as far as that
    assert depths(language())["embedding.weight"] == 4


def test_each_layer_has_its_rate() -> None:
    model = SequenceClassifier(SIZE, 20, 2)
    config = OptimizerConfig(lr=1.0, layer_decay=0.5, warmup_steps=2, schedule="constant")
    optimizer, schedule = build_optimizer(model, config, 10)
    names = {id(p): name for name, p in model.named_parameters()}

    def rates() -> dict[str, float]:
        return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    # in the first step of the warm-up, then after it
    for factor in (0.5, 1.0):
        found = rates()
        assert found["classifier.weight"] == found["backbone.norm_f.weight"] == factor
        assert found["backbone.layers.2.mixer.A_log"] == factor * 0.5
        assert found["backbone.layers.0.mixer.in_proj.weight"] == factor * 0.125
        assert found["embedding.weight"] == factor * 0.0625
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 1.0
    decayed = {
        names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert "embedding.weight" in decayed
    assert "backbone.layers.1.norm.weight" not in decayed


@pytest.mark.filterwarnings("ignore")
def test_layers_join_one_after_the_other() -> None:
    model = language(20, tie_embeddings=False, optimizer={"schedule": "constant"})
    seen: list[set[str]] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, *_: object) -> None:
            self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

        def on_train_batch_end(self, *_: object) -> None:
            names = changed(self.before, model)
            seen.append({part for part in ("head", "norm_f", "layers.2", "layers.1", "layers.0", "embedding")
                         if any(part in name for name in names)})  # fmt: skip

    trainer = L.Trainer(
        max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[FineTuning("gradual", unfreeze_every=2), Watch()],
    )  # fmt: skip
    trainer.fit(model, batches(10))
    joined = [{"head", "norm_f"}, {"layers.2"}, {"layers.1"}, {"layers.0"}, {"embedding"}]
    expected = [set().union(*joined[: i + 1]) for i in range(5) for _ in range(2)]
    assert seen == expected


@pytest.mark.parametrize("values", [{"rank": 0}, {"alpha": -1.0}, {"unfreeze_every": 0}], ids=str)
def test_numbers_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"finetune\.{next(iter(values))}: must be above 0"):
        FineTuning("lora", **values)

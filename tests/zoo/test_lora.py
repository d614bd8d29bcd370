"""Low-rank adapters: nothing at first, on every matrix there is, alone in what is trained, and gone when merged."""

from typing import Any

import pytest
import torch
from mambazoo.zoo.classification import SequenceClassifier
from mambazoo.zoo.finetune import FineTuning
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.lora import LowRank, attach, merge, size, split
from torch import Tensor, nn

COMPLEMENT = [3, 2, 1, 0, 4, 5]
BACKBONES: list[dict[str, Any]] = [{}, {"d_mlp": 24}, {"bidirectional": "tied"}, {"reverse_complement": True}]


def build(**backbone: Any) -> LanguageModel:
    return LanguageModel({"d_model": 32, "n_layers": 2, **backbone}, vocab_size=40)


def batch(vocab_size: int = 40) -> dict[str, Tensor]:
    rows = torch.randint(vocab_size, (2, 12))
    return {"inputs": rows[:, :-1], "targets": rows[:, 1:]}


def stir(model: nn.Module, std: float = 0.1) -> None:
    """Give adapters values, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)


@pytest.mark.parametrize("backbone", BACKBONES, ids=str)
@torch.no_grad()
def test_an_adapter_changes_nothing_at_first(backbone: dict[str, Any]) -> None:
    model = SequenceClassifier({"d_model": 32, "n_layers": 2, **backbone}, 6, 3, COMPLEMENT)
    x = torch.randint(4, (2, 12))
    before = model(x)
    attach(model, 4, 8.0)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("backbone", BACKBONES, ids=str)
@torch.no_grad()
def test_merged_equals_adapted(backbone: dict[str, Any]) -> None:
    values = {"d_model": 32, "n_layers": 2, **backbone}
    model = SequenceClassifier(values, 6, 3, COMPLEMENT)
    plain, count = model.state_dict().keys(), size(model)
    FineTuning("lora", rank=4).prepare(model)
    x = torch.randint(4, (2, 12))
    before = model(x)
    stir(model)
    adapted = model(x)
    assert (adapted - before).abs().max() > 0.1
    assert size(model) == count
    merged = SequenceClassifier(values, 6, 3, COMPLEMENT)
    weights = merge(*split(model.state_dict()))
    assert weights.keys() == plain
    merged.load_state_dict(weights)
    assert torch.equal(merged(x), adapted)


def test_every_kind_of_matrix_is_adapted_and_nothing_else_trained() -> None:
    model = build(d_mlp=24)
    FineTuning("lora", rank=2).prepare(model)
    stir(model)
    model.training_loss(batch()).backward()
    kinds = set()
    for name, parameter in model.named_parameters():
        module, mark, part = name.partition(".parametrizations.weight.0.")
        assert parameter.requires_grad == bool(mark)
        if mark:
            assert part in ("up", "down", "whole")
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
            kinds.add(module.rpartition(".")[2])
        else:
            assert parameter.grad is None, name
    assert kinds == {"embedding", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "fc1", "fc2"}


@torch.no_grad()
def test_each_target_alone_reaches_the_output() -> None:
    x = torch.randint(40, (1, 12))
    for target in ("embedding", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
        model = build()
        before = model(x)[0]
        FineTuning("lora", rank=2, targets=[target]).prepare(model)
        stir(model, std=1)
        assert not torch.equal(model(x)[0], before), target
        # in steps, which read weights another way, as well
        state, rows = model.init_state(1), []
        for t in range(12):
            row, state = model.step(x[:, t], state)
            rows.append(row)
        torch.testing.assert_close(torch.stack(rows, 1), model(x)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_head_that_shares_the_embedding_shares_its_adapter() -> None:
    model = build()
    FineTuning("lora", rank=2).prepare(model)
    stir(model)
    assert torch.equal(model.head.weight, model.embedding.weight)
    own = LanguageModel({"d_model": 32, "n_layers": 1}, 40, tie_embeddings=False)
    FineTuning("lora", rank=2).prepare(own)
    stir(own)
    assert not torch.equal(own.head.weight, own.embedding.weight)


@pytest.mark.parametrize("target", ["head", "embedding"])
@torch.no_grad()
def test_a_target_is_every_module_that_shares_its_weight(target: str) -> None:
    model = build()
    FineTuning("lora", rank=2, targets=[target]).prepare(model)
    stir(model)
    assert torch.equal(model.head.weight, model.embedding.weight)
    merged = build()
    merged.load_state_dict(merge(*split(model.state_dict())))
    x = torch.randint(40, (1, 12))
    assert torch.equal(merged(x)[0], model(x)[0])


def test_a_low_rank_is_used_where_it_is_smaller() -> None:
    low = LowRank(torch.zeros(64, 32), 4, 8.0)
    assert {name: tuple(p.shape) for name, p in low.named_parameters()} == {"down": (4, 32), "up": (64, 4)}
    conv = LowRank(torch.zeros(64, 1, 4), 8, 8.0)
    assert {name: tuple(p.shape) for name, p in conv.named_parameters()} == {"whole": (64, 4)}
    with torch.no_grad():
        low.up.fill_(1)
        difference = low(torch.zeros(64, 32))
    # alpha over rank times the product
    torch.testing.assert_close(difference, 2 * low.down.sum(0).expand(64, 32))


def test_all_targets_of_a_released_size_are_a_fiftieth_of_it() -> None:
    with torch.device("meta"):
        model = LanguageModel({"size": "mamba-130m"}, 50280)
        FineTuning("lora", rank=8).prepare(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained / size(model) < 0.02


def test_a_target_that_there_is_not_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"finetune\.targets: 'in_prj' is none of .*, did you mean 'in_proj'"
    ):
        FineTuning("lora", targets=["in_prj"]).prepare(build())


@pytest.mark.filterwarnings("ignore")
def test_an_adapted_backbone_compiles_as_one_graph() -> None:
    model = build(n_layers=1)
    FineTuning("lora", rank=2).prepare(model)
    stir(model)
    x = torch.randn(2, 11, 32)
    expected, _ = model.backbone(x)
    y, _ = torch.compile(model.backbone, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(y, expected)


def test_autocast_keeps_an_adapted_weight_in_float32() -> None:
    model = build()
    FineTuning("lora", rank=2).prepare(model)
    stir(model)
    projection = model.backbone.layers[0].mixer.in_proj
    expected = projection.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(projection.weight, expected)

"""What `info` says of memory, held against what layers keep and remember."""

from typing import Any

import pytest
import torch
from mambazoo.recipes.info import inference_memory, training_memory
from mambazoo.zoo.backbone import Backbone
from mambazoo.zoo.config import BackboneConfig
from mambazoo.zoo.generate import leaves
from mambazoo.zoo.language import LanguageModel

SIZES = {"d_model": 256, "n_layers": 2}
LENGTH = 1024


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"d_mlp": 768},
        {"bidirectional": "tied"},
        {"pattern": "attention"},
        {"pattern": "attention", "d_mlp": 0},
        {"pattern": "attention", "bidirectional": "untied"},
        {"pattern": "mamba + attention"},
    ],
    ids=str,
)
def test_the_memory_of_training_is_about_what_the_backward_reads(values: dict[str, Any]) -> None:
    config, kept = BackboneConfig.from_dict({**SIZES, **values}), {}
    backbone = Backbone(config)
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            # with the tensor, so that its place is not given to another
            kept[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        backbone(torch.randn(1, LENGTH, 256, requires_grad=True))
    # of which weights and their moments, whatever they are, are no part
    model = LanguageModel(SIZES, 16)
    estimate = training_memory(model, config, LENGTH, 4) - training_memory(model, config, 0, 4)
    assert estimate == pytest.approx(sum(size for size, _ in kept.values()), rel=0.15)


@pytest.mark.parametrize("pattern", ["mamba", "attention", "mamba + attention"])
def test_the_memory_of_a_state_is_counted(pattern: str) -> None:
    values = {**SIZES, "pattern": pattern, "attention": {"window": 512}}
    model = LanguageModel(values, 16)
    weights = 4 * sum(p.numel() for p in model.parameters())
    state = sum(x.numel() * x.element_size() for x in leaves(model.init_state(1)))
    estimate = inference_memory(model, BackboneConfig.from_dict(values), 0, 4)
    assert estimate == pytest.approx(weights + state, rel=1e-4)

"""Configs read plain values, refuse what does not fit, and name the nearest right word."""

import json

import pytest
import torch
from mambazoo.zoo.config import SIZES, BackboneConfig, MambaConfig, OptimizerConfig
from mambazoo.zoo.language import LanguageModel

# parameters of the released models, read off their files: 50,280 rows of embedding, tied
RELEASED = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
}


def test_a_config_survives_json() -> None:
    config = BackboneConfig(d_model=64, n_layers=3, mamba=MambaConfig(selective=("delta",), dt_rank=7))
    assert BackboneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_all_problems_are_found_at_once() -> None:
    with pytest.raises(ValueError, match="d_modle") as error:
        BackboneConfig.from_dict(
            {"d_modle": 3, "n_layers": 2.5, "mamba": {"d_stat": 1, "dt_rank": "x"}}, "model.backbone"
        )
    assert str(error.value).splitlines() == [
        "model.backbone.d_modle: there is no such key, did you mean 'd_model'?",
        "model.backbone.n_layers: must be a whole number, not 2.5",
        "model.backbone.mamba.d_stat: there is no such key, did you mean 'd_state'?",
        "model.backbone.mamba.dt_rank: must be a whole number or null, not 'x'",
    ]


def test_values_that_make_no_sense_are_found_in_each_section() -> None:
    values = {"n_layers": 0, "mamba": {"d_state": -3}, "attention": {"d_head": 5}, "s4d": {"expand": 1}}
    assert BackboneConfig.problems(values, "model.backbone") == [
        "model.backbone.n_layers: must be above 0, not 0",
        "model.backbone.mamba.d_state: must be above 0, not -3",
        "model.backbone.attention.d_head: must be even, channels turn in pairs, not 5",
    ]
    stages = {"pool": [4], "stages": [{"d_model": 0}]}
    assert BackboneConfig.problems(stages, "model.backbone") == [
        "model.backbone.stages.0.d_model: must be above 0, not 0"
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "mamb*3"}, "did you mean 'mamba'"),
        ({"pattern": "mamba*x"}, "backbone.pattern: must read like"),
        ({"size": "mamba-130n"}, "is none of"),
        ({"n_layers": 0}, "must be above 0"),
        ({"pattern": "mamba*²"}, "backbone.pattern: must read like"),
        ({"d_model": 10**9}, "backbone.d_model: must be 1048576 at most"),
        ({"n_layers": 10**5}, "backbone.n_layers: must be 1024 at most"),
        ({"d_mlp": -8}, "backbone.d_mlp: must be above 0"),
        ({"mamba": {"dt_rank": 0}}, "mamba.dt_rank: must be above 0"),
        (
            {"pool": [4], "n_layers": 400},
            "backbone.n_layers: those of all stages: must be 1024 at most, not 1200",
        ),
        (
            {"pool": [2] * 10**5},
            "backbone.pool: must be factors of 2 or more with a product of 1048576 at most",
        ),
        ({"pool": [4], "stages": [{"pool": [4]}]}, "backbone.stages.0.pool: is the same in every stage"),
        (
            {"pool": [4], "stages": [{"size": "mamba-7m"}]},
            "backbone.stages.0.size: is the same in every stage",
        ),
        ({"mamba": {"d_state": 10**9}}, "mamba.d_state: must be 1048576 at most"),
        ({"mamba": {"a_init": "zeros"}}, "mamba.a_init: must be one of"),
        ({"mamba": {"selective": ["delta", "D"]}}, "mamba.selective: must be one of"),
        ({"mamba": {"a_init": "s4d-lin", "d_state": 5}}, "must be even"),
        ({"mamba": 3}, "must be a section"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackboneConfig.from_dict(values)


def test_a_pattern_fills_the_layers() -> None:
    assert BackboneConfig(n_layers=5, pattern="mamba*2 + mamba").mixers == ["mamba"] * 5


def test_attention_has_its_mlp_unless_something_else_is_said() -> None:
    def widths(**values: object) -> list[int]:
        config = BackboneConfig.from_dict(
            {"d_model": 64, "n_layers": 4, "pattern": "mamba*3 + attention", **values}
        )
        assert BackboneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        return [config.mlp_width(mixer) for mixer in config.mixers]

    assert widths() == widths(d_mlp=None) == [0, 0, 0, 256]
    assert widths(d_mlp=0) == [0, 0, 0, 0]
    assert widths(d_mlp=96) == [96, 96, 96, 96]
    assert widths(pattern="s4d + lstm") == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("d_model", "width"), [(1, 128), (48, 128), (49, 256), (768, 2048), (1024, 2816), (2048, 5504)]
)
def test_the_width_of_an_mlp_is_that_of_the_reference_package(d_model: int, width: int) -> None:
    assert BackboneConfig(d_model=d_model).mlp_width("attention") == width


def test_a_size_is_a_start_that_other_values_override() -> None:
    config = BackboneConfig.from_dict({"size": "mamba-130m", "n_layers": 2})
    assert (config.d_model, config.n_layers) == (768, 2)
    assert BackboneConfig.from_dict({"size": None, "d_model": 8}).d_model == 8


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_parameters_of_their_names(size: str) -> None:
    with torch.device("meta"):
        model = LanguageModel({"size": size}, vocab_size=50280)
    count = sum(p.numel() for p in model.parameters())
    if size in RELEASED:
        assert count == RELEASED[size]
    else:
        kind, _, number = size.partition("-")
        # those of DNA are counted without an embedding
        counted = model.backbone if kind == "mamba" else model
        count = sum(p.numel() for p in counted.parameters())
        unit = {"k": 1e3, "m": 1e6}[number[-1]]
        assert count == pytest.approx(float(number[:-1]) * unit, rel=0.2)


def test_schedule_names_are_checked() -> None:
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        OptimizerConfig(schedule="cosin")

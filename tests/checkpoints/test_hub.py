"""Other layouts of a Mamba: to transformers and state-spaces and back, on random models; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mambazoo.checkpoints.hub import FIELDS, KEYS, arguments_from, config_to
from mambazoo.checkpoints.io import export, from_pretrained, load, read, save_pretrained
from mambazoo.datamodules.vocab import train_bpe
from mambazoo.zoo.config import BackboneConfig
from mambazoo.zoo.generate import Sampling, generate
from mambazoo.zoo.language import LanguageModel
from torch import Tensor

SHAPES: list[dict[str, Any]] = [
    {"vocab_size": 40},
    {"vocab_size": 37, "state_size": 8, "time_step_rank": 3},
    {"vocab_size": 41, "state_size": 32, "tie_word_embeddings": False},
    {"vocab_size": 40, "use_bias": True, "use_conv_bias": False, "expand": 3, "conv_kernel": 3},
]


def theirs(folder: Path, dtype: torch.dtype = torch.float32, **values: Any) -> Any:
    """A random model of transformers, and its folder."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "rescale_prenorm_residual": False}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**{**sizes, **values}))
    with torch.no_grad():
        # its own initial values would leave biases at zero and D at one
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


def ours(**values: Any) -> LanguageModel:
    backbone = {"d_model": 32, "n_layers": 2, **values.pop("backbone", {})}
    model = LanguageModel(backbone, **{"vocab_size": 37, **values})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (2, 33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("values", SHAPES, ids=str)
@torch.no_grad()
def test_a_model_of_transformers_comes_in_and_goes_out_unchanged(
    tmp_path: Path, values: dict[str, Any], dtype: torch.dtype
) -> None:
    transformers = pytest.importorskip("transformers")
    peer = theirs(tmp_path / "theirs", dtype, **values)
    model = from_pretrained(tmp_path / "theirs")
    assert model.embedding.weight.dtype == dtype
    assert (model.head.weight is model.embedding.weight) is values.get("tie_word_embeddings", True)
    export(read(tmp_path / "theirs"), "transformers", tmp_path / "back")
    back = transformers.MambaForCausalLM.from_pretrained(tmp_path / "back")
    for name, value in peer.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    x = tokens(values["vocab_size"])
    expected = peer.float()(x).logits
    torch.testing.assert_close(model.float()(x)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(back.float()(x).logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_both_write_the_same_text(tmp_path: Path) -> None:
    peer = theirs(tmp_path / "theirs", vocab_size=41, tie_word_embeddings=False, eos_token_id=None)
    model = from_pretrained(tmp_path / "theirs")
    prompt = [3, 1, 4, 1, 5]
    written = [row[0] for row in generate(model, [prompt], 100, Sampling(temperature=0))]
    peers = peer.generate(torch.tensor([prompt]), max_new_tokens=100, do_sample=False)
    assert written == peers[0, len(prompt) :].tolist()
    assert len(set(written)) > 10


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_our_model_goes_to_transformers_with_its_tokenizer(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    words = train_bpe(iter(["a small text, " * 20, "and another one; " * 20]), 280)
    model = ours(vocab_size=words.size, tie_embeddings=tied)
    save_pretrained(model, words.to_dict(), tmp_path / "ours")
    export(read(tmp_path / "ours"), "transformers", tmp_path / "out", eos=words.eos)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    x = tokens(words.size)
    torch.testing.assert_close(peer(x).logits, model(x)[0], rtol=0, atol=1e-5)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert auto("a small one").input_ids == words.encode(b"a small one").tolist()
    assert auto.eos_token_id == words.eos
    again, vocabulary = load(tmp_path / "out")
    assert vocabulary == words.to_dict()
    assert torch.equal(again(x)[0], model(x)[0])


@pytest.mark.parametrize("values", [{}, {"tie_embeddings": False}, {"backbone": {"d_mlp": 128}}], ids=str)
@torch.no_grad()
def test_our_model_goes_to_state_spaces_and_back(tmp_path: Path, values: dict[str, Any]) -> None:
    model = ours(**values)
    save_pretrained(model, None, tmp_path / "ours")
    export(read(tmp_path / "ours"), "state-spaces", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["d_model"], config["n_layer"], config["vocab_size"]) == (32, 2, 37)
    weights = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    # the original pads its vocabulary to a multiple of 8, and lists a shared head too
    assert weights["backbone.embedding.weight"].shape == weights["lm_head.weight"].shape == (40, 32)
    again = from_pretrained(tmp_path / "out")
    x = tokens(37)
    torch.testing.assert_close(again(x)[0], model(x)[0], rtol=0, atol=0)
    assert (again.head.weight is again.embedding.weight) is values.get("tie_embeddings", True)


@torch.no_grad()
def test_an_original_folder_reads_as_it_was_released(tmp_path: Path) -> None:
    """config.json and names as in the released folders, written down here by hand."""
    model = ours()
    weights = {
        {"embedding.weight": "backbone.embedding.weight", "head.weight": "lm_head.weight"}.get(
            name, name
        ): value
        for name, value in model.state_dict().items()
    }
    torch.save(weights, tmp_path / "pytorch_model.bin")
    config = {
        "d_model": 32, "n_layer": 2, "vocab_size": 37, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = tokens(37)
    assert torch.equal(from_pretrained(tmp_path)(x)[0], model(x)[0])


@torch.no_grad()
def test_weights_in_several_files_are_read_as_one(tmp_path: Path) -> None:
    peer = theirs(tmp_path, vocab_size=40)
    assert (tmp_path / "model.safetensors").exists()
    (tmp_path / "model.safetensors").unlink()
    peer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    x = tokens(40)
    torch.testing.assert_close(from_pretrained(tmp_path)(x)[0], peer(x).logits, rtol=0, atol=1e-5)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not say which file beside it"):
        from_pretrained(tmp_path)


def test_every_weight_of_a_model_is_in_the_table() -> None:
    model = LanguageModel(
        {"d_model": 16, "n_layers": 1, "d_mlp": 8, "mamba": {"bias": True}}, 20, tie_embeddings=False
    )
    assert {name.replace(".0.", ".{}.") for name, _ in model.named_parameters()} == set(KEYS)
    for layout in range(2):
        there = [names[layout] for names in KEYS.values()]
        assert len(set(there)) == len(there)


def test_every_field_of_the_table_is_one_of_the_backbone() -> None:
    values = BackboneConfig().to_dict()
    known = {*values, *(f"mamba.{name}" for name in values["mamba"])}
    assert set(FIELDS) <= known


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "falcon_mamba"}, "config.json is of a kind that is not read, falcon_mamba"),
        ({"model_type": "mamba2"}, "not read, mamba2.*not Mamba-2"),
        (
            {"d_model": 8, "n_layer": 1, "vocab_size": 9, "ssm_cfg": {"layer": "Mamba2"}},
            "must be Mamba1, not 'Mamba2'",
        ),
        (
            {"d_model": 8, "n_layer": 1, "vocab_size": 9, "attn_layer_idx": [0]},
            "layers of attention are not read",
        ),
        ({"d_model": 8, "n_layer": 1, "vocab_size": 9, "rms_norm": False}, "LayerNorm is not read"),
        (
            {"d_model": 8, "n_layer": 1, "vocab_size": -9},
            "vocab_size: must be a whole number above 0, not -9",
        ),
        (
            {"model_type": "mamba", "vocab_size": 9, "hidden_act": "gelu"},
            "hidden_act: must be silu, not 'gelu'",
        ),
        (
            {"d_model": 8, "n_layer": 1, "vocab_size": 9, "d_intermediate": "x"},
            "d_mlp: must be a whole number or null, not 'x'",
        ),
        (
            {"model_type": "mamba", "vocab_size": 9, "hidden_size": "x"},
            "d_model: must be a whole number, not 'x'",
        ),
    ],
)
def test_what_a_language_model_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments_from(config, "config.json")


@pytest.mark.parametrize("d_mlp", [None, 0])
def test_layers_without_an_mlp_can_be_said_in_every_layout(d_mlp: int | None) -> None:
    arguments = {"backbone": {"d_model": 16, "n_layers": 1, "d_mlp": d_mlp}, "vocab_size": 20}
    assert config_to(arguments, "state-spaces", dtype="float32", eos=None)["d_intermediate"] == 0
    assert config_to(arguments, "transformers", dtype="float32", eos=None)["hidden_size"] == 16


@pytest.mark.parametrize(
    ("layout", "values", "message"),
    [
        ("transformers", {"d_mlp": 64}, "a Mamba of transformers cannot say.*backbone.d_mlp is 64"),
        ("transformers", {"mamba": {"discretization": "zoh"}}, "backbone.mamba.discretization is 'zoh'"),
        ("transformers", {"mamba": {"a_init": "s4d-lin"}}, "A is complex"),
        ("state-spaces", {"layer_scale": 0.1}, "a Mamba of state-spaces cannot say.*layer_scale is 0.1"),
        ("state-spaces", {"norm_eps": 1e-6}, "a Mamba of state-spaces cannot say.*norm_eps is 1e-06"),
        ("state-spaces", {"mamba": {"selective": ["delta"]}}, "backbone.mamba.selective is"),
        ("state-spaces", {"d_mlp": 100}, "d_mlp is 100, no multiple of 128"),
    ],
)
def test_what_a_layout_cannot_say_is_not_written(
    tmp_path: Path, layout: str, values: dict[str, Any], message: str
) -> None:
    save_pretrained(LanguageModel({"d_model": 16, "n_layers": 1, **values}, 20), None, tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        export(read(tmp_path / "ours"), layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Reading models: mapped and not copied, validated before anything is built, adapters on what they were trained on."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mambazoo.checkpoints import adapters
from mambazoo.checkpoints.io import Stored, build, empty, from_pretrained, load, read, save_pretrained
from mambazoo.zoo.classification import SequenceClassifier
from mambazoo.zoo.config import MambaConfig
from mambazoo.zoo.finetune import FineTuning, transfer
from mambazoo.zoo.genomics import GenomeModel
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.lora import merge, split
from mambazoo.zoo.task import Task
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COMPLEMENT = [3, 2, 1, 0, 4, 5]
SIZE = {"d_model": 16, "n_layers": 2}


def folder(path: Path, **values: Any) -> Path:
    save_pretrained(LanguageModel({**SIZE, **values}, 20), None, path)
    return path


def models() -> list[Task]:
    both = {**SIZE, "reverse_complement": True, "bidirectional": "tied"}
    return [
        LanguageModel(SIZE, 20),
        LanguageModel(
            {**SIZE, "mamba": {"a_init": "s4d-lin", "selective": ["delta"]}}, 20, tie_embeddings=False
        ),
        GenomeModel(both, 6, COMPLEMENT),
        SequenceClassifier(both, 6, 3, COMPLEMENT, class_weights=[1.0, 2.0, 3.0], average_strands=True),
    ]


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
@torch.no_grad()
def test_nothing_is_left_without_memory(tmp_path: Path, model: Task) -> None:
    save_pretrained(model, None, tmp_path / "model")
    state = torch.get_rng_state()
    again = from_pretrained(tmp_path / "model")
    # nor was anything drawn to be thrown away
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert b.requires_grad
    for (name, a), (_, b) in zip(model.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    tokens = torch.randint(4, (2, 9))
    one, other = (
        result[0] if isinstance(result, tuple) else result for result in (model(tokens), again(tokens))
    )
    assert torch.equal(one, other)


def test_weights_are_mapped_and_writing_to_them_leaves_the_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "model")
    content = (path / "model.safetensors").read_bytes()
    model = from_pretrained(path)
    # weights lie as far apart as in the file
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    offsets = {name: header[name]["data_offsets"][0] for name in places}
    assert len({places[name] - offsets[name] for name in places}) == 1
    assert model.head.weight is model.embedding.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert (path / "model.safetensors").read_bytes() == content
    # the folder may be replaced while a model lives on it
    folder(path)
    assert all((p == 7).all() for p in model.parameters())


class Own(LanguageModel):
    """A model of a user's that makes a buffer the way weights are made."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**{key: value for key, value in values.items() if key != "optimizer"})
        self.register_buffer("table", torch.empty(3).copy_(torch.arange(3.0)), persistent=False)


def test_a_class_of_the_callers_is_built_as_it_wants(tmp_path: Path) -> None:
    model = Own(backbone=SIZE, vocab_size=20)
    save_pretrained(model, None, tmp_path / "model")
    again = from_pretrained(tmp_path / "model", task=Own)
    assert again.table.tolist() == [0, 1, 2]
    assert torch.equal(again.embedding.weight, model.embedding.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 10**9}, r"that can be built: model\.backbone\.n_layers: must be 1024 at most"),
        ({"pattern": f"mamba*{'9' * 5000}"}, r"backbone\.pattern: must read like"),
        ({"n_layers": 3}, r"layers\.2\.norm\.weight is \(16,\) in the model and is not there; .* and 7 more"),
        ({"n_layers": 1}, r"layers\.1\.mixer\.A_log is there and not in the model"),
        ({"d_model": 10**13}, "that can be built"),
        ({"d_model": 8}, r"embedding\.weight is \(24, 8\) in the model and is \(24, 16\) there"),
        ({"d_model": -1}, r"model/?.* that can be built: model\.backbone\.d_model: must be above 0, not -1"),
        ({"d_model": "wide"}, r"backbone\.d_model: must be a whole number, not 'wide'"),
    ],
    ids=str,
)
def test_a_config_is_held_against_the_weights_before_there_is_a_model(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = folder(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["model"]["backbone"].update(change)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(path)


class Watch(TorchDispatchMode):
    """Knows the largest tensor with memory that was made."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and not leaf.is_meta]
        self.largest = max(self.largest, *made, 0)
        return result


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": {"d_model": 1 << 20}},
        {"backbone": {"norm": "batch", "d_model": 1 << 20}},
        {"backbone": {"mamba": {"a_init": "random", "d_state": 1 << 20}}},
        {"backbone": {"mamba": {"expand": 1 << 20, "d_conv": 1 << 20, "dt_rank": 1 << 20}}},
        {"backbone": {"pattern": "s4d", "s4d": {"d_state": 1 << 20}}},
        {"backbone": {"pattern": "attention", "d_mlp": 1 << 20, "attention": {"window": 1 << 20}}},
        {"backbone": {"pattern": "lstm", "lstm": {"expand": 1 << 20}}},
        {"backbone": {"pool": [1 << 20]}},
        {"vocab_size": 1 << 40},
        {"num_classes": 1 << 12},
        {"num_classes": 1 << 40},
        {"patch": 1 << 30},
        {"vocab_size": None, "features": 1 << 30},
    ],
    ids=str,
)
def test_what_does_not_fit_its_weights_gets_no_memory(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "model"
    save_pretrained(SequenceClassifier(SIZE, 6, 3), None, path)
    config = json.loads((path / "config.json").read_text())
    backbone = config["model"]["backbone"]
    config["model"] |= {**change, "backbone": {**backbone, **change.get("backbone", {})}}
    (path / "config.json").write_text(json.dumps(config))
    with Watch() as watch, pytest.raises(ValueError, match=r"model (does not fit|describes no)"):
        load(path)
    assert watch.largest < 1 << 16
    # nor does it take any to look at
    with Watch() as watch, contextlib.suppress(ValueError):
        empty(read(path, weights=False))
    assert watch.largest < 1 << 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": [1]}, r"vocabulary must be values by name, not \[1\]"),
        ({"model": {"backbone": None}}, "backbone must be values by name, not None"),
        ({"model": {"backbone": {}, "optimizer": 5}}, "optimizer must be values by name, not 5"),
    ],
    ids=str,
)
def test_a_config_without_its_sections_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = folder(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=rf"config\.json is damaged: {message}"):
        load(path)


def test_a_file_of_a_model_folder_stands_for_it(tmp_path: Path) -> None:
    path = folder(tmp_path / "model")
    for name in ("model.safetensors", "config.json"):
        assert read(path / name).place == path
    (tmp_path / "config.json").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint, model folder or run"):
        read(tmp_path / "config.json")


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploded"),))


def test_a_bin_with_code_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"d_model": 16, "n_layer": 1, "vocab_size": 20}
    Path("config.json").write_text(json.dumps(config))
    torch.save({"backbone.embedding.weight": torch.ones(24, 16), "bomb": Bomb()}, "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read as tensors"):
        from_pretrained(tmp_path)
    assert not Path("exploded").exists()
    torch.save({"backbone.embedding.weight": [1, 2]}, "pytorch_model.bin")
    with pytest.raises(ValueError, match="something else than weights by name"):
        from_pretrained(tmp_path)


def test_a_tensor_without_its_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    for value in (torch.ones(1).expand(1 << 40), torch.ones(3, device="meta")):
        torch.save({"state_dict": {"embedding.weight": value}}, path)
        with pytest.raises(
            ValueError, match=r"a\.ckpt is damaged: a tensor in it is .*, and not that many numbers"
        ):
            read(path)
    torch.save({"state_dict": {}, "shards": {"folder": "x", "ranks": 1 << 60}}, path)
    with pytest.raises(ValueError, match=r"a\.ckpt is in parts, and .*00000\.parts is not there"):
        read(path)


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, SequenceClassifier]:
    """An adapter under a new head, and the model that it makes."""
    base = GenomeModel(SIZE, 6, COMPLEMENT)
    save_pretrained(base, {"kind": "nucleotides"}, tmp_path / "base")
    model = SequenceClassifier(SIZE, 6, 3)
    fresh = transfer(model, base.state_dict()).fresh
    FineTuning("lora", rank=2, fresh=fresh).prepare(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    weights = model.state_dict()
    task = f"{SequenceClassifier.__module__}.SequenceClassifier"
    values = adapters.Adapter(
        "../base", adapters.fingerprint(merge(*split(weights))), task, dict(model.hparams), {"kind": "nucleotides"},
        adapters.take(weights, fresh),
    )  # fmt: skip
    adapters.save(tmp_path / "adapter", values, {})
    return tmp_path / "adapter", model


@torch.no_grad()
def test_an_adapter_alone_gives_back_its_model(
    adapter: tuple[Path, SequenceClassifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = adapter
    # its base is found from where it lies itself
    monkeypatch.chdir("/")
    again, vocabulary = load(path)
    tokens = torch.randint(4, (2, 9))
    assert torch.equal(again(tokens), model(tokens))
    assert vocabulary == {"kind": "nucleotides"}
    whole = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert (path / "adapter.safetensors").stat().st_size < whole
    assert {path.name for path in path.iterdir()} == {"adapter.json", "adapter.safetensors"}


def test_an_adapter_on_another_model_is_refused(
    adapter: tuple[Path, SequenceClassifier], tmp_path: Path
) -> None:
    path, _ = adapter
    other = GenomeModel(SIZE, 6, COMPLEMENT)
    with torch.no_grad():
        other.backbone.norm_f.weight.add_(1e-3)
    save_pretrained(other, None, tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"adapter was trained on another model than .*base: name the right one"
    ):
        load(path)
    config = json.loads((path / "adapter.json").read_text())
    (path / "adapter.json").write_text(json.dumps({**config, "base": "./nowhere"}))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(path)
    for base in (".", 5):
        (path / "adapter.json").write_text(json.dumps({**config, "base": base}))
        with pytest.raises(ValueError, match=f"`base` must be a model, not {base!r}"):
            load(path)
    (path / "adapter.json").write_text(json.dumps({**config, "task": 5}))
    with pytest.raises(ValueError, match="is of the task '5', which is none of this package"):
        load(path)
    (path / "adapter.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"adapter\.json is not JSON"):
        load(path)
    (path / "adapter.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"adapter\.json is not the config of an adapter \('base' is missing\)"
    ):
        load(path)


@pytest.mark.parametrize(
    "parts",
    [
        {"up": torch.ones(1 << 12, 1), "down": torch.ones(1, 1 << 12), "scale": torch.ones(())},
        {"up": torch.ones(16, 2), "scale": torch.ones(())},
        {"whole": torch.ones(1, 1)},
    ],
    ids=lambda parts: "-".join(parts),
)
def test_an_adapter_of_another_shape_is_refused(
    adapter: tuple[Path, SequenceClassifier], parts: dict[str, Tensor]
) -> None:
    path, _ = adapter
    found = adapters.read(path)
    name = "backbone.layers.0.mixer.out_proj.weight"
    kept = {key: value for key, value in found.weights.items() if not key.startswith(name)}
    own = {f"{name}.{part}": value for part, value in parts.items()}
    adapters.save(path, found._replace(weights={**kept, **own}), {})
    with Watch() as watch, pytest.raises(ValueError, match=r"is \(16, 32\), and its adapter is of another"):
        load(path)
    assert watch.largest < 1 << 16


def test_saving_a_model_with_adapters_merges_them(
    adapter: tuple[Path, SequenceClassifier], tmp_path: Path
) -> None:
    _, model = adapter
    save_pretrained(model, None, tmp_path / "merged")
    stored = read(tmp_path / "merged")
    assert not any("parametrizations" in name for name in stored.weights)
    tokens = torch.randint(4, (2, 9))
    assert torch.equal(build(stored)(tokens), model(tokens))


def test_reading_without_weights_reads_none(tmp_path: Path) -> None:
    path = folder(tmp_path / "model")
    (path / "model.safetensors").unlink()
    stored = read(path, weights=False)
    assert isinstance(stored, Stored)
    assert stored.weights == {}
    assert stored.arguments["backbone"]["mamba"]["d_state"] == MambaConfig().d_state

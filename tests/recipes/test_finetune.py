"""The verb `finetune` from end to end: what it takes over, goes on with exactly, leaves behind, and refuses."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mambazoo.checkpoints.io import from_pretrained, load, save_pretrained
from mambazoo.datamodules.alphabet import COMPLEMENT, SIZE, stored, tokens_of
from mambazoo.datamodules.vocab import EOS, Bytes, train_bpe, vocabulary_from_dict
from mambazoo.datamodules.waveform import Waveform
from mambazoo.zoo.audio import WaveformModel
from mambazoo.zoo.classification import SequenceClassifier
from mambazoo.zoo.genomics import GenomeModel
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.optim import cast
from mambazoo.zoo.saving import read_checkpoint
from safetensors.torch import load_file

from .command import SMALL, Command

BACKBONE = {"d_model": 16, "n_layers": 2}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A language model of bytes to start from."""
    save_pretrained(LanguageModel(BACKBONE, Bytes.size), {"kind": "bytes"}, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def genome_base(tmp_path: Path) -> Path:
    """A DNA model to start from."""
    save_pretrained(
        GenomeModel(BACKBONE, SIZE, COMPLEMENT), {"kind": "nucleotides"}, tmp_path / "genome base"
    )
    return tmp_path / "genome base"


def curve(run: Path) -> list[list[str]]:
    """The log of a run, but for its speed and what that takes."""
    machine = ("train/tokens_per_second", "train/data_wait", "train/memory_gib")
    with (run / "metrics.csv").open() as file:
        return [row for row in csv.reader(file) if row[1] not in machine]


def assert_equal(a: Any, b: Any) -> None:
    """Two nested values, tensors bitwise."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


@pytest.mark.parametrize(
    "options",
    [
        ("finetune.mode=lora", "finetune.rank=2"),
        ("finetune.mode=gradual", "finetune.unfreeze_every=2", "model.optimizer.layer_decay=0.8"),
        ("finetune.mode=head", "callbacks.average.decay=0.9"),
    ],
    ids=lambda options: options[0].partition("=")[2],
)
@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_exactly_without_the_model_it_started_from(
    mambazoo: Command, base: Path, texts: Path, options: tuple[str, ...]
) -> None:
    given = ("language/finetune", f"model.pretrained={base}", f"data.paths={texts}", *SMALL, *options)
    code, out, err = mambazoo("finetune", *given)
    assert code == 0, err
    whole, half = Path("runs/language/finetune/1"), Path("runs/language/finetune/2")
    shutil.copytree(whole, half)
    # as it was when it was killed after its third step
    for name in ("last.ckpt", "best.ckpt"):
        (half / "checkpoints" / name).unlink()
    (half / "checkpoints" / "previous.ckpt").rename(half / "checkpoints" / "last.ckpt")
    for name in ("model", "adapter"):
        shutil.rmtree(half / name, ignore_errors=True)
    shutil.rmtree(base)
    code, _, err = mambazoo("resume", str(half))
    assert code == 0, err
    assert curve(half) == curve(whole)
    states = [read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (whole, half)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(states[0][key], states[1][key])
    code, out, _ = mambazoo("validate", str(half))
    assert code == 0
    best = json.loads((half / "summary.json").read_text())["val"]["loss"]
    assert json.loads(out[out.index("{") :])["val/loss"] == pytest.approx(best, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_adapters_are_kept_alone_and_merged(mambazoo: Command, base: Path, texts: Path) -> None:
    options = ("finetune.mode=lora", "finetune.rank=2", "model.optimizer.lr=0.05")
    code, out, err = mambazoo(
        "finetune", "language/finetune", f"model.pretrained={base}", f"data.paths={texts}", *SMALL, *options
    )
    assert code == 0, err
    assert "  lora         trains 1,540 parameters, 14 % of the model's 10,992" in out
    run = Path("runs/language/finetune/1")
    tokens = torch.randint(257, (1, 20))
    places = (run, run / "model", run / "adapter")
    with torch.no_grad():
        merged, kept, alone = (from_pretrained(place)(tokens)[0] for place in places)
        before = from_pretrained(base)(tokens)[0]
    assert torch.equal(merged, kept)
    assert torch.equal(merged, alone)
    assert not torch.allclose(merged, before, atol=1e-2)
    written = (run / "adapter" / "adapter.safetensors").stat().st_size
    assert written < 0.3 * (run / "model" / "model.safetensors").stat().st_size
    assert json.loads((run / "summary.json").read_text())["parameters"] == 10992


@pytest.mark.parametrize("targets", ["null", "[head]", "[in_proj]"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_coarser_model_is_the_model_that_was_trained(
    mambazoo: Command, texts: Path, targets: str
) -> None:
    coarse = LanguageModel(BACKBONE, Bytes.size)
    cast(coarse, torch.bfloat16)
    save_pretrained(coarse, {"kind": "bytes"}, Path("coarse"))
    code, _, err = mambazoo(
        "finetune", "language/finetune", "model.pretrained=coarse", f"data.paths={texts}", *SMALL,
        "finetune.mode=lora", "finetune.rank=2", f"finetune.targets={targets}", "model.optimizer.lr=0.05",
    )  # fmt: skip
    assert code == 0, err
    run, tokens = Path("runs/language/finetune/1"), torch.randint(257, (1, 20))
    with torch.no_grad():
        kept, alone = (from_pretrained(run / name)(tokens)[0] for name in ("model", "adapter"))
        before = from_pretrained("coarse", dtype=torch.float32)(tokens)[0]
    torch.testing.assert_close(alone, kept, rtol=0, atol=1e-6)
    assert not torch.allclose(kept, before, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_another_vocabulary_keeps_the_tokens_that_both_have(
    mambazoo: Command, base: Path, texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, out, err = mambazoo(
        "finetune", "language/finetune", f"model.pretrained={base}", f"data.paths={texts}", *SMALL,
        "data.tokenizer=bpe-270", "model.optimizer.lr=1.0e-9", "model.optimizer.schedule=constant",
    )  # fmt: skip
    assert code == 0, err
    assert (
        "has another vocabulary: of 270 tokens the rows of 257, which it knows, are kept, and 13 start anew"
        in caplog.text
    )
    assert "the rows of 257 tokens loaded, any others new" in out
    model, vocabulary = load("runs/language/finetune")
    assert vocabulary is not None
    names = vocabulary_from_dict(vocabulary).names()
    old = from_pretrained(base).embedding.weight
    for token, name in enumerate(names):
        if len(name) == 1:
            torch.testing.assert_close(model.embedding.weight[token], old[name[0]], rtol=0, atol=1e-6)
    eos = names.index(EOS.encode())
    torch.testing.assert_close(model.embedding.weight[eos], old[Bytes.eos], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_codes_of_sound_are_no_bytes(
    mambazoo: Command, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_pretrained(WaveformModel(BACKBONE), Waveform("mu-law", 8000).to_dict(), tmp_path / "sound")
    code, out, err = mambazoo(
        "finetune", "language/finetune", "model.pretrained=sound", f"data.paths={texts}", *SMALL
    )
    assert code == 0, err
    assert "of 257 tokens the rows of 0, which it knows, are kept, and 257 start anew" in caplog.text
    assert "the rows of 0 tokens loaded, any others new" in out


@pytest.mark.filterwarnings("ignore")
def test_a_run_killed_before_its_first_checkpoint_starts_from_its_model(
    mambazoo: Command, base: Path, texts: Path
) -> None:
    code, _, err = mambazoo(
        "finetune", "language/finetune", f"model.pretrained={base}", f"data.paths={texts}", *SMALL
    )
    assert code == 0, err
    whole, begun = Path("runs/language/finetune/1"), Path("runs/language/finetune/2")
    shutil.copytree(whole, begun)
    (begun / "summary.json").unlink()
    for name in ("checkpoints", "model"):
        shutil.rmtree(begun / name)
    code, out, err = mambazoo("resume", str(begun))
    assert code == 0, err
    assert "it starts anew" in out
    assert curve(begun) == curve(whole)


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_comes_with_its_model(
    mambazoo: Command, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = train_bpe(iter(path.read_text() for path in sorted(texts.iterdir())), 270)
    save_pretrained(LanguageModel(BACKBONE, words.size, False), words.to_dict(), tmp_path / "base")
    code, out, err = mambazoo(
        "finetune", "language/finetune", "model.pretrained=base", f"data.paths={texts}", *SMALL
    )
    assert code == 0, err
    assert "another vocabulary" not in caplog.text
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [
        ["embedding", "loaded"], ["backbone", "loaded"], ["head", "loaded"],
    ]  # fmt: skip
    kept = yaml.safe_load(Path("runs/language/finetune/1/recipe.yaml").read_text())
    assert kept["data"]["tokenizer"] == "${trainer.default_root_dir}/tokenizer.json"
    assert kept["model"]["tie_embeddings"] is False
    assert kept["finetune"]["fresh"] == []
    assert load("runs/language/finetune")[1] == words.to_dict()


@pytest.mark.filterwarnings("ignore")
def test_dna_moves_under_a_classifier(mambazoo: Command, genome_base: Path, labelled: Path) -> None:
    given = ("genomics/finetune", f"model.pretrained={genome_base}", f"data.paths={labelled}", *SMALL)
    code, out, err = mambazoo("check", *given, "finetune.mode=head")
    assert code == 0, err
    assert "classifier   new 2 tensors, 34 parameters" in out
    code, out, err = mambazoo("finetune", *given, "finetune.mode=head")
    assert code == 0, err
    assert "head         trains 34 parameters" in out
    run = Path("runs/genomics/finetune/1")
    old, new = from_pretrained(genome_base), from_pretrained(run)
    assert torch.equal(old.backbone.norm_f.weight, new.backbone.norm_f.weight)
    assert new.hparams["num_classes"] == 2
    # and from there under another one
    code, out, err = mambazoo("finetune", *given[:1], f"model.pretrained={run}", *given[2:])
    assert code == 0, err
    assert "classifier   loaded 2 tensors" in out
    # what tells other classes apart starts anew, though they are as many
    others = labelled.with_name("others.tsv")
    others.write_text(labelled.read_text().replace("\tb", "\tc"))
    code, out, err = mambazoo("check", *given[:1], f"model.pretrained={run}", f"data.paths={others}", *SMALL)
    assert code == 0, err
    assert "classifier   new 2 tensors, 34 parameters" in out
    # predictions call classes by their names, and are not of others
    code, out, err = mambazoo("predict", str(run))
    assert code == 0, err
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert rows
    text = labelled.read_text().splitlines()
    classifier = from_pretrained(run)
    assert isinstance(classifier, SequenceClassifier)
    for row in rows:
        file, _, line = row["name"].rpartition(":")
        assert file == str(labelled)
        sequence = text[int(line) - 1].split("\t")[0]
        start = max(0, len(sequence) - 32) // 2
        tokens = tokens_of(np.frombuffer(stored(sequence[start : start + 32].encode()), dtype=np.uint8))
        with torch.no_grad():
            expected = classifier(torch.from_numpy(tokens)[None].long())[0].softmax(-1)
        probabilities = row["probabilities"]
        assert list(probabilities) == ["a", "b"]
        assert list(probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["class"] == max(probabilities, key=probabilities.get)
    code, out, err = mambazoo("predict", str(run), "trainer.limit_predict_batches=1")
    assert code == 0, err
    assert [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()] == rows[:2]
    code, out, err = mambazoo("predict", str(run), "trainer.devices=2")
    assert (code, "trainer.devices: predictions are written by one process" in err) == (2, True)
    code, out, err = mambazoo("predict", str(run), f"data.paths={others}")
    assert code == 2
    assert "classes: the checkpoint has ['a', 'b'], the recipe ['a', 'c']" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "language/finetune", "data.paths=texts"], "model.pretrained: must be given"),
        (["finetune", "language/demo"], "model.pretrained: must be given: a run, a model folder, a name"),
        (
            ["fit", "language/finetune", "model.pretrained=base", "data.paths=texts"],
            "model.pretrained: `fit` starts from nothing; write mambazoo finetune language/finetune",
        ),
        (
            ["finetune", "language/finetune", "model.pretrained=mamba-13b", "data.paths=texts"],
            "model.pretrained: there is no checkpoint, model folder or run mamba-13b, did you mean 'mamba-130m'?",
        ),
        (
            ["check", "language/finetune", "model.pretrained=base", "data.paths=texts", "finetune.mode=lra"],
            "finetune.mode: must be one of full, head, gradual, lora, not 'lra'",
        ),
        (
            ["check", "language/finetune", "model.pretrained=base", "data.paths=texts", "finetune.rnk=2"],
            "finetune.rnk: there is no such key, did you mean 'rank'?",
        ),
        (
            ["finetune", "language/finetune", "model.pretrained=base", "data.paths=texts", "finetune.rank=0"],
            "finetune.rank: must be above 0, not 0",
        ),
        (
            ["finetune", "language/finetune", "model.pretrained=base", "data.paths=texts", "finetune.mode=lora",
             "finetune.targets=[in_prj]"],
            "finetune.targets: 'in_prj' is none of conv1d, dt_proj, embedding, head, in_proj, out_proj, x_proj, did",
        ),
        (
            ["check", "language/finetune", "model.pretrained=base", "data.paths=texts",
             "model.optimizer.layer_decay=0"],
            "optimizer.layer_decay: must be above 0, not 0",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_a_mistake_costs_a_line_and_leaves_nothing(
    mambazoo: Command, base: Path, texts: Path, arguments: list[str], message: str
) -> None:
    code, _, err = mambazoo(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not [path for path in Path("runs").rglob("*") if path.is_file()]


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_does_not_fit_is_shown_by_part(mambazoo: Command, base: Path, texts: Path) -> None:
    given = ("language/finetune", f"model.pretrained={base}", f"data.paths={texts}", *SMALL)
    for verb in ("finetune", "check"):
        code, _, err = mambazoo(verb, *given, "model.backbone.n_layers=3")
        assert code == 2
        lines = [
            line.removeprefix("mambazoo: ") for line in err.splitlines() if line.startswith("mambazoo: ")
        ]
        assert lines[0] == (
            f"model.pretrained: {base}, a LanguageModel, does not fit; leave out model.backbone, or what else is of "
            "its shape, to have its own"
        )
        assert lines[1].split() == ["embedding", "loaded", "1", "tensor,", "4,224", "parameters"]
        assert "backbone.layers.2.mixer.A_log is (32, 16) here and is not there" in lines[2]
        assert lines[2].endswith("and 7 more")
    assert not Path("runs/language/finetune/1").exists()


@pytest.mark.filterwarnings("ignore")
def test_what_decides_a_run_cannot_change_when_it_is_resumed(
    mambazoo: Command, base: Path, texts: Path
) -> None:
    given = ("language/finetune", f"model.pretrained={base}", f"data.paths={texts}", *SMALL)
    assert mambazoo("finetune", *given)[0] == 0
    code, _, err = mambazoo("resume", "runs/language/finetune", "finetune.mode=lora")
    assert code == 2
    assert "finetune.mode: is 'full' in this run and cannot become 'lora'" in err


@pytest.mark.filterwarnings("ignore")
def test_export_and_import_are_each_others_inverse(mambazoo: Command, base: Path) -> None:
    for layout in ("transformers", "state-spaces"):
        code, out, err = mambazoo("export", str(base), "--format", layout, "--output", layout)
        assert code == 0, err
        assert "config.json" in out
        # bytes too, for who knows no other vocabulary
        assert "tokenizer.json" in out
        code, _, err = mambazoo("import", layout, "--output", f"{layout} back", "--dtype", "bfloat16")
        assert code == 0, err
        model, tokens = from_pretrained(f"{layout} back"), torch.randint(257, (1, 20))
        assert model.embedding.weight.dtype == torch.bfloat16
        # the state space stays in float32
        assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32
        # what two names share is stored once
        assert "head.weight" not in load_file(f"{layout} back/model.safetensors")
        with torch.no_grad():
            expected = from_pretrained(base, dtype=torch.bfloat16)(tokens)[0]
            assert torch.equal(model(tokens)[0], expected)
    # a config of its own makes no model of a folder, nor do weights of all that lies in it
    for beside in ((), ("config.json",), ("config.json", "model.safetensors")):
        Path("mine").mkdir(exist_ok=True)
        for name in (*beside, "thesis.txt"):
            Path("mine", name).write_text("years of work")
        for output in ("mine", "mine/../mine"):
            code, _, err = mambazoo("export", str(base), "--output", output)
            assert code == 2
            assert f"--output: {output} holds " in err
            assert "which is no part of a model; name another folder" in err
        assert Path("mine/thesis.txt").read_text() == "years of work"
    Path("only").mkdir()
    for name in ("README.md", "config.json"):
        Path("only", name).touch()
    for output, message in (
        ("only", "only holds README.md, which is no part of a model"),
        ("mine/thesis.txt", "mine/thesis.txt is there and no folder; name another"),
        ("mine/thesis.txt/x", "mambazoo: mine/thesis.txt/x cannot be written"),
    ):
        code, _, err = mambazoo("export", str(base), "--output", output)
        assert (code, message in err) == (2, True), err

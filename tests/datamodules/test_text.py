"""Text from files to batches: what is read, how it is split, cached, cut and packed."""

import gzip
import json
import logging
import lzma
import multiprocessing
import os
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from mambazoo.datamodules import documents
from mambazoo.datamodules.cache import cache_root
from mambazoo.datamodules.corpus import Corpus, CorpusRecipe
from mambazoo.datamodules.documents import find_sources
from mambazoo.datamodules.packing import Windows
from mambazoo.datamodules.text import TextDataModule
from mambazoo.datamodules.vocab import Bytes, Subwords, train_bpe, vocabulary_from_dict


def contents(paths: list[str]) -> list[bytes]:
    return [b"".join(blocks) for source in find_sources(paths) for blocks in source.documents()]


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\xff\xfe")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"two"))
    (tmp_path / "c.py.xz").write_bytes(lzma.compress(b"three"))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("four", "fünf"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "e.bin").write_bytes(b"left out")
    whole = [b"one\xff\xfe", b"two", b"three", b"four", "fünf".encode()]
    assert contents([str(tmp_path)]) == whole
    assert contents([str(tmp_path / "*.gz")]) == [whole[1], *whole[3:]]
    assert contents([str(tmp_path / "c.py.xz"), str(tmp_path / "a.txt")]) == [whole[2], whole[0]]


def test_long_documents_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK", 100)
    text = b"".join(b"line %d\n" % i for i in range(100)) + b"x" * 250
    (tmp_path / "a.txt").write_bytes(text)
    [source] = find_sources([str(tmp_path / "a.txt")])
    [blocks] = [list(blocks) for blocks in source.documents()]
    assert b"".join(blocks) == text
    assert len(blocks) > 10
    assert all(block.endswith(b"\n") for block in blocks[:8])


def test_the_standard_library_is_a_corpus() -> None:
    sources = find_sources(["stdlib"])
    assert [source.name for source in sources] == sorted(source.name for source in sources)
    assert 300 < len(sources) < 1500
    assert not any("test" in Path(source.name).parts for source in sources)
    assert any(source.name == "stdlib/json/decoder.py" for source in sources)


@pytest.mark.parametrize(
    ("files", "paths", "message"),
    [
        ({}, ["missing.txt"], "no file, folder or match for .*missing.txt"),
        ({"a.bin": b"x"}, ["."], "holds no .txt"),
        ({"a.bin": b"x"}, ["a.bin"], "not a kind of file that is read"),
        ({"a.jsonl": b'{"text": "x"}\n{"txt": "y"}\n'}, ["a.jsonl"], "a.jsonl, line 2: is not a JSON object"),
        ({"a.txt.gz": b"not gzip"}, ["a.txt.gz"], "cannot be read to its end"),
        ({"a.txt.xz": lzma.compress(b"text" * 9999)[:-20]}, ["a.txt.xz"], "cannot be read to its end"),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], paths: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        contents(paths)


def corpus(paths: list[str], **options: object) -> Corpus:
    values = {"valid_fraction": 0.1, "tokenizer": "bytes", "valid": [], **options}
    valid = find_sources(values["valid"]) if values["valid"] else []  # type: ignore[arg-type]
    recipe = CorpusRecipe(find_sources(paths), valid, values["valid_fraction"], values["tokenizer"])  # type: ignore[arg-type]
    recipe.build()
    return recipe.open()


def split_documents(corpus: Corpus, split: str) -> list[bytes]:
    """What a split holds, read back from its tokens."""
    tokens, eos = corpus.splits[split].tokens.array, corpus.vocabulary.eos
    assert tokens[0] == tokens[-1] == eos
    ends = np.flatnonzero(tokens == eos)
    assert list(corpus.splits[split].starts.array) == list(ends[:-1])
    return [bytes(tokens[a + 1 : b].astype(np.uint8)) for a, b in pairwise(ends)]


def test_whole_documents_are_held_out(texts: Path) -> None:
    # equal documents fall on the same side
    (texts / "twin.py").write_bytes((texts / "module_03.py").read_bytes())
    made = corpus([str(texts)])
    train, val = split_documents(made, "train"), split_documents(made, "val")
    assert sorted(train + val) == sorted(contents([str(texts)]))
    assert len(val) in (3, 4)
    assert not set(train) & set(val)


def test_few_documents_give_their_ends(tmp_path: Path) -> None:
    text = "ä".join("abc" for _ in range(1000)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    made = corpus([str(tmp_path)])
    [train], [val] = split_documents(made, "train"), split_documents(made, "val")
    assert train + val == text
    assert len(val) == pytest.approx(len(text) / 10, abs=2)
    val.decode()


def test_given_paths_are_held_out(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("held out")
    made = corpus([str(texts)], valid=[str(tmp_path / "v.txt")])
    assert split_documents(made, "val") == [b"held out"]
    assert len(split_documents(made, "train")) == 30


def test_a_corpus_is_built_once_and_again_when_a_file_changes(texts: Path) -> None:
    first = corpus([str(texts)])
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    again = corpus([str(texts)])
    assert again.folder == first.folder
    assert (again.folder / "meta.json").stat().st_mtime_ns == stamp
    # a file that was only touched makes no other corpus
    os.utime(texts / "module_00.py", (1, 1))
    assert corpus([str(texts)]).folder == first.folder
    (texts / "module_00.py").write_text("x = 1")
    assert corpus([str(texts)]).folder != first.folder


def _build(folder: str, cache: str) -> str:
    os.environ["MAMBAZOO_CACHE"] = cache
    return corpus([folder]).digest


def test_processes_that_build_at_once_agree(texts: Path, tmp_path: Path) -> None:
    (texts / "extra.py").write_text("at_once = True\n" * 20000)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        digests = pool.starmap(_build, [(str(texts), str(tmp_path / "cache"))] * 4)
    assert len(set(digests)) == 1
    assert [path.name for path in (tmp_path / "cache" / "text").iterdir()] == [digests[0][:32]]


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(ValueError, match="line 2"):
        corpus([str(tmp_path / "a.jsonl")])
    assert list((cache_root() / "text").iterdir()) == []


def test_a_token_file_travels_as_its_path(texts: Path) -> None:
    tokens = corpus([str(texts)]).splits["train"].tokens
    assert len(tokens.array) == len(tokens)
    assert len(pickle.dumps(tokens)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(tokens)).array, tokens.array)


@pytest.mark.parametrize("text", ["plain", "naïve café ☕ 日本", "<|eos|> in a text is text", ""])
def test_vocabularies_give_back_what_they_took(text: str) -> None:
    bpe = train_bpe(iter(["plain text, naïve café"] * 10), 300)
    for vocabulary in (
        Bytes(),
        Bytes().as_subwords(),
        bpe,
        vocabulary_from_dict(bpe.to_dict()),
        vocabulary_from_dict({"kind": "bytes"}),
    ):
        tokens = vocabulary.encode(text.encode())
        assert vocabulary.decode(tokens.tolist()) == text
        assert vocabulary.eos not in tokens
        assert vocabulary.byte_lengths()[tokens.astype(int)].sum() == len(text.encode())
        stream = vocabulary.stream()
        assert "".join(stream.push(token) for token in tokens.tolist()) + stream.flush() == text
        assert tokens.max(initial=0) < vocabulary.size


def test_bytes_are_the_same_tokens_in_a_tokenizer_json() -> None:
    own, words = Bytes(), Bytes().as_subwords()
    assert (words.size, words.eos) == (own.size, own.eos)
    assert words.names() == own.names()
    assert words.byte_lengths().tolist() == own.byte_lengths().tolist()
    text = "naïve café ☕ 日本\n".encode()
    assert words.encode(text).tolist() == own.encode(text).tolist()


def test_a_long_stream_loses_nothing() -> None:
    bpe = train_bpe(iter(["def f(x): return x"] * 10), 280)
    text = "日本 def f(x): return café\n" * 40
    stream = bpe.stream()
    assert (
        "".join(stream.push(token) for token in bpe.encode(text.encode()).tolist()) + stream.flush() == text
    )


def test_training_a_bpe_is_deterministic(texts: Path) -> None:
    a, b = (corpus([str(texts)], tokenizer="bpe-300") for _ in range(2))
    assert a.folder == b.folder
    documents_ = [
        b"".join(blocks).decode() for source in find_sources([str(texts)]) for blocks in source.documents()
    ]
    assert train_bpe(iter(documents_), 300).to_dict() == train_bpe(iter(documents_), 300).to_dict()
    assert sum(a.splits[name].bytes for name in ("train", "val")) == sum(len(d) for d in documents_)


def test_any_tokenizer_json_serves(texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(train_bpe(iter(["return x"] * 5), 270).to_dict()["json"])
    data = TextDataModule(str(texts), tokenizer=str(path), length=32)
    assert data.vocab_size == Subwords(path.read_text()).size
    data.prepare_data()
    data.setup("fit")
    assert data.vocabulary["kind"] == "subwords"


def test_windows_cover_the_held_out_split_once(texts: Path) -> None:
    split = corpus([str(texts)]).splits["val"]
    windows = Windows(split, 100, shifted=False)
    targets = np.concatenate([windows.read(i, 0)["tokens"][1:] for i in range(len(windows))])
    assert np.array_equal(targets, split.tokens.array[1:])


def test_training_windows_move_from_pass_to_pass(texts: Path) -> None:
    split = corpus([str(texts)]).splits["train"]
    windows = Windows(split, 100, seed=1, shifted=True)
    first, second = windows.read(0, 0)["tokens"], windows.read(0, 1)["tokens"]
    assert not np.array_equal(first, second)
    assert all(len(windows.read(len(windows) - 1, pass_)["tokens"]) == 101 for pass_ in range(50))


def module(texts: Path, **options: object) -> TextDataModule:
    data = TextDataModule(str(texts), **{"length": 50, "batch_size": 3, **options})  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


def test_packed_batches_mark_every_row_and_document(texts: Path) -> None:
    data = module(texts, length=2000)
    batch = next(iter(data.train_dataloader()))
    inputs, bounds = batch["inputs"][0], set(batch["cu_seqlens"].tolist())
    assert batch["inputs"].shape == batch["targets"].shape == (1, 6000)
    starts = set((inputs == Bytes.eos).nonzero().flatten().tolist())
    assert starts
    assert bounds == starts | {0, 2000, 4000, 6000}
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["bytes"] == (batch["targets"] != Bytes.eos).sum()


def test_stacked_batches_are_rows(texts: Path) -> None:
    data = module(texts, packing=False)
    batch = next(iter(data.train_dataloader()))
    assert batch["inputs"].shape == (3, 50)
    assert torch.equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    last = list(data.val_dataloader())[-1]
    ignored = last["targets"] == -100
    assert ignored.any()
    assert last["bytes"] == ((last["targets"] >= 0) & (last["targets"] != Bytes.eos)).sum()


def test_held_out_bytes_add_up(texts: Path) -> None:
    for packing in (True, False):
        data = module(texts, packing=packing)
        assert sum(int(batch["bytes"]) for batch in data.val_dataloader()) == data.corpus.splits["val"].bytes


def first_batches(data: TextDataModule, count: int = 4) -> list[torch.Tensor]:
    iterator = iter(data.train_dataloader())
    return [next(iterator)["inputs"] for _ in range(count)]


def test_workers_change_nothing(texts: Path) -> None:
    alone, helped = module(texts), module(texts, num_workers=2)
    assert all(torch.equal(a, b) for a, b in zip(first_batches(alone), first_batches(helped), strict=True))


def test_a_position_is_all_it_takes_to_go_on(texts: Path) -> None:
    whole, resumed = module(texts), module(texts)
    resumed.load_state_dict({"position": 6, "vocabulary": None})
    assert all(
        torch.equal(a, b) for a, b in zip(first_batches(whole)[2:], first_batches(resumed, 2), strict=True)
    )


def test_opening_a_loader_draws_no_global_number(texts: Path) -> None:
    data = module(texts)
    before = torch.get_rng_state()
    first_batches(data)
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_digest_is_logged(texts: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mambazoo"):
        data = module(texts)
    assert f"corpus {data.corpus.digest[:16]}" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 10**6}, "data.length: 1000000 needs 1000001 tokens and the training split has"),
        ({"tokenizer": "bpe-20"}, "data.tokenizer: write bpe-8192"),
        ({"tokenizer": "nothing.json"}, "there is no file nothing.json"),
        ({"valid_fraction": 2}, "data.valid_fraction: must be between"),
        ({"batch_size": 0}, "data.batch_size: must be 1 or more"),
        ({"paths": []}, "names nothing"),
    ],
)
def test_what_cannot_be_is_said(texts: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module(texts, **options) if "paths" not in options else TextDataModule(**options)  # type: ignore[arg-type]


def test_an_empty_corpus_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="is the corpus empty"):
        module(tmp_path)


def test_a_file_that_is_no_tokenizer_is_said(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"t\.json: is not a tokenizer.json"):
        module(texts, tokenizer=str(tmp_path / "t.json"))


def test_hugging_face_data_sets_are_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(5)))
    assert contents([f"hf:{tmp_path}"]) == [b"text %d" % i for i in range(5)]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        contents(["hf:wikitext"])

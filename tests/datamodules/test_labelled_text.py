"""Labelled texts: folders like aclImdb and JSON lines give the same rows; splits are by document."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from mambazoo.datamodules.labelled_text import LabelledTextDataModule
from mambazoo.datamodules.vocab import Bytes


def build(path: Path, **values: Any) -> LabelledTextDataModule:
    data = LabelledTextDataModule(str(path), **{"batch_size": 4, **values})
    data.prepare_data()
    data.setup("fit")
    return data


def read(data: LabelledTextDataModule, *splits: str) -> list[tuple[str, bytes]]:
    samples = [data.samples[split].read(i, 0) for split in splits for i in range(len(data.samples[split]))]
    return sorted((data.classes[sample["label"]], sample["tokens"].tobytes()) for sample in samples)


def texts(folder: Path) -> list[tuple[str, bytes]]:
    return sorted((path.parent.name, path.read_bytes()) for path in folder.glob("[np]*/*.txt"))


def lines(path: Path, rows: list[tuple[str, bytes]]) -> Path:
    objects = [
        json.dumps({"id": i, "label": label, "text": text.decode()}) for i, (label, text) in enumerate(rows)
    ]
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write("\n".join(objects).encode())
    return path


def test_a_folder_like_aclimdb_is_read(reviews: Path) -> None:
    data = build(reviews, valid=0.25)
    assert (data.classes, data.num_classes, data.vocab_size) == (["neg", "pos"], 2, 257)
    assert read(data, "train", "val") == texts(reviews / "train")
    assert read(data, "test") == texts(reviews / "test")
    assert 3 < len(data.samples["val"]) < 20
    assert data.vocabulary == {"kind": "bytes"}


def test_lines_of_json_are_read_as_folders_are(reviews: Path, tmp_path: Path) -> None:
    expected = build(reviews, valid=0.25)
    test = lines(tmp_path / "test.jsonl", texts(reviews / "test"))
    for name in ("a.jsonl", "a.jsonl.xz", "a.jsonl.gz"):
        path = lines(tmp_path / name, texts(reviews / "train"))
        data = build(path, test=str(test), valid=0.25)
        for split in ("train", "val", "test"):
            assert read(data, split) == read(expected, split)
    numbered = lines(
        tmp_path / "b.jsonl", [(i % 2, text) for i, (_, text) in enumerate(texts(reviews / "train"))]
    )
    assert build(numbered).classes == ["0", "1"]
    # the file alone has no test
    assert "test" not in build(path).samples


def test_texts_are_cut_and_padded(reviews: Path) -> None:
    data = build(reviews, length=30)
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    assert batch["inputs"].dtype == torch.int64
    assert batch["lengths"].max() == 30
    for row, length in zip(batch["inputs"], batch["lengths"], strict=True):
        assert (row[length:] == Bytes.eos).all()
        assert Bytes().decode(row.tolist()).startswith("Film number")
    whole = dict(zip(read(build(reviews), "test"), read(data, "test"), strict=True))
    assert all(long[1][:30] == short[1] for long, short in whole.items())


def test_equal_texts_are_on_one_side(reviews: Path) -> None:
    for path in list((reviews / "train").glob("[np]*/*.txt")):
        path.with_name(f"again_{path.name}").write_bytes(path.read_bytes())
    data = build(reviews, valid=0.3)
    train, held_out = (read(data, split) for split in ("train", "val"))
    assert held_out
    assert not set(train) & set(held_out)


def test_words_tell_what_simple_models_reach(reviews: Path) -> None:
    assert dict(build(reviews, valid=0.3).baselines())["regression on which words there are, accuracy"] > 0.9


def test_what_is_no_labelled_text_is_refused(reviews: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path: there is no file or folder"):
        build(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no train/CLASS/NAME\.txt"):
        build(reviews / "train")
    with pytest.raises(ValueError, match=r"is not a kind of file that is read: \.jsonl"):
        build(next((reviews / "train" / "pos").iterdir()))
    with pytest.raises(ValueError, match=r"data\.length: must be 1 or more"):
        build(reviews, length=0)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b"}\n')
    with pytest.raises(
        ValueError, match=r'a\.jsonl, line 2: is not a JSON object with a "text" and a "label"'
    ):
        build(path)
    path.write_text('{"text": "a", "label": 0}\n')
    with pytest.raises(ValueError, match="all sequences have the label '0'; a classifier needs two"):
        build(path)
    path.write_text('{"text": "a", "label": 0}\n{"text": "", "label": 1}\n')
    with pytest.raises(ValueError, match="there is an empty text in it"):
        build(path)


def test_published_reviews_are_read(data: Path) -> None:
    path = data / "language" / "imdb_train.jsonl.xz"
    if not path.exists():
        pytest.skip(f"needs {path.name}")
    reviews = build(path)
    assert reviews.classes == ["0", "1"]
    assert {split: len(samples) for split, samples in reviews.samples.items()} == {
        "train": 22463,
        "val": 2505,
    }
    assert reviews.majority["val"] < 0.52

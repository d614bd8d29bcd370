"""Genomes in batches: where windows lie, what is predicted, how it is resumed, warmed up, mixed and masked."""

import itertools
import logging
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from Bio.Seq import Seq
from mambazoo.datamodules import genomics
from mambazoo.datamodules.alphabet import EOS, MASK, PAD
from mambazoo.datamodules.genomics import GenomeDataModule
from torch import Tensor

LETTERS = "ACGTNRYSWKMBDHV"


def write(path: Path, sequences: dict[str, str]) -> Path:
    path.write_text("".join(f">{name} of a test\n{sequence}\n" for name, sequence in sequences.items()))
    return path


def draw(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("ACGTacgtN", (9, 9, 9, 9, 4, 4, 4, 4, 1), k=length))


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    """A genome of three records, none of whose 30-mers occur twice."""
    sizes = {"one": 3000, "two": 2000, "tiny": 40}
    return write(tmp_path / "a.fa", {name: draw(size, i) for i, (name, size) in enumerate(sizes.items())})


def sequences_of(path: Path) -> dict[str, str]:
    records = path.read_text().split(">")[1:]
    return {record.split()[0]: record.split("\n")[1].upper() for record in records}


def module(path: Path | list[Path], **options: object) -> GenomeDataModule:
    paths = [str(p) for p in path] if isinstance(path, list) else str(path)
    values = {"length": 100, "batch_size": 4, "valid": 0.1, **options}
    data = GenomeDataModule(paths, **values)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


def text(tokens: Tensor) -> str:
    return "".join(LETTERS[token] for token in tokens.tolist() if token not in (PAD, EOS))


def take(data: GenomeDataModule, count: int) -> list[dict[str, Tensor]]:
    return [
        data.on_after_batch_transfer(batch, 0) for batch in itertools.islice(data.train_dataloader(), count)
    ]


def windows(data: GenomeDataModule, split: str) -> list[str]:
    """The letters of held-out or of a thousand training windows."""
    return [
        text(torch.from_numpy(data.samples[split].read(i % len(data.samples[split]), i)["sequence"] & 127))
        for i in range(len(data.samples[split]) if split != "train" else 1000)
    ]


def test_windows_lie_where_they_may(fasta: Path) -> None:
    data, whole = module(fasta, reverse_complement=False), sequences_of(fasta)
    # one batch of a task's inputs and targets: each input is the target before it
    for batch in take(data, 100):
        assert batch["inputs"].dtype == batch["targets"].dtype == torch.int64
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
            assert inputs[0] == EOS
            known = targets[:-1] >= 0
            assert torch.equal(inputs[1:][known], targets[:-1][known])
            assert all(token > 3 for token in inputs[1:][~known])
            seen = text(inputs)
            assert any(seen in sequence[: int(len(sequence) * 0.9)] for sequence in whole.values())
    starts = Counter(whole["one"].find(window) for window in windows(data, "train"))
    # every place in the training part, and evenly
    assert min(start for start in starts if start >= 0) < 30
    assert 2550 < max(starts) <= 2600


def test_every_pass_sees_all_of_the_genome_about_equally(fasta: Path) -> None:
    data, whole = module(fasta, reverse_complement=False, length=50), sequences_of(fasta)["one"]
    count, train = np.zeros(2700), data.samples["train"]
    for pass_, index in itertools.product(range(40), range(len(train))):
        window = text(torch.from_numpy(train.read(index, pass_)["sequence"] & 127))
        if (start := whole.find(window)) >= 0 and len(window) == 50:
            count[start : start + 50] += 1
    assert 35 < count[100:-100].mean() < 45
    assert count[100:-100].min() > 15


def test_held_out_windows_are_end_to_end(fasta: Path) -> None:
    data, whole = module(fasta, valid=["two", "tiny"], length=64, batch_size=33), sequences_of(fasta)
    assert "".join(windows(data, "val")) == whole["two"] + whole["tiny"]
    batches = list(data.val_dataloader())
    seen = torch.cat([batch["targets"].flatten() for batch in batches])
    # every known base is predicted exactly once
    assert (seen >= 0).sum() == sum(letter in "ACGT" for letter in whole["two"] + whole["tiny"])
    last = batches[-1]
    assert set(last["inputs"][-1][41:].tolist()) == {PAD}
    assert set(last["targets"][-1][40:].tolist()) == {-100}


def test_half_of_the_windows_are_the_other_strand(fasta: Path) -> None:
    data, whole = module(fasta), sequences_of(fasta)
    forward = backward = 0
    for window in windows(data, "train"):
        forward += any(window in sequence for sequence in whole.values())
        backward += any(str(Seq(window).reverse_complement()) in sequence for sequence in whole.values())
    assert forward + backward == 1000
    assert 420 < forward < 580
    assert all(any(window in sequence for sequence in whole.values()) for window in windows(data, "val"))


def test_short_records_are_padded_and_counted(fasta: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mambazoo"):
        data = module(fasta, valid="two")
    assert "train: 3040 bases in 2 stretches, 1 of them shorter than 100 and padded" in caplog.text
    tiny = sequences_of(fasta)["tiny"]
    short = [window for window in windows(data, "train") if len(window) == 40]
    assert set(short) == {tiny, str(Seq(tiny).reverse_complement())}
    # a short record is read as often as if it were one window long
    assert 10 < len(short) < 70


def test_tokens_travel_as_bytes(fasta: Path) -> None:
    for objective in ("next", "masked"):
        batch = next(iter(module(fasta, objective=objective).train_dataloader()))
        assert (batch["inputs"].dtype, batch["targets"].dtype) == (torch.uint8, torch.int8)


def test_masked_targets_are_what_is_hidden(fasta: Path) -> None:
    plain, hidden = (
        module(fasta, length=1000, objective="next"),
        module(fasta, length=1000, objective="masked"),
    )
    kinds: Counter[str] = Counter()
    total = 0
    for a, b in zip(take(plain, 40), take(hidden, 40), strict=True):
        inputs, targets, truth = b["inputs"], b["targets"], a["targets"]
        chosen = targets >= 0
        assert torch.equal(targets[chosen], truth[chosen])
        known = truth >= 0
        assert torch.equal(inputs[known & ~chosen], truth[known & ~chosen])
        assert not (inputs[~chosen] == MASK).any()
        total += int(known.sum())
        seen, true = inputs[chosen], targets[chosen]
        kinds["mask"] += int((seen == MASK).sum())
        kinds["same"] += int((seen == true).sum())
        kinds["other"] += int(((seen != true) & (seen != MASK)).sum())
        assert seen[seen != MASK].max() <= 3
    chosen_count = sum(kinds.values())
    assert chosen_count / total == pytest.approx(0.15, abs=0.005)
    # a random base is the true one in a quarter of the cases
    assert kinds["mask"] / chosen_count == pytest.approx(0.8, abs=0.01)
    assert kinds["same"] / chosen_count == pytest.approx(0.125, abs=0.01)
    assert kinds["other"] / chosen_count == pytest.approx(0.075, abs=0.01)


def test_masks_differ_from_pass_to_pass_but_not_in_validation(fasta: Path) -> None:
    data = module(fasta, objective="masked", valid="two")
    one, two = (list(data.val_dataloader()) for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(one, two, strict=True) for key in a)
    batch = take(data, 1)[0]["targets"] >= 0
    assert len({tuple(row.tolist()) for row in batch}) == len(batch)


def test_repeats_count_less(fasta: Path) -> None:
    data = module(fasta, soft_mask_weight=0.25, valid="two", reverse_complement=False)
    sequence = fasta.read_text().split(">two of a test\n")[1].split("\n")[0]
    weights = torch.cat([batch["weights"].flatten() for batch in data.val_dataloader()])[:2000]
    assert weights.dtype == torch.float32
    assert weights.tolist() == [0.25 if letter.islower() else 1.0 for letter in sequence]
    assert "weights" not in next(iter(module(fasta).train_dataloader()))


OPTIONS: list[dict[str, object]] = [
    {},
    {"objective": "masked", "soft_mask_weight": 0.5},
    {"length": 128, "length_warmup": [1024, 2048]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["next", "masked", "warmup"])
def test_a_position_is_all_it_takes_to_go_on(fasta: Path, options: dict[str, object]) -> None:
    whole = take(module(fasta, **options), 6)
    resumed = module(fasta, **options)
    resumed.load_state_dict({"position": 8, "vocabulary": None})
    for a, b in zip(whole[2:], take(resumed, 4), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    helped = take(module(fasta, num_workers=2, **options), 6)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(whole, helped, strict=True) for key in a)
    other = take(module(fasta, seed=1, **options), 6)
    assert not torch.equal(whole[0]["inputs"], other[0]["inputs"])


def test_the_length_doubles_where_it_is_told_to(fasta: Path) -> None:
    data = module(fasta, length=128, length_warmup=[1024, 2048], valid="tiny")
    batches = take(data, 6)
    assert [tuple(batch["inputs"].shape) for batch in batches] == [
        (16, 32), (16, 32), (8, 64), (8, 64), (4, 128), (4, 128),
    ]  # fmt: skip
    assert all(batch["inputs"].shape[1] == 40 for batch in data.val_dataloader())


def test_genomes_are_mixed_by_weight(fasta: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "b.fa", {"only": draw(1000, 9)})
    for weights, expected in (
        (None, 900 / (900 + 4536)),
        ([1.0, 1.0], 0.5),
        ([3.0, 1.0], 0.25),
        ([1.0, 0.0], 0.0),
    ):
        data = module([fasta, other], weights=weights, length=30, objective="genome", batch_size=50)
        labels = torch.cat([batch["labels"] for batch in take(data, 40)]).float()
        assert labels.mean() == pytest.approx(expected, abs=0.04)


def test_a_window_can_be_labelled_with_its_genome(fasta: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "b.fa", {"only": draw(1000, 9)})
    data = module([fasta, other], objective="genome", length=60, reverse_complement=False)
    assert data.num_classes == 2
    assert data.classes == ["a.fa", "b.fa"]
    (tmp_path / "again").mkdir()
    alike = [fasta, write(tmp_path / "again" / "a.fa", {"only": draw(1000, 9)})]
    assert module(alike, objective="genome", length=60).classes == [str(path) for path in alike]
    whole = ["|".join(sequences_of(path).values()) for path in (fasta, other)]
    for batch in take(data, 30):
        assert set(batch) == {"inputs", "labels", "lengths"}
        for inputs, label, length in zip(batch["inputs"], batch["labels"], batch["lengths"], strict=True):
            assert text(inputs) in whole[label]
            assert (inputs != PAD).sum() == length


def test_what_a_model_must_know_is_there_from_the_start(fasta: Path) -> None:
    data = GenomeDataModule(str(fasta))
    assert data.vocab_size == 18
    assert sorted(data.complement) == list(range(18))
    assert data.vocabulary == {"kind": "nucleotides"}
    masked = GenomeDataModule(str(fasta), objective="masked").vocabulary
    assert masked == {"kind": "nucleotides", "objective": "masked"}
    assert data.describe().startswith("1 genome of 0.0 MB, next")


def test_opening_a_loader_draws_no_global_number(fasta: Path) -> None:
    data = module(fasta, objective="masked")
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    take(data, 3)
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid": 1.5}, "data.valid: a fraction must be between 0 and 1"),
        ({"valid": 0.0}, "data.valid: a fraction must be"),
        ({"valid": 0.5, "test": 0.5}, "leave nothing to train on"),
        ({"valid": ["one", "two", "tiny"]}, "data.train: there is not a base in it"),
        ({"valid": "three"}, "data.valid: there is no record 'three'"),
        ({"valid": 1e-6}, "data.valid: there is not a base in it"),
        ({"weights": [1.0, 2.0]}, "data.weights: give 1 numbers"),
        ({"weights": [-1.0]}, "data.weights"),
        ({"weights": [math.nan]}, "data.weights"),
        ({"objective": "previous"}, "data.objective: must be next, masked or genome"),
        ({"objective": "genome"}, "data.paths: to tell genomes apart there must be two or more"),
        ({"length": 0}, "data.length: must be 1 or more"),
        ({"length_warmup": [200, 100]}, "each greater than the one before"),
        ({"length_warmup": [100, 200, 300]}, "a length of 100 cannot be halved 3 times"),
        ({"soft_mask_weight": -1.0}, "data.soft_mask_weight"),
        ({"batch_size": 0}, "data.batch_size"),
    ],
)
def test_what_cannot_be_is_said(fasta: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(fasta, **options)


@pytest.mark.parametrize(
    ("n", "options", "key"),
    [
        ("one two", {}, "train"),
        ("one two", {"objective": "masked", "valid": "two"}, "train"),
        ("two", {"valid": "two"}, "valid"),
        ("two", {"valid": "one", "train": "two"}, "train"),
        ("two", {"test": "two"}, "test"),
        ("two", {"valid": 0.1}, None),
    ],
)
def test_a_split_of_n_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: str, options: dict[str, object], key: str | None
) -> None:
    monkeypatch.setattr(genomics, "BLOCK", 100)
    whole = {name: ("NnRY" if name in n else "NNac") * 200 for name in ("one", "two")}
    path = write(tmp_path / "n.fa", whole)
    if key is None:
        module(path, **options)
        return
    with pytest.raises(ValueError, match=rf"data\.{key}: there is no A, C, G or T in it, .*: {path}$"):
        module(path, **options)


def test_a_real_genome_is_served(data: Path) -> None:
    path = data / "dna" / "bacteria" / "E_Coli.MG1655-K12.fasta.gz"
    served = module(path, length=1 << 20, batch_size=1, valid=0.1)
    batch = take(served, 1)[0]
    assert batch["inputs"].shape == (1, 1 << 20)
    assert (batch["targets"] >= 0).float().mean() > 0.99


def test_training_reads_hidden_intervals_as_n(fasta: Path, tmp_path: Path) -> None:
    bed, whole = tmp_path / "hide.bed", sequences_of(fasta)
    bed.write_text("one\t500\t650\none\t640\t700\ntwo\t0\t30\ntwo\t1990\t2000\n")
    hidden = {"one": range(500, 700), "two": [*range(30), *range(1990, 2000)], "tiny": []}
    seen = {
        name: "".join("N" if i in hidden[name] else base for i, base in enumerate(sequence))
        for name, sequence in whole.items()
    }
    data = module(fasta, hide=str(bed), reverse_complement=False)
    found = windows(data, "train")
    assert all(any(window in sequence for sequence in seen.values()) for window in found)
    assert any("N" * 90 in window for window in found)
    # what is held out is all there
    assert all(any(window in sequence for sequence in whole.values()) for window in windows(data, "val"))
    with pytest.raises(ValueError, match=r"data\.hide: there is no record 'three'"):
        module(fasta, hide="three")


def test_baselines_learn_nothing_from_what_is_hidden(tmp_path: Path) -> None:
    # what is held out of the second record is what its hidden beginning would tell
    fasta = write(tmp_path / "a.fa", {"one": draw(4000, 1), "two": "ACGTTGCA" * 500})
    bed = tmp_path / "hide.bed"
    bed.write_text("two\t0\t3600\n")
    held_out = tmp_path / "valid.bed"
    held_out.write_text("two\t3600\t4000\n")
    known, unknown = (
        dict(module(fasta, valid=str(held_out), hide=hidden).baselines())[
            "Markov model of order 6, bits per base"
        ]
        for hidden in (None, str(bed))
    )
    assert known < 0.5 < 1.5 < unknown


def test_what_is_hidden_must_leave_something_to_train_on(fasta: Path, tmp_path: Path) -> None:
    # the validation part, the end of each record, is read as it is and does not count
    bed = tmp_path / "hide.bed"
    bed.write_text("one\t0\t2700\ntwo\t0\t1800\ntiny\t0\t36\n")
    for hide in (str(bed), ["one", "two", "tiny"]):
        with pytest.raises(ValueError, match=r"data\.hide: .* to train on; hide less, or give more genomes"):
            module(fasta, hide=hide)
    other = write(tmp_path / "b.fa", {"other": draw(500, 9)})
    module([fasta, other], hide=str(bed))
    with pytest.raises(ValueError, match=r"data\.weights: nothing of a\.fa is left to train on; give it 0"):
        module([fasta, other], hide=str(bed), weights=[1, 1])

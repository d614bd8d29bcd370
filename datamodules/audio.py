"""Recordings of sound to batches: the parts, labels and codes of recordings, and prediction of the next sample."""

import logging
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .base import IGNORE, DataModule, Samples
from .baselines import markov_bits, prediction_bits
from .classes import count_classes, expression, label_recordings, sort_classes
from .recording_splits import KEYS, Places, Selection, split_recordings
from .recordings import RecordingFiles, Recordings, find_recordings
from .sound import RATES
from .waveform import LEVELS, Waveform
from .windows import HeldOutWindows, RandomWindows, Stretches, Windows

log = logging.getLogger(__name__)

# of the simple models to compare with
MARKOV_ORDERS, PREDICTION_ORDERS = (0, 1), (32,)


class RecordingsDataModule(DataModule):
    """What data modules of sound have in common: recordings, made once into a memory-mapped file, split and labelled.

    After `setup`, of labelled recordings, `counts` has for each split the number of each of `classes`, and `majority`
    the share of the commonest: what a model that has learnt nothing reaches.

    Args:
        paths: wav, flac, ogg or mp3 files of any rate, length and number of channels; folders; globs; .zip archives;
            or sample:bach-piano (see datamodules/samples.py). A recording's name is its file's, with the folders that
            it is in below the one that is given. What cannot be read is left out and named.
        sample_rate: samples a second; other recordings are resampled.
        encoding: mu-law or linear codes of 8 bits, or, to classify, float samples.
        length: samples a row; a shorter one is filled up with silence.
        batch_size: rows a device and step.
        train: what to train on. Without it, all that is not held out.
        valid, test: what to hold out: a fraction; or names of recordings or speakers, globs ("*_[0-4].flac"), or .txt
            files of such, a line each.
        speaker: a regular expression whose first group, found in a recording's name, is the speaker. A fraction is
            then one of the speakers: no voice is on both sides.
        by_time: a fraction is the end of every recording, for a few long ones; else it is one of the recordings.
        labels: "folder", a regular expression whose first group, found in a name, is the label, or a .csv or .tsv with
            the columns file and label, which leaves out what it does not name.
        trim_silence: cut at both ends what is so many decibels below a recording's peak.
        normalise: scale each recording so that its peak is full scale.
        num_workers, seed: see DataModule.
    """

    # num_classes is none where there are no labels, vocab_size where there are no codes
    PROVIDES: ClassVar[tuple[str, ...]] = ("vocab_size", "num_classes", "classes")

    def __init__(
        self,
        paths: str | list[str],
        sample_rate: int = 16000,
        encoding: Literal["mu-law", "linear", "float"] = "mu-law",
        length: int = 16384,
        batch_size: int = 8,
        train: str | list[str] | None = None,
        valid: Selection = 0.1,
        test: Selection | None = None,
        speaker: str | None = None,
        by_time: bool = False,
        labels: str | None = None,
        trim_silence: float | None = None,
        normalise: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        _check(sample_rate, length, valid, test, trim_silence)
        if speaker is not None:
            expression(speaker, "data.speaker")
        self.length, self.speaker, self.by_time = length, speaker, by_time
        self.train, self.valid, self.test = train, valid, test
        sources = find_recordings([paths] if isinstance(paths, str) else paths)
        if not sources:
            raise ValueError(
                "data.paths: names nothing; give files of sound, folders, globs or .zip archives"
            )
        self.labels: dict[str, str] | None = None
        if labels is not None:
            self.labels = label_recordings([source.name for source in sources], labels)
            sources = [source for source in sources if source.name in self.labels]
        self.classes = sort_classes(self.labels.values()) if self.labels is not None else []
        self.num_classes = len(self.classes) or None
        self.waveform = Waveform(encoding, sample_rate, self.classes)
        self.vocab_size = self.waveform.size
        self.files = RecordingFiles(sources, sample_rate, trim_silence, normalise)
        self.recordings: Recordings | None = None
        self.parts: dict[str, Stretches] = {}
        # of each split, the class of each recording
        self.numbers: dict[str, NDArray[np.int64]] = {}
        self.counts: dict[str, list[int]] = {}
        self.majority: dict[str, float] = {}

    @property
    def vocabulary(self) -> dict[str, Any] | None:
        return self.waveform.to_dict()

    def describe(self) -> str:
        count, rate = len(self.files.sources), self.waveform.sample_rate
        classes = f" of {self.num_classes} classes" if self.labels is not None else ""
        return (
            f"{count} recording{'s' * (count > 1)}{classes} in {self.files.size() / 1e6:.1f} MB, "
            f"{self.waveform.encoding} at {rate} Hz, batches of {self.batch_size} x {self.length} samples"
        )

    def prepare_data(self) -> None:
        self.files.build()

    def setup(self, stage: str) -> None:
        if self.samples:
            return
        self.recordings = recordings = self.files.open()
        self.fingerprint = recordings.digest
        for split, found in self.split(recordings).items():
            self.parts[split] = part = Stretches(recordings.samples, found)
            seconds = int(part.sizes.sum()) / self.waveform.sample_rate
            labels, balance = None, ""
            if self.labels is not None:
                names = recordings.names_at(part.starts)
                labels = np.array([self.classes.index(self.labels[name]) for name in names])
                self.numbers[split] = labels
                self.counts[split], self.majority[split], words = count_classes(labels, self.classes)
                balance = f" ({words})"
            log.info("%s: %d recordings, %.1f s%s", split, len(part.starts), seconds, balance)
            self.samples[split] = self.read_split(split, part, labels)
        log.info("recordings %s", recordings.digest[:16])

    def split(self, recordings: Recordings) -> dict[str, Places]:
        """Where the recordings of each split are among all samples."""
        return split_recordings(
            recordings, self.train, self.valid, self.test, speaker=self.speaker, by_time=self.by_time
        )

    def read_split(self, split: str, part: Stretches, labels: NDArray[np.int64] | None) -> Samples:
        """The samples of a split: of its recordings, or parts of them, and the class of each."""
        raise NotImplementedError


class AudioDataModule(RecordingsDataModule):
    """Windows of recordings, to predict the next sample: `inputs` (b, length) are one sample behind `targets`.

    The input before the first sample of a recording, or of its held-out end, is silence. Training windows are drawn
    anew on every pass (see windows.RandomWindows); held-out ones lie end to end, each sample a target once. Where
    there are labels, `labels` (b,) has the class of each row, for models that generate by class.

    Args:
        random_crops: without it, training windows lie end to end too, and only their order differs from pass to pass.
        recordings: see RecordingsDataModule.
    """

    def __init__(self, paths: str | list[str], random_crops: bool = True, **recordings: Any) -> None:
        super().__init__(paths, **recordings)
        if self.waveform.size is None:
            raise ValueError(
                "data.encoding: the next sample is one of 256 codes; write mu-law or linear, not float"
            )
        self.random_crops = random_crops

    def read_split(self, split: str, part: Stretches, labels: NDArray[np.int64] | None) -> Samples:
        if split == "train" and self.random_crops:
            return WaveformWindows(RandomWindows([part], self.length, None, self.seed), self.waveform, labels)
        return WaveformWindows(HeldOutWindows([part], self.length), self.waveform, labels)

    def baselines(self) -> Iterator[tuple[str, float]]:
        for order in MARKOV_ORDERS:
            bits = markov_bits(self._codes("train"), self._codes("val"), LEVELS, order)
            yield f"Markov model of order {order}, bits per sample", bits
        for order in PREDICTION_ORDERS:
            bits = prediction_bits(self._codes("train"), self._codes("val"), self.waveform, order)
            yield f"linear prediction from {order} samples, bits per sample", bits

    def _codes(self, split: str) -> Iterator[NDArray[np.uint8]]:
        part = self.parts[split]
        for start, end in zip(part.starts, part.ends, strict=True):
            yield self.waveform.read(part.sequence.array[start:end])

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        # always as long, since models with pooling and compiled ones want it so
        inputs = np.full((len(rows), self.length), self.waveform.silence, dtype=np.uint8)
        targets = np.full((len(rows), self.length), IGNORE, dtype=np.int16)
        for i, row in enumerate(rows):
            codes = row["codes"]
            inputs[i, : len(codes) - 1], targets[i, : len(codes) - 1] = codes[:-1], codes[1:]
        batch = {"inputs": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch


class WaveformWindows:
    """Windows of recordings as samples; see base.Samples."""

    def __init__(self, windows: Windows, waveform: Waveform, labels: NDArray[np.int64] | None = None) -> None:
        self.windows, self.waveform, self.labels = windows, waveform, labels

    def __len__(self) -> int:
        return len(self.windows)

    def read(self, index: int, pass_: int) -> dict[str, Any]:
        """The codes of a window, after the one before it (up to length + 1,), and its class if it has one."""
        window = self.windows.place(index, pass_)
        part = self.windows.parts[window.part]
        start = max(window.start - 1, int(part.starts[window.stretch]))
        codes = self.waveform.read(part.sequence.array[start : window.end])
        if start == window.start:
            codes = np.concatenate([[self.waveform.silence], codes])
        return {"codes": codes} | ({} if self.labels is None else {"label": self.labels[window.stretch]})


def _check(
    sample_rate: int, length: int, valid: Selection, test: Selection | None, trim_silence: float | None
) -> None:
    if not RATES[0] <= sample_rate <= RATES[1]:
        raise ValueError(
            f"data.sample_rate: must be {RATES[0]} to {RATES[1]} samples a second, not {sample_rate}"
        )
    if length < 1:
        raise ValueError(f"data.length: must be 1 or more, not {length}")
    for key, given in (("val", valid), ("test", test)):
        if isinstance(given, float | int) and not 0 < given < 1:
            raise ValueError(f"{KEYS[key]}: a fraction must be between 0 and 1, not {given}")
    if isinstance(valid, float) and isinstance(test, float) and valid + test >= 1:
        raise ValueError(f"data.valid: {valid} and data.test: {test} leave nothing to train on")
    if trim_silence is not None and not trim_silence > 0:
        raise ValueError(f"data.trim_silence: must be decibels above 0, as in 40, not {trim_silence}")

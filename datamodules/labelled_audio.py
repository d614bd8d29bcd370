"""Labelled clips of sound, all of one length, for a classifier."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .audio import RecordingsDataModule
from .augmentation import Augmentation
from .base import IGNORE, Samples
from .baselines import spectrum_accuracy
from .order import mix
from .recording_splits import Places
from .recordings import Recordings
from .waveform import Waveform, samples_of, stored
from .windows import Stretches


class LabelledAudioDataModule(RecordingsDataModule):
    """Labelled recordings, one a row: `inputs` (b, length), or (b, length, 1) of float samples, and `labels` (b,).

    A longer recording is cropped and a shorter one laid in silence: in training at a random place, otherwise in the
    middle. All that varies is off by default, is drawn anew on every pass, and is of training clips alone.

    Args:
        labels: see RecordingsDataModule; null for recordings that a model is to label (`mambazoo predict`): these are
            all of them, whatever valid and test say.
        shift: seconds by which a clip may moreover be moved out of the row, what leaves it being lost.
        speed, equalise, noise, gain, polarity: see augmentation.Augmentation.
        classes: what a model calls unlabelled recordings; a run that is asked to label them fills this in.
        recordings: see RecordingsDataModule.
    """

    def __init__(
        self,
        paths: str | list[str],
        labels: str | None,
        shift: float = 0.0,
        speed: float = 0.0,
        equalise: float = 0.0,
        noise: float | None = None,
        gain: float = 0.0,
        polarity: bool = False,
        classes: list[str] | None = None,
        **recordings: Any,
    ) -> None:
        if not shift >= 0:
            raise ValueError(f"data.shift: must be 0 seconds or more, not {shift}")
        self.shift = shift
        self.augmentation = Augmentation(speed, equalise, noise, gain, polarity)
        if (labels is None) == (classes is None):
            raise ValueError(
                "data.labels: must be given to learn or measure: folder, an expression or a table; null is for "
                "`mambazoo predict RUN`"
                if labels is None
                else "data.classes: are of unlabelled recordings; leave it out, or data.labels=null"
            )
        super().__init__(paths, labels=labels, **recordings)
        if classes is not None:
            self.classes, self.num_classes = classes, len(classes)
            self.waveform = Waveform(self.waveform.encoding, self.waveform.sample_rate, classes)

    def split(self, recordings: Recordings) -> dict[str, Places]:
        if self.labels is not None:
            return super().split(recordings)
        return {"test": recordings.places}

    def names(self) -> list[str]:
        assert self.recordings is not None, "before setup"
        return self.recordings.names_at(self.parts[self.tested].starts)

    def read_split(self, split: str, part: Stretches, labels: NDArray[np.int64] | None) -> Samples:
        if labels is None:
            labels = np.full(len(part.starts), IGNORE)
        clips = Clips(part, labels, self.waveform, self.length)
        return Varied(clips, self.augmentation, self.shift, self.seed) if split == "train" else clips

    def baselines(self) -> Iterator[tuple[str, float]]:
        yield "the commonest class, accuracy", self.majority["val"]
        train, held_out = (self._recordings(split) for split in ("train", "val"))
        rate = self.waveform.sample_rate
        accuracy = spectrum_accuracy(train, held_out, rate, len(self.classes))
        yield "regression on log-mel spectra, accuracy", accuracy

    def _recordings(self, split: str) -> tuple[list[NDArray[np.float32]], NDArray[np.int64]]:
        part = self.parts[split]
        places = zip(part.starts, part.ends, strict=True)
        return [samples_of(part.sequence.array[start:end]) for start, end in places], self.numbers[split]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = torch.from_numpy(np.stack([row["codes"] for row in rows]))
        return {
            "inputs": inputs[..., None] if inputs.is_floating_point() else inputs,
            "labels": torch.tensor([row["label"] for row in rows]),
        }


class Clips:
    """The middle of each recording, laid in silence where it is shorter; see base.Samples."""

    def __init__(self, part: Stretches, labels: NDArray[np.int64], waveform: Waveform, length: int) -> None:
        self.part, self.labels, self.waveform, self.length = part, labels, waveform, length

    def __len__(self) -> int:
        return len(self.part.starts)

    def read(self, index: int, pass_: int) -> dict[str, Any]:
        """The codes of a clip (length,), and its class."""
        start, end = int(self.part.starts[index]), int(self.part.ends[index])
        start += max(0, end - start - self.length) // 2
        clip = self.part.sequence.array[start : min(end, start + self.length)]
        return self.row(index, clip, (self.length - len(clip)) // 2)

    def row(self, index: int, clip: NDArray[np.int16], at: int) -> dict[str, Any]:
        """The row of a clip that begins at a place in it, or before it; what is outside is lost."""
        row = np.zeros(self.length, dtype=np.int16)
        clip = clip[max(0, -at) : max(0, self.length - at)]
        row[max(0, at) : max(0, at) + len(clip)] = clip
        return {"codes": self.waveform.read(row), "label": self.labels[index]}


class Varied:
    """Clips at random places, and varied; see base.Samples."""

    def __init__(self, clips: Clips, augmentation: Augmentation, shift: float, seed: int) -> None:
        self.clips, self.augmentation, self.seed = clips, augmentation, seed
        self.shift = round(shift * clips.waveform.sample_rate)

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, index: int, pass_: int) -> dict[str, Any]:
        """The codes of a clip (length,), and its class."""
        lots = np.random.Generator(np.random.SFC64(mix(self.seed, pass_, index)))
        part, length = self.clips.part, self.clips.length
        start, end = int(part.starts[index]), int(part.ends[index])
        span = self.augmentation.span(length)
        start += int(lots.integers(max(0, end - start - span) + 1))
        clip = np.asarray(part.sequence.array[start : min(end, start + span)])
        if self.augmentation:
            clip = stored(self.augmentation(samples_of(clip), self.clips.waveform.sample_rate, lots))
        # all of what is shorter is in the row, and all of the row in what is longer
        low, high = sorted((0, length - len(clip)))
        return self.clips.row(index, clip, int(lots.integers(low - self.shift, high + self.shift + 1)))

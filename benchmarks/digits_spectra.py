"""Whether a model that knows classes speaks as the recordings do: mel spectra of what it says beside those of people.

    python benchmarks/digits_spectra.py MODEL fsdd.zip docs/digits.png >> results.jsonl

The model says every class a few times, from silence; held-out recordings are the truth. A line is how far the
mean spectrum (decibels in each mel band, the bands' own mean taken off) of what is said is from that of the truth, over
bands, of other recordings as many, and of what the truth becomes when its samples are shuffled. The picture has a
recording of each class over one that was said.
"""

# mypy: allow-untyped-calls

import json
import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mambazoo.checkpoints.io import load
from mambazoo.datamodules.recordings import RecordingFiles, find_recordings
from mambazoo.datamodules.waveform import FULL_SCALE, Waveform
from mambazoo.recipes.recordings import spectrogram
from mambazoo.recipes.runs import origin
from mambazoo.zoo.audio import WaveformModel
from mambazoo.zoo.generate import Sampling, generate
from matplotlib.figure import Figure
from numpy.typing import NDArray

TIMES, SECONDS = 4, 0.6

Sound = NDArray[np.float32]


def mean_spectrum(sounds: list[Sound], rate: int) -> NDArray[np.float64]:
    """The mean over sounds of the power in each mel band, in decibels, without the mean over bands."""
    powers = [10 ** (spectrogram(torch.from_numpy(sound), rate) / 10) for sound in sounds]
    decibels = 10 * np.log10(np.mean([power.mean(1) for power in powers], 0))
    return decibels - decibels.mean()


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("recordings")
    parser.add_argument("picture")
    parser.add_argument("--labels", default=r"/(\d)_")
    parser.add_argument("--held-out", default=r"_[0-4]\.")
    arguments = parser.parse_args()
    model, kept = load(arguments.model)
    assert kept is not None
    waveform = Waveform.from_dict(kept)
    model.float().eval()
    classes, rate = waveform.classes, waveform.sample_rate
    files = RecordingFiles(find_recordings([arguments.recordings]), rate)
    files.build()
    recordings = files.open()
    truth: list[list[Sound]] = [[] for _ in classes]
    others: list[list[Sound]] = [[] for _ in classes]
    for i, name in enumerate(recordings.names):
        match = re.search(arguments.labels, name)
        if match is not None:
            stored = recordings.samples.array[recordings.starts[i] : recordings.starts[i + 1]]
            chosen = truth if re.search(arguments.held_out, name) else others
            chosen[classes.index(match[1])].append(stored.astype(np.float32) / np.float32(FULL_SCALE))
    generator = np.random.default_rng(0)
    other = [sounds[i] for sounds in others for i in generator.choice(len(sounds), TIMES, replace=False)]

    labels = torch.arange(len(classes)).repeat_interleave(TIMES)
    assert isinstance(model, WaveformModel)
    state, start = model.init_state(len(labels), labels), [[int(waveform.silence)]] * len(labels)
    seeds = list(range(len(labels)))
    drawn = generate(model, start, round(SECONDS * rate), Sampling(), seeds=seeds, state=state)
    codes = [[0 if token is None else token for token in tokens] for tokens in drawn]
    said = list(waveform.decode(np.array(codes).T))

    whole = [sound for sounds in truth for sound in sounds]
    of_truth = mean_spectrum(whole, rate)
    shuffled = [generator.permutation(sound) for sound in whole]
    archive = Path(arguments.recordings).name
    command = f"python benchmarks/digits_spectra.py {arguments.model} {archive} {arguments.picture}"
    known = origin(command)
    for what, sounds in (("said by the model", said), ("other recordings", other), ("shuffled", shuffled)):
        away = float(np.sqrt(((mean_spectrum(sounds, rate) - of_truth) ** 2).mean()))
        row: dict[str, Any] = {"suite": "spectra", "name": what, "shape": f"{len(sounds)} clips"}
        row |= {"value": round(away, 2), "unit": "dB from the truth"}
        print(json.dumps({**row, **known}), flush=True)

    figure = Figure(figsize=(10, 2.8), layout="constrained")
    panels = figure.subplots(2, len(classes), sharey=True)
    for column, name in enumerate(classes):
        for axes, sound in zip(panels[:, column], (truth[column][0], said[column * TIMES]), strict=True):
            picture = spectrogram(torch.from_numpy(sound), rate)
            seconds = len(sound) / rate
            axes.imshow(
                picture, origin="lower", aspect="auto", extent=(0, seconds, 0, len(picture)), cmap="magma"
            )
            axes.set(xlim=(0, SECONDS), xticks=[0, 0.5], yticks=[], facecolor="black")
        panels[0, column].set_title(name)
    for axes, what in zip(panels[:, 0], ("recorded", "said by the model"), strict=True):
        axes.set_ylabel(what)
    figure.savefig(arguments.picture, dpi=75, metadata={"Software": None})


if __name__ == "__main__":
    main()

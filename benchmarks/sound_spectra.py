"""Whether a model sounds as recordings do: mel spectra of what it says or plays beside those of recordings held out.

    python benchmarks/sound_spectra.py DIGITS fsdd.zip docs/digits.png --held-out '_[0-4]\\.' >> results.jsonl
    python benchmarks/sound_spectra.py RUN sample:bach-piano docs/piano.png --held-out 'BWV 254' >> results.jsonl

A model that knows classes says each of them a few times, from silence, and --labels finds a recording's class in its
name; another makes pieces of a few seconds, and recordings are cut into such. A line is how far the mean spectrum
(decibels in each mel band, the bands' own mean taken off) of what is made is from that of what was held out, over
bands, of other recordings as many, and of what was held out when its samples are shuffled. The picture has what was
recorded over what was made.
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

# how often a class is said and for how long; how many pieces are made without classes, how long, and how many are shown
TIMES, SAID = 4, 0.6
PIECES, PLAYED, SHOWN = 8, 4.0, 4

Sound = NDArray[np.float32]


def mean_spectrum(sounds: list[Sound], rate: int) -> NDArray[np.float64]:
    """The mean over sounds of the power in each mel band, in decibels, without the mean over bands."""
    powers = [10 ** (spectrogram(torch.from_numpy(sound), rate) / 10) for sound in sounds]
    decibels = 10 * np.log10(np.mean([power.mean(1) for power in powers], 0))
    return decibels - decibels.mean()


def read(given: str, rate: int) -> list[tuple[str, Sound]]:
    """Every recording of a folder, an archive or a sample, with its name."""
    files = RecordingFiles(find_recordings([given]), rate)
    files.build()
    recordings = files.open()
    starts = recordings.starts
    return [
        (
            name,
            recordings.samples.array[starts[i] : starts[i + 1]].astype(np.float32) / np.float32(FULL_SCALE),
        )
        for i, name in enumerate(recordings.names)
    ]


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("recordings")
    parser.add_argument("picture")
    parser.add_argument("--labels", default=r"/(\d)_")
    parser.add_argument("--held-out", required=True)
    arguments = parser.parse_args()
    model, kept = load(arguments.model)
    assert isinstance(model, WaveformModel)
    assert kept is not None
    waveform = Waveform.from_dict(kept)
    model.float().eval()
    rate = waveform.sample_rate
    # columns of the picture, each with what was held out and what was not
    titles = waveform.classes or [""]
    truth: list[list[Sound]] = [[] for _ in titles]
    others: list[list[Sound]] = [[] for _ in titles]
    for name, sound in read(arguments.recordings, rate):
        chosen = truth if re.search(arguments.held_out, name) else others
        if not waveform.classes:
            length = round(PLAYED * rate)
            chosen[0] += [sound[i : i + length] for i in range(0, len(sound) - length + 1, length)]
        elif match := re.search(arguments.labels, name):
            chosen[titles.index(match[1])].append(sound)
    each, seconds = (TIMES, SAID) if waveform.classes else (PIECES, PLAYED)
    generator = np.random.default_rng(0)
    other = [sounds[i] for sounds in others for i in generator.choice(len(sounds), each, replace=False)]

    labels = torch.arange(len(titles)).repeat_interleave(each)
    state = model.init_state(len(labels), labels if waveform.classes else None)
    start, seeds = [[int(waveform.silence)]] * len(labels), list(range(len(labels)))
    drawn = generate(model, start, round(seconds * rate), Sampling(), seeds=seeds, state=state)
    codes = [[0 if token is None else token for token in tokens] for tokens in drawn]
    made = list(waveform.decode(np.array(codes).T))

    whole = [sound for sounds in truth for sound in sounds]
    of_truth = mean_spectrum(whole, rate)
    shuffled = [generator.permutation(sound) for sound in whole]
    places = f"{Path(arguments.recordings).name} {arguments.picture} --held-out '{arguments.held_out}'"
    known = origin(f"python benchmarks/sound_spectra.py {arguments.model} {places}")
    for what, sounds in (("made by the model", made), ("other recordings", other), ("shuffled", shuffled)):
        away = float(np.sqrt(((mean_spectrum(sounds, rate) - of_truth) ** 2).mean()))
        row: dict[str, Any] = {"suite": "spectra", "name": what, "shape": f"{len(sounds)} of {seconds} s"}
        row |= {"value": round(away, 2), "unit": "dB from recordings held out"}
        print(json.dumps({**row, **known}), flush=True)

    if waveform.classes:
        shown = [(name, truth[i][0], made[i * each]) for i, name in enumerate(titles)]
    else:
        shown = [("", whole[i * (len(whole) // SHOWN)], made[i]) for i in range(SHOWN)]
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    panels = figure.subplots(2, len(shown), sharey=True)
    for column, (title, *sounds) in enumerate(shown):
        for axes, sound in zip(panels[:, column], sounds, strict=True):
            picture = spectrogram(torch.from_numpy(sound), rate)
            extent = (0, len(sound) / rate, 0, len(picture))
            axes.imshow(picture, origin="lower", aspect="auto", extent=extent, cmap="magma")
            axes.set(xlim=(0, seconds), xticks=[0, int(seconds) or 0.5], yticks=[], facecolor="black")
        panels[0, column].set_title(title)
    for axes, what in zip(panels[:, 0], ("recorded", "made by the model"), strict=True):
        axes.set_ylabel(what)
    figure.savefig(arguments.picture, dpi=75, metadata={"Software": None})


if __name__ == "__main__":
    main()

"""What `generate` does with a model of sound: recordings to listen to (.wav), and a picture of each (.png)."""

import dataclasses
import itertools
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..datamodules.waveform import Waveform
    from ..zoo.audio import WaveformModel
    from ..zoo.generate import Sampling

# samples that a WAV file has room for
_LONGEST = 1 << 30
# samples of a prompt that are read at once
_BLOCK = 1 << 14
# columns of a picture
_WIDTH = 1000


def add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("of sound")
    group.add_argument("--seconds", type=float, help="how long, behind the prompt; 4 if not given")
    group.add_argument("--label", help="of which class; without it, all classes in turn")


def write_recordings(
    model: "WaveformModel", vocabulary: dict[str, Any], arguments: Namespace, sampling: "Sampling"
) -> int:
    """Write `number` recordings for each prompt, a file of sound, or from silence; all of a prompt at once.

    Raises:
        ValueError: when a prompt cannot be read, or there is no such class.
    """
    from ..datamodules.sound import SUFFIXES
    from ..datamodules.waveform import Waveform
    from .bar import progress

    if arguments.temperature is None:
        sampling = dataclasses.replace(sampling, temperature=1.0)
    sound = Waveform.from_dict(vocabulary)
    seconds = 4.0 if arguments.seconds is None else arguments.seconds
    if not 1 <= seconds * sound.sample_rate < _LONGEST:
        raise ValueError(
            f"--seconds: must be a sample or more, and less than {_LONGEST // sound.sample_rate}, not {seconds:g}"
        )
    steps = round(seconds * sound.sample_rate)
    labels = _labels(arguments.label, model, sound, arguments.number)
    prompts = {Path(given).stem: _read(given, sound) for given in arguments.prompt or []}
    if len(prompts) < len(arguments.prompt or []):
        raise ValueError("--prompt: two files have one name, and what is written is called after them")
    folder = Path(arguments.output or "recordings").expanduser()
    if folder.suffix.lower() in SUFFIXES and not folder.is_dir():
        raise ValueError(f"--output: {folder} is the name of a file; give that of a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: {folder} cannot be made a folder ({error.strerror})") from None
    seeds = [arguments.seed + i for i in range(arguments.number)]
    for name, prompt in (prompts or {"": sound.encode([])}).items():
        with progress(f"writing {arguments.number} x", steps) as advance:
            codes = _write_on(model, sound, prompt, labels, steps, sampling, seeds, advance)
        for i, (row, seed) in enumerate(zip(codes, seeds, strict=True)):
            kind = name or (sound.classes[labels[i]] if labels and sound.classes else "recording")
            path = folder / f"{kind}-{seed}.wav"
            _save(path, sound.decode(row), sound.sample_rate, len(prompt))
            print(path)
    return 0


def _labels(given: str | None, model: "WaveformModel", sound: "Waveform", number: int) -> list[int] | None:
    """The class of each recording; None where the model knows none."""
    if model.num_classes is None:
        if given is not None:
            raise ValueError("--label: this model knows no classes; it was trained on all recordings alike")
        return None
    names = sound.classes or [str(i) for i in range(model.num_classes)]
    if given is None:
        return [i % model.num_classes for i in range(number)]
    if given not in names:
        from ..zoo.values import nearest

        raise ValueError(f"--label: {given!r} is none of {', '.join(names)}{nearest(given, names)}")
    return [names.index(given)] * number


def _read(given: str, sound: "Waveform") -> "NDArray[np.uint8]":
    """The codes of a file of sound, at the model's rate."""
    import numpy as np

    from ..datamodules.sound import read_sound

    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"--prompt: there is no file {given}; give one of sound to go on with")
    try:
        return sound.encode(np.concatenate(list(read_sound(path, sound.sample_rate))))
    except ValueError as error:
        raise ValueError(f"--prompt: {given}: {error}") from None


def _write_on(
    model: "WaveformModel",
    sound: "Waveform",
    prompt: "NDArray[np.uint8]",
    labels: list[int] | None,
    steps: int,
    sampling: "Sampling",
    seeds: list[int],
    advance: Any,
) -> "NDArray[np.uint8]":
    """The codes of the prompt and `steps` more, a row for each seed."""
    import numpy as np
    import torch

    from ..zoo.generate import generate, pick

    # the prompt is read once for each class, whatever is made of it
    kinds = sorted(set(labels)) if labels else [0]
    rows = [kinds.index(label) for label in labels] if labels else [0] * len(seeds)
    history = torch.tensor([sound.silence, *prompt], dtype=torch.long, device=model.device)
    with torch.inference_mode():
        chosen = torch.tensor(kinds, device=model.device) if labels else None
        state: list[Any] | None = model.init_state(len(kinds), chosen)
        for part in history[:-1].split(_BLOCK) if len(prompt) else ():
            _, state = model.mix(part.expand(len(kinds), -1), state=state)
        state = pick(state, torch.tensor(rows, device=model.device))
    codes = np.empty((len(seeds), len(prompt) + steps), dtype=np.uint8)
    codes[:, : len(prompt)] = prompt
    last = [[int(history[-1])]] * len(seeds)
    for t, drawn in enumerate(generate(model, last, steps, sampling, seeds=seeds, state=state), len(prompt)):
        codes[:, t] = np.array(drawn)
        advance(1)
    return codes


def _save(path: Path, samples: "NDArray[np.float32]", rate: int, start: int) -> None:
    """Write a recording and its picture, each whole or not at all."""
    import soundfile

    from ..zoo.saving import write_whole

    write_whole(path, lambda file: soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16"))
    figure = draw(samples, rate, start)
    write_whole(path.with_suffix(".png"), lambda file: figure.savefig(file, format="png", dpi=100))


def draw(samples: "NDArray[np.float32]", rate: int, start: int = 0) -> Any:
    """A figure of a waveform (l,) over its mel spectrogram, with a line where the prompt ends, at sample `start`."""
    import numpy as np
    import torch
    from matplotlib.figure import Figure

    seconds = len(samples) / rate
    figure = Figure(figsize=(10, 5), layout="constrained")
    wave, mel = figure.subplots(2, sharex=True)
    # what is drawn of a column is from its least to its greatest sample, the last one of the column before among them
    bounds = np.linspace(0, len(samples), min(_WIDTH, len(samples)) + 1).astype(int)
    columns = [samples[max(0, low - 1) : high] for low, high in itertools.pairwise(bounds)]
    least, most = [column.min() for column in columns], [column.max() for column in columns]
    # an edge is seen where there is no area
    wave.fill_between(bounds[1:] / rate, least, most, color="C0", linewidth=0.5)
    wave.set(ylabel="amplitude", ylim=(-1, 1))
    decibels = spectrogram(torch.from_numpy(samples), rate)
    mel.imshow(decibels, origin="lower", aspect="auto", extent=(0, seconds, 0, len(decibels)), cmap="magma")
    mel.set(xlabel="seconds", ylabel="mel band", xlim=(0, seconds))
    for axes in (wave, mel):
        if start:
            axes.axvline(start / rate, color="tab:red", linewidth=1)
    return figure


def spectrogram(samples: "Tensor", rate: int) -> "NDArray[np.float32]":
    """The mel spectrogram (bands, frames) of samples (l,), in decibels below its loudest."""
    import torch
    from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

    # windows of some 50 ms, in which speech and music stand still
    window = 1 << max(5, (rate // 20).bit_length())
    padded = torch.nn.functional.pad(samples, (0, max(0, window - len(samples))))
    bands = MelSpectrogram(rate, window, hop_length=window // 4, n_mels=window // 16)(padded)
    decibels = AmplitudeToDB(top_db=80)(bands)
    return (decibels - decibels.max()).numpy()

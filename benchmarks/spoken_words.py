"""Words said by four synthetic voices, as an archive of clips whose names begin with a word's place: 3_awb_17.flac.

    apt install flite
    python benchmarks/spoken_words.py voices.zip zero one two three four five six seven eight nine

They are for learning to tell words apart where few people were recorded, as further paths beside theirs. Words take
turns and so do voices; how long a clip is and how high its voice are drawn. The same flite and the same seed write the
same bytes.
"""

import io
import shutil
import subprocess
import tempfile
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from numpy.typing import NDArray

# flite's voices without those for telling the time, and how high they are, hertz; rms does not let itself be moved
VOICES = {"awb": 120, "kal16": 105, "rms": 95, "slt": 170}
# times as long, and as high
_LENGTH, _HEIGHT = (0.8, 1.4), (0.8, 1.25)
# of the loudest sample; and seconds of silence that are left before and after a word
_SILENCE, _AROUND = 0.01, 0.02


def say(word: str, voice: str, length: float, height: float, rate: int) -> NDArray[np.float32]:
    """A word without silence around it, its loudest sample at 0.9."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "word.wav")
        hertz = round(VOICES[voice] * height)
        features = [f"duration_stretch={length:.3f}", f"int_f0_target_mean={hertz}"]
        command = ["flite", "-voice", voice, "--setf", features[0], "--setf", features[1], "-t", word]
        subprocess.run([*command, "-o", str(file)], check=True)
        written, own = soundfile.read(file, dtype="float32")
    if not np.any(written):
        raise SystemExit(f"flite says nothing of {word!r}; give a word")
    sound = torchaudio.functional.resample(torch.from_numpy(written), own, rate).numpy()
    loudest = np.abs(sound).max()
    loud = np.flatnonzero(np.abs(sound) > _SILENCE * loudest)
    around = round(_AROUND * rate)
    return 0.9 / loudest * sound[max(0, loud[0] - around) : loud[-1] + around]


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("words", nargs="+")
    parser.add_argument("--number", type=int, default=600)
    parser.add_argument("--sample-rate", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if shutil.which("flite") is None:
        raise SystemExit("flite is not there; install it, as by apt install flite")
    lots, rate = np.random.default_rng(arguments.seed), arguments.sample_rate
    with zipfile.ZipFile(arguments.output, "w") as archive:
        for number in range(arguments.number):
            round_, place = divmod(number, len(arguments.words))
            voice = sorted(VOICES)[round_ % len(VOICES)]
            sound = say(arguments.words[place], voice, lots.uniform(*_LENGTH), lots.uniform(*_HEIGHT), rate)
            file = io.BytesIO()
            soundfile.write(file, sound, rate, format="FLAC", subtype="PCM_16")
            archive.writestr(zipfile.ZipInfo(f"voices/{place}_{voice}_{number}.flac"), file.getvalue())


if __name__ == "__main__":
    main()

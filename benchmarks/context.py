"""How much a model gains from context: bits a base, sample or byte by the length of windows, and by distance.

    python benchmarks/context.py dna-7m genome.fa.gz --lengths 1024 8192 65536 >> results.jsonl
    python benchmarks/context.py audio-3m recordings/*.mp3 --lengths 2048 16384 131072 --held-out 0.1 >> results.jsonl
    python benchmarks/context.py language-3m valid.jsonl.xz --lengths 256 2048 --held-out 1 >> results.jsonl

Windows lie end to end over the last part of every record, recording or document, for all lengths over the same tokens.
A line is one number, as `mambazoo bench` writes them: the bits of whole windows, and what tokens at a place in a long
window, so many from its start, gain over the shortest windows.
"""

# mypy: allow-untyped-calls

import json
import math
from argparse import ArgumentParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mambazoo.checkpoints.io import load
from mambazoo.datamodules.alphabet import EOS, IGNORE, targets_of, tokens_of
from mambazoo.datamodules.documents import find_sources
from mambazoo.datamodules.genome import find_genomes
from mambazoo.datamodules.sound import read_sound
from mambazoo.datamodules.vocab import Bytes
from mambazoo.datamodules.waveform import Waveform
from mambazoo.recipes.runs import origin
from torch import Tensor

# tokens of a batch
BATCH = 65536


def of_genomes(files: list[str], held_out: float) -> list[tuple[Tensor, Tensor]]:
    """The tokens (t,) and targets (t,) of the last part of every record."""
    found = []
    for given in find_genomes(files):
        given.build()
        genome = given.open()
        for name in genome.names:
            size = genome.length(name)
            record = genome.read(name, size - round(size * held_out), size)
            found.append(
                (torch.from_numpy(tokens_of(record)), torch.from_numpy(targets_of(record).copy()).long())
            )
    return found


def of_recordings(files: list[str], held_out: float, waveform: Waveform) -> list[tuple[Tensor, Tensor]]:
    """The codes of the last part of every recording, once as tokens (t,) and once as targets."""
    sounds = [np.concatenate(list(read_sound(Path(file), waveform.sample_rate))) for file in files]
    ends = [sound[len(sound) - round(len(sound) * held_out) :] for sound in sounds]
    codes = [torch.from_numpy(waveform.encode(end)) for end in ends]
    return [(code, code.long()) for code in codes]


def of_documents(files: list[str], held_out: float) -> list[tuple[Tensor, Tensor]]:
    """The bytes of the last part of every document, once as tokens (t,) and once as targets."""
    texts = [b"".join(document) for source in find_sources(files) for document in source.documents()]
    ends = [text[len(text) - round(len(text) * held_out) :] for text in texts]
    codes = [torch.frombuffer(bytearray(end), dtype=torch.uint8) for end in ends if end]
    return [(code.int(), code.long()) for code in codes]


@torch.inference_mode()
def bits(model: Any, tokens: Tensor, targets: Tensor, length: int, first: int) -> Tensor:
    """The bits of every token (t,) in windows of a length that divides their number; NaN where none is known."""
    found = []
    rows = max(1, BATCH // length)
    parts = zip(tokens.view(-1, length).split(rows), targets.view(-1, length).split(rows), strict=True)
    for part, asked in parts:
        part, asked = part.long().to(model.device), asked.to(model.device)
        logits, _ = model(F.pad(part[:, :-1], (1, 0), value=first))
        losses = F.cross_entropy(logits.mT.float(), asked, ignore_index=IGNORE, reduction="none")
        found.append((losses.masked_fill(asked == IGNORE, math.nan).flatten() / math.log(2)).cpu())
    return torch.cat(found)


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--lengths", type=int, nargs="+", required=True)
    parser.add_argument("--held-out", type=float, default=0.05)
    arguments = parser.parse_args()
    held = arguments.held_out
    model, kept = load(arguments.model)
    model.float().eval().to("cuda" if torch.cuda.is_available() else "cpu")
    assert kept is not None
    if kept["kind"] == "waveform":
        waveform = Waveform.from_dict(kept)
        records, first, what = of_recordings(arguments.files, held, waveform), int(waveform.silence), "sample"
    elif kept["kind"] == "bytes":
        records, first, what = of_documents(arguments.files, held), Bytes.eos, "byte"
    else:
        records, first, what = of_genomes(arguments.files, held), EOS, "base"
    # filled up to what all lengths divide
    step = math.lcm(*arguments.lengths)
    filled = [
        [F.pad(x, (0, -len(x) % step), value=fill) for x, fill in zip(record, (first, IGNORE), strict=True)]
        for record in records
    ]
    tokens, targets = (torch.cat(parts) for parts in zip(*filled, strict=True))
    names = " ".join(Path(file).name for file in arguments.files)
    lengths = " ".join(map(str, arguments.lengths))
    options = f"--lengths {lengths} --held-out {held}"
    command = f"python benchmarks/context.py {arguments.model} {names} {options}"
    known = origin(command)

    def say(name: str, shape: str, value: Tensor) -> None:
        row = {
            "suite": "context",
            "name": name,
            "shape": shape,
            "value": round(float(value), 4),
            "unit": f"bits per {what}",
        }
        print(json.dumps({**row, **known}), flush=True)

    shortest, *longer = sorted(arguments.lengths)
    short = bits(model, tokens, targets, shortest, first)
    say("windows", str(shortest), short.nanmean())
    for length in longer:
        long = bits(model, tokens, targets, length, first)
        say("windows", str(length), long.nanmean())
        gain = (short - long).view(-1, length)
        edges = [low for low in (1 << i for i in range(length.bit_length())) if shortest <= low <= length]
        for low, high in pairwise(edges):
            say(
                f"gain in windows of {length} over {shortest}",
                f"{low} to {high}",
                gain[:, low:high].nanmean(),
            )


if __name__ == "__main__":
    main()

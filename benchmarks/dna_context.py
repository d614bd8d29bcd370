"""How much a model of the next base gains from context: bits per base by the length of windows, and by distance.

    python benchmarks/dna_context.py MODEL genome.fa.gz 1024 8192 65536 --held-out 0.05 >> results.jsonl

Windows lie end to end over the last part of every record, for all lengths over the same bases. A line is one number, as
`mambazoo bench` writes them: the bits of whole windows, and what bases at a place in a long window, so many bases
from its start, gain over the shortest windows.
"""

# mypy: allow-untyped-calls

import json
import math
from argparse import ArgumentParser
from itertools import pairwise

import torch
import torch.nn.functional as F
from mambazoo import from_pretrained
from mambazoo.datamodules.alphabet import EOS, IGNORE, targets_of, tokens_of
from mambazoo.datamodules.genome import find_genomes
from mambazoo.recipes.runs import environment
from torch import Tensor

# bases of a batch
BATCH = 65536


@torch.inference_mode()
def bits(model: torch.nn.Module, tokens: Tensor, targets: Tensor, length: int) -> Tensor:
    """The bits of every base (t,) in windows of a length that divides their number; NaN where none is known."""
    found = []
    seen = F.pad(tokens.view(-1, length)[:, :-1], (1, 0), value=EOS)
    rows = max(1, BATCH // length)
    for part, asked in zip(seen.split(rows), targets.view(-1, length).split(rows), strict=True):
        logits, _ = model(part)
        losses = F.cross_entropy(logits.mT.float(), asked, ignore_index=IGNORE, reduction="none")
        found.append(losses.masked_fill(asked == IGNORE, math.nan).flatten() / math.log(2))
    return torch.cat(found)


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("genome")
    parser.add_argument("lengths", type=int, nargs="+")
    parser.add_argument("--held-out", type=float, default=0.05)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = from_pretrained(arguments.model, dtype=torch.float32).to(device)
    [files] = find_genomes([arguments.genome])
    files.build()
    genome = files.open()
    parts = [
        genome.read(
            name, genome.length(name) - round(genome.length(name) * arguments.held_out), genome.length(name)
        )
        for name in genome.names
    ]
    # as many as all lengths divide
    step = math.lcm(*arguments.lengths)
    parts = [part[: len(part) // step * step] for part in parts]
    tokens = torch.cat([torch.from_numpy(tokens_of(part)) for part in parts]).long().to(device)
    targets = torch.cat([torch.from_numpy(targets_of(part).copy()) for part in parts]).long().to(device)
    surroundings = {
        key: value for key, value in environment().items() if key in ("commit", "hardware", "versions")
    }
    command = f"python benchmarks/dna_context.py {arguments.model} {files.name} {' '.join(map(str, arguments.lengths))}"

    def say(name: str, shape: str, value: Tensor) -> None:
        row = {
            "suite": "context",
            "name": name,
            "shape": shape,
            "value": round(float(value), 4),
            "unit": "bits per base",
        }
        print(json.dumps({**row, "command": command, **surroundings}), flush=True)

    shortest, *longer = sorted(arguments.lengths)
    short = bits(model, tokens, targets, shortest)
    say("windows", str(shortest), short.nanmean())
    for length in longer:
        long = bits(model, tokens, targets, length)
        say("windows", str(length), long.nanmean())
        gain = (short - long).view(-1, length)
        edges = [low for low in (1 << i for i in range(length.bit_length())) if shortest <= low <= length]
        for low, high in pairwise(edges):
            say(f"gain over windows of {shortest}", f"{low} to {high}", gain[:, low:high].nanmean())


if __name__ == "__main__":
    main()

"""Whether a model writes DNA with the words of a genome: k-mers of what it writes beside those of what it has not seen.

    python benchmarks/dna_spectrum.py MODEL genome.fa.gz docs/dna-spectrum.png --held-out 0.05 >> results.jsonl

Prompts are windows from the last part of the first record; the model goes on from each, and what the genome has there
is the truth that it is compared with. A line is the divergence of Jensen and Shannon, in bits, between the k-mers of
the truth and those that the model wrote, of another stretch of the genome, and of bases drawn one by one.
"""

# mypy: allow-untyped-calls

import json
from argparse import ArgumentParser
from typing import Any

import numpy as np
import torch
from mambazoo import from_pretrained
from mambazoo.datamodules.alphabet import EOS, tokens_of
from mambazoo.datamodules.genome import find_genomes
from mambazoo.recipes.runs import origin
from mambazoo.zoo.generate import Sampling, generate
from matplotlib.figure import Figure
from numpy.typing import NDArray

K = 6
ROWS, PROMPT, LENGTH = 64, 1024, 2048


def counts(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each of the 4^K words of A C G T occurs in rows (r, l) of tokens; others are left out."""
    words = np.lib.stride_tricks.sliding_window_view(rows, K, axis=1)
    known = words[(words < 4).all(-1)]
    return np.bincount(known @ 4 ** np.arange(K), minlength=4**K)


def divergence(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    p, q = a / a.sum(), b / b.sum()
    middle = (p + q) / 2

    def away(x: NDArray[np.float64]) -> float:
        return float((x[x > 0] * np.log2(x[x > 0] / middle[x > 0])).sum())

    return (away(p) + away(q)) / 2


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("genome")
    parser.add_argument("picture")
    parser.add_argument("--held-out", type=float, default=0.05)
    arguments = parser.parse_args()
    model: Any = from_pretrained(arguments.model, dtype=torch.float32)
    [files] = find_genomes([arguments.genome])
    files.build()
    genome = files.open()
    name, size = genome.names[0], genome.length(genome.names[0])
    first = size - round(size * arguments.held_out)
    step = (size - first) // ROWS
    rows = np.stack(
        [tokens_of(genome.read(name, at, at + step)) for at in range(first, first + ROWS * step, step)]
    ).astype(np.int64)
    # as many bases from elsewhere as are written
    truth, other = rows[:, PROMPT : PROMPT + LENGTH], rows[:, -LENGTH:]
    prompts = [[EOS, *row] for row in rows[:, :PROMPT].tolist()]
    written: list[list[int]] = [[] for _ in prompts]
    sampling = Sampling(temperature=1.0)
    for tokens in generate(model, prompts, LENGTH, sampling, seeds=list(range(ROWS))):
        for line, token in zip(written, tokens, strict=True):
            if token is not None:
                line.append(token)
    generator = np.random.default_rng(0)
    share = np.bincount(truth[truth < 4], minlength=4) / (truth < 4).sum()
    drawn = generator.choice(4, size=truth.shape, p=share)
    spectra = {
        "the truth": counts(truth),
        "written by the model": counts(np.array(written)),
        "elsewhere in the genome": counts(other),
        "bases one by one": counts(drawn),
    }
    command = f"python benchmarks/dna_spectrum.py {arguments.model} {files.name} {arguments.picture}"
    known = origin(command)
    of_truth = spectra.pop("the truth")
    for what, spectrum in spectra.items():
        row: dict[str, Any] = {
            "suite": "spectrum",
            "name": what,
            "shape": f"{K}-mers of {ROWS} x {LENGTH}",
        }
        row |= {"value": round(divergence(of_truth, spectrum), 4), "unit": "bits from the truth"}
        print(json.dumps({**row, **known}), flush=True)

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(spectra), sharex=True, sharey=True)
    for axes, (what, spectrum) in zip(panels, spectra.items(), strict=True):
        axes.loglog(of_truth + 0.5, spectrum + 0.5, ".", markersize=2, alpha=0.3)
        axes.set(title=what, xlabel=f"count of a {K}-mer in the truth")
        axes.plot([1, of_truth.max()], [1, of_truth.max()], color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("count here")
    figure.savefig(arguments.picture, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()

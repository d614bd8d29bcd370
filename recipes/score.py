"""The verb `score`: the variants of a VCF file, each ALT allele with its log-likelihood against REF (see scorer.py)."""

import hashlib
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .dna import add_arguments as add_common_arguments
from .dna import check_input, check_output, load_model, open_genome

if TYPE_CHECKING:
    from ..datamodules.variants import Variant, VariantFile
    from .partial import PartialFile
    from .scorer import Outcome, Scorer

NAME, SUMMARY = "score", "score the variants of a VCF file with a model of DNA"
INFO, STATUS = "MAMBAZOO_DLL", "MAMBAZOO_STATUS"
MARK = "##mambazoo_score="
_MEANING = "log-likelihood with ALT less that with REF, in nats"
_REASON = "scored, or why an allele could not be"
_COLUMNS = ("chrom", "pos", "id", "ref", "alt", "score", "ref_ll", "alt_ll", "status")
# alleles at a time on a GPU, and on a CPU; alleles left out for one reason that are shown
_BATCH, _CPU_BATCH, _SHOWN = 512, 32, 5


def add_arguments(parser: ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--vcf", required=True, help="the variants: a VCF file, plain, gzip or bgzip")
    parser.add_argument(
        "--output",
        required=True,
        help=f"a table (.tsv), or the VCF with {INFO} in its INFO (.vcf), packed by bgzip where .gz follows; the same "
        "command goes on with what a kill left unfinished",
    )
    parser.add_argument("--window", type=int, default=1024, help="bases to read round one that changes")
    parser.add_argument("--strand", choices=("both", "forward"), default="both")
    parser.add_argument(
        "--batch-size", type=int, help=f"alleles at a time; {_BATCH} on a GPU, else {_CPU_BATCH}"
    )


def run(arguments: Namespace) -> int:
    for option in ("window", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be 1 or more, not {value}")
    path = check_output(arguments.output, ".tsv", ".tsv.gz", ".vcf", ".vcf.gz")
    vcf = check_input(arguments.vcf, "--vcf")

    from ..datamodules.variants import VariantFile
    from ..zoo.genomics import GenomeModel
    from .bar import progress
    from .partial import PartialFile
    from .scorer import Scorer

    variants = VariantFile(vcf)
    table = path.name.removesuffix(".gz").endswith(".tsv")
    layout: _Layout = _Table() if table else _AnnotatedVariants(variants)
    model = load_model(arguments.checkpoint, arguments.device, scores=True)
    if not isinstance(model, GenomeModel):
        raise ValueError(f"{arguments.checkpoint} is a {type(model).__name__}, which gives no likelihoods")
    genome = open_genome(arguments.fasta)
    scorer = Scorer(model, genome, arguments.window, both_strands=arguments.strand == "both")
    counts = _examine(variants, scorer)
    with PartialFile(path, layout.head, MARK, _made_of(arguments, scorer, vcf)) as output:
        if output.finished:
            print(f"{path} is there and whole; remove it to have it made again")
            return 0
        done, alleles = _go_on(output, variants, layout)
        size = arguments.batch_size or (_BATCH if model.device.type == "cuda" else _CPU_BATCH)
        started, count = time.monotonic(), counts.total() - alleles
        with progress("scoring", counts.total(), alleles) as advance:
            for batch in scorer.run(_batches(islice(variants, done, None), size)):
                output.write("".join(f"{line}\n" for row in batch for line in layout.lines(*row)))
                advance(sum(len(outcomes) for _, outcomes in batch))
        output.finish()
    seconds = time.monotonic() - started
    print(f"{counts['scored']} of {counts.total()} alleles scored{_left_out(counts)}: {path}")
    print(f"{count} in {seconds:.1f} s, {count / max(seconds, 1e-9):,.1f} a second", file=sys.stderr)
    return 0


class _Layout(Protocol):
    """What an output looks like."""

    def head(self, mark: str) -> str: ...

    def rows(self, variant: "Variant") -> int:
        """How many lines a variant takes."""
        ...

    def lines(self, variant: "Variant", outcomes: "list[Outcome]") -> Iterator[str]: ...


class _Table:
    """A row for each ALT allele, columns parted by tabs."""

    def head(self, mark: str) -> str:
        return f"{mark}\n# score = alt_ll - ref_ll: {_MEANING}\n" + "\t".join(_COLUMNS) + "\n"

    def rows(self, variant: "Variant") -> int:
        return len(variant.alts)

    def lines(self, variant: "Variant", outcomes: "list[Outcome]") -> Iterator[str]:
        record, _, id = variant.text.split("\t", 3)[:3]
        for alt, outcome in zip(variant.alts, outcomes, strict=True):
            if isinstance(outcome, list):
                ref_ll, alt_ll = outcome
                values = [f"{alt_ll - ref_ll:.6f}", f"{ref_ll:.6f}", f"{alt_ll:.6f}", "scored"]
            else:
                values = ["NA", "NA", "NA", outcome.status]
            yield "\t".join([record, str(variant.position + 1), id, variant.ref, alt, *values])


class _AnnotatedVariants:
    """The VCF file as it is, with the score of every ALT allele in INFO, and their status where one has none."""

    def __init__(self, variants: "VariantFile") -> None:
        self.header = variants.header
        for key in (INFO, STATUS):
            if any(line.startswith(f"##INFO=<ID={key},") for line in self.header):
                raise ValueError(
                    f"--vcf: {variants.path} has {key} in INFO already; give the file without it"
                )

    def head(self, mark: str) -> str:
        fields = [
            f'##INFO=<ID={INFO},Number=A,Type=Float,Description="{_MEANING} (mambazoo)">',
            f'##INFO=<ID={STATUS},Number=A,Type=String,Description="{_REASON} (mambazoo)">',
        ]
        return "\n".join([*self.header[:-1], *fields, mark, self.header[-1], ""])

    def rows(self, variant: "Variant") -> int:
        return 1

    def lines(self, variant: "Variant", outcomes: "list[Outcome]") -> Iterator[str]:
        values = [f"{one[1] - one[0]:.6f}" if isinstance(one, list) else "." for one in outcomes]
        statuses = ["scored" if isinstance(one, list) else one.status for one in outcomes]
        fields = variant.text.split("\t")
        info = [] if fields[7] == "." else [fields[7]]
        if "scored" in statuses:
            info.append(f"{INFO}={','.join(values)}")
        if "." in values:
            info.append(f"{STATUS}={','.join(statuses)}")
        fields[7] = ";".join(info) or "."
        yield "\t".join(fields)


def _examine(variants: "VariantFile", scorer: "Scorer") -> Counter[str]:
    """How many alleles there are of every status; what is wrong with the file is said before anything is scored.

    Raises:
        ValueError: for what is no VCF, and when not one of its alleles can be scored.
    """
    from ..datamodules.variants import Skip

    counts: Counter[str] = Counter()
    for variant in variants:
        for alt, found in zip(variant.alts, scorer.changes(variant), strict=True):
            status = found.status if isinstance(found, Skip) else "scored"
            counts[status] += 1
            if isinstance(found, Skip) and counts[status] <= _SHOWN:
                more = "; of others like it only the number is said" if counts[status] == _SHOWN else ""
                print(
                    f"{variants.path}, line {variant.line}: {alt} is left out: {found.reason}{more}",
                    file=sys.stderr,
                )
    if counts and not counts["scored"]:
        raise ValueError(f"--vcf: {variants.path} has no allele that can be scored{_left_out(counts)}")
    return counts


def _go_on(output: "PartialFile", variants: "VariantFile", layout: "_Layout") -> tuple[int, int]:
    """How many variants and alleles are in an output that is not finished; what is half written of one is dropped."""
    done, alleles, rows = 0, 0, 0
    for variant in variants:
        if rows + layout.rows(variant) > output.lines:
            break
        done, alleles, rows = done + 1, alleles + len(variant.alts), rows + layout.rows(variant)
    output.keep(rows)
    if rows:
        print(f"going on behind line {rows} of {output.part}", file=sys.stderr)
    return done, alleles


def _left_out(counts: Counter[str]) -> str:
    reasons = [f"{number} {status}" for status, number in counts.most_common() if status != "scored"]
    return f" (left out: {', '.join(reasons)})" if reasons else ""


def _made_of(arguments: Namespace, scorer: "Scorer", vcf: Path) -> dict[str, Any]:
    """All that decides the scores, which the output keeps: a run with something else does not go on with it.

    Files are known by their contents, wherever they lie.
    """
    import torch

    from .. import __version__
    from .device import precision

    weights = hashlib.sha256()
    for name, tensor in scorer.model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    with vcf.open("rb") as file:
        variants = hashlib.file_digest(file, "sha256")
    return {
        "version": __version__,
        "weights": weights.hexdigest()[:16],
        "fasta": scorer.genome.digest[:16],
        "vcf": variants.hexdigest()[:16],
        "window": arguments.window,
        "strand": arguments.strand,
        "precision": precision(scorer.model.device),
    }


def _batches(variants: Iterable["Variant"], size: int) -> Iterator[list["Variant"]]:
    """Variants in lists of about `size` alleles."""
    batch: list[Variant] = []
    alleles = 0
    for variant in variants:
        batch.append(variant)
        alleles += max(1, len(variant.alts))
        if alleles >= size:
            yield batch
            batch, alleles = [], 0
    if batch:
        yield batch

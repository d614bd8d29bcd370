"""Where the sequences of labelled tables lie in a genome, on either strand, as a BED file for data.hide.

    python benchmarks/find_intervals.py genome.fa.gz tables/*/train.tsv.gz > hide.bed

Sequences that do not occur letter for letter, such as those of other chromosomes, are counted and left out.
"""

# mypy: allow-untyped-calls

import csv
import gzip
import sys
from collections import defaultdict

from Bio import SeqIO
from Bio.Seq import reverse_complement

# letters by which places to look at are found
SEED = 24


def main(genome: str, tables: list[str]) -> None:
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    for table in tables:
        with gzip.open(table, "rt") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                for sequence in (row["sequence"].upper(), reverse_complement(row["sequence"].upper())):
                    wanted[sequence[:SEED]].add(sequence)
    found = 0
    with gzip.open(genome, "rt") as file:
        for record in SeqIO.parse(file, "fasta"):
            letters = str(record.seq).upper()
            for start in range(len(letters) - SEED + 1):
                for sequence in wanted.get(letters[start : start + SEED], ()):
                    if letters.startswith(sequence, start):
                        print(record.id, start, start + len(sequence), sep="\t")
                        found += 1
    print(f"{found} intervals of {sum(map(len, wanted.values())) // 2} sequences", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

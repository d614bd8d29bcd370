"""What models write, by the kind of their vocabulary: how a prompt is read, what is shown, what a file holds.

A medium is told what is to be continued (`begin`), every token as it is drawn (`push`), and when all are (`finish`).
Another kind of output is one more class, and its line in MEDIA.
"""

import sys
from pathlib import Path

from ..datamodules.vocab import Vocabulary
from ..zoo.saving import write_whole

# letters of a line of FASTA
_WIDTH = 70


class Text:
    """Text on standard output, as it is written where there is but one; or in a file."""

    # what names of files may end in, if not in anything
    endings: tuple[str, ...] = ()

    def __init__(self, words: Vocabulary, output: Path | None) -> None:
        self.words, self.output = words, output

    def read(self, given: str) -> bytes:
        """What --prompt gives: standard input for -, the content of a file of that name, else the text itself."""
        if given == "-":
            return sys.stdin.buffer.read()
        try:
            path = Path(given)
            if path.is_file():
                return path.read_bytes()
        except OSError:
            # too long, or otherwise impossible, for a file name
            pass
        return given.encode("utf-8", errors="surrogateescape")

    def encode(self, prompt: bytes) -> list[int]:
        """The tokens of a prompt."""
        return [self.words.eos, *self.words.encode(prompt).tolist()]

    def begin(self, prompts: list[bytes], labels: list[str]) -> None:
        """Make ready to continue prompts, each under a label of its own."""
        self.prompts, self.labels = [prompt.decode("utf-8", errors="replace") for prompt in prompts], labels
        self.streams = [self.words.stream() for _ in prompts]
        self.written = ["" for _ in prompts]
        self.live = self.output is None and len(prompts) == 1
        self._show(self.prompts[0])

    def push(self, i: int, token: int) -> None:
        self._add(i, self.streams[i].push(token))

    def finish(self) -> None:
        for i, stream in enumerate(self.streams):
            self._add(i, stream.flush())
        if self.output is not None:
            content = self.content().encode("utf-8")
            write_whole(self.output, lambda file: file.write(content))
            print(self.output)
        elif self.live:
            self._show("\n")
        else:
            print(self.content(), end="")

    def content(self) -> str:
        """All that was written, as a file holds it."""
        texts = [prompt + text for prompt, text in zip(self.prompts, self.written, strict=True)]
        if len(texts) == 1:
            return texts[0] + "\n"
        return "\n".join(f"--- {i} of {len(texts)}\n{text}\n" for i, text in enumerate(texts, 1))

    def _add(self, i: int, piece: str) -> None:
        self.written[i] += piece
        self._show(piece)

    def _show(self, piece: str) -> None:
        if self.live:
            sys.stdout.write(piece)
            sys.stdout.flush()


class Fasta(Text):
    """DNA: letters on standard output, FASTA in a file."""

    endings = (".fa", ".fasta", ".fna")

    def encode(self, prompt: bytes) -> list[int]:
        if prompt.lstrip().startswith(b">"):
            raise ValueError(
                "--prompt: give the letters of a sequence alone, without the header that FASTA has"
            )
        return super().encode(prompt)

    def content(self) -> str:
        if self.output is None:
            return super().content()
        records = []
        for label, prompt, written in zip(self.labels, self.prompts, self.written, strict=True):
            given = self.words.decode(self.words.encode(prompt.encode()))
            letters = given + written
            lines = [letters[i : i + _WIDTH] for i in range(0, len(letters), _WIDTH)]
            # a record of nothing is none
            if lines:
                records += [f">{label} {len(given)} bases given, {len(written)} written", *lines]
        return "".join(f"{line}\n" for line in records)


# by the kind of vocabulary; any other writes text
MEDIA: dict[str, type[Text]] = {"nucleotides": Fasta}

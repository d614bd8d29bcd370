"""The documents that the zoo's language backbone is trained on and measured on, as train.jsonl.xz and valid.jsonl.xz.

    python benchmarks/language_corpus.py OUTPUT python-docs.info.txt.xz books/*.txt

Python source is that of the standard library, torch, sympy and numpy, without their tests, a document a file; of the
documentation a document is a node without the index, and books are cut between paragraphs. Held out are one document in
fifty, drawn by its content, and of books the last fiftieth.
"""

import hashlib
import json
import lzma
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from mambazoo.datamodules.documents import STDLIB, find_sources

HELD_OUT = 50
# letters of a part of a book
PART = 32768
PACKAGES = ("torch", "sympy", "numpy")
LEFT_OUT = {"test", "tests", "testing", "_generated"}


def python_files() -> Iterator[str]:
    folders = [Path(find_spec(name).submodule_search_locations[0]) for name in PACKAGES]  # type: ignore[union-attr,index]
    for source in find_sources([STDLIB, *(f"{folder}/**/*.py" for folder in folders)]):
        if source.path is not None and not LEFT_OUT & set(source.path.parts):
            yield source.path.read_text(encoding="utf-8", errors="replace")


def parts(text: str) -> Iterator[str]:
    """Text cut between paragraphs."""
    part = ""
    for paragraph in re.split(r"(?<=\n\n)", text):
        if part and len(part) + len(paragraph) > PART:
            yield part
            part = ""
        part += paragraph
    yield part


def main(output: Path, files: list[Path]) -> None:
    drawn, splits = list(python_files()), {"train": list[str](), "valid": list[str]()}
    for file in files:
        content = (lzma.open if file.suffix == ".xz" else open)(file, "rb").read()
        text = content.decode("utf-8", "replace").replace("\r\n", "\n")
        # nodes of info files are set apart by this
        nodes = [node.strip("\n") + "\n" for node in text.split("\x1f")]
        if len(nodes) > 1:
            drawn += [
                node for node in nodes if "Node: " in node and not re.search("Node: .*Index", node[:200])
            ]
            continue
        documents = list(parts(text))
        end = len(documents) - max(len(documents) // HELD_OUT, 1)
        splits["train"] += documents[:end]
        splits["valid"] += documents[end:]
    for document in drawn:
        held = int(hashlib.sha256(document.encode()).hexdigest(), 16) % HELD_OUT == 0
        splits["valid" if held else "train"].append(document)
    for name, documents in splits.items():
        with lzma.open(output / f"{name}.jsonl.xz", "wt", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        print(name, len(documents), "documents,", sum(len(text.encode()) for text in documents), "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])

"""The models that have a name: registry.yaml read, searched, and turned into files on this machine. No torch."""

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from ..zoo.values import nearest
from . import remote

REGISTRY = Path(__file__).resolve().parent / "registry.yaml"
HUB = "hf:"
# where runs are: what looks like owner/name is none there
_RUNS = "runs"


@dataclass(frozen=True)
class Entry:
    """A model that can be had by its name.

    Args:
        name: what from_pretrained is given.
        domain: language, audio or genomics.
        parameters: how many it has.
        weights: shipped, for a folder of this package beside the registry, called as the model is; hf:OWNER/NAME; or
            the https:// address of a .ckpt file or of a model folder as .zip, with its sha256.
        data, licence: what it was trained on, and under which terms that is.
        size: the row of zoo.config.SIZES that it has.
        sha256: of what an address holds.
        tokenizer: hf:OWNER/NAME of its tokenizer.json where the weights come without.
        recipe, commit: what made it; of those trained elsewhere, a source.
        metric: what it reached.
    """

    name: str
    domain: str
    parameters: int
    weights: str
    data: str
    licence: str
    size: str | None = None
    sha256: str | None = None
    tokenizer: str | None = None
    recipe: str | None = None
    commit: str | None = None
    metric: str | None = None

    def place(self, *, weights: bool = True) -> Path:
        """The model's folder or file on this machine, fetched where it has to be.

        Raises:
            OSError, ValueError: as remote.from_hub and remote.from_url say.
        """
        if self.weights == "shipped":
            return REGISTRY.parent / self.name
        if self.weights.startswith(HUB):
            return remote.from_hub(self.weights.removeprefix(HUB), weights=weights)
        assert self.sha256 is not None
        return remote.from_url(self.weights, self.sha256)


def entries() -> list[Entry]:
    """Every model of the registry.

    Raises:
        ValueError: for an entry that is not as it must be; the message names it.
    """
    return _read(REGISTRY)


@cache
def _read(path: Path) -> list[Entry]:
    import yaml

    known = {field.name for field in fields(Entry)} - {"name"}
    needed = {"domain", "parameters", "weights", "data", "licence"}
    found = []
    for name, values in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items():
        where = f"{path.name}, {name}"
        for key in values.keys() - known:
            raise ValueError(f"{where}: there is no key {key!r}{nearest(key, known)}")
        if missing := needed - values.keys():
            raise ValueError(f"{where}: {', '.join(sorted(missing))} must be given")
        entry = Entry(name=name, **values)
        if not entry.weights.startswith((HUB, "http")) and entry.weights != "shipped":
            raise ValueError(
                f"{where}: weights must be shipped, hf:OWNER/NAME or an address, not {entry.weights!r}"
            )
        if entry.weights.startswith("http") and not entry.sha256:
            raise ValueError(f"{where}: an address needs the sha256 of what is there")
        found.append(entry)
    return found


def find(name: str) -> Entry | None:
    """The model of a name, or of an id of the Hugging Face Hub; None where the registry has none."""
    return next((entry for entry in entries() if name in (entry.name, entry.weights.removeprefix(HUB))), None)


def locate(path: str | Path, *, weights: bool = True) -> tuple[Path, Entry | None]:
    """Where on this machine a path, a name of the registry or an owner/name of the Hub is, and its entry, if any.

    What is here comes first, then the registry, then the Hub.

    Raises:
        FileNotFoundError: when there is none; the message names the nearest.
        OSError, ValueError: when it cannot be fetched, or is not what it should be.
    """
    here = Path(path).expanduser()
    if here.exists():
        return here, None
    name = str(path)
    entry = find(name)
    if entry is not None:
        return entry.place(weights=weights), entry
    if (Path(_RUNS) / name).is_dir():
        raise FileNotFoundError(
            f"there is no checkpoint or model folder {name}, did you mean {_RUNS}/{name}?"
        )
    owner, slash, rest = name.partition("/")
    local = owner == _RUNS or owner in ("", ".", "..", "~") or Path(owner).exists()
    if slash and "/" not in rest and not local and not name.endswith((".ckpt", ".yaml")):
        return remote.from_hub(name, weights=weights), None
    names = [name for entry in entries() for name in (entry.name, entry.weights.removeprefix(HUB))]
    hint = nearest(name, names) or "; `mambazoo ls` lists the models that have a name"
    raise FileNotFoundError(f"there is no checkpoint, model folder or run {name}{hint}")

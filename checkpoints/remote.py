"""Model folders on other machines: the Hugging Face Hub with its cache, and files at an address with ours. No torch."""

import errno
import hashlib
import json
import logging
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

# the files of a model folder, ours or another's; of the weights, the first that is there
CONFIG, TOKENIZER, CARD = "config.json", "tokenizer.json", "README.md"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_BLOCK = 1 << 20
_TIMEOUT = 30.0
# what the HTTP libraries of huggingface_hub, old and new, call that nobody is there
_UNREACHED = ("ConnectError", "ConnectTimeout", "ConnectionError")


def cache_root() -> Path:
    """Where models are kept: MAMBAZOO_CACHE, or mambazoo in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MAMBAZOO_CACHE") or Path(home) / "mambazoo")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: when it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def shards(index: Path) -> list[str]:
    """The files that an index of weights names, which lie beside it.

    Raises:
        ValueError: when it is no index, or names others.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or any(Path(str(file)).name != file for file in places.values()):
        raise ValueError(f"{index} does not say which file beside it each weight is in")
    return sorted(set(places.values()))


def from_hub(repo: str, *, weights: bool = True) -> Path:
    """A model's folder in the cache of huggingface_hub; what is not there is fetched, unless HF_HUB_OFFLINE is set.

    Args:
        repo: owner/name.
        weights: have them too, and not only what describes the model.

    Raises:
        FileNotFoundError: when there is no such model, or it holds no weights.
        OSError: when it is not in the cache and cannot be fetched.
    """
    files = [_hub_file(repo, CONFIG, needed=True), _hub_file(repo, TOKENIZER)]
    if weights:
        cached = [name for name in WEIGHTS if isinstance(_in_cache(repo, name), Path)]
        found = next(
            (path for name in cached or WEIGHTS if (path := _hub_file(repo, name)) is not None), None
        )
        files.append(found or _hub_file(repo, WEIGHTS[0], needed=True))
        if found is not None and found.name.endswith(".index.json"):
            files += [_hub_file(repo, shard, needed=True) for shard in shards(found)]
    folders = {path.parent for path in files if path is not None}
    # the repository has changed since a part of it was cached: now all of it is of one state
    return folders.pop() if len(folders) == 1 else from_hub(repo, weights=weights)


def tokenizer_from_hub(repo: str) -> str:
    """The tokenizer.json of a repository.

    Raises:
        FileNotFoundError, OSError: as `from_hub`.
    """
    path = _hub_file(repo, TOKENIZER, needed=True)
    assert path is not None
    return path.read_text(encoding="utf-8")


def _hub_file(repo: str, name: str, *, needed: bool = False) -> Path | None:
    """A file of a repository, fetched if it is not in the cache; None where there is none and it is not needed."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        cached = _in_cache(repo, name)
        if isinstance(cached, Path) or (cached is False and not needed):
            return cached or None
        _reach_hub()
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except errors.GatedRepoError:
        raise PermissionError(
            f"{repo} is given to those who ask: do so at https://huggingface.co/{repo}, then `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise FileNotFoundError(
            f"there is no model {repo} here or at huggingface.co; a private one needs `hf auth login`"
        ) from None
    except errors.LocalEntryNotFoundError:
        if not needed:
            return None
        raise OSError(
            f"{repo}: {name} is not in the cache and cannot be fetched: there is no way to huggingface.co, or "
            "HF_HUB_OFFLINE is set; ask once where there is, or give a folder that holds it"
        ) from None
    except errors.EntryNotFoundError:
        if not needed:
            return None
        raise FileNotFoundError(f"{repo} at huggingface.co has no {name}") from None
    except _hub_failures() as error:
        raise OSError(
            f"{repo}: {name} cannot be fetched from huggingface.co ({_first_line(error)})"
        ) from None


@cache
def _reach_hub() -> None:
    """Ask the Hub once whether it is there: a download would ask for half a minute, with a warning each time.

    Raises:
        LocalEntryNotFoundError: when nobody answers.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        huggingface_hub.get_hf_file_metadata(constants.ENDPOINT)
    except _hub_failures() as error:
        # any other failure is an answer, or may pass: the download deals with it
        if type(error).__name__ in _UNREACHED:
            raise errors.LocalEntryNotFoundError(_first_line(error)) from None


def _hub_failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where it cannot fetch or write: its own errors, its HTTP library's, the system's."""
    from huggingface_hub import errors

    return (OSError, errors.HFValidationError, *errors.HfHubHTTPError.__bases__)


def _in_cache(repo: str, name: str) -> Path | Literal[False] | None:
    """Where a file is cached; False where it is known that there is none, None where it was never asked for."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(repo, name)
    return Path(found) if isinstance(found, str) else None if found is None else False


def push_to_hub(folder: Path, repo: str, *, private: bool = False, client: Any = None) -> str:
    """Upload a model folder with its card to huggingface.co; return its address.

    Args:
        folder: what `save_pretrained` or `mambazoo export` wrote.
        repo: owner/name; made if it is not there.
        private: whether one that is made is private.
        client: what to use instead of huggingface_hub.HfApi().

    Raises:
        FileNotFoundError: when the folder holds no model.
        OSError: when it cannot be uploaded.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}, so no model to upload")
    import huggingface_hub

    client = client or huggingface_hub.HfApi()
    try:
        client.create_repo(repo, private=private, exist_ok=True)
        client.upload_file(
            path_or_fileobj=card(folder, repo).encode(), path_in_repo=CARD, repo_id=repo,
            commit_message="Describe the model",
        )  # fmt: skip
        client.upload_folder(
            folder_path=str(folder), repo_id=repo, ignore_patterns=[CARD], commit_message="Add the model"
        )
    except _hub_failures() as error:
        raise OSError(f"{repo} cannot be written at huggingface.co ({_first_line(error)})") from None
    return f"https://huggingface.co/{repo}"


def card(folder: Path, repo: str) -> str:
    """The model card: the folder's own, or one of a sentence, under the lines that the Hub reads."""
    own = folder / CARD
    name = repo.rpartition("/")[2]
    text = own.read_text(encoding="utf-8") if own.is_file() else f"# {name}\n"
    if text.startswith("---\n"):
        return text
    library = "mambazoo" if "task" in read_json(folder / CONFIG) else "transformers"
    use = f'\n```python\nfrom mambazoo import from_pretrained\n\nmodel = from_pretrained("{repo}")\n```\n'
    return f"---\nlibrary_name: {library}\ntags:\n- mamba\n- state space model\n---\n\n{text}{use}"


def from_url(url: str, sha256: str) -> Path:
    """A .ckpt file, or the model folder of a .zip, at an address: in the cache, fetched and checked if it is not there.

    A download that was cut short is gone on with. Only what has the digest becomes an entry of the cache.

    Raises:
        OSError: when it is not in the cache and cannot be fetched.
        ValueError: when what is fetched is another file, or an archive of other things.
    """
    name = url.rpartition("/")[2]
    root = cache_root() / "models"
    place = root / sha256[:32]
    found = place / name if name.endswith(".ckpt") else place
    if found.exists():
        return found
    from filelock import FileLock

    root.mkdir(parents=True, exist_ok=True)
    partial = root / f".{sha256[:32]}.part"
    with FileLock(f"{partial}.lock"):
        if found.exists():
            return found
        _download(url, partial)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            partial.unlink()
            raise ValueError(f"{url} is not the file that is known: its SHA-256 is {digest}, not {sha256}")
        building = root / f".{sha256[:32]}.building"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        if found == place:
            _unpack(partial, building)
            partial.unlink()
        else:
            os.replace(partial, building / name)
        os.rename(building, place)
    return found


def _download(url: str, partial: Path) -> None:
    """Fetch a file, from where an earlier attempt has stopped if the server can do that."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            goes_on = answer.status == 206
            expected = (have if goes_on else 0) + int(answer.headers.get("Content-Length") or 0)
            log.warning("fetching %s, %.1f MB", url, expected / 1e6)
            with partial.open("ab" if goes_on else "wb") as file:
                shutil.copyfileobj(answer, file, _BLOCK)
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        if error.code == 416:
            # nothing is left to fetch; the digest decides
            return
        raise OSError(f"{url} cannot be fetched: {error.code} {error.reason}") from None
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(
            f"{url} is not in the cache and cannot be fetched ({reason}); is there a network?"
        ) from None
    if expected and partial.stat().st_size < expected:
        raise OSError(
            errno.EIO,
            f"{url} was cut short at {partial.stat().st_size:,} of {expected:,} bytes; ask again to go on",
        )


def _unpack(archive: Path, folder: Path) -> None:
    """The files of an archive, which must lie side by side in it or in one folder."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            names = [member.filename.rpartition("/")[2] for member in members]
            if len(set(names)) < len(names) or CONFIG not in names:
                raise ValueError(f"the archive holds no model folder: {', '.join(names[:5])}")
            for member, name in zip(members, names, strict=True):
                with file.open(member) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, _BLOCK)
    except zipfile.BadZipFile as error:
        raise ValueError(f"what was fetched is no archive ({error})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

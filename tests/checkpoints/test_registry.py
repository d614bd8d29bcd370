"""Models that have a name: the registry that comes along and others, what is fetched, what is refused."""

import hashlib
import http.server
import json
import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from huggingface_hub import constants, errors
from mambazoo.checkpoints import registry, remote
from mambazoo.checkpoints.io import Stored, empty, export, from_pretrained, load, read, save_pretrained
from mambazoo.checkpoints.registry import entries, find, locate
from mambazoo.datamodules.alphabet import Nucleotides
from mambazoo.datamodules.vocab import Bytes, train_bpe
from mambazoo.datamodules.waveform import Waveform
from mambazoo.recipes.cli import main
from mambazoo.zoo.config import SIZES
from mambazoo.zoo.language import LanguageModel

MODEL = {"domain": "language", "parameters": 1, "data": "random numbers", "licence": "none"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder."""
    save_pretrained(LanguageModel({"d_model": 16, "n_layers": 1}, 257), {"kind": "bytes"}, tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a registry that is read instead of the one that comes along."""

    def write(**models: dict[str, Any]) -> None:
        path = tmp_path / "registry.yaml"
        path.write_text(yaml.safe_dump(models))
        monkeypatch.setattr(registry, "REGISTRY", path)
        registry._read.cache_clear()

    return write


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put folders into a cache of the Hugging Face Hub, which cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repo: str, folder: Path) -> None:
        place = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, place / "snapshots" / ("0" * 40))

    return put


def test_the_released_models_have_names() -> None:
    names = {entry.name for entry in entries()}
    sizes = ("130m", "370m", "790m", "1.4b", "2.8b")
    assert {f"mamba-{size}{suffix}" for size in sizes for suffix in ("", "-hf")} | {
        "mamba-2.8b-slimpj"
    } <= names
    for name in names:
        entry = find(name)
        assert entry is not None
        assert entry.licence
        if entry.weights != "shipped":
            assert find(f"state-spaces/{name}") is entry
            assert entry.weights == f"hf:state-spaces/{name}"


SHIPPED = [entry for entry in entries() if entry.weights == "shipped"]


@pytest.mark.parametrize("entry", SHIPPED, ids=lambda entry: entry.name)
def test_a_shipped_model_is_what_its_entry_and_card_say(entry: registry.Entry) -> None:
    folder = locate(entry.name)[0]
    model = from_pretrained(entry.name)
    assert sum(p.numel() for p in model.parameters()) == entry.parameters
    assert all(p.isfinite().all() for p in model.parameters())
    card = (folder / "README.md").read_text()
    assert f"{entry.parameters:,} parameters" in card
    assert str(entry.commit) in card
    assert (folder / "loss.png").stat().st_size > 0


def test_shipped_weights_stay_small() -> None:
    sizes = [(locate(entry.name)[0] / "model.safetensors").stat().st_size for entry in SHIPPED]
    assert sum(sizes) <= 24 << 20


def test_the_shipped_dna_model_knows_dna() -> None:
    # the consensus of AluY, of which the human genome has 100,000 copies
    text = (
        "GGCCGGGCGCGGTGGCTCACGCCTGTAATCCCAGCACTTTGGGAGGCCGAGGCGGGCGGATCACGAGGTCAGGAGATCGAGACCATCCCGGCTAAAACGG"
        "TGAAACCCCGTCTCTACTAAAAATACAAAAAATTAGCCGGGCGTGGTGGCGGGCGCCTGTAGTCCCAGCTACTCGGGAGGCTGAGGCAGGAGAATGGCGT"
        "GAACCCGGGAGGCGGAGCTTGCAGTGAGCCGAGATCGCGCCACTGCACTCCAGCCTGGGCGACAGAGCGAGACTCCGTCTC"
    )
    model, vocabulary = load("dna-7m")
    assert vocabulary == Nucleotides().to_dict()
    tokens = torch.tensor([Nucleotides().encode(text.encode()).tolist()])
    with torch.inference_mode():
        logits, _ = model(tokens[:, :-1])
    bits = F.cross_entropy(logits.mT.float(), tokens[:, 1:]) / math.log(2)
    assert bits < 0.5


def test_the_shipped_language_model_knows_python_and_english() -> None:
    code = (
        "def __init__(self, name: str) -> None:\n        self.name = name\n\n    def __repr__(self) -> str:\n"
        '        return f"{type(self).__name__}({self.name!r})"\n'
    )
    prose = "He looked at her without a word, then went out of the room and shut the door behind him.\n"
    model, vocabulary = load("language-3m")
    assert vocabulary == Bytes().to_dict()
    for text, limit in ((code, 0.6), (prose, 2.0)):
        tokens = torch.tensor([[Bytes.eos, *text.encode()]])
        with torch.inference_mode():
            logits, _ = model(tokens[:, :-1])
        assert F.cross_entropy(logits.mT.float(), tokens[:, 1:]) / math.log(2) < limit


def test_the_shipped_audio_model_knows_tones() -> None:
    model, vocabulary = load("audio-3m")
    assert vocabulary is not None
    waveform = Waveform.from_dict(vocabulary)
    t = np.arange(3000) / waveform.sample_rate
    # as a string swings; an even guess has 8 bits
    tone = sum(0.3 / k * np.sin(2 * np.pi * 440 * k * t + k) for k in range(1, 8)) * np.minimum(1, 40 * t)
    codes = torch.from_numpy(waveform.encode(tone)).long()[None]
    with torch.inference_mode():
        logits, _ = model(codes[:, :-1])
    assert F.cross_entropy(logits.mT.float(), codes[:, 1:]) / math.log(2) < 4.0


def test_the_registry_says_how_many_parameters_there_are() -> None:
    counts = {}
    for entry in entries():
        if entry.weights == "shipped":
            continue
        assert entry.size in SIZES
        if entry.size not in counts:
            arguments = {"backbone": {"size": entry.size}, "vocab_size": 50280}
            model = empty(Stored(Path(), "mambazoo.zoo.language.LanguageModel", arguments, None, {}))
            counts[entry.size] = sum(p.numel() for p in model.parameters())
        assert counts[entry.size] == entry.parameters


def test_a_model_that_comes_along_takes_one_entry(folder: Path, register: Any) -> None:
    register(small={**MODEL, "weights": "shipped"})
    assert locate("small")[0] == folder
    model = from_pretrained("small")
    assert isinstance(model, LanguageModel)
    assert not model.training


def test_what_is_here_comes_before_the_registry(
    folder: Path, register: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(small={**MODEL, "weights": "hf:no/where"})
    monkeypatch.chdir(tmp_path)
    assert locate("small") == (Path("small"), None)


def test_a_model_of_the_hub_is_read_from_its_cache(folder: Path, register: Any, hub: Any) -> None:
    hub("some/body", folder)
    register(theirs={**MODEL, "weights": "hf:some/body"})
    x = torch.randint(257, (1, 9))
    models = [from_pretrained(name) for name in ("theirs", "some/body")]
    assert torch.equal(models[0](x)[0], models[1](x)[0])


def test_a_model_without_a_tokenizer_gets_the_one_of_its_entry(
    folder: Path, register: Any, hub: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocabulary": None}))
    hub("some/body", folder)
    register(theirs={**MODEL, "weights": "hf:some/body", "tokenizer": "hf:some/words"})
    assert load("theirs")[1] is None
    assert "theirs comes without its tokenizer: some/words: tokenizer.json is not in the cache" in caplog.text
    words = train_bpe(iter(["some words"]), 257).to_dict()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text(words["json"])
    hub("some/words", tmp_path / "words")
    assert load("theirs")[1] == words


def test_text_is_generated_by_a_model_of_the_hub(
    hub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = train_bpe(iter(["some words and other words"]), 265)
    save_pretrained(
        LanguageModel({"d_model": 16, "n_layers": 1}, words.size), words.to_dict(), tmp_path / "own"
    )
    for layout in ("transformers", "state-spaces"):
        export(read(tmp_path / "own"), layout, tmp_path / layout, eos=words.eos)
        hub(f"some/{layout}", tmp_path / layout)
        with pytest.raises(SystemExit) as exit_:
            main(["generate", f"some/{layout}", "--prompt", "some words", "--max-new-tokens", "5"])
        assert exit_.value.code == 0
        assert capsys.readouterr().out.startswith("some words")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mamba-13b", "there is no checkpoint, model folder or run mamba-13b, did you mean 'mamba-130m'?"),
        ("mamba-2.8b-slim", "did you mean 'mamba-2.8b-slimpj'?"),
        ("nonsense", "no checkpoint, model folder or run nonsense; `mambazoo ls` lists"),
        ("runs/nothing", "there is no checkpoint, model folder or run runs/nothing"),
        ("./some/body", "there is no checkpoint, model folder or run ./some/body"),
    ],
)
def test_a_name_that_there_is_not_is_answered_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError) as error:
        locate(name)
    assert message in str(error.value)


def test_without_a_network_it_is_said(hub: Any) -> None:
    message = (
        "state-spaces/mamba-130m: config.json is not in the cache and cannot be fetched: .* HF_HUB_OFFLINE"
    )
    for name in ("mamba-130m", "state-spaces/mamba-130m"):
        with pytest.raises(OSError, match=message):
            from_pretrained(name)


def test_without_a_network_the_hub_is_asked_once(
    hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remote._reach_hub.cache_clear()
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("it goes on asking"))
    with pytest.raises(OSError, match=r"config\.json is not in the cache and cannot be fetched"):
        from_pretrained("state-spaces/mamba-130m")
    assert not caplog.records
    # nor is there one to write to
    client = huggingface_hub.HfApi(endpoint=nowhere, token="none")
    with pytest.raises(OSError, match=r"some/body cannot be written at huggingface\.co"):
        remote.push_to_hub(folder, "some/body", client=client)


class Answer:
    """What the Hub answers with."""

    headers: ClassVar[dict[str, str]] = {}
    status_code = 404
    request = None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "there is no model some/body here or at huggingface.co"),
        (errors.GatedRepoError, "some/body is given to those who ask"),
        (errors.RemoteEntryNotFoundError, "some/body at huggingface.co has no config.json"),
        (errors.HfHubHTTPError, "config.json cannot be fetched from huggingface.co"),
    ],
)
def test_what_the_hub_refuses_is_said(
    hub: Any, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str
) -> None:
    def refuse(*_: object) -> None:
        raise kind("not this", response=Answer())  # type: ignore[call-arg]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(OSError, match=message):
        from_pretrained("some/body")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {**MODEL, "weights": "shipped", "metrik": 1},
            "small: there is no key 'metrik', did you mean 'metric'",
        ),
        ({"domain": "language", "weights": "shipped"}, "small: data, licence, parameters must be given"),
        ({**MODEL, "weights": "somewhere"}, "small: weights must be shipped, hf:OWNER/NAME or an address"),
        ({**MODEL, "weights": "https://x/y.zip"}, "small: an address needs the sha256"),
    ],
)
def test_an_entry_that_is_wrong_is_named(register: Any, entry: dict[str, Any], message: str) -> None:
    register(small=entry)
    with pytest.raises(ValueError, match=message):
        entries()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """Files at an address on this machine; `cut` ends an answer early, `asked` holds the ranges that were asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        files: ClassVar[dict[str, bytes]] = {}
        cut: ClassVar[list[int]] = []
        asked: ClassVar[list[str | None]] = []
        ranges = True

        def do_GET(self) -> None:
            content = self.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            given = self.headers["Range"]
            self.asked.append(given)
            start = int(given.removeprefix("bytes=").rstrip("-")) if given and self.ranges else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : self.cut.pop() if self.cut else None])

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    Handler.address = f"http://127.0.0.1:{running.server_address[1]}"  # type: ignore[attr-defined]
    yield Handler
    running.shutdown()
    running.server_close()


@pytest.fixture
def archive(folder: Path, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The entry of a model folder as an archive at an address."""
    monkeypatch.setenv("MAMBAZOO_CACHE", str(tmp_path / "own cache"))
    content = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "small")).read_bytes()
    server.files["/small.zip"] = content
    digest = hashlib.sha256(content).hexdigest()
    return {**MODEL, "weights": f"{server.address}/small.zip", "sha256": digest}


def kept() -> list[str]:
    """What the cache has, locks aside."""
    root = remote.cache_root() / "models"
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock") if root.exists() else []


def test_an_archive_is_fetched_once(archive: dict[str, Any], register: Any, server: Any) -> None:
    register(far=archive)
    for _ in range(2):
        assert isinstance(from_pretrained("far"), LanguageModel)
    assert server.asked == [None]
    assert kept() == [archive["sha256"][:32]]


def test_a_checkpoint_is_fetched_as_it_is(
    tmp_path: Path, register: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBAZOO_CACHE", str(tmp_path / "own cache"))
    model = LanguageModel({"d_model": 16, "n_layers": 1}, 20)
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    content = server.files["/a.ckpt"] = (tmp_path / "a.ckpt").read_bytes()
    register(
        far={**MODEL, "weights": f"{server.address}/a.ckpt", "sha256": hashlib.sha256(content).hexdigest()}
    )
    assert torch.equal(from_pretrained("far").embedding.weight, model.embedding.weight)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_was_cut_short_goes_on_or_starts_again(
    archive: dict[str, Any], register: Any, server: Any, ranges: bool
) -> None:
    register(far=archive)
    server.cut.append(1000)
    with pytest.raises(OSError, match="cut short at 1,000 of"):
        from_pretrained("far")
    # half a file is no entry
    assert kept() == [f".{archive['sha256'][:32]}.part"]
    server.ranges = ranges
    assert isinstance(from_pretrained("far"), LanguageModel)
    assert server.asked == [None, "bytes=1000-"]
    assert kept() == [archive["sha256"][:32]]


def test_another_file_than_the_known_one_is_thrown_away(
    archive: dict[str, Any], register: Any, server: Any
) -> None:
    register(far=archive)
    server.files["/small.zip"] = b"something else"
    with pytest.raises(ValueError, match=r"small\.zip is not the file that is known: its SHA-256 is"):
        from_pretrained("far")
    assert kept() == []


def test_an_address_that_does_not_answer_is_said(register: Any, server: Any, archive: dict[str, Any]) -> None:
    register(far={**archive, "weights": f"{server.address}/nothing.zip"})
    with pytest.raises(OSError, match=r"nothing\.zip cannot be fetched: 404"):
        from_pretrained("far")
    register(far={**archive, "weights": "http://127.0.0.1:9/x.zip"})
    with pytest.raises(OSError, match=r"is not in the cache and cannot be fetched .*is there a network"):
        from_pretrained("far")


class Client:
    """The part of huggingface_hub.HfApi that uploads, kept in memory."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.repos[repo_id] = {"private": str(private).encode()}

    def upload_file(
        self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, commit_message: str
    ) -> None:
        self.repos[repo_id][path_in_repo] = path_or_fileobj

    def upload_folder(
        self, *, folder_path: str, repo_id: str, ignore_patterns: list[str], commit_message: str
    ) -> None:
        for path in Path(folder_path).iterdir():
            if path.name not in ignore_patterns:
                self.repos[repo_id][path.name] = path.read_bytes()


def test_a_model_is_uploaded_with_its_card(folder: Path) -> None:
    (folder / "README.md").write_text("# small\n\nTrained on random numbers.\n")
    client = Client()
    assert remote.push_to_hub(folder, "some/body", client=client) == "https://huggingface.co/some/body"
    there = client.repos["some/body"]
    assert set(there) == {"private", "config.json", "model.safetensors", "README.md"}
    card = there["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "mambazoo"
    assert "Trained on random numbers." in card
    assert 'from_pretrained("some/body")' in card
    with pytest.raises(FileNotFoundError, match="no model to upload"):
        remote.push_to_hub(folder.parent, "some/body", client=client)


def test_ls_lists_models_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    line = "mamba-2.8b-slimpj        language: 2,768M parameters; SlimPajama, 600 billion tokens\n"
    with pytest.raises(SystemExit):
        main(["ls", "8b-slim"])
    assert capsys.readouterr().out == line
    # of a whole name, all that is known
    with pytest.raises(SystemExit):
        main(["ls", "mamba-2.8b-slimpj"])
    first, *more = capsys.readouterr().out.splitlines(keepends=True)
    assert first == line
    assert {row.split()[0] for row in more} >= {"weights", "licence", "parameters"}
    assert "hf:state-spaces/mamba-2.8b-slimpj" in "".join(more)
    code = (
        "import sys\nfrom mambazoo.checkpoints.registry import entries\nassert entries()\n"
        "assert not {'torch', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

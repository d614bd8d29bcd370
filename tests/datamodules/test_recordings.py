"""Recordings in the cache: which files are found, what is kept of them, what is left out, and that it is built once."""

import json
import logging
import multiprocessing
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from mambazoo.datamodules import recordings as module
from mambazoo.datamodules.cache import cache_root
from mambazoo.datamodules.recordings import RecordingFiles, Recordings, find_recordings
from numpy.typing import NDArray

RATE = 8000


def draw(count: int, seed: int) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-10000, 10000, count).astype(np.int16)


def write(path: Path, samples: NDArray[np.int16] | NDArray[np.float32], rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three recordings in two folders, and what is none."""
    root = tmp_path / "sounds"
    write(root / "b" / "1.flac", draw(300, 1))
    write(root / "a" / "2.wav", draw(200, 2))
    write(root / "a" / "1.wav", draw(100, 3))
    (root / "a" / "notes.md").write_text("by ear")
    (root / "a" / "._1.wav").write_bytes(b"a file system's own")
    return root


def opened(*paths: Path | str, **options: object) -> Recordings:
    files = RecordingFiles(find_recordings([str(path) for path in paths]), RATE, **options)  # type: ignore[arg-type]
    files.build()
    return files.open()


def content(recordings: Recordings) -> dict[str, NDArray[np.int16]]:
    bounds = zip(recordings.starts, recordings.starts[1:], strict=False)
    return {
        name: recordings.samples.array[a:b] for name, (a, b) in zip(recordings.names, bounds, strict=True)
    }


def test_files_folders_globs_and_archives_are_found(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(tmp_path))
    expected = {"a/1.wav": 3, "a/2.wav": 2, "b/1.flac": 1}
    for found, prefix in (
        (opened(folder), ""),
        (opened(tmp_path / "all.zip"), "sounds/"),
        (opened(folder / "*" / "*"), f"{folder.as_posix()}/"),
    ):
        assert found.names == [prefix + name for name in expected]
        for (_, samples), seed in zip(content(found).items(), expected.values(), strict=True):
            assert np.array_equal(samples, draw(len(samples), seed))
    assert opened(folder / "a" / "2.wav", folder / "b").names == ["2.wav", "1.flac"]


def test_each_file_that_is_left_out_counts_whatever_its_name(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for part in ("a", "b"):
        (folder / part / "9.wav").write_text("no sound")
    found = opened(folder / "a", folder / "b")
    assert found.names == ["1.wav", "2.wav", "1.flac"]
    assert set(found.skipped) == {"9.wav", (folder / "b" / "9.wav").as_posix()}
    assert "2 of 5 files are left out: 9.wav" in caplog.text


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "there is no .wav .flac .ogg .mp3 file at .*nowhere"),
        ("empty", FileNotFoundError, "file at .*empty, nor in a folder or .zip"),
        ("a/notes.md", ValueError, "notes.md is not a kind of file that is read"),
        ("*/none.wav", FileNotFoundError, "file at .*none.wav"),
        ("bad.zip", ValueError, "bad.zip is no .zip that can be read"),
    ],
)
def test_what_is_not_found_is_named(folder: Path, path: str, error: type[Exception], message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "bad.zip").write_bytes(b"PK nothing")
    with pytest.raises(error, match=f"data.paths: .*{message}"):
        find_recordings([str(folder / path)])


def test_what_cannot_be_read_is_left_out_and_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NAMED", 2)
    # one that breaks off when some of it has been written
    (folder / "a" / "half.flac").write_bytes(
        write(tmp_path / "x.flac", draw(300_000, 0)).read_bytes()[:400_000]
    )
    (folder / "a" / "text.wav").write_text("hello")
    (folder / "z.wav").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="mambazoo"):
        found = opened(folder)
    assert found.names == ["a/1.wav", "a/2.wav", "b/1.flac"]
    assert np.array_equal(content(found)["b/1.flac"], draw(300, 1))
    assert set(found.skipped) == {"a/half.flac", "a/text.wav", "z.wav"}
    [message] = caplog.messages
    assert message.startswith("3 of 6 files are left out: a/half.flac: it is no sound that can be read (")
    *_, meta = message.partition("; and 1 more; all of them, and why, are under skipped in ")
    assert json.loads(Path(meta).read_text())["skipped"] == found.skipped


def test_an_archive_may_be_damaged_in_part(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in ("a/1.wav", "a/2.wav"):
            archive.write(folder / name, name)
    changed = bytearray(path.read_bytes())
    changed[-400] ^= 255
    path.write_bytes(changed)
    found = opened(path)
    assert found.names == ["a/1.wav"]
    assert "it cannot be taken from all.zip (Bad CRC-32" in found.skipped["a/2.wav"]


def test_nothing_that_can_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.wav").write_text("hello")
    with pytest.raises(
        ValueError, match=r"data.paths: not one of 1 files can be read: a.wav: it is no sound"
    ):
        opened(tmp_path / "a.wav")
    assert list((cache_root() / "audio").iterdir()) == []


def test_silence_is_cut_and_peaks_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.concatenate([np.full(3000, 20), draw(1000, 0), np.full(500, -20)]).astype(np.int16)
    samples[3000], samples[3999] = 12000, -3000
    write(tmp_path / "sounds" / "a.wav", samples)
    write(tmp_path / "sounds" / "silent.wav", np.zeros(500, dtype=np.int16))
    for block in (999, 1 << 20):
        monkeypatch.setattr(module, "_BLOCK", block)
        monkeypatch.setattr(module, "_LONG", block)
        # the settings are part of the key, blocks are not
        cut = opened(tmp_path / "sounds", trim=40.0 + block)
        assert np.array_equal(cut.samples.array, samples)
        cut = opened(tmp_path / "sounds", trim=20.0 + block / 1e9)
        assert np.array_equal(cut.samples.array, samples[3000:4000])
        assert cut.skipped == {"silent.wav": "it is silent throughout"}
    raised = content(opened(tmp_path / "sounds", normalise=True))
    assert raised["a.wav"].max() == 32767
    assert np.abs(raised["a.wav"] - samples * (32767 / 12000)).max() < 0.51
    assert not raised["silent.wav"].any()


def test_the_same_content_is_built_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_sound", None)
        assert opened(folder).digest == first.digest
        with pytest.raises(TypeError):
            opened(folder, normalise=True)
    write(folder / "b" / "1.flac", draw(300, 7))
    assert opened(folder).digest != first.digest
    (folder / "b" / "1.flac").rename(folder / "b" / "2.flac")
    assert opened(folder).names[-1] == "b/2.flac"


def _build(folder: str, cache: str) -> str:
    os.environ["MAMBAZOO_CACHE"] = cache
    return opened(folder).digest


def test_processes_that_build_at_once_agree(folder: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        digests = pool.starmap(_build, [(str(folder), str(tmp_path / "cache"))] * 4)
    assert len(set(digests)) == 1
    assert [path.name for path in (tmp_path / "cache" / "audio").iterdir()] == [digests[0][:32]]
    assert {path.name for path in (tmp_path / "cache" / "audio" / digests[0][:32]).iterdir()} == {
        "samples",
        "meta.json",
    }


def test_recordings_travel_as_their_path(folder: Path) -> None:
    found = opened(write(folder / "long.wav", draw(100_000, 0)))
    assert len(content(found)["long.wav"]) == 100_000
    assert len(pickle.dumps(found)) < 2000
    assert np.array_equal(pickle.loads(pickle.dumps(found)).samples.array, found.samples.array)


def test_real_recordings_are_read(data: Path) -> None:
    found = opened(data / "audio" / "fsdd_4speakers_flac.zip")
    assert (len(found), found.skipped) == (2000, {})
    assert found.names[0] == "recordings/0_george_0.flac"
    # the set has 940.8 seconds
    assert len(found.samples) == 7_526_305

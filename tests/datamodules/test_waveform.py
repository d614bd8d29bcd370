"""Samples as codes, and codes as samples."""

import numpy as np
import pytest
import torch
from mambazoo.datamodules.vocab import vocabulary_from_dict
from mambazoo.datamodules.waveform import Waveform, samples_of, stored
from torchaudio.functional import mu_law_decoding, mu_law_encoding

EVERY = np.arange(-32768, 32768).astype(np.int16)
CODES = np.arange(256)


def test_mu_law_is_that_of_torchaudio() -> None:
    waveform, samples = Waveform("mu-law", 16000), samples_of(EVERY)
    assert np.array_equal(waveform.encode(samples), mu_law_encoding(torch.from_numpy(samples), 256).numpy())
    expected = mu_law_decoding(torch.from_numpy(CODES), 256).numpy()
    assert np.allclose(waveform.decode(CODES), expected, atol=1e-7)


def test_linear_codes_are_those_of_8_bit_files() -> None:
    waveform = Waveform("linear", 16000)
    assert waveform.encode([-1.0, -0.5, 0.0, 0.5, 127 / 128, 1.0]).tolist() == [0, 64, 128, 192, 255, 255]
    inside = EVERY[EVERY < 127 * 256]
    assert (
        np.abs(waveform.decode(waveform.encode(samples_of(inside))) - samples_of(inside)).max() <= 0.5 / 128
    )


@pytest.mark.parametrize("encoding", ["mu-law", "linear"])
def test_codes_come_back(encoding: str) -> None:
    waveform = Waveform(encoding, 16000)
    assert np.array_equal(waveform.encode(waveform.decode(CODES)), CODES)
    assert waveform.read(EVERY).dtype == np.uint8
    assert np.array_equal(waveform.read(EVERY), waveform.encode(samples_of(EVERY)))
    # louder never has a lower code
    assert (np.diff(waveform.read(EVERY).astype(int)) >= 0).all()
    assert waveform.encode([-9.0, 9.0]).tolist() == [0, 255]
    assert waveform.silence == waveform.encode(0.0) == 128
    assert abs(float(waveform.decode(waveform.silence))) < 1e-3


def test_samples_that_are_not_encoded_stay_what_they_are() -> None:
    waveform = Waveform("float", 16000)
    assert waveform.size is None
    assert np.array_equal(waveform.decode(waveform.read(EVERY)), samples_of(EVERY))
    assert np.array_equal(stored(samples_of(EVERY)), EVERY)
    assert stored(np.array([-2, 2], dtype=np.float32)).tolist() == [-32768, 32767]


def test_a_checkpoint_keeps_what_it_takes_to_listen() -> None:
    values = Waveform("linear", 8000, ["no", "yes"]).to_dict()
    assert values == {
        "kind": "waveform", "encoding": "linear", "levels": 256, "sample_rate": 8000, "classes": ["no", "yes"],
    }  # fmt: skip
    assert Waveform.from_dict(values).to_dict() == values
    assert Waveform.from_dict(Waveform("float", 1000).to_dict()).encoding == "float"
    with pytest.raises(ValueError, match=r"a vocabulary of bytes .* is no sound"):
        Waveform.from_dict({"kind": "bytes"})
    with pytest.raises(ValueError, match="512 levels is no sound"):
        Waveform.from_dict({**values, "levels": 512})
    for damaged in ({"sample_rate": None}, {"sample_rate": 0}, {"classes": 5}):
        with pytest.raises(ValueError, match="is damaged"):
            Waveform.from_dict({**values, **damaged})
    with pytest.raises(ValueError, match="samples of sound and no text"):
        vocabulary_from_dict(values)
    with pytest.raises(ValueError, match=r"data.encoding: must be one of mu-law, linear, float, not 'a-law'"):
        Waveform("a-law", 8000)

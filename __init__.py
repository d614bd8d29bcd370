"""Mamba language, audio and DNA models for PyTorch Lightning, on kernels that need no compiler."""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
# an editable install reaches the package through a link; tracebacks shall name the real files
__path__ = [os.path.realpath(path) for path in __path__]

# the public face: what a user imports from here, and the file that defines it
_FACE = {
    "selective_scan": "kernels.scan",
    "selective_state_update": "kernels.step",
    "causal_conv1d": "kernels.conv",
    "causal_conv1d_update": "kernels.conv",
    "rms_norm": "kernels.norm",
    "Backbone": "zoo.backbone",
    "BackboneConfig": "zoo.config",
    "Mamba": "zoo.mamba",
    "LanguageModel": "zoo.language",
    "GenomeModel": "zoo.genomics",
    "WaveformModel": "zoo.audio",
    "SequenceClassifier": "zoo.classification",
    "SyntheticTask": "zoo.synthetic",
    "TextDataModule": "datamodules.text",
    "GenomeDataModule": "datamodules.genomics",
    "LabelledSequenceDataModule": "datamodules.labelled",
    "AudioDataModule": "datamodules.audio",
    "LabelledAudioDataModule": "datamodules.labelled_audio",
    "from_pretrained": "checkpoints.io",
}
__all__ = [*_FACE, "__version__"]

if TYPE_CHECKING:
    # for tools that read and do not run
    from .checkpoints.io import from_pretrained as from_pretrained
    from .datamodules.audio import AudioDataModule as AudioDataModule
    from .datamodules.genomics import GenomeDataModule as GenomeDataModule
    from .datamodules.labelled import LabelledSequenceDataModule as LabelledSequenceDataModule
    from .datamodules.labelled_audio import LabelledAudioDataModule as LabelledAudioDataModule
    from .datamodules.text import TextDataModule as TextDataModule
    from .kernels.conv import causal_conv1d as causal_conv1d
    from .kernels.conv import causal_conv1d_update as causal_conv1d_update
    from .kernels.norm import rms_norm as rms_norm
    from .kernels.scan import selective_scan as selective_scan
    from .kernels.step import selective_state_update as selective_state_update
    from .zoo.audio import WaveformModel as WaveformModel
    from .zoo.backbone import Backbone as Backbone
    from .zoo.classification import SequenceClassifier as SequenceClassifier
    from .zoo.config import BackboneConfig as BackboneConfig
    from .zoo.genomics import GenomeModel as GenomeModel
    from .zoo.language import LanguageModel as LanguageModel
    from .zoo.mamba import Mamba as Mamba
    from .zoo.synthetic import SyntheticTask as SyntheticTask


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'mambazoo' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FACE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__

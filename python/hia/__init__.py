"""HiA: a high-resolution instruction-aware adapter for frozen multimodal LLMs (MICCAI 2024)."""

from . import _requirements as _requirements  # first: it names what is missing
from .config import HiAConfig
from .images.load import load_image
from .images.processor import HiABatch, HiAProcessor
from .images.radiograph import Radiograph
from .layers.features import ImageFeatures
from .runtime.health import AdapterHealth, Gradient, LayerHealth
from .runtime.model import HiAModel, get_hia_model
from .runtime.probe import LayerProbe, LayerReading, probe_layers
from .runtime.released import convert_released

__version__ = "0.1.0"

__all__ = [
    "AdapterHealth",
    "Gradient",
    "HiABatch",
    "HiAConfig",
    "HiAModel",
    "HiAProcessor",
    "ImageFeatures",
    "LayerHealth",
    "LayerProbe",
    "LayerReading",
    "Radiograph",
    "__version__",
    "convert_released",
    "get_hia_model",
    "load_image",
    "probe_layers",
]

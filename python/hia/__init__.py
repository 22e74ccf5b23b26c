"""HiA: a high-resolution instruction-aware adapter for frozen multimodal LLMs (MICCAI 2024)."""

from .config import HiAConfig
from .features import ImageFeatures
from .health import AdapterHealth, Gradient, LayerHealth
from .images import load_image
from .model import HiAModel, get_hia_model
from .probe import LayerProbe, LayerReading, probe_layers
from .processor import HiABatch, HiAProcessor
from .radiograph import Radiograph
from .released import convert_released

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

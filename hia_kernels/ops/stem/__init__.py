from .functional import stem
from .packed import PackedStem, pack_stem, packing_unsupported_reasons, stem_packed

__all__ = ["PackedStem", "pack_stem", "packing_unsupported_reasons", "stem", "stem_packed"]

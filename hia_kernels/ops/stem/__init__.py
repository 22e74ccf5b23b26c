from .functional import PackedStem, pack_stem, stem, stem_packed

__all__ = ["PackedStem", "pack_stem", "stem", "stem_packed"]

"""The high-resolution encoder: from raw pixels to features, whole, in strips, or as a CUDA graph."""

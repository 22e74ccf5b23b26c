"""The paper's Tables 2 and 4 in small: what each part of the adapter is worth (``python -m bench ablation``)."""

"""What each part of the adapter is worth: the paper's Tables 2 and 4 in small (``python -m bench ablation``)."""

"""Two revisions measured together."""

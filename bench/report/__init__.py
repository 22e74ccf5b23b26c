"""Records to Markdown, pictures and one HTML page."""

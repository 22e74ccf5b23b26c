"""A profile of one call: where its time goes."""

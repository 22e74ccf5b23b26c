"""Other forms of the encoder and of the extractor beside each other: what each costs, and how exact it is."""

"""Records of measurements, and the environment they were made in."""

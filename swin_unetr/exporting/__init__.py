"""The parts of `swin-unetr export`."""

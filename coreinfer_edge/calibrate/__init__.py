"""Collects statistics by calibration, and writes the GGUF that carries them."""

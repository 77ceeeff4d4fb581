"""Statistics from calibration, and the GGUF that carries them."""

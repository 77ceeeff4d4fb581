"""Generate: arguments, pre-fill, choice and decoding, memory, EdgeLLM."""

"""A model file before it is loaded: where it is, what it says, whether llama.cpp can run it."""

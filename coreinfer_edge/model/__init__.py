"""A model file before loading: its place, its header, and whether llama.cpp can run it."""

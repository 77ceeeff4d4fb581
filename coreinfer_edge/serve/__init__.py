"""Serve: OpenAI's interface over HTTP, on one EdgeLLM."""

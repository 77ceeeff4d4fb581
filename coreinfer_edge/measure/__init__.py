"""Measures quality and speed."""

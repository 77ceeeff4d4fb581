"""Chooses the neurons of a core set, with numpy alone and without llama.cpp."""

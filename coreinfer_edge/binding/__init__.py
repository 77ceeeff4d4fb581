"""All that touches the bundled llama.cpp: nothing outside this folder does."""

"""Which neurons a core set has: numpy alone, without llama.cpp."""

"""Says what a device is, what it can run, and what is wrong with it."""

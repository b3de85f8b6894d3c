"""A step on an NVIDIA GPU: the driver, arrays there, and the launches."""

"""Owns `kar serve`: Triton and the sidecar, started together and kept alive."""

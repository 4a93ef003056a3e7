"""Owns the throughput benchmark: tokens a second of generating and encoding, ours against the bare runtimes."""

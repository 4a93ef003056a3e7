"""Owns the benchmarks of the adaptor's implementations. A package of its own: `kar_kernels` does not import it."""

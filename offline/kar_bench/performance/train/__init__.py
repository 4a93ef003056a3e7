"""Owns the benchmark of training speed: our trainer, a loop over samples, and FuxiCTR."""

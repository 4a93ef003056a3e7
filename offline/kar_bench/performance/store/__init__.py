"""Owns the store benchmark: loading entities while another process reads batches of them at a steady rate."""

"""Owns the benchmark of the nearest-neighbour index: build, recall, searches a second beside bare FAISS, loading."""

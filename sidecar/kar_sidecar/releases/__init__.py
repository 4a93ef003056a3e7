"""Owns releases: their files on disk, their view in one serving mode, and the registry of loaded releases."""

"""Owns releases: their files on disk, what one serving mode reads of them, and those that a server has loaded."""

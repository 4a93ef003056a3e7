"""Owns quality studies, one file each."""

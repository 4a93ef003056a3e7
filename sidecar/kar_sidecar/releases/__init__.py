"""Owns releases: the manifest on disk, a release as one serving mode sees it, the registry of loaded ones."""

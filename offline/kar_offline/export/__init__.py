"""Owns exporting: a trained pair of models becomes a release, which servers can verify and load."""

from kar_offline.export.stage import export

__all__ = ["export"]

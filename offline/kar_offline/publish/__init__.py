"""Owns the way into the online stores: whole releases, and fresh features between releases."""

from kar_offline.publish.fresh import publish_features
from kar_offline.publish.release import publish

__all__ = ["publish", "publish_features"]

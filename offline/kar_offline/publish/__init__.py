"""Owns the way into the online stores: whole releases, and fresh features between releases."""

from kar_offline.publish.feature_update import publish_features
from kar_offline.publish.stage import publish

__all__ = ["publish", "publish_features"]

"""Owns publishing into the online store and the index: releases, fresh features, fresh knowledge."""

from kar_offline.publish.feature_update import publish_features
from kar_offline.publish.stage import publish

__all__ = ["publish", "publish_features"]

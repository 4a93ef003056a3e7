"""Owns joint training of backbones and adaptors, and trained models on disk."""

from kar_offline.train.arms import ARMS, DEFAULT_ARMS
from kar_offline.train.checkpoint import TrainedModel, load_trained
from kar_offline.train.settings import TrainSettings
from kar_offline.train.stage import DEFAULT_BACKBONES, train

__all__ = ["ARMS", "DEFAULT_ARMS", "DEFAULT_BACKBONES", "TrainSettings", "TrainedModel", "load_trained", "train"]

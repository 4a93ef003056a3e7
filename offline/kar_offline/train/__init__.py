"""Owns joint training of backbones and adaptor, and the trained models on disk."""

from kar_offline.train.checkpoint import ARMS, TrainedModel, load_trained
from kar_offline.train.fit import TrainSettings
from kar_offline.train.runs import train

__all__ = ["ARMS", "TrainSettings", "TrainedModel", "load_trained", "train"]

"""Owns the hybrid-expert adaptor operator."""

from kar_kernels.adaptor import PRECISIONS, TOWERS, Encoded, FrozenAdaptor, HybridExpertAdaptor, Precision, Tower
from kar_kernels.layout import PackedWeights, pack
from kar_kernels.operator import hybrid_expert_adaptor

__all__ = [
    "PRECISIONS",
    "TOWERS",
    "Encoded",
    "FrozenAdaptor",
    "HybridExpertAdaptor",
    "PackedWeights",
    "Precision",
    "Tower",
    "hybrid_expert_adaptor",
    "pack",
]

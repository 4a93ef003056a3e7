"""Owns the hybrid-expert adaptor operator."""

from kar_kernels.adaptor import TOWERS, HybridExpertAdaptor, Tower

__all__ = ["TOWERS", "HybridExpertAdaptor", "Tower"]

"""Owns the hybrid-expert adaptor operator."""

from kar_kernels.adaptor import HybridExpertAdaptor

__all__ = ["HybridExpertAdaptor"]

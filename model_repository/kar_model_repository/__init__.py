"""Triton model repository: model code and configuration templates, rendered by export."""

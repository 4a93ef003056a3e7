"""Owns the replay of test users through a running sidecar."""

"""Owns the study of quality gates: which good texts they reject, and which faults they find."""

"""Owns `python -m kar_sidecar`, the same as `kar`."""

from kar_sidecar.cli import main

main()

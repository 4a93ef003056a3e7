"""Owns `python -m kar_sidecar`, which runs the command `kar`."""

from kar_sidecar.cli import main

main()

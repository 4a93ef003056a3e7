"""Owns the sidecar's subcommands of `kar`."""

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the sidecar's commands to `app`."""

"""Owns the offline half's subcommands of `kar`."""

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the offline commands to `app`."""

"""Owns the questions put to language models: scenarios, versioned templates and the rendered prompts."""

from kar_offline.prompts.rendering import (
    History,
    Prompt,
    Renderer,
    read_prompts,
    read_renderer,
    read_scenario,
    render_again,
    render_prompts,
)
from kar_offline.prompts.scenario import Scenario, load_scenario

__all__ = [
    "History",
    "Prompt",
    "Renderer",
    "Scenario",
    "load_scenario",
    "read_prompts",
    "read_renderer",
    "read_scenario",
    "render_again",
    "render_prompts",
]

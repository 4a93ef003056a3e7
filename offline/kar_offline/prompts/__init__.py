"""Owns the questions to language models: scenarios, versioned templates and rendered prompts."""

from kar_offline.prompts.prompt import Prompt
from kar_offline.prompts.rendering import History, Renderer
from kar_offline.prompts.scenario import Scenario, load_scenario
from kar_offline.prompts.stage import (
    RenderedPrompts,
    read_prompts,
    read_renderer,
    read_scenario,
    render_again,
    render_prompts,
)

__all__ = [
    "History",
    "Prompt",
    "RenderedPrompts",
    "Renderer",
    "Scenario",
    "load_scenario",
    "read_prompts",
    "read_renderer",
    "read_scenario",
    "render_again",
    "render_prompts",
]

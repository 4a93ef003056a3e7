"""Owns the questions put to language models: scenarios, versioned templates and the rendered prompts."""

from kar_offline.prompts.rendering import Prompt, Renderer, read_prompts, render_prompts
from kar_offline.prompts.scenario import Scenario, load_scenario

__all__ = ["Prompt", "Renderer", "Scenario", "load_scenario", "read_prompts", "render_prompts"]

"""Owns the choice of the provider that the options name."""

import os
from collections.abc import Callable
from typing import Any

from kar_offline.generate.batch import OpenAIBatch
from kar_offline.generate.llama_cpp import PARAMETERS, LocalChat
from kar_offline.generate.openai_chat import DEFAULT_PARAMETERS, OpenAIChat, Price
from kar_offline.generate.pack import Pack
from kar_offline.generate.provider import Provider
from kar_offline.prompts.scenario import Scenario
from kar_offline.settings import API_KEY_VARIABLE, ProviderOptions
from kar_sidecar.errors import InputError

__all__ = ["make_provider"]


def make_provider(options: ProviderOptions, scenario: Callable[[], Scenario]) -> Provider:
    """The provider that the options choose.

    Args:
        options: The choice.
        scenario: Reads the scenario, which limits the length of an endpoint's answers; called only for endpoints.

    Raises:
        InputError: an option is missing, or options exclude each other.
        NotFoundError: there is no such pack.
        PreconditionError: there are no prompts.
    """
    provider = _without_ray(options, scenario)
    if options.budget_usd is not None and provider.cost_usd(1, 1) is None:
        raise InputError("--budget-usd needs to know what tokens cost: give --price, for a million read and written")
    if options.runner == "ray":
        if not isinstance(provider, OpenAIChat):
            raise InputError("--runner ray asks one question a request: not for packs or --batch")
        from kar_offline.generate.ray import OnRay  # an extra of its own

        return OnRay(provider, options.workers, options.ray_address)
    return provider


def _without_ray(options: ProviderOptions, scenario: Callable[[], Scenario]) -> Provider:
    if options.provider == "pack":
        return Pack.load(options.pack)
    if options.provider == "local":
        parameters = options.parameters or PARAMETERS
        return LocalChat(options.gguf, parameters=parameters, concurrency=options.concurrency or 4)
    if not options.base_url or not options.model:
        raise InputError("--llm openai needs an endpoint: give --base-url and --model, or set KAR_LLM_BASE_URL etc.")
    key = os.environ.get(API_KEY_VARIABLE)
    request: dict[str, Any] = {
        "parameters": options.parameters or {**DEFAULT_PARAMETERS, "max_tokens": scenario().limits.output_tokens},
        "price": Price(*options.price) if options.price else None,
        "timeout_s": options.timeout_s,
    }
    if options.batch:
        return OpenAIBatch(options.base_url, options.model, key, **request)
    return OpenAIChat(options.base_url, options.model, key, **request, concurrency=options.concurrency or 8)

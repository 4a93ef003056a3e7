import asyncio

import httpx
import pytest

from kar_offline.generate.local import LocalChat
from kar_sidecar.errors import UnavailableError

pytestmark = pytest.mark.service


def test_a_real_model_answers_on_loopback_and_is_gone_afterwards() -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is missing: install the extra local-llm")
    chat = LocalChat(parameters={"temperature": 0.0, "max_tokens": 4}, threads=1, concurrency=1)

    async def main() -> None:
        async with chat:
            completion = await chat.complete("What is the capital of France?")
            assert completion.text
            assert completion.input_tokens > 6
            assert 1 <= completion.output_tokens <= 4

    try:
        asyncio.run(main())
    except UnavailableError as error:
        pytest.skip(f"the model is not to be had: {error}")
    assert chat.base_url.startswith("http://127.0.0.1:")
    with pytest.raises(httpx.ConnectError):
        httpx.get(chat.base_url)
    assert chat.cost_usd(10, 10) == 0.0

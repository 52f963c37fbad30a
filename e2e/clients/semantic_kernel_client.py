"""Semantic Kernel against the Azure endpoint, over TLS: it accepts nothing else there."""

import asyncio
import json
import ssl
import urllib.error
import urllib.request

from checks import API_VERSION, CAPITAL, KEY, MODEL, TLS_URL, WEATHER, check, main, raises
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai.function_choice_behavior import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import AzureChatCompletion, AzureChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory, FunctionResultContent
from semantic_kernel.functions import kernel_function

service = AzureChatCompletion(deployment_name=MODEL, endpoint=TLS_URL, api_key=KEY, api_version=API_VERSION)
kernel = Kernel(services=[service])
# The service keeps its connections, which belong to one event loop.
loop = asyncio.Runner()


class Weather:
    """A plugin that remembers who called it."""

    asked = []

    @kernel_function(description="Tells the weather in a city.")
    def weather(self, city: str) -> str:
        self.asked.append(city)
        return f"It is sunny in {city}."


kernel.add_plugin(Weather(), plugin_name="sky")


def history(text: str) -> ChatHistory:
    history = ChatHistory()
    history.add_user_message(text)
    return history


def settings(**more) -> AzureChatPromptExecutionSettings:
    return AzureChatPromptExecutionSettings(temperature=0, max_tokens=100, **more)


async def streamed(text: str, wanted: AzureChatPromptExecutionSettings) -> list:
    stream = service.get_streaming_chat_message_contents(history(text), wanted, kernel=kernel)
    return [message async for messages in stream for message in messages]


@check("over TLS, with a CA that the client trusts; without it there is no connection")
def _():
    answer = loop.run(service.get_chat_message_content(history(CAPITAL), settings()))
    assert answer.content and answer.metadata["usage"].completion_tokens > 0, answer
    strangers = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    error = raises(urllib.error.URLError, lambda: urllib.request.urlopen(f"{TLS_URL}/health", context=strangers))
    assert isinstance(error.reason, ssl.SSLCertVerificationError), error


@check("streamed, with the usage that it asks for by itself")
def _():
    whole = loop.run(service.get_chat_message_content(history(CAPITAL), settings()))
    pieces = loop.run(streamed(CAPITAL, settings()))
    assert "".join(piece.content for piece in pieces) == whole.content, pieces
    usages = [piece.metadata["usage"] for piece in pieces if piece.metadata.get("usage")]
    assert usages and usages[-1].completion_tokens == whole.metadata["usage"].completion_tokens, usages


@check("a plugin's function is called by itself, whole and streamed, and its result answered")
def _():
    must = FunctionChoiceBehavior.Required(auto_invoke=True)
    Weather.asked.clear()
    wanted = settings(function_choice_behavior=must)
    answer = loop.run(service.get_chat_message_content(history(WEATHER), wanted, kernel=kernel))
    assert Weather.asked and answer.content, (Weather.asked, answer)
    whole = list(Weather.asked)
    Weather.asked.clear()
    pieces = loop.run(streamed(WEATHER, settings(function_choice_behavior=must)))
    assert Weather.asked == whole, (Weather.asked, whole)
    # Semantic Kernel ends its stream with the results, where a call is required: there is no turn after it.
    results = [item.result for piece in pieces for item in piece.items if isinstance(item, FunctionResultContent)]
    assert results == [f"It is sunny in {city}." for city in whole], results


@check("semantic-kernel#5289: a stream never ends silently, it says why, and what Azure's filter found")
def _():
    pieces = loop.run(streamed(CAPITAL, settings()))
    reasons = [piece.finish_reason for piece in pieces if piece.finish_reason]
    assert len(reasons) == 1 and reasons[0].value in ("stop", "length"), reasons
    body = {"messages": [{"role": "user", "content": CAPITAL}], "max_tokens": 8, "stream": True}
    url = f"{TLS_URL}/openai/deployments/{MODEL}/chat/completions?api-version={API_VERSION}"
    headers = {"api-key": KEY, "content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as response:
        lines = [line.decode().removeprefix("data: ").strip() for line in response if line.strip()]
    assert lines[-1] == "[DONE]", lines
    events = [json.loads(line) for line in lines[:-1]]
    assert any("prompt_filter_results" in event for event in events), events
    choices = [choice for event in events for choice in event["choices"]]
    assert choices and all("content_filter_results" in choice for choice in choices), choices


main("semantic-kernel")

"""LlamaIndex' class for servers that are like OpenAI's."""

import asyncio

from checks import CAPITAL, KEY, MODEL, URL, WEATHER, Capital, Short, check, main
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model=MODEL,
    api_base=f"{URL}/v1",
    api_key=KEY,
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=4096,
    max_tokens=200,
    temperature=0,
    max_retries=0,
)
ASK = [ChatMessage(role="user", content=CAPITAL)]


def weather(city: Short) -> str:
    """Tells the weather in a city."""
    return f"It is sunny in {city}."


@check("chat, streamed, and as a plain completion")
def _():
    whole = llm.chat(ASK).message.content
    assert whole
    assert "".join(piece.delta or "" for piece in llm.stream_chat(ASK)) == whole

    async def later():
        return "".join([piece.delta or "" async for piece in await llm.astream_chat(ASK)])

    assert asyncio.run(later()) == whole
    plain = llm.model_copy(update={"is_chat_model": False, "max_tokens": 8})
    assert plain.complete("The capital of France is").text


@check("function calling: the call, whole and streamed, and its result")
def _():
    tool = FunctionTool.from_defaults(weather)
    ask = {"tools": [tool], "user_msg": WEATHER, "tool_required": True}
    calls = llm.get_tool_calls_from_response(llm.chat_with_tools(**ask))
    assert calls and calls[0].tool_name == "weather" and isinstance(calls[0].tool_kwargs["city"], str), calls
    *_, last = llm.stream_chat_with_tools(**ask)
    streamed = llm.get_tool_calls_from_response(last)
    assert [call.tool_kwargs for call in streamed] == [call.tool_kwargs for call in calls], (streamed, calls)
    answer = llm.predict_and_call([tool], user_msg=WEATHER, tool_required=True)
    assert answer.response.startswith("It is sunny in "), answer


@check("as_structured_llm with a pydantic model")
def _():
    answer = llm.as_structured_llm(Capital).chat(ASK).raw
    assert isinstance(answer, Capital), answer


main("llama-index-llms-openai-like")

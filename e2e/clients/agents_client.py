"""OpenAI's Agents SDK: on chat completions and on responses."""

import asyncio
from dataclasses import replace

from agents import (
    Agent,
    AgentHooks,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checks import KEY, MODEL, URL, WEATHER, Capital, Short, check, main
from openai import AsyncOpenAI

set_tracing_disabled(True)


class OneCall(AgentHooks):
    """A model of this size decides badly: it must call, and after a call must answer. The tools are told both times."""

    async def on_tool_end(self, context, agent, tool, result):
        agent.model_settings = replace(agent.model_settings, tool_choice="none")


def run(model: type, streamed: bool) -> None:
    asked = []

    @function_tool
    def weather(city: Short) -> str:
        """Tells the weather in a city."""
        asked.append(city)
        return f"It is sunny in {city}."

    async def go():
        async with AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as client:
            settings = ModelSettings(temperature=0, max_tokens=200, tool_choice="required", parallel_tool_calls=False)
            agent = Agent(
                name="guide",
                instructions="Call the tool once, then answer.",
                tools=[weather],
                output_type=Capital,
                model=model(model=MODEL, openai_client=client),
                model_settings=settings,
                hooks=OneCall(),
                reset_tool_choice=False,
            )
            if not streamed:
                return (await Runner.run(agent, WEATHER, max_turns=6)).final_output
            result = Runner.run_streamed(agent, WEATHER, max_turns=6)
            async for _ in result.stream_events():
                pass
            return result.final_output

    answer = asyncio.run(go())
    assert isinstance(answer, Capital) and len(asked) == 1, (answer, asked)


@check("openai-agents-python#3709: response_format together with tools: a call, then an answer of the form")
def _():
    run(OpenAIChatCompletionsModel, streamed=False)
    run(OpenAIChatCompletionsModel, streamed=True)


@check("the same through /v1/responses")
def _():
    run(OpenAIResponsesModel, streamed=False)
    run(OpenAIResponsesModel, streamed=True)


main("openai-agents")

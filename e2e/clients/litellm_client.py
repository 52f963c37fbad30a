"""LiteLLM, which many gateways and agents stand on: as for an OpenAI-compatible server and as for Azure."""

import json

import litellm
from checks import API_VERSION, CAPITAL, EMBEDDINGS_URL, KEY, MODEL, URL, WEATHER, Capital, check, main, raises

litellm.suppress_debug_info = True
WAYS = {
    "openai": {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1"},
    "azure": {"model": f"azure/{MODEL}", "api_base": URL, "api_version": API_VERSION},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 16}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def complete(way: str, text: str, **more):
    common = {"api_key": KEY, "temperature": 0, "max_tokens": 200, "num_retries": 0}
    return litellm.completion(messages=[{"role": "user", "content": text}], **WAYS[way], **common, **more)


for way in WAYS:

    @check(f"{way}: whole and streamed, with usage")
    def _(way=way):
        whole = complete(way, CAPITAL)
        text = whole.choices[0].message.content
        assert text and whole.usage.completion_tokens > 0, whole
        chunks = list(complete(way, CAPITAL, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text, chunks
        usages = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
        assert usages[-1].completion_tokens == whole.usage.completion_tokens, usages

    @check(f"{way}: a tool that must be called, whole and streamed")
    def _(way=way):
        ask = {"tools": [TOOL], "tool_choice": "required"}
        calls = complete(way, WEATHER, **ask).choices[0].message.tool_calls
        assert set(json.loads(calls[0].function.arguments)) == {"city"}, calls
        built = litellm.stream_chunk_builder(list(complete(way, WEATHER, stream=True, **ask)))
        streamed = [call.function.arguments for call in built.choices[0].message.tool_calls]
        assert streamed == [call.function.arguments for call in calls], (streamed, calls)

    @check(f"{way}: an answer in the form of a pydantic model")
    def _(way=way):
        schema = {"name": "Capital", "schema": Capital.model_json_schema(), "strict": True}
        answer = complete(way, CAPITAL, response_format={"type": "json_schema", "json_schema": schema})
        Capital.model_validate_json(answer.choices[0].message.content)

    @check(f"{way}: errors are of their classes")
    def _(way=way):
        raises(litellm.BadRequestError, lambda: complete(way, CAPITAL, logit_bias={"x": 1}))
        wrong = {**WAYS[way], "model": f"{way}/nobody", "api_key": KEY, "num_retries": 0}
        raises(litellm.NotFoundError, lambda: litellm.completion(messages=[{"role": "user", "content": "x"}], **wrong))


@check("openai: responses and embeddings")
def _():
    answer = litellm.responses(input=CAPITAL, **WAYS["openai"], api_key=KEY, max_output_tokens=16)
    assert answer.output[0].content[0].text, answer
    vectors = litellm.embedding(
        model="openai/minilm", api_base=f"{EMBEDDINGS_URL}/v1", api_key=KEY, input=["one", "two"], encoding_format="float"
    )
    assert [len(item["embedding"]) for item in vectors.data] == [384, 384]


main("litellm")

"""OpenAI's own Python client, as for OpenAI and as for Azure OpenAI."""

import asyncio
import json

import openai
from checks import API_VERSION, CAPITAL, EMBEDDINGS_URL, KEY, MODEL, URL, WEATHER, Capital, check, main, raises

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
azure = openai.AzureOpenAI(azure_endpoint=URL, api_key=KEY, api_version=API_VERSION, max_retries=0)
ASK = {"model": MODEL, "messages": [{"role": "user", "content": CAPITAL}], "temperature": 0, "max_completion_tokens": 24}


def function(name: str, *arguments: str, **more) -> dict:
    fields = {argument: {"type": "string", "maxLength": 16} for argument in arguments}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": schema, **more}}


TOOLS = [function("weather", "city"), function("route", "origin", "target")]
CALL = {
    "model": MODEL,
    "messages": [{"role": "user", "content": WEATHER}],
    "tools": TOOLS,
    "temperature": 0,
    "max_completion_tokens": 200,
}


def follow(calls) -> None:
    """Each call is one of the functions, with the arguments that it has, and an id of its own."""
    wanted = {tool["function"]["name"]: set(tool["function"]["parameters"]["properties"]) for tool in TOOLS}
    for call in calls:
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == wanted[call.function.name], call
        assert all(isinstance(argument, str) for argument in arguments.values()), call
    assert len({call.id for call in calls}) == len(calls) > 0, calls


def accumulated(stream) -> tuple[dict, str, list]:
    """The calls of a stream by index, as text of name and arguments; why it ended; all its pieces of arguments."""
    calls, finish, pieces = {}, None, []
    for chunk in stream:
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            for delta in choice.delta.tool_calls or []:
                name, arguments = calls.get(delta.index, ("", ""))
                pieces.append(delta.function.arguments or "")
                calls[delta.index] = (name + (delta.function.name or ""), arguments + pieces[-1])
    return calls, finish, pieces


@check("models, listed and alone")
def _():
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@check("chat, whole and streamed: the same text, usage at the end")
def _():
    whole = client.chat.completions.create(**ASK)
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, text
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == [], chunks[-1]
    assert len({chunk.id for chunk in chunks}) == 1
    with client.chat.completions.stream(**ASK) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.content == text
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds


@check("eight at once with the asynchronous client: the same text eight times")
def _():
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as many:
            answers = await asyncio.gather(*(many.chat.completions.create(**ASK) for _ in range(8)))
            return {answer.choices[0].message.content for answer in answers}

    assert asyncio.run(ask()) == {client.chat.completions.create(**ASK).choices[0].message.content}


@check("n answers, whole and streamed; a seed repeats them")
def _():
    ask = {**ASK, "n": 3, "temperature": 1, "seed": 7}
    texts = [choice.message.content for choice in client.chat.completions.create(**ask).choices]
    assert len(set(texts)) > 1, texts
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts, (streamed, texts)


@check("log-probabilities, whole and streamed")
def _():
    ask = {**ASK, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**ask).choices[0]
    for token in whole.logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token, token
    assert b"".join(bytes(token.bytes) for token in whole.logprobs.content).decode().startswith(whole.message.content)
    choices = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True) if chunk.choices]
    assert [t for c in choices if c.logprobs for t in c.logprobs.content] == whole.logprobs.content


@check("stop ends the text before it")
def _():
    text = client.chat.completions.create(**ASK).choices[0].message.content
    stop = text.split()[2]
    choice = client.chat.completions.create(**ASK, stop=[stop]).choices[0]
    assert choice.finish_reason == "stop" and choice.message.content == text[: text.index(stop)], choice


@check("tools that must be called: names, arguments, ids; a named one; none")
def _():
    choice = client.chat.completions.create(**CALL, tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls", choice
    follow(choice.message.tool_calls)
    named = {"type": "function", "function": {"name": "route"}}
    choice = client.chat.completions.create(**CALL, tool_choice=named).choices[0]
    assert {call.function.name for call in choice.message.tool_calls} == {"route"}, choice
    choice = client.chat.completions.create(**CALL, tool_choice="none").choices[0]
    assert choice.message.tool_calls is None and choice.message.content, choice


@check("parallel calls, and one at most")
def _():
    ask = {**CALL, "tool_choice": "required", "n": 16, "temperature": 1, "seed": 1}
    choices = client.chat.completions.create(**ask).choices
    complete = [choice.message.tool_calls for choice in choices if choice.finish_reason == "tool_calls"]
    assert max(len(calls) for calls in complete) > 1, complete
    for calls in complete:
        follow(calls)
    one = client.chat.completions.create(**ask, parallel_tool_calls=False).choices
    assert {len(choice.message.tool_calls) for choice in one} == {1}, one


@check("streamed arguments: in pieces, and those of the whole answer")
def _():
    ask = {**CALL, "tool_choice": "required"}
    whole = client.chat.completions.create(**ask).choices[0].message.tool_calls
    calls, finish, pieces = accumulated(client.chat.completions.create(**ask, stream=True))
    expected = [(call.function.name, call.function.arguments) for call in whole]
    assert [calls[index] for index in sorted(calls)] == expected, (calls, expected)
    assert finish == "tool_calls" and len(pieces) > 2 * len(calls), (finish, pieces)


@check("a tool's result goes back, and an answer follows")
def _():
    message = client.chat.completions.create(**CALL, tool_choice="required").choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "Sunny."} for call in message.tool_calls]
    messages = [*CALL["messages"], message, *results]
    choice = client.chat.completions.create(**{**CALL, "messages": messages}, tool_choice="none").choices[0]
    assert choice.message.content, choice


@check("chat.completions.parse with a pydantic model, also streamed")
def _():
    ask = {**ASK, "max_completion_tokens": 200, "response_format": Capital}
    parsed = client.chat.completions.parse(**ask).choices[0].message.parsed
    assert isinstance(parsed, Capital), parsed
    with client.chat.completions.stream(**ask) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == parsed


@check("chat.completions.parse with a strict tool")
def _():
    tool = openai.pydantic_function_tool(Capital)
    choice = client.chat.completions.parse(**{**CALL, "tools": [tool]}, tool_choice="required").choices[0]
    assert isinstance(choice.message.tool_calls[0].function.parsed_arguments, Capital), choice


@check("completions, whole and streamed, of a text and of tokens; log-probabilities")
def _():
    ask = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**ask, logprobs=2)
    text = whole.choices[0].text
    assert whole.usage.completion_tokens == 8 == len(whole.choices[0].logprobs.tokens), whole
    assert "".join(whole.choices[0].logprobs.tokens) == text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True)) == text
    tokens = client.post("../tokenize", body={"prompt": ask["prompt"]}, cast_to=dict)["tokens"]
    assert client.completions.create(**{**ask, "prompt": tokens}).choices[0].text == text


RESPOND = {"model": MODEL, "input": CAPITAL, "temperature": 0, "max_output_tokens": 24}


@check("responses: created, streamed, kept, continued, deleted")
def _():
    first = client.responses.create(**RESPOND)
    assert first.status in ("completed", "incomplete") and first.output_text, first
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    with client.responses.stream(**RESPOND) as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == first.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == f"response.{first.status}", events[-1]
    assert client.responses.retrieve(first.id).output_text == first.output_text
    more = client.responses.create(**{**RESPOND, "input": "And of Italy?"}, previous_response_id=first.id)
    assert more.usage.input_tokens > first.usage.total_tokens, more.usage
    client.responses.delete(first.id)
    raises(openai.NotFoundError, lambda: client.responses.retrieve(first.id))


@check("responses.parse with a pydantic model")
def _():
    ask = {**RESPOND, "max_output_tokens": 200}
    parsed = client.responses.parse(**ask, text_format=Capital).output_parsed
    assert isinstance(parsed, Capital), parsed
    assert azure.responses.parse(**ask, text_format=Capital).output_parsed == parsed


@check("responses: a function is called, its result goes back, whole and streamed")
def _():
    tools = [{"type": "function", **tool["function"], "strict": True} for tool in TOOLS]
    ask = {**RESPOND, "input": WEATHER, "tools": tools, "max_output_tokens": 200, "parallel_tool_calls": False}
    first = client.responses.create(**ask, tool_choice="required")
    [call] = [item for item in first.output if item.type == "function_call"]
    json.loads(call.arguments)
    with client.responses.stream(**ask, tool_choice="required") as stream:
        kinds = [event.type for event in stream]
        [streamed] = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments), streamed
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= set(kinds), kinds
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    ask = {**ask, "input": [result], "tool_choice": "none", "previous_response_id": first.id}
    assert client.responses.create(**ask).output_text


@check("embeddings, as OpenAI's and as Azure's client ask for them")
def _():
    texts = ["The cat sits on the mat.", "A cat is sitting on a rug.", "Interest rates rose."]
    address = {"api_key": KEY, "max_retries": 0}
    plain = openai.OpenAI(base_url=f"{EMBEDDINGS_URL}/v1", **address)
    deployed = openai.AzureOpenAI(azure_endpoint=EMBEDDINGS_URL, api_version=API_VERSION, **address)
    answer = plain.embeddings.create(model="minilm", input=texts)
    vectors = [item.embedding for item in answer.data]
    likeness = [sum(a * b for a, b in zip(vectors[0], vector)) for vector in vectors]
    assert abs(likeness[0] - 1) < 1e-4 and likeness[1] > 0.5 > likeness[2], likeness
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    same = deployed.embeddings.create(model="minilm", input=texts, encoding_format="float")
    assert all(abs(a - b) < 1e-6 for one, two in zip(vectors, same.data) for a, b in zip(one, two.embedding))
    error = raises(openai.BadRequestError, lambda: plain.chat.completions.create(**{**ASK, "model": "minilm"}))
    assert error.param == "model", error


@check("errors: 401, 404 and 400 raise their classes, with code and field")
def _():
    stranger = openai.OpenAI(base_url=f"{URL}/v1", api_key="another", max_retries=0)
    assert raises(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"
    ask = client.chat.completions.create
    assert raises(openai.NotFoundError, lambda: ask(**{**ASK, "model": "nobody"})).code == "model_not_found"
    raises(openai.NotFoundError, lambda: client.post("/nowhere", cast_to=dict))
    for wrong, param in [
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
    ]:
        error = raises(openai.BadRequestError, lambda: ask(**{**ASK, **wrong}))
        assert error.param == param and error.type == "invalid_request_error", (error, wrong)
    long = [{"role": "user", "content": "word " * 10_000}]
    error = raises(openai.BadRequestError, lambda: ask(**{**ASK, "messages": long}))
    assert error.code == "context_length_exceeded", error


@check("AzureOpenAI: deployments in the path, api-key, models, responses, errors")
def _():
    text = client.chat.completions.create(**ASK).choices[0].message.content
    answer = azure.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == text
    assert answer.model_extra["prompt_filter_results"][0]["prompt_index"] == 0, answer
    assert "content_filter_results" in answer.choices[0].model_extra, answer
    assert azure.completions.create(model=MODEL, prompt="Once", max_tokens=4).choices[0].text
    assert azure.responses.create(**RESPOND).output_text == client.responses.create(**RESPOND).output_text
    assert MODEL in [model.id for model in azure.models.list()]
    deployed = openai.AzureOpenAI(
        azure_endpoint=URL, azure_deployment=MODEL, api_key=KEY, api_version=API_VERSION, max_retries=0
    )
    assert deployed.chat.completions.create(**{**ASK, "model": "gpt-4o"}).choices[0].message.content == text
    error = raises(openai.NotFoundError, lambda: azure.chat.completions.create(**{**ASK, "model": "nobody"}))
    assert error.code == "DeploymentNotFound", error
    stranger = openai.AzureOpenAI(azure_endpoint=URL, api_key="another", api_version=API_VERSION, max_retries=0)
    raises(openai.AuthenticationError, lambda: stranger.chat.completions.create(**ASK))
    newer = openai.OpenAI(base_url=f"{URL}/openai/v1/", api_key=KEY, max_retries=0)
    assert newer.chat.completions.create(**ASK).choices[0].message.content == text


@check("openai-python#1469: Azure's client asks for usage in a stream, and only the last chunk has it")
def _():
    chunks = list(azure.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False], chunks
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0, chunks[-1]
    assert all(chunk.usage is None for chunk in azure.chat.completions.create(**ASK, stream=True))


@check("worker-vllm#85: fields of tools and messages that nobody knows are ignored")
def _():
    tools = [{**function("weather", "city", strict=True, examples=["x"]), "cache_control": {"type": "ephemeral"}}]
    messages = [{**CALL["messages"][0], "name": "me", "annotations": []}]
    more = {"tools": tools, "messages": messages, "tool_choice": "required", "extra_body": {"unknown": 1}}
    choice = client.chat.completions.create(**{**CALL, **more}, store=False, metadata={"a": "b"}, user="me").choices[0]
    assert choice.message.tool_calls[0].function.name == "weather", choice


main("openai")

"""LangChain's classes for OpenAI and Azure OpenAI, and an agent of LangChain's that calls a tool."""

from checks import API_VERSION, CAPITAL, EMBEDDINGS_URL, KEY, MODEL, URL, WEATHER, Capital, Short, check, main
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain.messages import AIMessage, ToolMessage
from langchain.tools import tool
from langchain_openai import AzureChatOpenAI, ChatOpenAI, OpenAIEmbeddings

COMMON = {"api_key": KEY, "temperature": 0, "max_tokens": 200, "max_retries": 0}
openai = ChatOpenAI(base_url=f"{URL}/v1", model=MODEL, **COMMON)
azure = AzureChatOpenAI(azure_endpoint=URL, azure_deployment=MODEL, api_version=API_VERSION, **COMMON)


@tool
def weather(city: Short) -> str:
    """Tells the weather in a city."""
    return f"It is sunny in {city}."


for name, chat in [("ChatOpenAI", openai), ("AzureChatOpenAI", azure)]:

    @check(f"{name}: invoke and stream, with usage")
    def _(chat=chat):
        whole = chat.invoke(CAPITAL)
        assert whole.content and whole.usage_metadata["output_tokens"] > 0, whole
        pieces = list(chat.stream(CAPITAL, stream_usage=True))
        assert "".join(piece.text for piece in pieces) == whole.text, pieces
        assert sum((piece.usage_metadata or {}).get("output_tokens", 0) for piece in pieces) > 0, pieces

    @check(f"{name}: with_structured_output, by schema and by function")
    def _(chat=chat):
        for method in ["json_schema", "function_calling"]:
            answer = chat.with_structured_output(Capital, method=method).invoke(CAPITAL)
            assert isinstance(answer, Capital), (method, answer)

    @check(f"{name}: bind_tools, whole and streamed")
    def _(chat=chat):
        bound = chat.bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
        [call] = bound.invoke(WEATHER).tool_calls
        assert call["name"] == "weather" and isinstance(call["args"]["city"], str), call
        total = None
        for piece in bound.stream(WEATHER):
            total = piece if total is None else total + piece
        assert [(c["name"], c["args"]) for c in total.tool_calls] == [(call["name"], call["args"])], total


@wrap_model_call
def one_call(request, handler):
    """A model of this size decides badly: the first turn must call, the second must answer."""
    done = any(isinstance(message, ToolMessage) for message in request.messages)
    return handler(request.override(tool_choice="none" if done else "required"))


@check("create_agent: calls the tool, reads its result, answers, and ends")
def _():
    for chat in [openai, azure]:
        agent = create_agent(chat, tools=[weather], middleware=[one_call])
        messages = agent.invoke({"messages": [{"role": "user", "content": WEATHER}]}, {"recursion_limit": 10})["messages"]
        results = [message for message in messages if isinstance(message, ToolMessage)]
        assert results and all(result.text.startswith("It is sunny in ") for result in results), messages
        assert isinstance(messages[-1], AIMessage) and messages[-1].text and not messages[-1].tool_calls, messages[-1]


@check("ChatOpenAI through /v1/responses: invoke, stream, tools")
def _():
    chat = ChatOpenAI(base_url=f"{URL}/v1", model=MODEL, use_responses_api=True, **COMMON)
    whole = chat.invoke(CAPITAL)
    assert whole.text and whole.usage_metadata["output_tokens"] > 0, whole
    assert "".join(piece.text for piece in chat.stream(CAPITAL)) == whole.text
    assert isinstance(chat.with_structured_output(Capital).invoke(CAPITAL), Capital)
    calls = chat.bind_tools([weather], tool_choice="required").invoke(WEATHER).tool_calls
    assert calls and calls[0]["name"] == "weather", calls


@check("OpenAIEmbeddings: texts, not tokens")
def _():
    embeddings = OpenAIEmbeddings(
        base_url=f"{EMBEDDINGS_URL}/v1", api_key=KEY, model="minilm", check_embedding_ctx_length=False, max_retries=0
    )
    assert len(embeddings.embed_documents(["one", "two"])) == 2 and len(embeddings.embed_query("one")) == 384


main("langchain-openai")

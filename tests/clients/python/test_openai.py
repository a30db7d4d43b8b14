"""openai-python, as its users write it. Every answer is validated strictly."""

import asyncio
import json

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "Say something."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"celsius": {"type": "boolean"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["celsius", "days"],
            "additionalProperties": False,
        },
    },
}


class Flags(BaseModel):
    good: bool
    cheap: bool


@pytest.fixture(scope="module")
def client(base_url, api_key):
    return OpenAI(
        base_url=f"{base_url}/v1", api_key=api_key, timeout=60, max_retries=0, _strict_response_validation=True
    )


def test_models_are_listed_and_found(client, model):
    assert model in [entry.id for entry in client.models.list()]
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing-of-that-name")


def test_a_chat_is_answered_and_counted(client, model):
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("length", "stop")
    usage = answer.usage
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens


def test_a_stream_says_what_the_whole_answer_says(client, model):
    asked = dict(model=model, messages=MESSAGES, max_tokens=24, temperature=0)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text and text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_stream_helper_collects_a_parsed_answer(client, model):
    asked = dict(model=model, messages=MESSAGES, response_format=Flags, max_tokens=200, temperature=0)
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(answer.choices[0].message.parsed, Flags)


def test_logprobs_fall_and_the_greedy_token_leads(client, model):
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    for entry in answer.choices[0].logprobs.content:
        alternatives = [other.logprob for other in entry.top_logprobs]
        assert alternatives == sorted(alternatives, reverse=True)
        assert entry.logprob == pytest.approx(alternatives[0], abs=1e-6)


def test_structured_output_is_parsed(client, model):
    answer = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Flags, max_tokens=200, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Flags)


def test_a_named_tool_is_called_with_valid_arguments(client, model):
    asked = dict(
        model=model,
        messages=MESSAGES,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=200,
        temperature=0,
    )
    (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert isinstance(arguments["celsius"], bool) and 1 <= arguments["days"] <= 9
    pieces = [
        piece
        for chunk in client.chat.completions.create(**asked, stream=True)
        for choice in chunk.choices
        for piece in choice.delta.tool_calls or []
    ]
    assert pieces[0].function.name == "weather" and pieces[0].id
    assert "".join(piece.function.arguments or "" for piece in pieces) == call.function.arguments


def test_completions_take_text_ids_and_lists_of_both(client, model):
    def count(prompt):
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=2, temperature=0)
        return [choice.index for choice in answer.choices]

    assert count("One") == [0]
    assert count(["One", "Two", "Three"]) == [0, 1, 2]
    assert count([5, 6, 7]) == [0]
    assert count([[5, 6], [7, 8]]) == [0, 1]


def test_a_seed_gives_the_same_answer_again(client, model):
    def drawn(seed):
        # Tiny random weights are very sure of themselves.
        asked = dict(model=model, prompt="One", max_tokens=16, temperature=20, seed=seed)
        answer = client.completions.create(**asked)
        return answer.choices[0].text

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(5)}) > 1


def test_the_context_length_is_named(client, model):
    limit = client.models.retrieve(model).model_extra["max_model_len"]
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {limit} tokens"):
        client.completions.create(model=model, prompt=[5] * (limit + 1), max_tokens=1)


def test_errors_have_their_classes(client, base_url, model):
    stranger = OpenAI(base_url=f"{base_url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=MESSAGES, temperature=-1)
    assert refused.value.param == "temperature"


def test_async_answers_come_together_and_a_stream_may_be_left(base_url, api_key, model):
    async def main():
        async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key=api_key, max_retries=0) as client:
            asked = dict(model=model, messages=MESSAGES, max_tokens=16, temperature=0)
            answers = await asyncio.gather(*[client.chat.completions.create(**asked) for _ in range(10)])
            stream = await client.chat.completions.create(**{**asked, "max_tokens": 400}, stream=True)
            async for _ in stream:
                break
            await stream.close()
            return {answer.choices[0].message.content for answer in answers}

    assert len(asyncio.run(main())) == 1

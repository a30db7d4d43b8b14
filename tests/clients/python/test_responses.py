"""`/v1/responses`, as openai-python's users ask it. Every answer and event is validated strictly."""

import json

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

WEATHER = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"celsius": {"type": "boolean"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["celsius", "days"],
        "additionalProperties": False,
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


def test_an_answer_is_what_chat_completions_say(client, model):
    asked = dict(model=model, temperature=0)
    answer = client.responses.create(**asked, input="Say something.", max_output_tokens=12)
    messages = [{"role": "user", "content": "Say something."}]
    chat = client.chat.completions.create(**asked, messages=messages, max_tokens=12)
    assert answer.output_text and answer.output_text == chat.choices[0].message.content
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    if chat.choices[0].finish_reason == "length":
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_instructions_and_items_are_a_conversation(client, model):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Say "}, {"type": "input_text", "text": "something."}]},
        {"role": "assistant", "content": "Something."},
        {"role": "user", "content": "More."},
    ]
    answer = client.responses.create(
        model=model, instructions="Be brief.", input=items, max_output_tokens=8, temperature=0, metadata={"a": "b"}
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say something."},
        {"role": "assistant", "content": "Something."},
        {"role": "user", "content": "More."},
    ]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
    assert answer.output_text and answer.output_text == chat.choices[0].message.content
    assert (answer.instructions, answer.metadata) == ("Be brief.", {"a": "b"})


def test_a_stream_says_what_the_whole_answer_says(client, model):
    asked = dict(model=model, input="Say something.", max_output_tokens=24, temperature=0)
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == f"response.{whole.status}"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text and len(deltas) > 1
    assert events[-1].response.usage == whole.usage


def test_the_stream_helper_parses_what_comes(client, model):
    asked = dict(model=model, input="Flags?", max_output_tokens=200, temperature=0)
    with client.responses.stream(**asked, text_format=Flags) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_response()
    assert {"response.output_item.added", "response.content_part.done", "response.completed"} <= kinds
    assert isinstance(answer.output_parsed, Flags)
    assert isinstance(client.responses.parse(**asked, text_format=Flags).output_parsed, Flags)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_functions_are_called(client, model, choice):
    asked = dict(model=model, input="Weather?", tools=[WEATHER], tool_choice=choice, max_output_tokens=200, temperature=0)
    calls = [item for item in client.responses.create(**asked).output if item.type == "function_call"]
    assert calls and all(call.name == "weather" and call.call_id for call in calls)
    arguments = json.loads(calls[0].arguments)
    assert isinstance(arguments["celsius"], bool) and 1 <= arguments["days"] <= 9
    events = list(client.responses.create(**asked, stream=True))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == [call.arguments for call in calls]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == "".join(event.arguments for event in done)
    # The call and what it gave go back.
    back = [{"role": "user", "content": "Weather?"}, calls[0].model_dump(exclude_none=True)]
    back.append({"type": "function_call_output", "call_id": calls[0].call_id, "output": "sunny"})
    assert client.responses.create(model=model, input=back, max_output_tokens=4).usage.output_tokens > 0


def test_logprobs_come_if_they_are_included(client, model):
    asked = dict(model=model, input="Say something.", max_output_tokens=6, temperature=0)
    answer = client.responses.create(**asked, include=["message.output_text.logprobs"], top_logprobs=2)
    for entry in answer.output[0].content[0].logprobs:
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-6)
    assert not client.responses.create(**asked).output[0].content[0].logprobs


def test_what_is_not_kept_is_refused(client, model):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=model, input="More.", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")

"""anthropic-python against `/v1/messages`."""

import anthropic
import pytest
from anthropic import Anthropic

MESSAGES = [{"role": "user", "content": "Say something."}]
WEATHER = {
    "name": "weather",
    "description": "The weather.",
    "input_schema": {
        "type": "object",
        "properties": {"celsius": {"type": "boolean"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["celsius", "days"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(base_url, api_key):
    return Anthropic(
        base_url=base_url, api_key=api_key, timeout=60, max_retries=0, _strict_response_validation=True
    )


def greedy(model, **more):
    return dict(model=model, messages=MESSAGES, max_tokens=16, extra_body={"temperature": 0}, **more)


def text(message):
    return "".join(block.text for block in message.content if block.type == "text")


def test_an_answer_is_what_chat_completions_say(client, http, model):
    answer = client.messages.create(**greedy(model, system="Be brief."))
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    asked = {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0}
    chat = http.post("/v1/chat/completions", json=asked).json()
    assert text(answer) and text(answer) == chat["choices"][0]["message"]["content"]
    assert answer.usage.input_tokens == chat["usage"]["prompt_tokens"]
    reason = {"length": "max_tokens", "stop": "end_turn"}[chat["choices"][0]["finish_reason"]]
    assert answer.stop_reason == reason


def test_a_stream_says_what_the_whole_answer_says(client, model):
    whole = client.messages.create(**greedy(model))
    with client.messages.stream(**greedy(model)) as stream:
        pieces = list(stream.text_stream)
        last = stream.get_final_message()
    assert "".join(pieces) == text(whole) and len(pieces) > 1
    assert (last.stop_reason, last.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    kinds = [event.type for event in client.messages.create(**greedy(model), stream=True)]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert {"content_block_start", "content_block_delta", "content_block_stop", "message_delta"} <= set(kinds)


def test_a_message_may_be_begun(client, model):
    begun = [*MESSAGES, {"role": "assistant", "content": "Well,"}]
    answer = client.messages.create(**{**greedy(model), "messages": begun})
    assert answer.usage.input_tokens > client.messages.create(**greedy(model)).usage.input_tokens - 8


def test_stop_sequences_are_told(client, model):
    whole = text(client.messages.create(**greedy(model)))
    stop = whole[3:6]
    answer = client.messages.create(**greedy(model, stop_sequences=[stop]))
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert text(answer) == whole[: whole.index(stop)]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_tools_are_used(client, model, choice):
    asked = {**greedy(model, tools=[WEATHER], tool_choice=choice), "max_tokens": 200}
    answer = client.messages.create(**asked)
    calls = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "tool_use" and calls[0].name == "weather"
    assert isinstance(calls[0].input["celsius"], bool) and 1 <= calls[0].input["days"] <= 9
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert [block.input for block in streamed.content] == [block.input for block in answer.content]
    result = {"type": "tool_result", "tool_use_id": calls[0].id, "content": "sunny"}
    back = [
        *MESSAGES,
        {"role": "assistant", "content": [{"type": "tool_use", "id": calls[0].id, "name": "weather", "input": calls[0].input}]},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(model=model, messages=back, max_tokens=4).usage.output_tokens > 0


def test_tokens_are_counted(client, model):
    counted = client.messages.count_tokens(model=model, messages=MESSAGES)
    assert counted.input_tokens == client.messages.create(**greedy(model)).usage.input_tokens


def test_errors_have_their_classes(client, base_url, model):
    stranger = Anthropic(base_url=base_url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(**greedy(model))
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**greedy("nothing-of-that-name"))
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(**{**greedy(model), "max_tokens": 0})
    assert refused.value.body["error"]["type"] == "invalid_request_error"

"""litellm, langchain-openai and lm-eval against the same server."""

import litellm
import pytest
from langchain_openai import ChatOpenAI

MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def reach(base_url, api_key, model):
    return dict(model=f"hosted_vllm/{model}", api_base=f"{base_url}/v1", api_key=api_key)


def test_litellm_answers_and_streams_the_same(reach):
    asked = dict(reach, messages=MESSAGES, max_tokens=12, temperature=0)
    whole = litellm.completion(**asked).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)]
    assert whole and "".join(pieces) == whole


def test_litellm_knows_what_went_wrong(reach, http, model):
    limit = next(entry["max_model_len"] for entry in http.get("/v1/models").json()["data"] if entry["id"] == model)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**reach, messages=[{"role": "user", "content": "word " * limit}])
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**reach, "model": "hosted_vllm/nothing-of-that-name"}, messages=MESSAGES)


def test_langchain_answers_and_streams_the_same(base_url, api_key, model):
    chat = ChatOpenAI(model=model, base_url=f"{base_url}/v1", api_key=api_key, temperature=0, max_tokens=12)
    whole = chat.invoke("Say something.")
    assert whole.usage_metadata["total_tokens"] > 0
    streamed = "".join(chunk.content for chunk in chat.stream("Say something."))
    assert streamed and streamed == whole.content

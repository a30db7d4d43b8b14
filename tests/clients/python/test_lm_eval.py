"""lm-eval's local-completions: its loglikelihoods are the model's."""

import json
import math
import os
import subprocess

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from safetensors.numpy import load_file

TEXTS = [("One two", " three four"), ("The sky", " is blue today"), ("a", "b")]


def loglikelihood(http, context, continuation):
    """The model's own, from the logits that `epsmoe logits` writes."""

    def ids(text):
        return http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]

    whole, start = ids(context + continuation), len(ids(context))
    out = os.path.join(os.environ["EPSMOE_SCRATCH"], "logits.safetensors")
    command = [os.environ["EPSMOE_BINARY"], "logits", "--model", os.environ["EPSMOE_CHECKPOINT"]]
    command += ["--dtype", "float32", "--ids", ",".join(map(str, whole)), "--out", out]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (rows,) = load_file(out).values()
    rows = rows.reshape(len(whole), -1)

    def logprob(position):
        row = rows[position - 1].astype("float64")
        return row[whole[position]] - row.max() - math.log(sum(math.exp(value - row.max()) for value in row))

    return sum(logprob(position) for position in range(start, len(whole)))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihoods_are_those_of_the_model(http, base_url, api_key, model, monkeypatch, batch_size):
    monkeypatch.setenv("OPENAI_API_KEY", api_key)
    harness = LocalCompletionsAPI(
        model=model,
        base_url=f"{base_url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=os.environ["EPSMOE_CHECKPOINT"],
        tokenized_requests=True,
        batch_size=batch_size,
        add_bos_token=False,
    )
    requests = [Instance("loglikelihood", {}, arguments=pair, idx=at) for at, pair in enumerate(TEXTS)]
    answers = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (value, _) in zip(TEXTS, answers):
        assert value == pytest.approx(loglikelihood(http, context, continuation), abs=1e-3), json.dumps(context)

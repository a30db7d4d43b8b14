// openai-node and the Vercel AI SDK against the server that run.sh started.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const { EPSMOE_BASE_URL, EPSMOE_API_KEY: apiKey, EPSMOE_MODEL: model } = process.env;
const baseURL = `${EPSMOE_BASE_URL}/v1`;
const messages = [{ role: "user", content: "Say something." }];
const asked = { model, messages, max_tokens: 16, temperature: 0 };

test("openai-node: an answer, and the stream that says the same", async () => {
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  const whole = await client.chat.completions.create(asked);
  let text = "";
  let usage;
  const stream = await client.chat.completions.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.ok(text);
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(usage, whole.usage);
});

test("openai-node: errors have their classes", async () => {
  const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  await assert.rejects(client.chat.completions.create({ ...asked, model: "no-such-model" }), OpenAI.NotFoundError);
});

test("openai-node: a stream that is left ends its request", async () => {
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  const stream = await client.chat.completions.create({ ...asked, max_tokens: 400, stream: true });
  for await (const _ of stream) break;
  const metrics = await (await fetch(`${EPSMOE_BASE_URL}/metrics`, { headers: { authorization: `Bearer ${apiKey}` } })).text();
  assert.match(metrics, /num_requests_running/);
});

test("openai-node: a response, and the stream that says the same", async () => {
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  const input = { model, input: "Say something.", max_output_tokens: 16, temperature: 0 };
  const whole = await client.responses.create(input);
  const stream = client.responses.stream(input);
  let text = "";
  stream.on("response.output_text.delta", (event) => (text += event.delta));
  const last = await stream.finalResponse();
  assert.ok(text);
  assert.equal(text, whole.output_text);
  assert.deepEqual(last.usage, whole.usage);
});

test("Vercel AI SDK: an answer, and the stream that says the same", async () => {
  const provider = createOpenAICompatible({ name: "epsmoe", baseURL, apiKey, includeUsage: true });
  const settings = { model: provider(model), messages, maxOutputTokens: 16, temperature: 0, maxRetries: 0 };
  const whole = await generateText(settings);
  assert.ok(whole.usage.outputTokens > 0);
  let text = "";
  for await (const piece of streamText(settings).textStream) text += piece;
  assert.ok(text);
  assert.equal(text, whole.text);
});

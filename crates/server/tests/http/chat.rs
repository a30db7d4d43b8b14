//! `/v1/chat/completions`: conversations, reasoning and calls of functions.

use super::support::{Running, Setup, serve};
use serde_json::{Value, json};

fn ask(content: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": content }], "max_tokens": 12, "seed": 1, "ignore_eos": true })
}

fn chat(server: &Running, body: &Value) -> Value {
    server.post("/v1/chat/completions", body).ok()
}

#[test]
fn answers_have_their_shape() {
    let server = serve();
    let mut body = ask("Hello");
    body["model"] = "org/tiny".into();
    let answer = chat(&server, &body);
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!("org/tiny")));
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["index"], &choice["logprobs"], &choice["finish_reason"]),
        (&json!(0), &Value::Null, &json!("length"))
    );
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["content"].is_string() && choice["message"].get("tool_calls").is_none());
    let tokens = server.post("/tokenize", &json!({ "messages": body["messages"] })).ok();
    let usage = json!({ "prompt_tokens": tokens["count"], "completion_tokens": 12 });
    assert_eq!(
        json!({ "prompt_tokens": answer["usage"]["prompt_tokens"], "completion_tokens": answer["usage"]["completion_tokens"] }),
        usage
    );
    let mut newer = body.clone();
    newer["max_completion_tokens"] = 3.into();
    assert_eq!(chat(&server, &newer)["usage"]["completion_tokens"], 3);
    let mut parts = body.clone();
    parts["messages"][0]["content"] =
        json!([{ "type": "text", "text": "Hel" }, { "type": "text", "text": "lo" }]);
    assert_eq!(chat(&server, &parts)["choices"], answer["choices"]);
}

#[test]
fn streams_say_what_plain_answers_say() {
    let server = serve();
    let mut body = ask("Hello");
    (body["n"], body["logprobs"], body["top_logprobs"]) = (2.into(), true.into(), 2.into());
    let plain = chat(&server, &body);
    body["stream_options"] = json!({ "include_usage": true });
    let mut events = server.events("/v1/chat/completions", body);
    let last = events.pop().unwrap();
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &plain["usage"]));
    for choice in plain["choices"].as_array().unwrap() {
        let of_choice: Vec<&Value> = events
            .iter()
            .map(|event| &event["choices"][0])
            .filter(|it| it["index"] == choice["index"])
            .collect();
        assert_eq!(of_choice[0]["delta"]["role"], "assistant");
        assert!(of_choice[1..].iter().all(|it| it["delta"].get("role").is_none()));
        let joined: String = of_choice.iter().filter_map(|it| it["delta"]["content"].as_str()).collect();
        assert_eq!(joined, choice["message"]["content"]);
        let told: Vec<&Value> =
            of_choice.iter().filter_map(|it| it["logprobs"]["content"].as_array()).flatten().collect();
        assert_eq!(told, choice["logprobs"]["content"].as_array().unwrap().iter().collect::<Vec<_>>());
        assert_eq!(told.len(), 12);
        for it in &of_choice {
            assert!(it.as_object().unwrap().contains_key("finish_reason"));
        }
        assert_eq!(of_choice.last().unwrap()["finish_reason"], choice["finish_reason"]);
    }
    for event in &events {
        assert_eq!((&event["id"], &event["object"]), (&events[0]["id"], &json!("chat.completion.chunk")));
    }
}

#[test]
fn log_probabilities_fall() {
    let server = serve();
    let mut body = ask("Hello");
    (body["logprobs"], body["top_logprobs"], body["temperature"]) = (true.into(), 4.into(), 0.into());
    let answer = chat(&server, &body);
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 12);
    for token in content {
        let top: Vec<f64> = token["top_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| it["logprob"].as_f64().unwrap())
            .collect();
        assert!(top.len() == 4 && top.is_sorted_by(|a, b| a >= b), "{token}");
        assert_eq!(token["logprob"], top[0]);
        assert!(token["token"].is_string() && token["bytes"].is_array());
    }
}

#[test]
fn the_last_message_is_gone_on_with() {
    let server = serve();
    let messages =
        json!([{ "role": "user", "content": "Hello" }, { "role": "assistant", "content": "Well" }]);
    let body =
        json!({ "messages": messages, "continue_final_message": true, "add_generation_prompt": false });
    let rendered = server.post("/tokenize", &body).ok()["tokens"].clone();
    let text = server.post("/detokenize", &json!({ "tokens": rendered })).ok();
    assert_eq!(text["prompt"], "<s><|user|>Hello<|assistant|>Well");
    let echo = json!({ "messages": messages, "continue_final_message": true, "echo": true, "max_tokens": 2 });
    assert!(chat(&server, &echo)["choices"][0]["message"]["content"].as_str().unwrap().starts_with("Well"));
}

#[test]
fn reasoning_is_told_apart() {
    let template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>\n{# </think> #}";
    let mut setup = Setup { template: Some(template), ..Setup::default() };
    setup.options.reasoning = Some("qwen3".parse().unwrap());
    let server = setup.serve();
    let message = chat(&server, &ask("Hello"))["choices"][0]["message"].clone();
    // The prompt leaves the model thinking, and random weights never stop.
    assert_eq!(message["content"], "");
    assert!(!message["reasoning_content"].as_str().unwrap().is_empty(), "{message}");
    let mut silent = ask("Hello");
    silent["include_reasoning"] = false.into();
    assert!(chat(&server, &silent)["choices"][0]["message"].get("reasoning_content").is_none());
}

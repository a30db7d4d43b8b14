//! The other ways to ask for an answer: `/v1/responses` and `/v1/messages`. They say what `/v1/chat/completions` says.

use super::support::{MODEL, Running, Setup, serve};
use serde_json::{Value, json};

/// The names and data of a stream's events.
fn named_events(server: &Running, path: &str, mut body: Value) -> Vec<(String, Value)> {
    body["stream"] = true.into();
    let answer = server.post(path, &body);
    assert_eq!(answer.header("content-type"), Some("text/event-stream"), "{}", answer.text);
    let events = answer.text.split("\n\n").filter(|event| !event.is_empty());
    let event = |event: &str| {
        let (name, data) = event.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        let name = name.strip_prefix("event: ").unwrap().to_owned();
        assert_eq!(data["type"], name);
        (name, data)
    };
    events.map(event).collect()
}

fn names(events: &[(String, Value)]) -> Vec<&str> {
    let mut names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    names
}

fn joined(events: &[(String, Value)], name: &str, text: &str) -> String {
    let of_name = events.iter().filter(|(of, _)| of == name);
    of_name.map(|(_, data)| data.pointer(text).unwrap().as_str().unwrap()).collect()
}

fn chat(server: &Running, messages: &Value) -> (String, Value) {
    let body = json!({ "messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": true });
    let answer = server.post("/v1/chat/completions", &body).ok();
    (answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned(), answer["usage"].clone())
}

#[test]
fn responses_say_what_chats_say() {
    let server = serve();
    let (text, usage) = chat(
        &server,
        &json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "Hello" }]),
    );
    let body = json!({ "instructions": "Be brief.", "input": "Hello", "max_output_tokens": 12, "temperature": 0,
        "ignore_eos": true });
    let answer = server.post("/v1/responses", &body).ok();
    assert_eq!((&answer["object"], &answer["status"]), (&json!("response"), &json!("incomplete")));
    assert_eq!(answer["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(answer["output"][0]["content"][0]["text"], text);
    assert_eq!(answer["output"][0]["status"], "incomplete");
    assert_eq!(answer["usage"]["input_tokens"], usage["prompt_tokens"]);
    assert_eq!(answer["usage"]["output_tokens"], usage["completion_tokens"]);
    let events = named_events(&server, "/v1/responses", body);
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ];
    assert_eq!(names(&events), expected);
    assert_eq!(joined(&events, "response.output_text.delta", "/delta"), text);
    let numbers: Vec<u64> =
        events.iter().map(|(_, data)| data["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let last = &events.last().unwrap().1["response"];
    let done = &events[events.len() - 2].1["item"];
    assert_eq!(done, &last["output"][0], "an item that was cut off says so where it ends");
    assert_eq!(
        (&last["output"][0]["content"], &last["usage"]["output_tokens"]),
        (&answer["output"][0]["content"], &answer["usage"]["output_tokens"])
    );
}

#[test]
fn messages_say_what_chats_say() {
    let server = serve();
    let (text, usage) = chat(
        &server,
        &json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "Hello" }]),
    );
    let messages = json!([{ "role": "user", "content": "Hello" }]);
    let body = json!({ "model": MODEL, "system": "Be brief.", "messages": messages, "max_tokens": 12,
        "temperature": 0, "ignore_eos": true });
    let answer = server.post("/v1/messages", &body).ok();
    assert_eq!(answer["content"], json!([{ "type": "text", "text": text }]));
    assert_eq!((&answer["type"], &answer["stop_reason"]), (&json!("message"), &json!("max_tokens")));
    assert_eq!(answer["usage"]["input_tokens"], usage["prompt_tokens"]);
    assert_eq!(answer["usage"]["output_tokens"], 12);
    let events = named_events(&server, "/v1/messages", body.clone());
    let expected = [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(names(&events), expected);
    assert_eq!(joined(&events, "content_block_delta", "/delta/text"), text);
    assert_eq!(events[0].1["message"]["usage"]["input_tokens"], usage["prompt_tokens"]);
    let counted = server
        .post("/v1/messages/count_tokens", &json!({ "system": "Be brief.", "messages": messages }))
        .ok();
    assert_eq!(counted, json!({ "input_tokens": usage["prompt_tokens"] }));
}

#[test]
fn functions_are_called_in_every_dialect() {
    let setup = Setup { checkpoint: "qwen3_moe", ..Setup::default() };
    let server = setup.serve();
    let schema = json!({ "type": "object", "properties": { "yes": { "type": "boolean" } }, "required": ["yes"],
        "additionalProperties": false });
    let flat = json!([{ "type": "function", "name": "f", "parameters": schema }]);
    let body = json!({ "input": "Hello", "tools": flat, "tool_choice": "required", "parallel_tool_calls": false,
        "max_output_tokens": 200, "temperature": 0 });
    let call = server.post("/v1/responses", &body).ok()["output"][0].clone();
    assert_eq!((&call["type"], &call["name"]), (&json!("function_call"), &json!("f")));
    let arguments = call["arguments"].as_str().unwrap();
    assert!(["{\"yes\":true}", "{\"yes\":false}"].contains(&arguments), "{arguments}");
    let events = named_events(&server, "/v1/responses", body);
    assert_eq!(joined(&events, "response.function_call_arguments.delta", "/delta"), arguments);
    assert_eq!(joined(&events, "response.function_call_arguments.done", "/arguments"), arguments);

    let body = json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 200, "temperature": 0,
        "tools": [{ "name": "f", "input_schema": schema }], "tool_choice": { "type": "tool", "name": "f" } });
    let answer = server.post("/v1/messages", &body).ok();
    assert_eq!((&answer["stop_reason"], &answer["content"][0]["name"]), (&json!("tool_use"), &json!("f")));
    assert!(answer["content"][0]["input"]["yes"].is_boolean(), "{answer}");
    let events = named_events(&server, "/v1/messages", body);
    let input: Value =
        serde_json::from_str(&joined(&events, "content_block_delta", "/delta/partial_json")).unwrap();
    assert_eq!(input, answer["content"][0]["input"]);
}

#[test]
fn errors_are_in_the_words_of_the_route() {
    let mut setup = Setup::default();
    setup.options.api_keys = vec!["key".into()];
    let server = setup.serve();
    let error = |header: &str, body: &Value| {
        let mut request = super::support::request("POST", "/v1/messages", &body.to_string());
        request = request.replacen("host:", &format!("{header}connection: close\r\nhost:"), 1);
        let mut stream = server.connect();
        std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
        let answer = super::support::read_to_end(&mut stream);
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        serde_json::from_str::<Value>(body).unwrap()["error"]["type"].clone()
    };
    let good = json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 1 });
    assert_eq!(error("", &good), "authentication_error");
    assert_eq!(error("x-api-key: other\r\n", &good), "authentication_error");
    assert_eq!(error("x-api-key: key\r\n", &good), Value::Null);
    assert_eq!(error("authorization: Bearer key\r\n", &good), Value::Null);
    assert_eq!(error("x-api-key: key\r\n", &json!({ "messages": [] })), "invalid_request_error");
    let elsewhere = json!({ "messages": good["messages"], "max_tokens": 1, "model": "other" });
    assert_eq!(error("x-api-key: key\r\n", &elsewhere), "not_found_error");
    // Elsewhere that header is no key.
    let request = super::support::request("POST", "/v1/chat/completions", &good.to_string());
    let mut stream = server.connect();
    let request = request.replacen("host:", "x-api-key: key\r\nconnection: close\r\nhost:", 1);
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    assert!(super::support::read_to_end(&mut stream).starts_with("HTTP/1.1 401"));
}

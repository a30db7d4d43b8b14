//! Structured output. The weights are random, so that only the grammar keeps answers right.

use super::support::{Running, serve};
use serde_json::{Map, Value, json};

fn chat(server: &Running, rest: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 300, "temperature": 1.0 });
    body.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
    server.post("/v1/chat/completions", &body).ok()["choices"][0].clone()
}

fn person() -> Value {
    json!({ "type": "object", "properties": {
        "adult": { "type": "boolean" },
        "age": { "type": "integer", "minimum": 0, "maximum": 120 },
        "mood": { "enum": ["good", "bad"] },
        "next": { "anyOf": [{ "$ref": "#/$defs/place" }, { "type": "null" }] },
    }, "required": ["adult", "age", "mood", "next"], "additionalProperties": false,
       "$defs": { "place": { "type": "object", "properties": { "x": { "type": "integer", "minimum": 1, "maximum": 9 } },
                             "required": ["x"], "additionalProperties": false } } })
}

fn check_person(value: &Value) {
    let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["adult", "age", "mood", "next"], "{value}");
    assert!(value["adult"].is_boolean() && (0..=120).contains(&value["age"].as_i64().unwrap()), "{value}");
    assert!(["good", "bad"].contains(&value["mood"].as_str().unwrap()), "{value}");
    assert!(value["next"].is_null() || (1..=9).contains(&value["next"]["x"].as_i64().unwrap()), "{value}");
}

#[test]
fn answers_satisfy_their_schema() {
    let server = serve();
    for seed in 0..8 {
        let format =
            json!({ "type": "json_schema", "json_schema": { "name": "person", "schema": person() } });
        let choice = chat(&server, json!({ "seed": seed, "response_format": format }));
        assert_eq!(choice["finish_reason"], "stop", "seed {seed}: {choice}");
        check_person(&serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap());
        let outputs = json!({ "seed": seed, "structured_outputs": { "choice": ["red", "green"] } });
        let colour = chat(&server, outputs)["message"]["content"].clone();
        assert!(["red", "green"].contains(&colour.as_str().unwrap()), "seed {seed}: {colour}");
        let outputs = json!({ "seed": seed, "structured_outputs": { "regex": "[ab]{3}-[0-9]" } });
        let word = chat(&server, outputs)["message"]["content"].clone();
        let word = word.as_str().unwrap();
        assert!(word.len() == 5 && word.starts_with(['a', 'b']) && &word[3..4] == "-", "seed {seed}: {word}");
    }
}

#[test]
fn any_object_is_json() {
    let server = serve();
    let mut finished = 0;
    for seed in 0..12 {
        let choice = chat(&server, json!({ "seed": seed, "response_format": { "type": "json_object" } }));
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(text.starts_with('{'), "{text}");
        if choice["finish_reason"] == "stop" {
            finished += 1;
            let parsed: Result<Map<String, Value>, _> = serde_json::from_str(text);
            assert!(parsed.is_ok(), "seed {seed}: {text}");
        } else {
            let error = serde_json::from_str::<Value>(text).unwrap_err();
            assert!(error.is_eof() || text.ends_with('\u{fffd}'), "seed {seed}: {error} in {text}");
        }
    }
    assert!(finished > 0);
}

fn tools() -> Value {
    let tool = |name: &str| json!({ "type": "function", "function": { "name": name, "parameters": person(), "strict": true } });
    json!([tool("greet"), tool("part")])
}

#[test]
fn named_functions_are_called_once() {
    let server = serve();
    for seed in 0..4 {
        let choice = json!({ "type": "function", "function": { "name": "part" } });
        let answer = chat(&server, json!({ "seed": seed, "tools": tools(), "tool_choice": choice }));
        assert_eq!(answer["finish_reason"], "stop", "{answer}");
        let calls = answer["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(
            (calls.len(), &calls[0]["type"], &calls[0]["function"]["name"]),
            (1, &json!("function"), &json!("part"))
        );
        assert!(calls[0]["id"].is_string() && answer["message"]["content"].is_null());
        check_person(&serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap());
    }
}

#[test]
fn required_calls_are_made() {
    let server = serve();
    for seed in 0..4 {
        let body = json!({ "seed": seed, "tools": tools(), "tool_choice": "required", "parallel_tool_calls": false });
        let answer = chat(&server, body);
        assert_eq!(answer["finish_reason"], "tool_calls", "{answer}");
        let calls = answer["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(calls.len(), 1);
        assert!(["greet", "part"].contains(&calls[0]["function"]["name"].as_str().unwrap()));
        check_person(&serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap());
    }
    for choice in ["none", "auto"] {
        let answer =
            chat(&server, json!({ "seed": 1, "tools": tools(), "tool_choice": choice, "max_tokens": 9 }));
        assert!(answer["message"]["content"].is_string(), "{answer}");
    }
}

#[test]
fn calls_come_in_pieces() {
    let server = serve();
    let choice = json!({ "type": "function", "function": { "name": "greet" } });
    let mut body =
        json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 300, "seed": 3 });
    (body["tools"], body["tool_choice"]) = (tools(), choice);
    let whole = server.post("/v1/chat/completions", &body).ok()["choices"][0].clone();
    let events = server.events("/v1/chat/completions", body);
    let choices: Vec<&Value> = events.iter().map(|event| &event["choices"][0]).collect();
    let calls: Vec<&Value> = choices.iter().filter_map(|it| it["delta"]["tool_calls"].get(0)).collect();
    let first = calls[0];
    assert_eq!(
        (&first["index"], &first["type"], &first["function"]["name"]),
        (&json!(0), &json!("function"), &json!("greet"))
    );
    assert!(first["id"].is_string());
    assert!(calls[1..].iter().all(|call| call.get("id").is_none() && call["function"].get("name").is_none()));
    let arguments: String = calls.iter().filter_map(|call| call["function"]["arguments"].as_str()).collect();
    assert_eq!(arguments, whole["message"]["tool_calls"][0]["function"]["arguments"]);
    assert_eq!(choices.last().unwrap()["finish_reason"], whole["finish_reason"]);
}

#[test]
fn grammars_that_cannot_be_followed_are_refused() {
    let server = serve();
    for (param, body) in [
        (
            "response_format",
            json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": { "type": "banana" } } } }),
        ),
        (
            "response_format",
            json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": { "type": "string", "pattern": "(" } } } }),
        ),
        ("structured_outputs", json!({ "structured_outputs": { "choice": [] } })),
        ("structured_outputs", json!({ "structured_outputs": { "regex": "(" } })),
        ("structured_outputs", json!({ "structured_outputs": { "regex": "a", "json": {} } })),
        ("structured_outputs", json!({ "structured_outputs": {} })),
        ("structured_outputs", json!({ "structured_outputs": { "regex": r"[^\s\S]" } })),
        ("structured_outputs", json!({ "structured_outputs": { "grammar": "start: nowhere" } })),
        ("tool_choice", json!({ "tool_choice": "required" })),
        (
            "tools",
            json!({ "tool_choice": "required", "tools": [{ "type": "function", "function": { "name": "f", "parameters": { "type": "banana" } } }] }),
        ),
    ] {
        let mut whole = json!({ "messages": [{ "role": "user", "content": "Hello" }] });
        whole.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        let (status, error) = server.post("/v1/chat/completions", &whole).error();
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{body}: {error}");
    }
}

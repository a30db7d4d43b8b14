//! `/v1/completions`: the model's own answers, however they are asked for.

use super::support::{Running, Setup, expected, log_softmax, serve};
use serde_json::{Value, json};

fn ids(choice: &Value) -> Vec<u32> {
    choice["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A greedy request for so many tokens.
fn greedy(prompt: impl Into<Value>, max_tokens: usize) -> Value {
    json!({ "prompt": prompt.into(), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true })
}

#[test]
fn greedy_answers_are_the_reference_s() {
    for checkpoint in ["qwen3_moe", "mixtral", "deepseek_v3"] {
        let server = Setup { checkpoint, ..Setup::default() }.serve();
        std::thread::scope(|scope| {
            for index in 0..3 {
                let (server, expected) = (&server, expected(checkpoint, index));
                scope.spawn(move || {
                    let answer = server.completions(greedy(expected.ids, expected.greedy.len()));
                    assert_eq!(ids(&answer["choices"][0]), expected.greedy, "{checkpoint} {index}");
                });
            }
        });
    }
}

#[test]
fn log_probabilities_are_the_reference_s() {
    let server = serve();
    let expected = expected("mixtral", 1);
    let mut body = greedy(expected.ids.clone(), 1);
    (body["echo"], body["logprobs"]) = (true.into(), 3.into());
    let answer = server.completions(body);
    let logprobs = &answer["choices"][0]["logprobs"];
    let lists = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
    let all = |list: &str| logprobs[list].as_array().unwrap();
    assert_eq!(lists.map(|list| all(list).len()), [expected.ids.len() + 1; 4]);
    assert!(all("token_logprobs")[0].is_null() && all("top_logprobs")[0].is_null());
    for (at, row) in expected.logits.iter().enumerate().take(expected.ids.len() - 1) {
        let (row, id) = (log_softmax(row), expected.ids[at + 1] as usize);
        let told = all("token_logprobs")[at + 1].as_f64().unwrap();
        assert!((told - row[id]).abs() < 3e-3, "{at}: {told} and {}", row[id]);
        let top: Vec<f64> = all("top_logprobs")[at + 1]
            .as_object()
            .unwrap()
            .values()
            .map(|it| it.as_f64().unwrap())
            .collect();
        let mut sorted = row.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        assert!(top.len() == 3 || top.len() == 4, "{top:?}");
        for (told, most) in top.iter().zip(&sorted).take(3) {
            assert!((told - most).abs() < 3e-3, "{at}: {top:?} and {:?}", &sorted[..3]);
        }
        // A greedy token is told by equal numbers.
        if (told - sorted[0]).abs() < 1e-9 {
            assert_eq!(told, top[0]);
        }
    }
}

#[test]
fn prompts_come_in_every_shape() {
    let server = serve();
    let encode = |text: &str| server.post("/tokenize", &json!({ "prompt": text })).ok()["tokens"].clone();
    let texts = ["Once upon", "a time"];
    let alone: Vec<Value> = texts.iter().map(|text| server.completions(greedy(*text, 6))).collect();
    let both = server.completions(greedy(texts.to_vec(), 6));
    let by_ids = server.completions(greedy(vec![encode(texts[0]), encode(texts[1])], 6));
    for (index, alone) in alone.iter().enumerate() {
        for together in [&both, &by_ids] {
            assert_eq!(together["choices"][index]["index"], index);
            assert_eq!(together["choices"][index]["token_ids"], alone["choices"][0]["token_ids"]);
        }
        assert_eq!(server.completions(greedy(encode(texts[index]), 6))["choices"], alone["choices"]);
    }
    let sum = |field: &str| alone.iter().map(|answer| answer["usage"][field].as_u64().unwrap()).sum::<u64>();
    for field in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(both["usage"][field], sum(field), "{field}");
    }
}

#[test]
fn the_prompt_is_repeated_where_that_is_wanted() {
    let server = serve();
    let ask = |prompt: Value, max_tokens: usize| {
        let mut body = greedy(prompt, max_tokens);
        body["echo"] = true.into();
        server.completions(body)["choices"][0].clone()
    };
    let alone = ask("Once upon".into(), 0);
    assert_eq!((&alone["text"], &alone["finish_reason"]), (&json!("Once upon"), &json!("length")));
    let encoded = server.post("/tokenize", &json!({ "prompt": "Once upon" })).ok()["tokens"].clone();
    assert_eq!(ask(encoded, 0)["text"], "Once upon");
    let plain = server.completions(greedy("Once upon", 5))["choices"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(ask("Once upon".into(), 5)["text"], format!("Once upon{plain}"));
}

/// A request for a long drawn text; the checkpoint's weights are random, and so is the text.
fn drawn(seed: i64) -> Value {
    json!({ "prompt": "Once", "max_tokens": 60, "ignore_eos": true, "seed": seed, "return_token_ids": true })
}

fn text(server: &Running, body: &Value) -> String {
    server.completions(body.clone())["choices"][0]["text"].as_str().unwrap().to_owned()
}

#[test]
fn seeds_repeat_and_differ() {
    let server = serve();
    let once = text(&server, &drawn(7));
    std::thread::scope(|scope| {
        for seed in 0..24 {
            let (server, once) = (&server, &once);
            scope.spawn(move || {
                let again = text(server, &drawn(if seed % 2 == 0 { 7 } else { seed }));
                assert_eq!(again == *once, seed % 2 == 0 || seed == 7, "{seed}");
            });
        }
    });
    let mut seedless = drawn(0);
    seedless["seed"] = Value::Null;
    assert_ne!(text(&server, &seedless), text(&server, &seedless));
    let mut several = drawn(7);
    several["n"] = 3.into();
    let answer = server.completions(several);
    let texts: Vec<&str> = (0..3).map(|index| answer["choices"][index]["text"].as_str().unwrap()).collect();
    assert_eq!(texts[0], once);
    assert!(texts[0] != texts[1] && texts[1] != texts[2] && texts[0] != texts[2]);
    let usage = &answer["usage"];
    assert_eq!(
        (&usage["completion_tokens"], usage["prompt_tokens"].as_u64() < Some(10)),
        (&json!(180), true)
    );
}

#[test]
fn streams_say_what_plain_answers_say() {
    let server = serve();
    for (field, value) in [
        ("n", json!(1)),
        ("n", json!(3)),
        ("logprobs", json!(2)),
        ("echo", json!(true)),
        ("stop", json!("e")),
    ] {
        let mut body = drawn(11);
        body[field] = value.clone();
        let plain = server.completions(body.clone());
        body["stream_options"] = json!({ "include_usage": true });
        let mut events = server.events("/v1/completions", body);
        let last = events.pop().unwrap();
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &plain["usage"]), "{field} {value}");
        for choice in plain["choices"].as_array().unwrap() {
            let of_choice = || {
                events.iter().map(|event| &event["choices"][0]).filter(|it| it["index"] == choice["index"])
            };
            let joined: String = of_choice().map(|it| it["text"].as_str().unwrap()).collect();
            assert_eq!(joined, choice["text"], "{field} {value}");
            let ids: Vec<u32> = of_choice().flat_map(ids).collect();
            assert_eq!(ids, self::ids(choice), "{field} {value}");
            let reasons: Vec<&Value> =
                of_choice().map(|it| &it["finish_reason"]).filter(|it| !it.is_null()).collect();
            assert_eq!(reasons, [&choice["finish_reason"]], "{field} {value}");
            assert!(of_choice().next_back().unwrap()["finish_reason"].is_string());
            if let Some(told) = choice["logprobs"]["token_logprobs"].as_array() {
                let lists = of_choice().filter_map(|it| it["logprobs"]["token_logprobs"].as_array());
                assert_eq!(lists.flatten().collect::<Vec<_>>(), told.iter().collect::<Vec<_>>());
            }
        }
        assert!(events.len() > 20 || field == "stop", "{field}: tokens come one by one");
        for event in &events {
            assert_eq!(
                (&event["id"], &event["created"], &event["object"]),
                (&events[0]["id"], &events[0]["created"], &json!("text_completion"))
            );
            assert!(event.get("usage").is_none());
        }
    }
}

#[test]
fn stop_texts_are_found_however_tokens_cut_them() {
    let server = serve();
    let whole = text(&server, &drawn(3));
    let letters: Vec<char> = whole.chars().collect();
    for (from, length) in [(0, 1), (5, 2), (9, 3), (14, 5), (20, 8)] {
        let stop: String = letters[from..from + length].iter().collect();
        let at = whole.find(&stop).unwrap();
        let mut body = drawn(3);
        body["stop"] = json!(["never comes", stop]);
        let choice = server.completions(body.clone())["choices"][0].clone();
        assert_eq!(choice["text"], whole[..at], "{stop:?}");
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(stop)));
        body["include_stop_str_in_output"] = true.into();
        assert_eq!(text(&server, &body), whole[..at + stop.len()], "{stop:?}");
    }
    assert!(server.wait_until_idle().as_secs() < 5);
}

#[test]
fn tokens_end_answers_when_they_may() {
    let server = serve();
    let whole = server.completions(drawn(5));
    let all = ids(&whole["choices"][0]);
    let (stop, at) = (all[20], all.iter().position(|&id| id == all[20]).unwrap());
    let mut body = drawn(5);
    body["stop_token_ids"] = json!([stop]);
    let choice = server.completions(body.clone())["choices"][0].clone();
    assert_eq!((ids(&choice), &choice["stop_reason"]), (all[..=at].to_vec(), &json!(stop)));
    body["min_tokens"] = 40.into();
    let later = ids(&server.completions(body)["choices"][0]);
    assert!(later.len() >= 40, "{}", later.len());
    assert!(!later[..39].contains(&stop));
}

#[test]
fn completions_have_16_tokens_unless_they_say() {
    let server = serve();
    for (fields, tokens) in [
        (json!({}), 16),
        (json!({ "max_tokens": null }), 16),
        (json!({ "min_tokens": 20 }), 20),
        (json!({ "max_tokens": 17, "min_tokens": 17 }), 17),
    ] {
        let mut body = json!({ "prompt": "Once", "ignore_eos": true });
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        assert_eq!(server.completions(body.clone())["usage"]["completion_tokens"], tokens, "{body}");
    }
}

#[test]
fn biases_forbid_and_force() {
    let server = serve();
    let plain = ids(&server.completions(greedy("Once", 8))["choices"][0]);
    let mut body = greedy("Once", 8);
    body["logit_bias"] = json!({ plain[0].to_string(): -100 });
    assert_ne!(ids(&server.completions(body)["choices"][0])[0], plain[0]);
    let mut body = greedy("Once", 8);
    body["logit_bias"] = json!({ "77": 100 });
    assert_eq!(ids(&server.completions(body)["choices"][0]), [77; 8]);
}

/// A token that is the beginning of a character has no text of its own; its chunk says nothing, but says it in time.
#[test]
fn streams_have_a_chunk_for_every_token() {
    let server = serve();
    let chat = json!([{ "role": "user", "content": "Once" }]);
    for (path, field, prompt) in
        [("/v1/completions", "prompt", json!("Once")), ("/v1/chat/completions", "messages", chat)]
    {
        let body = json!({ field: prompt, "max_tokens": 60, "ignore_eos": true, "seed": 11 });
        let events = server.events(path, body);
        let of_tokens = events
            .iter()
            .map(|event| &event["choices"][0])
            .filter(|choice| choice["finish_reason"].is_null() && choice["delta"]["role"].is_null());
        let silent =
            of_tokens.clone().filter(|choice| choice["text"] == "" || choice["delta"]["content"] == "");
        assert_eq!(of_tokens.count(), 60, "{path}: {events:?}");
        assert!(silent.count() > 0, "{path}: {events:?}");
    }
}

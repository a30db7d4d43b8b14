use super::jinja::{OwnedContext, Problem, Program};
use super::*;
use serde_json::json;
use std::time::{Duration, Instant};

fn tokens() -> SpecialTokens {
    let config = json!({ "bos_token": "<s>", "eos_token": "</s>" });
    SpecialTokens::of(config.as_object().unwrap(), &Map::new())
}

fn template(source: &str) -> ChatTemplate {
    let source = (DEFAULT.to_owned(), (source.to_owned(), "test".into()));
    ChatTemplate::new([source].into(), &tokens()).unwrap()
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

fn request(messages: &[Value]) -> RenderRequest<'_> {
    RenderRequest { messages, add_generation_prompt: true, ..RenderRequest::default() }
}

fn render(source: &str) -> Result<String, String> {
    let messages = [message("user", "Hi"), message("assistant", "Hello"), message("user", "1 < 2 & 'ü'")];
    template(source).render(&request(&messages)).map_err(|error| error.to_string())
}

/// A folder with some files.
fn opened(files: &[(&str, &str)]) -> Result<Option<ChatTemplate>, String> {
    let folder = tempfile::tempdir().unwrap();
    for (file, text) in files {
        let path = folder.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    ChatTemplate::open(folder.path()).map_err(|error| error.to_string())
}

#[test]
fn published_checkpoints_say_how() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/mixtral");
    let template = ChatTemplate::open(&folder).unwrap().unwrap();
    let prompt = template.render(&request(&[message("user", "Hi")])).unwrap();
    assert_eq!(prompt, "<s><|user|>Hi<|assistant|>");
}

#[test]
fn templates_are_found_where_they_may_be() {
    let render = |files: &[(&str, &str)], tools: Option<&[Value]>| {
        let template = opened(files).unwrap().unwrap();
        template.render(&RenderRequest { tools, ..RenderRequest::default() }).unwrap()
    };
    let config = "tokenizer_config.json";
    assert_eq!(
        render(
            &[(config, r#"{"chat_template": "{{ bos_token }}!", "bos_token": {"content": "<b>"}}"#)],
            None
        ),
        "<b>!"
    );
    let named =
        r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    assert_eq!(render(&[(config, named)], None), "d");
    assert_eq!(render(&[(config, named)], Some(&[json!({})])), "t");
    assert_eq!(render(&[(config, named), (TEMPLATE, "file")], Some(&[json!({})])), "file");
    let more = [(TEMPLATE, "d"), ("additional_chat_templates/tool_use.jinja", "more")];
    assert_eq!(render(&more, Some(&[json!({})])), "more");
    assert_eq!(render(&[(PROCESSOR, r#"{"chat_template": "p"}"#)], None), "p");
    assert!(opened(&[(config, r#"{"bos_token": null, "chat_template": null}"#)]).unwrap().is_none());
    for damaged in ["{", &"[".repeat(100_000), r#"{"chat_template": 3}"#] {
        assert!(opened(&[(config, damaged)]).unwrap_err().contains(config));
    }
    let only =
        opened(&[(config, r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#)]).unwrap().unwrap();
    assert!(only.render(&request(&[])).unwrap_err().to_string().contains("only rag"));
}

/// Small templates, and what Jinja2 3.1.6 makes of them, set up as transformers 5.24 does. The first line is what they see.
#[test]
fn python_is_understood() {
    let mut lines = include_str!("../../tests/templates/python.jsonl").lines();
    let variables: Map<String, Value> = serde_json::from_str(lines.next().unwrap()).unwrap();
    let mut wrong = Vec::new();
    for line in lines {
        let line: Value = serde_json::from_str(line).unwrap();
        let source = line["source"].as_str().unwrap();
        let context = json!({
            "messages": [], "tools": null, "documents": null, "add_generation_prompt": false, "kwargs": variables,
        });
        let context: OwnedContext = serde_json::from_value(context).unwrap();
        let rendered =
            Program::new(source, BTreeMap::new()).and_then(|mut program| program.render(context, 0, 100_000));
        let want = line["gives"].as_str().unwrap();
        if rendered.as_deref() != Ok(want) {
            wrong.push(format!("{source} gives {rendered:?}, not {want:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Templates in the style of published ones, and what transformers 5.17 makes of them.
#[test]
fn prompts_are_those_of_transformers() {
    let messages = [
        message("system", "Be é"),
        message("user", "Hi"),
        message("assistant", "<think>\nhm\n</think>\n\nHello"),
        message("user", "2?"),
    ];
    let check = |source: &str, want: &str| {
        assert_eq!(template(source).render(&request(&messages)).unwrap(), want);
    };
    check(
        include_str!("../../tests/templates/thinking.jinja"),
        include_str!("../../tests/templates/thinking.txt"),
    );
    check(
        include_str!("../../tests/templates/alternating.jinja"),
        include_str!("../../tests/templates/alternating.txt"),
    );
}

/// Conversations with tools, reasoning and several turns through templates in the style of the supported families, and what
/// transformers 5.17 makes of them (`families/make.py`).
#[test]
fn families_templates_give_what_transformers_gives() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/templates/families");
    let cases = std::fs::read_to_string(folder.join("families.jsonl")).unwrap();
    let (mut templates, mut wrong) = (BTreeMap::new(), Vec::new());
    for case in cases.lines() {
        let case: Value = serde_json::from_str(case).unwrap();
        let name = case["template"].as_str().unwrap().to_owned();
        let source = || std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let template = templates.entry(name.clone()).or_insert_with(|| template(&source()));
        let request = RenderRequest {
            messages: case["messages"].as_array().unwrap(),
            tools: case["tools"].as_array().map(Vec::as_slice),
            kwargs: case["kwargs"].as_object(),
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
            ..RenderRequest::default()
        };
        let rendered = template.render(&request).map_err(|error| error.to_string());
        let want = case["gives"].as_str().unwrap();
        if rendered.as_deref() != Ok(want) {
            wrong.push(format!("{name}, {}: {rendered:?}, not {want:?}", case["name"]));
        }
    }
    assert_eq!(templates.len(), 11);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn templates_see_what_they_are_given() {
    let source =
        "{{ messages[0] | tojson }}{{ tools | tojson }}{{ documents }}{{ bos_token }}{{ enable_thinking }}";
    let messages = [json!({ "role": "user", "z": 1, "content": [{ "type": "text", "text": "x" }] })];
    let kwargs = json!({ "enable_thinking": false, "bos_token": "!" });
    let request = RenderRequest {
        tools: Some(&[json!({ "name": "f" })]),
        kwargs: kwargs.as_object(),
        ..request(&messages)
    };
    assert_eq!(
        template(source).render(&request).unwrap(),
        r#"{"role": "user", "z": 1, "content": [{"type": "text", "text": "x"}]}[{"name": "f"}]None!False"#
    );
    assert_eq!(render("{{ strftime_now('%Y') }}").unwrap().len(), 4);
}

#[test]
fn the_last_message_can_be_continued() {
    let continued = |source: &str, content: Value| {
        let messages = [message("user", "Hi"), json!({ "role": "assistant", "content": content })];
        let request =
            RenderRequest { messages: &messages, continue_final_message: true, ..RenderRequest::default() };
        template(source).render(&request).map_err(|error| error.to_string())
    };
    let plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}";
    assert_eq!(continued(plain, "Well, ".into()).as_deref(), Ok("[user]Hi</s>[assistant]Well, "));
    let trimmed = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}";
    assert_eq!(continued(trimmed, "Well, ".into()).as_deref(), Ok("[user]Hi</s>[assistant]Well,"));
    let parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}";
    assert_eq!(continued(parts, json!([{ "text": "a" }, { "text": "b" }])).as_deref(), Ok("</s>ab"));
    assert!(continued("", "x".into()).unwrap_err().contains("leaves out the end"));
    assert!(continued(plain, Value::Null).unwrap_err().contains("no text"));
}

#[test]
fn errors_say_what_and_where() {
    assert_eq!(
        render("{{ raise_exception('roles must alternate') }}").unwrap_err(),
        "test: the template refuses this conversation: roles must alternate (line 1)"
    );
    let refused = |source: &str| render(source).unwrap_err();
    assert!(refused("\n{% if %}").contains("(line 2)"));
    assert!(refused("{% include '/etc/passwd' %}").contains("/etc/passwd"));
    assert!(refused("{{ open('/etc/passwd') }}").contains("open"));
    assert!(refused("{{ messages.__class__.__mro__ }}").contains("undefined"));
    assert!(refused("{{ strftime_now('%Q%') }}").contains("strftime_now"));
    assert!(refused(&format!("{{{{ raise_exception('x' * {}) }}}}", 1 << 20)).len() < 3000);
}

/// What would end this process, fill its memory, or run for ever, ends in one error, and soon.
#[test]
fn hostile_templates_end_in_one_error() {
    let self_containing = "{% set n = namespace() %}{% set n.n = n %}";
    let deep = "{% set n = namespace(s=[]) %}{% for i in range(200000) %}{% set n.s = [n.s] %}{% endfor %}";
    let shared =
        "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}";
    let doubled =
        "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}";
    let sources = [
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}".to_owned(),
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}".into(),
        format!("{self_containing}{{{{ n }}}}"),
        format!("{self_containing}{{{{ n | tojson }}}}"),
        format!("{self_containing}{{{{ n == n.n }}}}{{{{ [n] < [n] }}}}{{{{ n | pprint }}}}"),
        format!("{deep}{{{{ n.s }}}}"),
        format!("{deep}{{{{ n.s | tojson }}}}"),
        format!("{deep}{{{{ n.s == n.s }}}}{{{{ raise_exception('x') }}}}"),
        format!("{shared}{{{{ n.s | tojson }}}}"),
        format!("{shared}{{{{ n.s | string | length }}}}"),
        format!("{shared}{{{{ n.s == n.s }}}}{{{{ raise_exception('x') }}}}"),
        doubled.into(),
        "{{ 'x' * 1000000000 }}".into(),
        "{{ '{:>4000000000}'.format(1) }}".into(),
        "{{ '%4000000000d' | format(1) }}".into(),
        "{{ 'x'.ljust(4000000000) }}".into(),
        "{{ 'x' | center(4000000000) }}".into(),
        "{{ 'a\nb' | indent(4000000000) }}".into(),
        "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}".into(),
        "{{ ('x' * 100000).join('x' * 100000) }}".into(),
        "{{ range(4000000000) | list | length }}".into(),
        "{{ (1, 2) * 4000000000 }}".into(),
        "{{ 2 ** 4000000000 }}{{ raise_exception('x') }}".into(),
        format!("{{{{ {}1 }}}}{{{{ raise_exception('x') }}}}", "-".repeat(19_000)),
        format!("{{{{ {}1 }}}}{{{{ raise_exception('x') }}}}", "not ".repeat(200_000)),
        format!("{{{{ 1{} }}}}{{{{ raise_exception('x') }}}}", "+1".repeat(400_000)),
        format!("{{{{ x{} }}}}", ".a".repeat(400_000)),
        format!("{{{{ x{} }}}}{{{{ raise_exception('x') }}}}", "|trim".repeat(150_000)),
        format!("{{% if x %}}{}{{% endif %}}{{{{ raise_exception('x') }}}}", "{% elif x %}".repeat(80_000)),
        format!("{{{{ {}1 }}}}", "(".repeat(100_000)),
        format!("{{{{ {}1 }}}}", "[".repeat(100_000)),
        "{% if true %}".repeat(70_000),
    ];
    for source in &sources {
        let begun = Instant::now();
        let error = render(source).unwrap_err();
        assert!(error.starts_with("test: ") || error.contains("longer than"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}: {source:.300}", begun.elapsed());
    }
}

#[test]
fn what_is_written_is_bounded() {
    let limited = |max_bytes| {
        template("{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}")
            .render(&RenderRequest { max_bytes, ..request(&[message("user", "é")]) })
            .map_err(|error| error.to_string())
    };
    assert_eq!(limited(2000), Ok("é".repeat(1000)));
    assert!(limited(1999).unwrap_err().contains("longer than 1999 bytes"));
}

/// A worker that died or failed is no harm to the next conversation.
#[test]
fn workers_are_replaced() {
    let template = template(
        "{% set n = namespace() %}{% set n.n = n %}{{ n if messages[0].content == 'die' else 'fine' }}",
    );
    let render = |content: &str| template.render(&request(&[message("user", content)]));
    for _ in 0..3 {
        assert_eq!(render("live").unwrap(), "fine");
        assert!(render("die").unwrap_err().to_string().contains("do not trust this model"));
    }
    std::thread::scope(|scope| {
        let both = [(); 2].map(|()| scope.spawn(|| render("live").unwrap()));
        both.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), "fine"));
    });
}

#[test]
fn problems_tell_the_kinds_apart() {
    let kind = |source: &str| template(source).render(&request(&[])).unwrap_err();
    assert!(matches!(kind("{{ raise_exception('x') }}"), TextError::Refused { .. }));
    assert!(matches!(kind("{{ 1 / 0 }}"), TextError::Template { .. }));
    assert!(matches!(Program::new("{{", BTreeMap::new()), Err(Problem::Failed(_))));
}

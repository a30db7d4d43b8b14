//! Conversations become prompts, through the template that comes with a checkpoint.
//!
//! Templates are Jinja as Hugging Face renders it: Python's methods on strings and maps, `tojson` as Python
//! writes JSON, `raise_exception`, `strftime_now`, loop controls, and `{% generation %}`. A template is somebody
//! else's program: it sees nothing but the conversation, cannot include files, and runs on fuel, which every
//! step and every byte costs.

use crate::{TextError, files};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value as Jinja, context};
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::error::Error as _;
use std::io;
use std::path::Path;

const TEMPLATE: &str = "chat_template.jinja";
const TOKENIZER: &str = "tokenizer_config.json";
const LIMIT: u64 = 16 << 20;

/// Steps, or 64 times as many bytes, that a template may take: a thousand times what published ones do.
const FUEL: u64 = 4_000_000;

/// What a prompt is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct RenderRequest<'a> {
    /// The conversation: objects with a `role` and, as the role wants it, `content` (a string, or a list of parts),
    /// `tool_calls`, `tool_call_id`, `name`, `reasoning_content`, and whatever else the template looks at.
    pub messages: &'a [Value],
    /// Descriptions of tools that the assistant may call.
    pub tools: Option<&'a [Value]>,
    /// Documents that the assistant may refer to.
    pub documents: Option<&'a [Value]>,
    /// Further variables of the template, like `enable_thinking`; they go before the texts of special tokens.
    pub kwargs: Option<&'a Map<String, Value>>,
    /// Whether the assistant's next message is begun.
    pub add_generation_prompt: bool,
}

/// A checkpoint's chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    /// Where it was found, for messages.
    file: String,
    /// Texts of special tokens, by what the template calls them.
    tokens: BTreeMap<String, String>,
}

/// What `tokenizer_config.json` has for templates.
#[derive(Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl ChatTemplate {
    /// The template of a checkpoint folder: `chat_template.jinja`, or the one in `tokenizer_config.json`; nothing
    /// if there is neither.
    pub fn open(folder: &Path) -> Result<Option<Self>, TextError> {
        let (config, template) = (folder.join(TOKENIZER), folder.join(TEMPLATE));
        let text = files::read(&config, LIMIT)?;
        let source = files::read_text(&template, LIMIT)?;
        ChatTemplate::parse((text.as_deref().unwrap_or(b"{}"), &config), source.map(|it| (it, &*template)))
    }

    /// Reads the texts of the two files, each with its path: `tokenizer_config.json`, and `chat_template.jinja`,
    /// which goes before the template in the other.
    pub fn parse(
        (config, config_path): (&[u8], &Path),
        template: Option<(String, &Path)>,
    ) -> Result<Option<Self>, TextError> {
        let config: TokenizerConfig = serde_json::from_slice(config).map_err(|error| {
            TextError::file(config_path, format!("cannot be read ({error}); fetch the file again"))
        })?;
        let inside = config.chat_template.and_then(Templates::default_one);
        let template = template.or_else(|| Some((inside?, config_path)));
        let tokens = config.rest.into_iter().filter_map(|(name, value)| Some((name, token_text(&value)?)));
        let tokens = tokens.collect();
        Ok(template.map(|(source, path)| {
            let file = path.display().to_string();
            ChatTemplate { source: plain_blocks(&source), file, tokens }
        }))
    }

    /// The template itself.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt of a conversation.
    pub fn render(&self, request: &RenderRequest) -> Result<String, TextError> {
        let refuse = |error: Error| TextError::File { file: self.file.clone(), problem: described(&error) };
        let environment = environment();
        let template = environment.template_from_str(&self.source).map_err(refuse)?;
        let conversation = context! {
            messages => Jinja::from(Serde(request.messages)),
            add_generation_prompt => request.add_generation_prompt,
            tools => Jinja::from(Serde(&request.tools)),
            documents => Jinja::from(Serde(&request.documents)),
        };
        let tokens = Jinja::from(Serde(&self.tokens));
        let kwargs = request.kwargs.map(|kwargs| Jinja::from(Serde(kwargs))).unwrap_or_default();
        template.render(context! { ..conversation, ..kwargs, ..tokens }).map_err(refuse)
    }
}

impl Templates {
    /// The template for plain conversations.
    fn default_one(self) -> Option<String> {
        match self {
            Templates::One(template) => Some(template),
            Templates::Named(named) => {
                named.into_iter().find(|named| named.name == "default").map(|named| named.template)
            }
        }
    }
}

/// The text of a special token, written plainly or with its properties.
fn token_text(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    text.map(str::to_owned)
}

/// `{% generation %}` marks the assistant's part for training. For a prompt it means nothing: it becomes a block
/// that always shows.
fn plain_blocks(source: &str) -> String {
    const MARKS: [(&str, &str); 2] = [("generation", "if true"), ("endgeneration", "endif")];
    let mut plain = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (text, tag) = rest.split_at(start);
        plain.push_str(text);
        let end = tag.find("%}").unwrap_or(tag.len());
        let inside = tag[2..end.max(2)].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match MARKS.iter().find(|(mark, _)| *mark == inside) {
            Some((mark, meaning)) => plain.push_str(&tag[..end].replacen(mark, meaning, 1)),
            None => plain.push_str(&tag[..end]),
        }
        rest = &tag[end..];
    }
    plain.push_str(rest);
    plain
}

/// Jinja as Hugging Face sets it up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default(),
    );
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(format_as_python);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// Python writes its constants with a capital.
fn format_as_python(out: &mut Output, state: &mut State, value: &Jinja) -> Result<(), Error> {
    let constant = match value.kind() {
        ValueKind::None => "None",
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        _ => return minijinja::escape_formatter(out, state, value),
    };
    out.write_str(constant).map_err(Error::from)
}

fn raise_exception(message: String) -> Result<Jinja, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("the template refuses this conversation: {message}")))
}

fn strftime_now(format: String) -> Result<String, Error> {
    jiff::fmt::strtime::format(&format, &jiff::ZonedDateTime::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

/// JSON as Python's `json.dumps` writes it: with a space after commas and colons, or indented.
fn to_json(value: &Jinja, options: Kwargs) -> Result<Jinja, Error> {
    /// More than anybody indents.
    const MOST_INDENT: usize = 16;
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let json = match indent {
        None => written(value, PythonFormatter),
        Some(indent) => {
            written(value, PrettyFormatter::with_indent(&[b' '; MOST_INDENT][..indent.min(MOST_INDENT)]))
        }
    }?;
    Ok(Jinja::from_safe_string(if ensure_ascii == Some(true) { ascii(&json) } else { json }))
}

fn written(value: &Jinja, formatter: impl Formatter) -> Result<String, Error> {
    let mut bytes = Vec::new();
    let failed = |error: String| Error::new(ErrorKind::BadSerialization, error);
    value
        .serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        .map_err(|error| failed(error.to_string()))?;
    String::from_utf8(bytes).map_err(|error| failed(error.to_string()))
}

/// Everything but ASCII, escaped.
fn ascii(json: &str) -> String {
    let mut ascii = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            ascii.push(c);
        } else {
            let units =
                c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect::<String>();
            ascii.push_str(&units);
        }
    }
    ascii
}

struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// What went wrong in a template, and in which line of it.
fn described(error: &Error) -> String {
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => {
            "the template does more than a chat template needs and was stopped; do not trust this model"
                .into()
        }
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
    format!("{what}{line}{cause}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(source: &str) -> ChatTemplate {
        let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        ChatTemplate { source: plain_blocks(source), file: "test".into(), tokens }
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

    /// A folder with one file.
    fn opened(file: &str, text: &str) -> Result<Option<ChatTemplate>, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(file), text).unwrap();
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
        let render = |template: Option<ChatTemplate>| template.unwrap().render(&request(&[])).unwrap();
        let text = r#"{"chat_template": "{{ bos_token }}!", "bos_token": {"content": "<b>"}, "x": 1}"#;
        assert_eq!(render(opened(TOKENIZER, text).unwrap()), "<b>!");
        let named = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(render(opened(TOKENIZER, named).unwrap()), "d");
        assert!(opened(TOKENIZER, r#"{"bos_token": null}"#).unwrap().is_none());
        assert!(opened(TOKENIZER, "{").unwrap_err().contains("cannot be read"));
        assert!(opened(TOKENIZER, &"[".repeat(100_000)).unwrap_err().contains("cannot be read"));
    }

    #[test]
    fn python_is_understood() {
        let check = |source: &str, want: &str| assert_eq!(render(source).as_deref(), Ok(want), "{source}");
        check("{{ messages[0].content.strip().startswith('H') }} {{ none }}", "True None");
        check("{{ messages[-1]['content'] | tojson }}", "\"1 < 2 & 'ü'\"");
        check("{{ messages[0] | tojson }}", r#"{"role": "user", "content": "Hi"}"#);
        check("{{ [1, 'ü'] | tojson(ensure_ascii=true) }}", "[1, \"\\u00fc\"]");
        check("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}");
        check(
            "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
            "user",
        );
        check(
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "3",
        );
        check("a\n  {%- generation -%}\n b {% endgeneration %}\nc", "ab c");
        check("{{ messages[::-1][0].content[:1] }}{{ 'x' if tools is none }}", "1x");
        check(
            "{% for k, v in messages[0].items() %}{{ k }}{% if not loop.last %},{% endif %}{% endfor %}",
            "role,content",
        );
        assert_eq!(render("{{ strftime_now('%Y') }}").unwrap().len(), 4);
    }

    /// Templates in the style of published ones, and what Hugging Face transformers 5.17 makes of them.
    #[test]
    fn prompts_are_those_of_transformers() {
        let messages = [
            message("system", "Be é"),
            message("user", "Hi"),
            message("assistant", "<think>\nhm\n</think>\n\nHello"),
            message("user", "2?"),
        ];
        let check = |source: &str, want: &str| {
            let mut template = template(source);
            template.tokens.insert("eos_token".into(), "</s>".into());
            assert_eq!(template.render(&request(&messages)).unwrap(), want);
        };
        check(
            include_str!("../tests/templates/thinking.jinja"),
            include_str!("../tests/templates/thinking.txt"),
        );
        check(
            include_str!("../tests/templates/alternating.jinja"),
            include_str!("../tests/templates/alternating.txt"),
        );
    }

    #[test]
    fn what_templates_must_not_do_ends_in_one_error() {
        let refused = |source: &str| render(source).unwrap_err();
        let stopped = "does more than a chat template needs";
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}";
        assert!(refused(endless).contains(stopped));
        let doubling = "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}";
        assert!(refused(doubling).contains(stopped));
        let deep = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}";
        assert!(refused(deep).contains("recursion"), "{}", refused(deep));
        assert!(refused("{{ 'x' * 1000000000 }}").contains(stopped));
        assert!(refused("{% include '/etc/passwd' %}").contains("/etc/passwd"));
        assert!(refused("{{ open('/etc/passwd') }}").contains("open"));
        assert!(refused("{{ messages.__class__.__mro__ }}").contains("undefined"));
        assert!(refused("{% if %}").contains("line 1"));
        assert!(refused(&format!("{{{{ {}1 }}}}", "(".repeat(100_000))).contains("recursion"));
        assert_eq!(
            refused("{{ raise_exception('roles must alternate') }}"),
            "test: the template refuses this conversation: roles must alternate (line 1)"
        );
        assert!(refused("{{ strftime_now('%Q%') }}").contains("strftime_now"));
    }
}

//! Jinja as transformers sets it up, on a library that is Jinja in most things. Not there: `varargs` and `kwargs` inside macros,
//! which no published template is known to use; a macro refuses arguments that it does not name.
//!
//! Nothing here bounds what a hostile template does: it runs on fuel, which every step and every byte costs, but a value
//! that holds itself, or a tree of a million levels, is beyond that. So all of this runs in a process of its own, see
//! `worker`.

use super::adapt::{self, adapted};
use super::arguments::wrong;
use super::{filters, json, methods};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, Tuple, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, functions};
use minijinja_contrib::globals;
use serde::{Deserialize, Serialize};
use serde_json::Map;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error as _;
use std::io;

/// Steps, or 64 times as many bytes, that a template may take beside one for each byte of the conversation: a thousand
/// times what published ones do.
const FUEL: u64 = 4_000_000;

/// The one template of an environment.
const NAME: &str = "chat";

/// What a template sees.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Context<'a> {
    pub(super) messages: &'a [serde_json::Value],
    pub(super) tools: Option<&'a [serde_json::Value]>,
    pub(super) documents: Option<&'a [serde_json::Value]>,
    pub(super) add_generation_prompt: bool,
    pub(super) kwargs: Option<&'a Map<String, serde_json::Value>>,
}

/// The same on its way from one process to another.
#[derive(Deserialize)]
pub(super) struct OwnedContext {
    messages: serde_json::Value,
    tools: serde_json::Value,
    documents: serde_json::Value,
    add_generation_prompt: bool,
    kwargs: Option<Map<String, serde_json::Value>>,
}

/// Why there is no prompt.
#[derive(Debug, PartialEq)]
pub(super) enum Problem {
    /// The template refuses the conversation, in its own words.
    Refused(String),
    /// It fails.
    Failed(String),
    /// It writes more than was allowed.
    TooLong,
}

/// A template that was understood, and the texts of special tokens.
pub(super) struct Program {
    environment: Environment<'static>,
    tokens: BTreeMap<String, serde_json::Value>,
}

impl Program {
    /// Reads a template.
    pub(super) fn new(source: &str, tokens: BTreeMap<String, serde_json::Value>) -> Result<Self, Problem> {
        let mut environment = environment();
        environment.add_template_owned(NAME, adapted(source)).map_err(|error| problem(&error))?;
        Ok(Program { environment, tokens })
    }

    /// The prompt of a conversation of `size` bytes, if it has at most `limit` bytes.
    pub(super) fn render(
        &mut self,
        context: OwnedContext,
        size: usize,
        limit: usize,
    ) -> Result<String, Problem> {
        let OwnedContext { messages, tools, documents, add_generation_prompt, kwargs } = context;
        self.environment.set_fuel(Some(FUEL + size as u64));
        let template = self.environment.get_template(NAME).map_err(|error| problem(&error))?;
        let mut variables = self.tokens.clone();
        variables.extend(kwargs.into_iter().flatten());
        variables.insert("messages".into(), messages);
        variables.insert("tools".into(), tools);
        variables.insert("documents".into(), documents);
        variables.insert("add_generation_prompt".into(), add_generation_prompt.into());
        let mut prompt = Limited { text: Vec::new(), limit, exceeded: false };
        let rendered = template.render_captured_to(Value::from(Serde(&variables)), &mut prompt).map(drop);
        match rendered {
            _ if prompt.exceeded => Err(Problem::TooLong),
            Err(error) => Err(problem(&error)),
            Ok(()) => String::from_utf8(prompt.text).map_err(|error| Problem::Failed(error.to_string())),
        }
    }
}

/// Text up to a length.
struct Limited {
    text: Vec<u8>,
    limit: usize,
    exceeded: bool,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.text.len() {
            self.exceeded = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default(),
    );
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(print);
    filters::add(&mut environment);
    environment.add_filter(adapt::PERCENT, filters::percent);
    environment.add_filter(adapt::ITEMS, items);
    environment.add_filter(adapt::PRINTED, printed);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment
        .add_test("callable", |value: &Value| value.is_undefined() || value.kind() == ValueKind::Plain);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("namespace", namespace);
    environment.add_function("cycler", globals::cycler);
    environment.add_function("joiner", globals::joiner);
    environment
}

/// Prints as Python does; the library does so too, but for constants and floats.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match printed_otherwise(value)? {
        Some(text) => out.write_str(&text).map_err(Error::from),
        None => minijinja::escape_formatter(out, state, value),
    }
}

/// What becomes of a value as a part of a text.
fn printed(value: Value) -> Result<Value, Error> {
    Ok(printed_otherwise(&value)?.map_or(value, Value::from))
}

/// The text that Python has for a value, where the library has another.
fn printed_otherwise(value: &Value) -> Result<Option<Cow<'static, str>>, Error> {
    Ok(Some(match value.kind() {
        ValueKind::None => "None".into(),
        ValueKind::Bool if value.is_true() => "True".into(),
        ValueKind::Bool => "False".into(),
        ValueKind::Number if !value.is_integer() => json::float(f64::try_from(value.clone())?).into(),
        ValueKind::Seq | ValueKind::Map if holds_float(value)? => represented(value)?.into(),
        _ => return Ok(None),
    }))
}

fn holds_float(value: &Value) -> Result<bool, Error> {
    match value.kind() {
        ValueKind::Number => Ok(!value.is_integer()),
        ValueKind::Seq => value.try_iter()?.try_fold(false, |found, item| Ok(found || holds_float(&item)?)),
        ValueKind::Map => {
            value.try_iter()?.try_fold(false, |found, key| Ok(found || holds_float(&value.get_item(&key)?)?))
        }
        _ => Ok(false),
    }
}

/// Python's `repr`.
fn represented(value: &Value) -> Result<String, Error> {
    let items = |value: &Value| -> Result<Vec<String>, Error> {
        value.try_iter()?.map(|item| represented(&item)).collect()
    };
    Ok(match value.kind() {
        ValueKind::Seq if value.downcast_object_ref::<Tuple>().is_some() => match &items(value)?[..] {
            [only] => format!("({only},)"),
            items => format!("({})", items.join(", ")),
        },
        ValueKind::Seq => format!("[{}]", items(value)?.join(", ")),
        ValueKind::Map => {
            let pair =
                |key: Value| Ok(format!("{}: {}", represented(&key)?, represented(&value.get_item(&key)?)?));
            let pairs: Result<Vec<String>, Error> = value.try_iter()?.map(pair).collect();
            format!("{{{}}}", pairs?.join(", "))
        }
        _ => match printed_otherwise(value)? {
            Some(text) => text.into_owned(),
            // The library quotes texts in lists as Python does.
            None => Value::from(vec![value.clone()]).to_string().trim_matches(['[', ']']).to_owned(),
        },
    })
}

/// Python cannot iterate over `None`; an undefined value has no items.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// What has a length and items: texts and dictionaries too.
fn is_sequence(value: &Value) -> bool {
    value.is_undefined() || matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
}

/// What a loop walks over: a text letter by letter, so that the loop knows how many there are.
fn items(value: Value) -> Value {
    match value.as_str() {
        Some(text) => text.chars().map(|c| Value::from(c.to_string())).collect(),
        None => value,
    }
}

const REFUSAL: &str = "the template refuses this conversation: ";

fn raise_exception(message: Value) -> Result<Value, Error> {
    Err(wrong(format!("{REFUSAL}{message}")))
}

fn strftime_now(format: String) -> Result<String, Error> {
    jiff::fmt::strtime::format(&format, &jiff::ZonedDateTime::now())
        .map_err(|error| wrong(format!("strftime_now: {error}")))
}

/// A namespace of a dictionary, keywords, or both.
fn namespace(values: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let mut all: Vec<(Value, Value)> = Vec::new();
    for value in values.iter().chain([&Value::from(named)]) {
        let object = value.as_object().ok_or_else(|| wrong("namespace takes dictionaries and keywords"))?;
        all.extend(object.try_iter_pairs().into_iter().flatten());
    }
    functions::namespace(Some(Value::from_pairs(all).into()))
}

/// What went wrong in a template, and in which line of it.
fn problem(error: &Error) -> Problem {
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) if detail.starts_with(REFUSAL) => {
            Problem::Refused(format!("{detail}{line}"))
        }
        (ErrorKind::OutOfFuel, _) => Problem::Failed(format!(
            "the template does more than a chat template needs and was stopped; do not trust this model{line}"
        )),
        (kind, detail) => {
            let what = match (kind, detail) {
                (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
                (kind, Some(detail)) => format!("{kind}: {detail}"),
                (kind, None) => kind.to_string(),
            };
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            Problem::Failed(format!("{what}{line}{cause}"))
        }
    }
}

//! Conversations become prompts, through the template that comes with a checkpoint.
//!
//! In reading order: this file (which template, and what it is given), `worker` (the process that renders), `jinja` (the
//! language), `filters`, `methods` and `json` (what Python has beyond it).

mod adapt;
mod arguments;
mod filters;
mod jinja;
mod json;
mod methods;
mod worker;

use crate::gguf::GgufText;
use crate::{SpecialTokens, TextError, files, special_tokens};
use jinja::Context;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use worker::{Setup, Workers};

const TEMPLATE: &str = "chat_template.jinja";
const MORE_TEMPLATES: &str = "additional_chat_templates";
/// Where processors of images and text have it.
const PROCESSOR: &str = "chat_template.json";

const LIMIT: u64 = ChatTemplate::MOST_BYTES;

/// Most templates of a checkpoint; published ones have three.
const MOST_TEMPLATES: usize = 64;

/// What marks the end of a message that is to be continued.
const MARK: &str = "[[the end of the final message]] ";

/// Names of the templates that are chosen among.
const DEFAULT: &str = "default";
const TOOLS: &str = "tool_use";

/// What a prompt is made of.
#[derive(Clone, Copy, Debug)]
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
    /// Whether the prompt ends inside the last message, which is to be continued.
    pub continue_final_message: bool,
    /// Most bytes of the prompt.
    pub max_bytes: usize,
}

impl Default for RenderRequest<'_> {
    fn default() -> Self {
        RenderRequest {
            messages: &[],
            tools: None,
            documents: None,
            kwargs: None,
            add_generation_prompt: false,
            continue_final_message: false,
            max_bytes: 16 << 20,
        }
    }
}

/// A checkpoint's chat template. Clones share the processes that render it.
#[derive(Clone)]
pub struct ChatTemplate {
    templates: Arc<BTreeMap<String, Template>>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.templates.keys()).finish()
    }
}

struct Template {
    /// Where it was found, for messages.
    file: String,
    workers: Workers,
}

impl ChatTemplate {
    /// The largest template that is read, in bytes; published ones have up to about 50 thousand.
    pub const MOST_BYTES: u64 = 1 << 20;

    /// The template of a checkpoint folder: `chat_template.jinja` and `additional_chat_templates/`, or those in
    /// `tokenizer_config.json`, or `chat_template.json`; or those in the header of a GGUF file. Nothing if there is none.
    pub fn open(folder: &Path) -> Result<Option<Self>, TextError> {
        if GgufText::is_at(folder) {
            let config = GgufText::open(folder)?.config;
            return Ok(ChatTemplate::new(inside(&config, folder)?, &SpecialTokens::of(&config, &Map::new())));
        }
        let mut sources = BTreeMap::new();
        let mut add = |name: &str, path: &Path| {
            let source = files::read_text(path, LIMIT)?;
            sources.extend(source.map(|source| (name.to_owned(), (source, path.to_owned()))));
            Ok(())
        };
        add(DEFAULT, &folder.join(TEMPLATE))?;
        for path in more_templates(&folder.join(MORE_TEMPLATES)) {
            add(&path.file_stem().unwrap_or_default().to_string_lossy(), &path)?;
        }
        for file in [special_tokens::CONFIG, PROCESSOR] {
            let path = folder.join(file);
            if sources.is_empty()
                && let Some(config) = files::read_json(&path, special_tokens::LIMIT)?
            {
                sources = inside(&config, &path)?;
            }
        }
        Ok(ChatTemplate::new(sources, &SpecialTokens::open(folder)?))
    }

    /// Reads the texts of the two files, each with its path: `tokenizer_config.json`, and `chat_template.jinja`,
    /// which goes before the template in the other.
    pub fn parse(
        (config, config_path): (&[u8], &Path),
        template: Option<(String, &Path)>,
    ) -> Result<Option<Self>, TextError> {
        let config = files::parse_json(config, config_path)?;
        let sources = match template {
            Some((source, path)) => BTreeMap::from([(DEFAULT.to_owned(), (source, path.to_owned()))]),
            None => inside(&config, config_path)?,
        };
        Ok(ChatTemplate::new(sources, &SpecialTokens::of(&config, &Map::new())))
    }

    /// Reads a template that came without a checkpoint, at `path`, with the special tokens of one.
    pub fn from_source(source: String, path: &Path, tokens: &SpecialTokens) -> Result<Self, TextError> {
        let config = Map::from_iter([("chat_template".to_owned(), source.into())]);
        ChatTemplate::new(inside(&config, path)?, tokens)
            .ok_or_else(|| TextError::file(path, "this is no chat template"))
    }

    /// The text of the default template.
    pub fn source(&self) -> &str {
        self.templates.get(DEFAULT).map(|template| template.workers.source()).unwrap_or_default()
    }

    fn new(sources: BTreeMap<String, (String, PathBuf)>, tokens: &SpecialTokens) -> Option<Self> {
        let tokens: BTreeMap<String, Value> =
            tokens.named().iter().map(|(name, token)| (name.clone(), token.as_str().into())).collect();
        let template = |(name, (source, path)): (String, (String, PathBuf))| {
            let setup = Setup { source, tokens: tokens.clone() };
            (name, Template { file: path.display().to_string(), workers: Workers::new(setup) })
        };
        let templates: BTreeMap<String, Template> = sources.into_iter().map(template).collect();
        (!templates.is_empty()).then(|| ChatTemplate { templates: Arc::new(templates) })
    }

    /// The prompt of a conversation.
    pub fn render(&self, request: &RenderRequest) -> Result<String, TextError> {
        let template = self.choose(request.tools.is_some_and(|tools| !tools.is_empty()))?;
        let mut messages = Cow::Borrowed(request.messages);
        if request.continue_final_message {
            mark_end(messages.to_mut()).ok_or_else(|| {
                TextError::Request("there is no text in the final message that could be continued".into())
            })?;
        }
        let context = Context {
            messages: &messages,
            tools: request.tools,
            documents: request.documents,
            add_generation_prompt: request.add_generation_prompt,
            kwargs: request.kwargs,
        };
        let prompt = template.workers.render(&context, request.max_bytes, &template.file)?;
        if request.continue_final_message { cut_at_mark(prompt, &template.file) } else { Ok(prompt) }
    }

    /// The template for conversations with or without tools.
    fn choose(&self, tools: bool) -> Result<&Template, TextError> {
        let for_tools = self.templates.get(TOOLS).filter(|_| tools);
        for_tools.or_else(|| self.templates.get(DEFAULT)).ok_or_else(|| {
            let names = self.templates.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let file = self.templates.values().next().map(|template| template.file.clone());
            let problem = format!("there is no default template, only {names}");
            TextError::Template { file: file.unwrap_or_default(), problem }
        })
    }
}

/// Templates in a folder beside the default one, by the names of their files.
fn more_templates(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let paths =
        entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|it| it == "jinja"));
    let mut paths: Vec<PathBuf> = paths.take(MOST_TEMPLATES).collect();
    paths.sort();
    paths
}

/// The templates inside of a configuration: one, or several with names.
fn inside(
    config: &Map<String, Value>,
    path: &Path,
) -> Result<BTreeMap<String, (String, PathBuf)>, TextError> {
    let one = |name: &str, source: &str| {
        if source.len() as u64 > LIMIT {
            let problem = format!("its chat template has more than {LIMIT} bytes; do not trust this model");
            return Err(TextError::file(path, problem));
        }
        Ok((name.to_owned(), (source.to_owned(), path.to_owned())))
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::String(source)) => one(DEFAULT, source).map(|it| BTreeMap::from([it])),
        Some(Value::Array(named)) if named.len() <= MOST_TEMPLATES => {
            let text = |entry: &'_ Value, key| entry.get(key).and_then(Value::as_str).map(str::to_owned);
            let named =
                named.iter().filter_map(|entry| Some((text(entry, "name")?, text(entry, "template")?)));
            named.map(|(name, source)| one(&name, &source)).collect()
        }
        Some(_) => Err(TextError::file(path, "`chat_template` must be a text, or a list of named ones")),
    }
}

/// Puts a mark at the end of the last message's text.
fn mark_end(messages: &mut [Value]) -> Option<()> {
    let text = match messages.last_mut()?.get_mut("content")? {
        Value::Array(parts) => parts.iter_mut().rev().find_map(|part| part.get_mut("text"))?,
        content => content,
    };
    *text = Value::from(format!("{}{MARK}", text.as_str()?));
    Some(())
}

/// The prompt up to the mark. Where the template took the space off the mark's end, it would have taken it off the
/// message's end too.
fn cut_at_mark(mut prompt: String, file: &str) -> Result<String, TextError> {
    let at = prompt.rfind(MARK.trim_end()).ok_or_else(|| {
        let problem = "the template leaves out the end of the final message, so that it cannot be continued";
        TextError::Refused { file: file.to_owned(), reason: problem.into() }
    })?;
    let trimmed = !prompt[at..].starts_with(MARK);
    prompt.truncate(at);
    if trimmed {
        prompt.truncate(prompt.trim_end().len());
    }
    Ok(prompt)
}

#[cfg(test)]
mod tests;

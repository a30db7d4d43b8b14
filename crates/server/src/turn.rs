//! The assistant's turn in a conversation, in whatever words it was asked for: what the engine is asked, what the answer
//! must look like, and how its text becomes pieces of a message.

use crate::app::{App, Shared};
use crate::auth::Caller;
use crate::calls;
use crate::generation::{Job, Step, TokenTexts, What};
use crate::guide::Grammar;
use crate::openai::chat::ChatFields;
use crate::openai::logprobs::ChatTokenLogprob;
use crate::openai::sampling::SamplingFields;
use crate::openai::tools::ToolChoice;
use crate::openai::{ApiError, new_id};
use crate::parsers::{self, Parser, Piece};
use crate::prompt::{Conversation, encode};

/// What is asked of the assistant.
pub(crate) struct Asked<'a> {
    pub(crate) chat: &'a ChatFields,
    pub(crate) sampling: &'a SamplingFields,
    /// What the answer must look like, and the field that says so.
    pub(crate) form: Option<(Grammar, &'static str)>,
    /// The field that the conversation is in.
    pub(crate) messages: &'static str,
}

impl Asked<'_> {
    /// Everything that takes long before the engine is asked: its job, and a reply for each choice.
    pub(crate) fn prepare(self, app: &Shared, caller: Caller) -> Result<(Job, Vec<Reply>), ApiError> {
        let Asked { chat, sampling, form, messages } = self;
        let choice = chat.choice();
        let prompt = Conversation::of_chat(chat, choice != ToolChoice::None, messages).render(app)?;
        let ids = encode(app, &prompt, sampling.add_special_tokens.unwrap_or(false), messages)?;
        let mut job = Job::new(app, caller, vec![ids], sampling, messages)?;
        job.logprobs = chat.logprobs();
        let thinking = app.options.reasoning.filter(|reasoning| reasoning.begun_in(&prompt));
        if let Some((grammar, param)) = wanted_form(chat, &choice, form)? {
            let after = thinking.map(|reasoning| reasoning.close());
            job.guide = Some(app.guides()?.compile(&grammar, param, after)?);
        }
        let reads_calls = choice == ToolChoice::Auto && app.options.tool_parser.is_some();
        if reads_calls || app.options.reasoning.is_some() {
            // The marks that parsers look for are often special tokens.
            job.skip_special = sampling.skip_special_tokens.unwrap_or(false);
        }
        let replies = (0..job.n).map(|_| Reply::new(app, chat, &choice, thinking.is_some())).collect();
        Ok((job, replies))
    }
}

/// What the answer must look like, and the field that says so: a form, or calls of functions.
fn wanted_form(
    chat: &ChatFields,
    choice: &ToolChoice,
    form: Option<(Grammar, &'static str)>,
) -> Result<Option<(Grammar, &'static str)>, ApiError> {
    let tools = chat.tools.as_deref().unwrap_or_default();
    let calls = match choice {
        ToolChoice::None | ToolChoice::Auto => return Ok(form),
        ToolChoice::Named(name) => calls::arguments_of(tools, name),
        ToolChoice::Required => calls::list_of_calls(tools, chat.parallel_tool_calls != Some(false)),
    };
    match form {
        Some((_, param)) => {
            Err(ApiError::field(param, "tool_choice wants calls of functions: leave one of them out"))
        }
        None => Ok(Some((Grammar::Json(calls), "tools"))),
    }
}

/// One answer on its way from text to a message.
pub(crate) struct Reply {
    parser: Box<dyn Parser>,
    /// Whether the parser looks for anything but content.
    pub(crate) parsed: bool,
    /// Calls so far.
    pub(crate) calls: usize,
    /// Whether only one may be made.
    one_call: bool,
    /// Whether the client named the function: an answer that is the call then ends as others do, with `stop`.
    named: bool,
    /// Whether reasoning is told.
    reasoning: bool,
}

impl Reply {
    fn new(app: &App, chat: &ChatFields, choice: &ToolChoice, thinking: bool) -> Self {
        let tools = chat.tools.as_deref().unwrap_or_default();
        let parsed = app.options.reasoning.is_some()
            || match choice {
                ToolChoice::None => false,
                ToolChoice::Auto => app.options.tool_parser.is_some(),
                ToolChoice::Named(_) | ToolChoice::Required => true,
            };
        let answer = match (choice, app.options.tool_parser) {
            (ToolChoice::Named(name), _) => parsers::named_call(name),
            (ToolChoice::Required, _) => parsers::required_calls(),
            (ToolChoice::Auto, Some(parser)) => parser.parser(tools),
            (ToolChoice::Auto | ToolChoice::None, _) => parsers::plain(),
        };
        let parser = match app.options.reasoning {
            Some(reasoning) => reasoning.parser(thinking, answer),
            None => answer,
        };
        Reply {
            parser,
            parsed,
            calls: 0,
            one_call: chat.parallel_tool_calls == Some(false),
            named: matches!(choice, ToolChoice::Named(_)),
            reasoning: chat.include_reasoning.unwrap_or(true),
        }
    }

    /// What more text adds to the message; at the `last` of it also what was held back.
    pub(crate) fn pieces(&mut self, text: &str, last: bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        self.parser.push(text, &mut pieces);
        if last {
            self.parser.finish(&mut pieces);
        }
        pieces.retain(|piece| self.is_told(piece));
        pieces
    }

    fn is_told(&mut self, piece: &Piece) -> bool {
        match piece {
            Piece::Content(_) => true,
            Piece::Reasoning(_) => self.reasoning,
            Piece::Call { .. } => {
                self.calls += 1;
                self.calls == 1 || !self.one_call
            }
            Piece::Arguments(_) => self.calls == 1 || !self.one_call,
        }
    }

    /// `tool_calls` where the model chose to end with some.
    pub(crate) fn finish_reason(&self, reason: &'static str) -> &'static str {
        if reason == "stop" && self.calls > 0 && !self.named { "tool_calls" } else { reason }
    }
}

/// A part of a message: a run of pieces of one kind, or one call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    /// An identifier nobody else has.
    pub(crate) id: String,
    pub(crate) kind: PartKind,
    /// What was thought or said, or the arguments of the call.
    pub(crate) text: String,
    /// Of the tokens of what was said, if they are wanted.
    pub(crate) logprobs: Vec<ChatTokenLogprob>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum PartKind {
    Reasoning,
    Text,
    Call { name: String },
}

/// What happens to the last part of a message.
#[derive(Debug, PartialEq)]
pub(crate) enum Change {
    /// It is new, and empty.
    Opened,
    /// This came to it; of what is said, with the log-probabilities of its tokens.
    More(String, Vec<ChatTokenLogprob>),
    Closed,
}

/// A message in parts, on its way.
pub(crate) struct Parts {
    reply: Reply,
    pub(crate) all: Vec<Part>,
    /// Whether the last of them may grow.
    open: bool,
    /// Log-probabilities of tokens whose text has not been certain.
    waiting: Vec<ChatTokenLogprob>,
    /// New tokens that were thoughts.
    pub(crate) reasoning_tokens: usize,
}

impl Parts {
    pub(crate) fn new(reply: Reply) -> Self {
        Parts { reply, all: Vec::new(), open: false, waiting: Vec::new(), reasoning_tokens: 0 }
    }

    /// Takes in what happened, and says after every change to the last part what it was.
    pub(crate) fn step(&mut self, step: &Step, texts: &TokenTexts, mut changed: impl FnMut(&Parts, Change)) {
        let (text, last) = match &step.what {
            What::Prompt(_) => return,
            What::Token { text, id, logprobs } => {
                self.waiting.extend(logprobs.as_ref().map(|logprobs| texts.of_chat(*id, logprobs)));
                (text, false)
            }
            What::End { text, .. } => (text, true),
        };
        for piece in self.reply.pieces(text, last) {
            self.piece(piece, &mut changed);
        }
        if last {
            self.close(&mut changed);
        } else if self.all.last().is_some_and(|part| part.kind == PartKind::Reasoning) {
            self.reasoning_tokens += 1;
        }
    }

    fn piece(&mut self, piece: Piece, changed: &mut impl FnMut(&Parts, Change)) {
        let text = match piece {
            Piece::Call { name } => return self.open(PartKind::Call { name }, "call", changed),
            Piece::Arguments(text) => text,
            Piece::Content(text) => {
                self.go_on(PartKind::Text, "msg", changed);
                text
            }
            Piece::Reasoning(text) => {
                self.go_on(PartKind::Reasoning, "rs", changed);
                text
            }
        };
        let waiting = std::mem::take(&mut self.waiting);
        if let Some(part) = self.all.last_mut() {
            part.text.push_str(&text);
            let logprobs = if part.kind == PartKind::Text { waiting } else { Vec::new() };
            part.logprobs.extend_from_slice(&logprobs);
            changed(self, Change::More(text, logprobs));
        }
    }

    /// Makes the last part one of this kind.
    fn go_on(&mut self, kind: PartKind, prefix: &str, changed: &mut impl FnMut(&Parts, Change)) {
        if !self.open || self.all.last().is_none_or(|part| part.kind != kind) {
            self.open(kind, prefix, changed);
        }
    }

    fn open(&mut self, kind: PartKind, prefix: &str, changed: &mut impl FnMut(&Parts, Change)) {
        self.close(changed);
        self.all.push(Part { id: new_id(prefix), kind, text: String::new(), logprobs: Vec::new() });
        self.open = true;
        changed(self, Change::Opened);
    }

    fn close(&mut self, changed: &mut impl FnMut(&Parts, Change)) {
        if std::mem::take(&mut self.open) {
            changed(self, Change::Closed);
        }
    }

    /// Whether functions are called.
    pub(crate) fn has_calls(&self) -> bool {
        self.reply.calls > 0
    }
}

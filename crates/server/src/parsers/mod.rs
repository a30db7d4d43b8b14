//! What a model writes becomes a message: its reasoning, its text, and its calls of functions.
//!
//! A parser takes text in pieces of any size and gives pieces of a message; put together, these are the same however
//! the text was cut. `reasoning` splits off what a model thinks; then one file for each way to write calls: `hermes`
//! (also Qwen's), `qwen_coder`, `mistral`, `deepseek`, `harmony` (which has reasoning too), and `guided`, where a grammar forces the calls. Beside them: `steps`
//! (what these have in common), `held` (markers that may be cut anywhere) and `json` (where a value ends, and what a
//! call's object says).

mod deepseek;
mod guided;
mod harmony;
mod held;
mod hermes;
mod json;
mod mistral;
mod qwen_coder;
mod reasoning;
mod steps;

pub use reasoning::Reasoning;

use crate::openai::tools::Tool;
use std::str::FromStr;
use steps::Stepping;

/// A piece of an assistant's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Content(String),
    Reasoning(String),
    /// A call begins.
    Call {
        name: String,
    },
    /// More of the arguments of the last call.
    Arguments(String),
}

/// Splits text into pieces of a message.
pub(crate) trait Parser: Send {
    /// Takes more text.
    fn push(&mut self, text: &str, out: &mut Vec<Piece>);
    /// No more will come: what was held back goes out.
    fn finish(&mut self, out: &mut Vec<Piece>);
}

/// How a family of models writes calls of functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolParser {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`: Hermes, Qwen.
    Hermes,
    /// `<function=name><parameter=key>value</parameter></function>`: Qwen3-Coder.
    QwenCoder,
    /// `[TOOL_CALLS]` and a list of objects, or a name and an object: Mistral.
    Mistral,
    /// `<｜tool▁calls▁begin｜>…` with the arguments in a block of code: DeepSeek-V3 and R1.
    DeepSeekV3,
    /// The same without the block of code: DeepSeek-V3.1.
    DeepSeekV31,
    /// `<|channel|>commentary to=functions.name<|message|>` and the arguments: gpt-oss.
    Harmony,
}

/// What `--tool-call-parser` may say.
const TOOL_PARSERS: [(&str, ToolParser); 6] = [
    ("hermes", ToolParser::Hermes),
    ("qwen3_coder", ToolParser::QwenCoder),
    ("mistral", ToolParser::Mistral),
    ("deepseek_v3", ToolParser::DeepSeekV3),
    ("deepseek_v31", ToolParser::DeepSeekV31),
    ("openai", ToolParser::Harmony),
];

impl FromStr for ToolParser {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = TOOL_PARSERS.iter().find(|(known, _)| *known == name);
        found.map(|(_, parser)| *parser).ok_or_else(|| {
            let known: Vec<&str> = TOOL_PARSERS.iter().map(|(known, _)| *known).collect();
            format!("`{name}` is no tool-call parser: write auto, none, {}", known.join(", "))
        })
    }
}

impl ToolParser {
    /// The way that a chat template teaches, if it teaches one.
    pub fn of_template(template: &str) -> Option<Self> {
        let has = |text: &str| template.contains(text);
        if has(harmony::CHANNEL) && has(harmony::MESSAGE) {
            return Some(ToolParser::Harmony);
        }
        if has("<function=") && has("<parameter=") {
            return Some(ToolParser::QwenCoder);
        }
        if has(deepseek::CALLS_BEGIN) {
            let in_block = has("```json");
            return Some(if in_block { ToolParser::DeepSeekV3 } else { ToolParser::DeepSeekV31 });
        }
        if has(mistral::MARK) {
            return Some(ToolParser::Mistral);
        }
        // Other families put something else than JSON between the same marks.
        (has(hermes::OPEN) && !has("<arg_key>")).then_some(ToolParser::Hermes)
    }

    /// A parser for one answer.
    pub(crate) fn parser(self, tools: &[Tool]) -> Box<dyn Parser> {
        match self {
            ToolParser::Hermes => Stepping::boxed(hermes::Hermes::default()),
            ToolParser::QwenCoder => Stepping::boxed(qwen_coder::QwenCoder::new(tools)),
            ToolParser::Mistral => Stepping::boxed(mistral::Mistral::default()),
            ToolParser::DeepSeekV3 => Stepping::boxed(deepseek::DeepSeek::new(true)),
            ToolParser::DeepSeekV31 => Stepping::boxed(deepseek::DeepSeek::new(false)),
            ToolParser::Harmony => harmony::parser(plain()),
        }
    }
}

/// The parser of an answer that a grammar makes the arguments of this function.
pub(crate) fn named_call(function: &str) -> Box<dyn Parser> {
    Box::new(guided::NamedCall::new(function))
}

/// The parser of an answer that a grammar makes a list of calls.
pub(crate) fn required_calls() -> Box<dyn Parser> {
    Stepping::boxed(guided::RequiredCalls::default())
}

/// The parser of an answer that is only text.
pub(crate) fn plain() -> Box<dyn Parser> {
    Box::new(Plain)
}

struct Plain;

impl Parser for Plain {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        if !text.is_empty() {
            out.push(Piece::Content(text.to_owned()));
        }
    }

    fn finish(&mut self, _: &mut Vec<Piece>) {}
}

#[cfg(test)]
pub(crate) mod testing {
    use super::{Parser, Piece};

    /// What a parser makes of a text, cut in every way that has pieces of one size; neighbours of a kind are joined.
    pub(crate) fn parsed(parser: impl Fn() -> Box<dyn Parser>, text: &str) -> Vec<Piece> {
        let whole = cut(parser(), text, usize::MAX);
        for size in 1..=text.chars().count().min(40) {
            assert_eq!(cut(parser(), text, size), whole, "pieces of {size}");
        }
        whole
    }

    fn cut(mut parser: Box<dyn Parser>, text: &str, size: usize) -> Vec<Piece> {
        let mut out = Vec::new();
        let letters: Vec<char> = text.chars().collect();
        for piece in letters.chunks(size.min(letters.len().max(1))) {
            parser.push(&piece.iter().collect::<String>(), &mut out);
        }
        parser.finish(&mut out);
        joined(out)
    }

    fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
        let mut all: Vec<Piece> = Vec::new();
        for piece in pieces {
            match (all.last_mut(), piece) {
                (Some(Piece::Content(last)), Piece::Content(more))
                | (Some(Piece::Reasoning(last)), Piece::Reasoning(more))
                | (Some(Piece::Arguments(last)), Piece::Arguments(more)) => last.push_str(&more),
                (_, piece) => all.push(piece),
            }
        }
        all
    }

    pub(crate) fn content(text: &str) -> Piece {
        Piece::Content(text.into())
    }

    pub(crate) fn call(name: &str) -> Piece {
        Piece::Call { name: name.into() }
    }

    pub(crate) fn arguments(text: &str) -> Piece {
        Piece::Arguments(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_tell_the_family() {
        let of = ToolParser::of_template;
        assert_eq!(of("… <tool_call>\n{{ name }}</tool_call>"), Some(ToolParser::Hermes));
        assert_eq!(of("<tool_call><function={{ name }}><parameter=x>"), Some(ToolParser::QwenCoder));
        assert_eq!(of("[TOOL_CALLS]"), Some(ToolParser::Mistral));
        assert_eq!(of("<｜tool▁calls▁begin｜> ```json"), Some(ToolParser::DeepSeekV3));
        assert_eq!(of("<｜tool▁calls▁begin｜>"), Some(ToolParser::DeepSeekV31));
        assert_eq!(of("<tool_call>{{ name }}<arg_key>"), None);
        assert_eq!(of("{{ messages }}"), None);
    }

    #[test]
    fn parsers_have_names() {
        for (name, parser) in TOOL_PARSERS {
            assert_eq!(name.parse(), Ok(parser));
        }
        assert!("other".parse::<ToolParser>().unwrap_err().contains("hermes"));
    }
}

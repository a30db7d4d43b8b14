//! What a model thinks before it answers: `<think>…</think>`, or a channel of its own.

use super::held::Held;
use super::steps::{Stepping, Steps};
use super::{Parser, Piece, harmony};
use std::str::FromStr;

/// How a family of models marks its reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reasoning {
    open: &'static str,
    close: &'static str,
    /// Whether the model thinks first even where nothing opens it: there is only the end to be seen.
    always: bool,
}

const THINK: Reasoning = Reasoning { open: "<think>", close: "</think>", always: false };
const ALWAYS: Reasoning = Reasoning { always: true, ..THINK };
const BRACKETS: Reasoning = Reasoning { open: "[THINK]", close: "[/THINK]", always: false };
const HARMONY: Reasoning =
    Reasoning { open: "<|channel|>analysis<|message|>", close: "<|end|>", always: false };

/// What `--reasoning-parser` may say.
const REASONING_PARSERS: [(&str, Reasoning); 5] = [
    ("deepseek_r1", ALWAYS),
    ("deepseek_v3", THINK),
    ("qwen3", THINK),
    ("mistral", BRACKETS),
    ("openai_gptoss", HARMONY),
];

impl FromStr for Reasoning {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = REASONING_PARSERS.iter().find(|(known, _)| *known == name);
        found.map(|(_, parser)| *parser).ok_or_else(|| {
            let known: Vec<&str> = REASONING_PARSERS.iter().map(|(known, _)| *known).collect();
            format!("`{name}` is no reasoning parser: write auto, none, {}", known.join(", "))
        })
    }
}

impl Reasoning {
    /// The marks that a chat template knows, if it knows any.
    pub fn of_template(template: &str) -> Option<Self> {
        if template.contains(harmony::CHANNEL) && template.contains(harmony::MESSAGE) {
            return Some(HARMONY);
        }
        [THINK, BRACKETS].into_iter().find(|marks| template.contains(marks.close))
    }

    /// Whether a prompt ends where the model is thinking.
    pub(crate) fn begun_in(self, prompt: &str) -> bool {
        let prompt = prompt.trim_end();
        prompt.ends_with(self.open) || self.always && !prompt.ends_with(self.close)
    }

    /// Text that ends the reasoning.
    pub(crate) fn close(self) -> &'static str {
        self.close
    }

    /// A parser for one answer, which hands what follows the reasoning to `answer`. `begun` says whether the prompt left
    /// the model thinking.
    pub(crate) fn parser(self, begun: bool, answer: Box<dyn Parser>) -> Box<dyn Parser> {
        if self == HARMONY {
            return harmony::parser(answer);
        }
        let unopened = if begun { State::Thinking } else { State::Answer };
        Stepping::boxed(Splitter { marks: self, state: State::Start, unopened, answer })
    }
}

struct Splitter {
    marks: Reasoning,
    state: State,
    /// What an answer begins with that does not open reasoning itself.
    unopened: State,
    answer: Box<dyn Parser>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The first words tell whether the model thinks.
    Start,
    /// Reasoning has been opened, and white space there means nothing.
    Thinking,
    Reasoning,
    /// White space before the answer means nothing.
    Closed,
    Answer,
}

impl Steps for Splitter {
    fn advance(&mut self, held: &mut Held, out: &mut Vec<Piece>) -> bool {
        match self.state {
            State::Start => {
                let text = held.text().trim_start();
                if text.len() < self.marks.open.len() && self.marks.open.starts_with(text) {
                    return false;
                }
                self.state = if text.starts_with(self.marks.open) {
                    held.skip_space();
                    held.skip(self.marks.open.len());
                    State::Thinking
                } else {
                    self.unopened
                };
                true
            }
            State::Thinking | State::Closed => {
                let any = held.skip_space();
                if any {
                    self.state = if self.state == State::Thinking { State::Reasoning } else { State::Answer };
                }
                any
            }
            State::Reasoning => {
                let (text, closed) = held.until(&[self.marks.close]);
                if !text.is_empty() {
                    out.push(Piece::Reasoning(text));
                }
                if closed.is_some() {
                    self.state = State::Closed;
                }
                closed.is_some()
            }
            State::Answer => {
                self.answer.push(&held.take(), out);
                false
            }
        }
    }

    fn end(&mut self, rest: String, out: &mut Vec<Piece>) {
        match self.state {
            State::Start if self.unopened == State::Thinking => {
                let rest = rest.trim_start();
                out.extend((!rest.is_empty()).then(|| Piece::Reasoning(rest.to_owned())));
            }
            State::Start | State::Answer => self.answer.push(&rest, out),
            State::Reasoning if !rest.is_empty() => out.push(Piece::Reasoning(rest)),
            State::Thinking | State::Reasoning | State::Closed => {}
        }
        self.answer.finish(out);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{content, parsed};
    use super::super::{ToolParser, plain};
    use super::*;

    fn reasoning(text: &str) -> Piece {
        Piece::Reasoning(text.into())
    }

    #[test]
    fn reasoning_is_split_off() {
        let check = |begun: bool, text: &str, expected: &[Piece]| {
            assert_eq!(parsed(|| THINK.parser(begun, plain()), text), expected, "{text}");
        };
        check(false, "<think>\nHm.\n</think>\n\nYes <b>", &[reasoning("Hm.\n"), content("Yes <b>")]);
        check(true, "\nHm.</think>Yes", &[reasoning("Hm."), content("Yes")]);
        check(true, "Hm. </thi", &[reasoning("Hm. </thi")]);
        check(false, "Plain < text", &[content("Plain < text")]);
        check(false, "<thi", &[content("<thi")]);
        check(false, "", &[]);
        check(false, "<think></think>Yes", &[content("Yes")]);
        check(true, "\n", &[]);
        check(true, "<think>Hm.</think>Yes", &[reasoning("Hm."), content("Yes")]);
    }

    #[test]
    fn some_models_always_think_first() {
        let always: Reasoning = "deepseek_r1".parse().unwrap();
        assert!(always.begun_in("<|Assistant|>") && always.begun_in("<|Assistant|><think>\n"));
        assert!(!always.begun_in("<|Assistant|><think>\n\n</think>\n"));
        let pieces = parsed(|| always.parser(always.begun_in("<|Assistant|>"), plain()), "Hm.</think>\nYes");
        assert_eq!(pieces, [reasoning("Hm."), content("Yes")]);
    }

    #[test]
    fn calls_follow_reasoning() {
        let text = "<think>f?</think>\n<tool_call>{\"name\": \"f\"}</tool_call>";
        let pieces = parsed(|| THINK.parser(false, ToolParser::Hermes.parser(&[])), text);
        let call = Piece::Call { name: "f".into() };
        assert_eq!(pieces, [reasoning("f?"), call, Piece::Arguments("{}".into())]);
    }

    #[test]
    fn prompts_and_templates() {
        assert!(THINK.begun_in("<|assistant|><think>\n") && !THINK.begun_in("<think>\n\n</think>\n\n"));
        assert_eq!(Reasoning::of_template("{% if x %}</think>{% endif %}"), Some(THINK));
        assert_eq!(Reasoning::of_template("<|start|>assistant<|channel|>final<|message|>"), Some(HARMONY));
        assert_eq!(Reasoning::of_template("plain"), None);
        assert!("other".parse::<Reasoning>().is_err());
    }
}

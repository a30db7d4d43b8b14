//! Harmony, the format of gpt-oss: messages with a header each, `<|start|>assistant<|channel|>final<|message|>…<|end|>`. The
//! channel `analysis` is reasoning; a message that is addressed (`to=functions.name`) is a call; the rest is content.

use super::held::Held;
use super::steps::{Stepping, Steps};
use super::{Parser, Piece};

pub(super) const START: &str = "<|start|>";
pub(super) const CHANNEL: &str = "<|channel|>";
pub(super) const MESSAGE: &str = "<|message|>";
/// What ends a message: it goes on, all is said, or a call is to be answered.
const ENDS: [&str; 3] = ["<|end|>", "<|return|>", "<|call|>"];

/// A parser for one answer, which hands content to `answer`.
pub(super) fn parser(answer: Box<dyn Parser>) -> Box<dyn Parser> {
    Stepping::boxed(Harmony { state: State::Start, answer })
}

struct Harmony {
    state: State,
    answer: Box<dyn Parser>,
}

enum State {
    /// The first letters tell whether there are headers at all: an answer that a grammar makes has none.
    Start,
    /// Text without headers.
    Plain,
    /// Up to the mark that begins a message.
    Header,
    /// In a message of some kind.
    Message(Kind),
    /// After one.
    Between,
}

#[derive(Clone, Copy)]
enum Kind {
    Reasoning,
    Content,
    Arguments,
}

impl Steps for Harmony {
    fn advance(&mut self, held: &mut Held, out: &mut Vec<Piece>) -> bool {
        match self.state {
            State::Start => {
                let text = held.text();
                let begun = |mark: &str| text.len() < mark.len() && mark.starts_with(text);
                if [START, CHANNEL].into_iter().any(begun) {
                    return false;
                }
                let headed = [START, CHANNEL].into_iter().any(|mark| text.starts_with(mark));
                self.state = if headed { State::Header } else { State::Plain };
                true
            }
            State::Plain => {
                self.answer.push(&held.take(), out);
                false
            }
            State::Header => {
                // A header is short, and all of it is needed.
                if !held.text().contains(MESSAGE) {
                    return false;
                }
                let (header, _) = held.until(&[MESSAGE]);
                self.state = State::Message(kind_of(&header, out));
                true
            }
            State::Message(kind) => {
                let (text, end) = held.until(&[&ENDS[..], &[START]].concat());
                self.say(kind, text, out);
                let ended = end.is_some();
                if let Some(end) = end {
                    self.state = if end < ENDS.len() { State::Between } else { State::Header };
                }
                ended
            }
            State::Between => {
                let (_, found) = held.until(&[START, CHANNEL]);
                if found.is_some() {
                    self.state = State::Header;
                }
                found.is_some()
            }
        }
    }

    fn end(&mut self, rest: String, out: &mut Vec<Piece>) {
        match self.state {
            State::Start | State::Plain => self.answer.push(&rest, out),
            State::Message(kind) => self.say(kind, rest, out),
            State::Header | State::Between => {}
        }
        self.answer.finish(out);
    }
}

impl Harmony {
    fn say(&mut self, kind: Kind, text: String, out: &mut Vec<Piece>) {
        if text.is_empty() {
            return;
        }
        match kind {
            Kind::Reasoning => out.push(Piece::Reasoning(text)),
            Kind::Content => self.answer.push(&text, out),
            Kind::Arguments => out.push(Piece::Arguments(text)),
        }
    }
}

/// What follows a header; an address begins a call.
fn kind_of(header: &str, out: &mut Vec<Piece>) -> Kind {
    let word = |text: &str| -> String {
        text.chars().take_while(|letter| !letter.is_whitespace() && *letter != '<').collect()
    };
    if let Some((_, address)) = header.split_once("to=") {
        let address = word(address);
        let name = address.strip_prefix("functions.").unwrap_or(&address).to_owned();
        out.push(Piece::Call { name });
        return Kind::Arguments;
    }
    let channel = header.rsplit_once(CHANNEL).map_or(header, |(_, channel)| channel);
    if word(channel) == "analysis" { Kind::Reasoning } else { Kind::Content }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{arguments, call, content, parsed};
    use super::super::{Reasoning, ToolParser, plain};
    use super::*;

    fn check(text: &str, expected: &[Piece]) {
        assert_eq!(parsed(|| parser(plain()), text), expected, "{text}");
        let both = || {
            let reasoning: Reasoning = "openai_gptoss".parse().unwrap();
            reasoning.parser(false, "openai".parse::<ToolParser>().unwrap().parser(&[]))
        };
        assert_eq!(parsed(both, text), expected, "{text}");
    }

    fn reasoning(text: &str) -> Piece {
        Piece::Reasoning(text.into())
    }

    #[test]
    fn channels_are_told_apart() {
        check(
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes <b><|return|>",
            &[reasoning("Hm."), content("Yes <b>")],
        );
        check("<|channel|>final<|message|>Yes", &[content("Yes")]);
        check("<|channel|>analysis<|message|>Hm, <|en", &[reasoning("Hm, <|en")]);
        check("Without headers < so", &[content("Without headers < so")]);
        check("<|channel|>fin", &[]);
        check("", &[]);
    }

    #[test]
    fn calls_are_addressed() {
        check(
            "<|channel|>analysis<|message|>f?<|end|><|start|>assistant<|channel|>commentary to=functions.f \
             <|constrain|>json<|message|>{\"x\": 1}<|call|>",
            &[reasoning("f?"), call("f"), arguments("{\"x\": 1}")],
        );
        check(
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.g<|channel|>commentary \
             json<|message|>{}<|call|>",
            &[content("I look."), call("g"), arguments("{}")],
        );
    }
}

//! `<tool_call>{"name": …, "arguments": …}</tool_call>`.

use super::held::Held;
use super::json::{CallObject, Progress};
use super::{Parser, Piece};

pub(super) const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

#[derive(Default)]
pub(super) struct Hermes {
    held: Held,
    state: State,
}

#[derive(Default)]
enum State {
    #[default]
    Content,
    /// In the object of a call.
    Call(CallObject),
    /// After it.
    Closing,
    /// After a call, where white space means nothing.
    Between,
}

impl Parser for Hermes {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        self.held.push(text);
        while self.advance(out) {}
    }

    fn finish(&mut self, out: &mut Vec<Piece>) {
        let rest = match &mut self.state {
            State::Content => self.held.take(),
            State::Call(call) => match call.raw() {
                raw if raw.is_empty() => String::new(),
                raw => format!("{OPEN}{raw}"),
            },
            State::Closing => String::new(),
            State::Between => self.held.take().trim_start().to_owned(),
        };
        if !rest.is_empty() {
            out.push(Piece::Content(rest));
        }
    }
}

impl Hermes {
    /// One step; whether there may be another.
    fn advance(&mut self, out: &mut Vec<Piece>) -> bool {
        match &mut self.state {
            State::Content => {
                let (text, opened) = self.held.until(&[OPEN]);
                if !text.is_empty() {
                    out.push(Piece::Content(text));
                }
                if opened.is_some() {
                    self.state = State::Call(CallObject::default());
                }
                opened.is_some()
            }
            State::Call(call) => {
                let text = self.held.take();
                match call.push(&text, out) {
                    Progress::Open => return false,
                    Progress::Done(end) => {
                        self.held.push(&text[end..]);
                        self.state = State::Closing;
                    }
                    Progress::Broken(read) => {
                        out.push(Piece::Content(format!("{OPEN}{}", call.raw())));
                        self.held.push(&text[read..]);
                        self.state = State::Content;
                    }
                }
                true
            }
            State::Closing => {
                let (_, closed) = self.held.until(&[CLOSE]);
                if closed.is_some() {
                    self.state = State::Between;
                }
                closed.is_some()
            }
            State::Between => {
                let any = self.held.skip_space();
                if any {
                    self.state = State::Content;
                }
                any
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{arguments, call, content, parsed};
    use super::*;

    fn check(text: &str, expected: &[Piece]) {
        assert_eq!(parsed(|| Box::new(Hermes::default()), text), expected, "{text}");
    }

    #[test]
    fn calls_among_text() {
        check("Hello <b>", &[content("Hello <b>")]);
        check(
            "Wait.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n\
             <tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>\n",
            &[content("Wait.\n"), call("f"), arguments("{\"x\": 1}"), call("g"), arguments("{}")],
        );
        check(
            "<tool_call>{\"name\": \"f\"}</tool_call> done",
            &[call("f"), arguments("{}"), content("done")],
        );
    }

    #[test]
    fn cut_and_broken_calls() {
        check("<tool_call>{\"name\": \"f\", \"arguments\": {\"x", &[call("f"), arguments("{\"x")]);
        check("<tool_call>{\"na", &[content("<tool_call>{\"na")]);
        check("<tool_call>no, wait", &[content("<tool_call>no, wait")]);
        check("a <tool", &[content("a <tool")]);
    }
}

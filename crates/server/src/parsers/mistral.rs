//! `[TOOL_CALLS]` before a list of objects, or before a name and an object, with or without `[ARGS]` between them.

use super::held::Held;
use super::json::{CallObject, Progress, Step, ValueEnd};
use super::{Parser, Piece};

pub(super) const MARK: &str = "[TOOL_CALLS]";
const ARGS: &str = "[ARGS]";

#[derive(Default)]
pub(super) struct Mistral {
    held: Held,
    state: State,
}

#[derive(Default)]
enum State {
    #[default]
    Content,
    /// After the mark.
    Marked,
    /// Before an object of a list, or the list's end.
    InList,
    Call(CallObject),
    /// Before arguments that follow a name.
    Named,
    Arguments(ValueEnd),
}

impl Parser for Mistral {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        self.held.push(text);
        while self.advance(out) {}
    }

    fn finish(&mut self, out: &mut Vec<Piece>) {
        let rest = match &mut self.state {
            State::Content => self.held.take(),
            State::Marked | State::InList | State::Arguments(_) => String::new(),
            State::Named => format!("{MARK}{}", self.held.take()),
            State::Call(call) => call.raw(),
        };
        if !rest.is_empty() {
            out.push(Piece::Content(rest));
        }
    }
}

impl Mistral {
    /// One step; whether there may be another.
    fn advance(&mut self, out: &mut Vec<Piece>) -> bool {
        match &mut self.state {
            State::Content => {
                let (text, marked) = self.held.until(&[MARK]);
                if !text.is_empty() {
                    out.push(Piece::Content(text));
                }
                if marked.is_some() {
                    self.state = State::Marked;
                }
                marked.is_some()
            }
            State::Marked => {
                let any = self.held.skip_space();
                if any && self.held.text().starts_with('[') {
                    self.held.skip(1);
                    self.state = State::InList;
                } else if any {
                    self.state = State::Named;
                }
                any
            }
            State::InList => {
                if !self.held.skip_space() {
                    return false;
                }
                match self.held.text().chars().next() {
                    Some(',') => self.held.skip(1),
                    Some('{') => self.state = State::Call(CallObject::default()),
                    Some(']') => {
                        self.held.skip(1);
                        self.state = State::Content;
                    }
                    _ => self.state = State::Content,
                }
                true
            }
            State::Call(call) => {
                let text = self.held.take();
                let (read, broken) = match call.push(&text, out) {
                    Progress::Open => return false,
                    Progress::Done(read) => (read, false),
                    Progress::Broken(read) => (read, true),
                };
                if broken {
                    out.push(Piece::Content(call.raw()));
                }
                self.held.push(&text[read..]);
                self.state = if broken { State::Content } else { State::InList };
                true
            }
            State::Named => {
                let Some(brace) = self.held.text().find('{') else { return false };
                let name = self.held.text()[..brace].trim().trim_end_matches(ARGS).trim();
                out.push(Piece::Call { name: name.to_owned() });
                self.held.skip(brace);
                self.state = State::Arguments(ValueEnd::default());
                true
            }
            State::Arguments(end) => {
                let text = self.held.take();
                let (mut read, mut ended) = (0, false);
                for letter in text.chars() {
                    read += letter.len_utf8();
                    ended = end.step(letter) == Step::Last;
                    if ended {
                        break;
                    }
                }
                if read > 0 {
                    out.push(Piece::Arguments(text[..read].to_owned()));
                }
                self.held.push(&text[read..]);
                if ended {
                    self.state = State::Content;
                }
                ended
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{arguments, call, content, parsed};
    use super::*;

    fn check(text: &str, expected: &[Piece]) {
        assert_eq!(parsed(|| Box::new(Mistral::default()), text), expected, "{text}");
    }

    #[test]
    fn lists_of_calls() {
        check("Hello [x]", &[content("Hello [x]")]);
        check(
            r#"[TOOL_CALLS] [{"name": "f", "arguments": {"x": [1]}}, {"name": "g", "arguments": {}}]"#,
            &[call("f"), arguments(r#"{"x": [1]}"#), call("g"), arguments("{}")],
        );
        check(r#"[TOOL_CALLS][{"x": 1}]"#, &[content(r#"{"x": 1}]"#)]);
    }

    #[test]
    fn names_before_arguments() {
        check(
            r#"So: [TOOL_CALLS]f{"x": "}"}[TOOL_CALLS]g[ARGS]{}"#,
            &[content("So: "), call("f"), arguments(r#"{"x": "}"}"#), call("g"), arguments("{}")],
        );
        check(r#"[TOOL_CALLS]f{"x"#, &[call("f"), arguments(r#"{"x"#)]);
        check("[TOOL_CALLS]f", &[content("[TOOL_CALLS]f")]);
    }
}

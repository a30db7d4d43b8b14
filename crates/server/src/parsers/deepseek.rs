//! `<｜tool▁calls▁begin｜>`, then for each call its name and arguments between marks of their own: in a block of code
//! after the word `function` (V3, R1), or plainly after the name (V3.1).

use super::held::Held;
use super::json::{Step, ValueEnd};
use super::{Parser, Piece};

pub(super) const CALLS_BEGIN: &str = "<｜tool▁calls▁begin｜>";
const CALLS_END: &str = "<｜tool▁calls▁end｜>";
const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
const CALL_END: &str = "<｜tool▁call▁end｜>";
const SEPARATOR: &str = "<｜tool▁sep｜>";

pub(super) struct DeepSeek {
    /// Whether the name stands on a line of its own after the separator, and the arguments in a block of code.
    in_block: bool,
    held: Held,
    state: State,
}

enum State {
    Content,
    /// Before a call, or the end of the calls.
    Calls,
    /// Before the separator; what was read of that.
    Head(String),
    /// Before the arguments; what was read of the name's line.
    Name(String),
    Arguments(ValueEnd),
    /// After the arguments.
    Tail,
}

impl DeepSeek {
    pub(super) fn new(in_block: bool) -> Self {
        DeepSeek { in_block, held: Held::default(), state: State::Content }
    }

    /// One step; whether there may be another.
    fn advance(&mut self, out: &mut Vec<Piece>) -> bool {
        match &mut self.state {
            State::Content => {
                let (text, begun) = self.held.until(&[CALLS_BEGIN]);
                if !text.is_empty() {
                    out.push(Piece::Content(text));
                }
                if begun.is_some() {
                    self.state = State::Calls;
                }
                begun.is_some()
            }
            State::Calls => {
                let (_, which) = self.held.until(&[CALL_BEGIN, CALLS_END]);
                match which {
                    Some(0) => self.state = State::Head(String::new()),
                    Some(_) => self.state = State::Content,
                    None => {}
                }
                which.is_some()
            }
            State::Head(head) => {
                let (text, separated) = self.held.until(&[SEPARATOR]);
                head.push_str(&text);
                if separated.is_some() {
                    // In a block the head is the word `function`; else it is the name.
                    let name = if self.in_block { String::new() } else { std::mem::take(head) };
                    self.state = State::Name(name);
                }
                separated.is_some()
            }
            State::Name(name) => {
                let Some(brace) = self.held.text().find('{') else { return false };
                let before = self.held.text()[..brace].trim();
                name.push_str(before.trim_end_matches("```json").trim());
                out.push(Piece::Call { name: name.trim().to_owned() });
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
                    self.state = State::Tail;
                }
                ended
            }
            State::Tail => {
                let (_, ended) = self.held.until(&[CALL_END]);
                if ended.is_some() {
                    self.state = State::Calls;
                }
                ended.is_some()
            }
        }
    }
}

impl Parser for DeepSeek {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        self.held.push(text);
        while self.advance(out) {}
    }

    fn finish(&mut self, out: &mut Vec<Piece>) {
        let rest = self.held.take();
        if matches!(self.state, State::Content) && !rest.is_empty() {
            out.push(Piece::Content(rest));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{arguments, call, content, parsed};
    use super::*;

    #[test]
    fn calls_in_blocks_of_code() {
        let text = "Look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"x\": 1}\n```\
                    <｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```\
                    <｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        let expected = [content("Look."), call("f"), arguments("{\"x\": 1}"), call("g"), arguments("{}")];
        assert_eq!(parsed(|| Box::new(DeepSeek::new(true)), text), expected);
    }

    #[test]
    fn calls_by_name() {
        let text = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"x\": {\"y\": \"}\"}}\
                    <｜tool▁call▁end｜><｜tool▁calls▁end｜>after";
        let expected = [call("f"), arguments("{\"x\": {\"y\": \"}\"}}"), content("after")];
        assert_eq!(parsed(|| Box::new(DeepSeek::new(false)), text), expected);
        assert_eq!(parsed(|| Box::new(DeepSeek::new(false)), "a < b"), [content("a < b")]);
    }
}

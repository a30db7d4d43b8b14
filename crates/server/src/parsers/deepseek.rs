//! `<｜tool▁calls▁begin｜>`, then for each call its name and arguments between marks of their own: in a block of code
//! after the word `function` (V3, R1), or plainly after the name (V3.1).

use super::Piece;
use super::held::Held;
use super::json::ValueEnd;
use super::steps::{Steps, arguments_until, content_until, go, say, skip_until};

pub(super) const CALLS_BEGIN: &str = "<｜tool▁calls▁begin｜>";
const CALLS_END: &str = "<｜tool▁calls▁end｜>";
const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
const CALL_END: &str = "<｜tool▁call▁end｜>";
const SEPARATOR: &str = "<｜tool▁sep｜>";

pub(super) struct DeepSeek {
    /// Whether the name stands on a line of its own after the separator, and the arguments in a block of code.
    in_block: bool,
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
        DeepSeek { in_block, state: State::Content }
    }
}

impl Steps for DeepSeek {
    fn advance(&mut self, held: &mut Held, out: &mut Vec<Piece>) -> bool {
        let next = match &mut self.state {
            State::Content => content_until(CALLS_BEGIN, held, out).then_some(State::Calls),
            State::Calls => held.until(&[CALL_BEGIN, CALLS_END]).1.map(|which| match which {
                0 => State::Head(String::new()),
                _ => State::Content,
            }),
            State::Head(head) => {
                let (text, separated) = held.until(&[SEPARATOR]);
                head.push_str(&text);
                // In a block the head is the word `function`; else it is the name.
                let name = if self.in_block { String::new() } else { head.clone() };
                separated.map(|_| State::Name(name))
            }
            State::Name(name) => held.text().find('{').map(|brace| {
                let before = held.text()[..brace].trim();
                name.push_str(before.trim_end_matches("```json").trim());
                out.push(Piece::Call { name: name.trim().to_owned() });
                held.skip(brace);
                State::Arguments(ValueEnd::default())
            }),
            State::Arguments(end) => arguments_until(end, held, out).then_some(State::Tail),
            State::Tail => skip_until(CALL_END, held).then_some(State::Calls),
        };
        go(&mut self.state, next)
    }

    fn end(&mut self, rest: String, out: &mut Vec<Piece>) {
        if matches!(self.state, State::Content) {
            say(rest, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::steps::Stepping;
    use super::super::testing::{arguments, call, content, parsed};
    use super::*;

    #[test]
    fn calls_in_blocks_of_code() {
        let text = "Look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"x\": 1}\n```\
                    <｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```\
                    <｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        let expected = [content("Look."), call("f"), arguments("{\"x\": 1}"), call("g"), arguments("{}")];
        assert_eq!(parsed(|| Stepping::boxed(DeepSeek::new(true)), text), expected);
    }

    #[test]
    fn calls_by_name() {
        let text = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"x\": {\"y\": \"}\"}}\
                    <｜tool▁call▁end｜><｜tool▁calls▁end｜>after";
        let expected = [call("f"), arguments("{\"x\": {\"y\": \"}\"}}"), content("after")];
        assert_eq!(parsed(|| Stepping::boxed(DeepSeek::new(false)), text), expected);
        assert_eq!(parsed(|| Stepping::boxed(DeepSeek::new(false)), "a < b"), [content("a < b")]);
    }
}

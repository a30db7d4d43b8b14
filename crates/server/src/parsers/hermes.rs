//! `<tool_call>{"name": …, "arguments": …}</tool_call>`.

use super::Piece;
use super::held::Held;
use super::json::CallObject;
use super::steps::{CallEnd, Steps, call_object, content_until, go, say, skip_until};

pub(super) const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

#[derive(Default)]
pub(super) enum Hermes {
    #[default]
    Content,
    /// In the object of a call.
    Call(CallObject),
    /// After it.
    Closing,
    /// After a call, where white space means nothing.
    Between,
}

impl Steps for Hermes {
    fn advance(&mut self, held: &mut Held, out: &mut Vec<Piece>) -> bool {
        let next = match self {
            Hermes::Content => content_until(OPEN, held, out).then(|| Hermes::Call(CallObject::default())),
            Hermes::Call(call) => call_object(call, held, out).map(|end| match end {
                CallEnd::Called => Hermes::Closing,
                CallEnd::Broken(raw) => {
                    say(format!("{OPEN}{raw}"), out);
                    Hermes::Content
                }
            }),
            Hermes::Closing => skip_until(CLOSE, held).then_some(Hermes::Between),
            Hermes::Between => held.skip_space().then_some(Hermes::Content),
        };
        go(self, next)
    }

    fn end(&mut self, rest: String, out: &mut Vec<Piece>) {
        match self {
            Hermes::Content => say(rest, out),
            Hermes::Call(call) => match call.raw() {
                raw if raw.is_empty() => {}
                raw => say(format!("{OPEN}{raw}"), out),
            },
            Hermes::Closing => {}
            Hermes::Between => say(rest.trim_start().to_owned(), out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::steps::Stepping;
    use super::super::testing::{arguments, call, content, parsed};
    use super::*;

    fn check(text: &str, expected: &[Piece]) {
        assert_eq!(parsed(|| Stepping::boxed(Hermes::default()), text), expected, "{text}");
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

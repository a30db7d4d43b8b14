//! `[TOOL_CALLS]` before a list of objects, or before a name and an object, with or without `[ARGS]` between them.

use super::Piece;
use super::held::Held;
use super::json::{CallObject, ValueEnd};
use super::steps::{CallEnd, Steps, arguments_until, call_object, content_until, go, say};

pub(super) const MARK: &str = "[TOOL_CALLS]";
const ARGS: &str = "[ARGS]";

#[derive(Default)]
pub(super) enum Mistral {
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

impl Steps for Mistral {
    fn advance(&mut self, held: &mut Held, out: &mut Vec<Piece>) -> bool {
        let next = match self {
            Mistral::Content => content_until(MARK, held, out).then_some(Mistral::Marked),
            Mistral::Marked => held.skip_space().then(|| {
                if held.text().starts_with('[') {
                    held.skip(1);
                    Mistral::InList
                } else {
                    Mistral::Named
                }
            }),
            Mistral::InList => held.skip_space().then(|| match held.text().chars().next() {
                Some(',') => {
                    held.skip(1);
                    Mistral::InList
                }
                Some('{') => Mistral::Call(CallObject::default()),
                Some(']') => {
                    held.skip(1);
                    Mistral::Content
                }
                _ => Mistral::Content,
            }),
            Mistral::Call(call) => call_object(call, held, out).map(|end| match end {
                CallEnd::Called => Mistral::InList,
                CallEnd::Broken(raw) => {
                    say(raw, out);
                    Mistral::Content
                }
            }),
            Mistral::Named => held.text().find('{').map(|brace| {
                let name = held.text()[..brace].trim().trim_end_matches(ARGS).trim();
                out.push(Piece::Call { name: name.to_owned() });
                held.skip(brace);
                Mistral::Arguments(ValueEnd::default())
            }),
            Mistral::Arguments(end) => arguments_until(end, held, out).then_some(Mistral::Content),
        };
        go(self, next)
    }

    fn end(&mut self, rest: String, out: &mut Vec<Piece>) {
        match self {
            Mistral::Content => say(rest, out),
            Mistral::Marked | Mistral::InList | Mistral::Arguments(_) => {}
            Mistral::Named => say(format!("{MARK}{rest}"), out),
            Mistral::Call(call) => say(call.raw(), out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::steps::Stepping;
    use super::super::testing::{arguments, call, content, parsed};
    use super::*;

    fn check(text: &str, expected: &[Piece]) {
        assert_eq!(parsed(|| Stepping::boxed(Mistral::default()), text), expected, "{text}");
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

//! Calls that a grammar forces: the arguments of a named function, or a list of calls.

use super::held::Held;
use super::json::{CallObject, Progress};
use super::{Parser, Piece};

/// The whole text is the arguments of one function.
pub(super) struct NamedCall {
    /// Until the call has begun.
    name: Option<String>,
}

impl NamedCall {
    pub(super) fn new(function: &str) -> Self {
        NamedCall { name: Some(function.to_owned()) }
    }
}

impl Parser for NamedCall {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        if text.is_empty() {
            return;
        }
        out.extend(self.name.take().map(|name| Piece::Call { name }));
        out.push(Piece::Arguments(text.to_owned()));
    }

    /// There is a call even where there was no room for its arguments.
    fn finish(&mut self, out: &mut Vec<Piece>) {
        out.extend(self.name.take().map(|name| Piece::Call { name }));
    }
}

/// `[{"name": …, "arguments": …}, …]`.
#[derive(Default)]
pub(super) struct RequiredCalls {
    held: Held,
    call: Option<CallObject>,
}

impl Parser for RequiredCalls {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        self.held.push(text);
        loop {
            let Some(call) = &mut self.call else {
                let Some(brace) = self.held.text().find('{') else { return };
                self.held.skip(brace);
                self.call = Some(CallObject::default());
                continue;
            };
            let text = self.held.take();
            match call.push(&text, out) {
                Progress::Open => return,
                Progress::Done(read) | Progress::Broken(read) => self.held.push(&text[read..]),
            }
            self.call = None;
        }
    }

    fn finish(&mut self, _: &mut Vec<Piece>) {}
}

#[cfg(test)]
mod tests {
    use super::super::testing::{arguments, call, parsed};
    use super::*;

    #[test]
    fn forced_calls() {
        assert_eq!(
            parsed(|| Box::new(NamedCall::new("f")), "{\"x\":1}"),
            [call("f"), arguments("{\"x\":1}")]
        );
        assert_eq!(parsed(|| Box::new(NamedCall::new("f")), ""), [call("f")]);
        let two = r#"[{"name":"f","arguments":{"x":1}},{"name":"g","arguments":{}}]"#;
        let expected = [call("f"), arguments(r#"{"x":1}"#), call("g"), arguments("{}")];
        assert_eq!(parsed(|| Box::new(RequiredCalls::default()), two), expected);
    }
}

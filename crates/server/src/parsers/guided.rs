//! Calls that a grammar forces: the arguments of a named function, or a list of calls.

use super::held::Held;
use super::json::CallObject;
use super::steps::{Steps, call_object};
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
pub(super) struct RequiredCalls(Option<CallObject>);

impl Steps for RequiredCalls {
    fn advance(&mut self, held: &mut Held, out: &mut Vec<Piece>) -> bool {
        match &mut self.0 {
            None => {
                let Some(brace) = held.text().find('{') else { return false };
                held.skip(brace);
                self.0 = Some(CallObject::default());
                true
            }
            Some(call) => {
                let ended = call_object(call, held, out).is_some();
                if ended {
                    self.0 = None;
                }
                ended
            }
        }
    }

    fn end(&mut self, _: String, _: &mut Vec<Piece>) {}
}

#[cfg(test)]
mod tests {
    use super::super::steps::Stepping;
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
        assert_eq!(parsed(|| Stepping::boxed(RequiredCalls::default()), two), expected);
    }
}

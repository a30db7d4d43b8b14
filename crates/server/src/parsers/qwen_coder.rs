//! `<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`: values are bare text, and what
//! they mean follows from the function's parameters.

use super::Piece;
use super::held::Held;
use super::steps::Steps;
use crate::openai::tools::Tool;
use serde_json::{Map, Value};

const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";
const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

pub(super) struct QwenCoder {
    tools: Vec<Tool>,
    state: State,
    function: String,
    key: String,
    value: String,
    arguments: Map<String, Value>,
    /// Whether text was all white space since the last mark around a call.
    after_mark: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Content,
    FunctionName,
    /// Between parameters.
    Function,
    Key,
    Value,
}

impl QwenCoder {
    pub(super) fn new(tools: &[Tool]) -> Self {
        QwenCoder {
            tools: tools.to_vec(),
            state: State::Content,
            function: String::new(),
            key: String::new(),
            value: String::new(),
            arguments: Map::new(),
            after_mark: false,
        }
    }

    fn content(&mut self, text: &str, out: &mut Vec<Piece>) {
        let text = if self.after_mark { text.trim_start() } else { text };
        if !text.is_empty() {
            self.after_mark = false;
            out.push(Piece::Content(text.to_owned()));
        }
    }

    /// Takes in a value: as JSON where the parameter is no string and the text is JSON, else as a string.
    fn parameter(&mut self) {
        let key = std::mem::take(&mut self.key).trim().to_owned();
        let value = std::mem::take(&mut self.value);
        let text = value.strip_prefix('\n').unwrap_or(&value);
        let text = text.strip_suffix('\n').unwrap_or(text);
        let is_string = self.kind(&key) == Some("string");
        let json = || serde_json::from_str(text.trim()).ok();
        let value = if is_string { None } else { json() };
        self.arguments.insert(key, value.unwrap_or_else(|| text.into()));
    }

    /// The type of a parameter in the function's schema.
    fn kind(&self, parameter: &str) -> Option<&str> {
        let tool = self.tools.iter().find(|tool| tool.function.name == self.function)?;
        tool.function.parameters.as_ref()?.get("properties")?.get(parameter)?.get("type")?.as_str()
    }
}

impl Steps for QwenCoder {
    fn advance(&mut self, held: &mut Held, out: &mut Vec<Piece>) -> bool {
        let markers: &[&str] = match self.state {
            State::Content => &[FUNCTION, OPEN, CLOSE],
            State::FunctionName | State::Key => &[">"],
            State::Function => &[PARAMETER, FUNCTION_END],
            State::Value => &[PARAMETER_END],
        };
        let (text, which) = held.until(markers);
        match self.state {
            State::Content => self.content(&text, out),
            State::FunctionName => self.function.push_str(&text),
            State::Key => self.key.push_str(&text),
            State::Value => self.value.push_str(&text),
            State::Function => {}
        }
        let Some(which) = which else { return false };
        self.state = match (self.state, which) {
            (State::Content, 0) => State::FunctionName,
            (State::Content, _) => {
                self.after_mark = true;
                State::Content
            }
            (State::FunctionName, _) => {
                self.function = self.function.trim().to_owned();
                out.push(Piece::Call { name: self.function.clone() });
                State::Function
            }
            (State::Function, 0) => State::Key,
            (State::Function, _) => {
                self.function.clear();
                let arguments = Value::Object(std::mem::take(&mut self.arguments));
                out.push(Piece::Arguments(arguments.to_string()));
                self.after_mark = true;
                State::Content
            }
            (State::Key, _) => State::Value,
            (State::Value, _) => {
                self.parameter();
                State::Function
            }
        };
        true
    }

    /// A call that was cut has the parameters that are whole.
    fn end(&mut self, rest: String, out: &mut Vec<Piece>) {
        match self.state {
            State::Content => self.content(&rest, out),
            State::FunctionName => out.push(Piece::Content(format!("{FUNCTION}{}{rest}", self.function))),
            State::Function | State::Key | State::Value => {
                let arguments = Value::Object(std::mem::take(&mut self.arguments));
                out.push(Piece::Arguments(arguments.to_string()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::steps::Stepping;
    use super::super::testing::{arguments, call, content, parsed};
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_what_the_schema_says() {
        let parameters =
            json!({ "properties": { "city": { "type": "string" }, "days": { "type": "integer" } } });
        let tool = json!({ "type": "function", "function": { "name": "weather", "parameters": parameters } });
        let tools = [serde_json::from_value(tool).unwrap()];
        let text = "Let me see.\n<tool_call>\n<function=weather>\n<parameter=city>\n5\n</parameter>\n\
                    <parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=weather>\n\
                    <parameter=city>\nRio <de> J\n</parameter>\n</function>\n</tool_call>";
        let expected = [
            content("Let me see.\n"),
            call("weather"),
            arguments(r#"{"city":"5","days":3}"#),
            call("weather"),
            arguments(r#"{"city":"Rio <de> J"}"#),
        ];
        assert_eq!(parsed(|| Stepping::boxed(QwenCoder::new(&tools)), text), expected);
    }

    #[test]
    fn cut_calls() {
        let check = |text: &str| parsed(|| Stepping::boxed(QwenCoder::new(&[])), text);
        assert_eq!(check("a <funct"), [content("a <funct")]);
        assert_eq!(check("<function=f"), [content("<function=f")]);
        let cut = "<function=f><parameter=x>1</parameter><parameter=y>2";
        assert_eq!(check(cut), [call("f"), arguments("{\"x\":1}")]);
    }
}

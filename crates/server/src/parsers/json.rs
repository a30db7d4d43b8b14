//! JSON that comes in pieces: where a value ends, and what the object of a call says.

use super::Piece;

/// Follows one JSON value to its end. It does not check the value, only strings and brackets.
#[derive(Debug, Default)]
pub(super) struct ValueEnd {
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// A number or a word, which only ends where something else begins.
    bare: bool,
}

/// Where a letter stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Inside,
    /// It is the value's last one.
    Last,
    /// It comes after the value.
    Beyond,
}

impl ValueEnd {
    /// Takes the value's next letter; white space before it is not for here.
    pub(super) fn step(&mut self, letter: char) -> Step {
        if self.in_string {
            match letter {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => {
                    self.in_string = false;
                    return if self.depth == 0 { Step::Last } else { Step::Inside };
                }
                _ => {}
            }
            return Step::Inside;
        }
        match letter {
            ',' | '}' | ']' if self.depth == 0 => Step::Beyond,
            letter if self.bare && letter.is_whitespace() => Step::Beyond,
            '"' => {
                self.in_string = true;
                Step::Inside
            }
            '{' | '[' => {
                self.depth += 1;
                Step::Inside
            }
            '}' | ']' => {
                self.depth -= 1;
                if self.depth == 0 { Step::Last } else { Step::Inside }
            }
            _ => {
                self.bare = self.depth == 0;
                Step::Inside
            }
        }
    }
}

/// Reads `{"name": …, "arguments": …}`; arguments go out as they come, once the name is known.
#[derive(Debug, Default)]
pub(super) struct CallObject {
    state: State,
    /// The key, or the value that is not to go out as it comes.
    text: String,
    name: Option<String>,
    /// Arguments that wait for the name, or went out.
    arguments: Option<String>,
    /// All that was read while no piece has gone out.
    raw: String,
}

#[derive(Debug, Default)]
enum State {
    /// Before the object.
    #[default]
    Start,
    /// Before a key, or the object's end.
    Key,
    InKey(ValueEnd),
    /// Before the colon.
    Colon,
    /// Before the value.
    Value(Field),
    InValue(Field, ValueEnd),
    /// After a value.
    Comma,
    Done,
    /// This is no call.
    Broken,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Name,
    Arguments,
    /// Arguments in a string, which is unpacked at its end.
    Packed,
    Other,
}

/// How far a call's object has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// More has to come.
    Open,
    /// It ended after this many bytes of what was pushed last.
    Done(usize),
    /// It is no call, which this many bytes of what was pushed last show; the text so far is [`CallObject::raw`].
    Broken(usize),
}

impl CallObject {
    /// Takes text in and gives out what is known of the call.
    pub(super) fn push(&mut self, text: &str, out: &mut Vec<Piece>) -> Progress {
        let mut fresh = String::new();
        let mut read = 0;
        for letter in text.chars() {
            read += letter.len_utf8();
            if self.name.is_none() {
                self.raw.push(letter);
            }
            self.letter(letter, &mut fresh, out);
            if matches!(self.state, State::Done | State::Broken) {
                break;
            }
        }
        self.send(fresh, out);
        match self.state {
            State::Done if self.name.is_some() => {
                if self.arguments.is_none() {
                    out.push(Piece::Arguments("{}".into()));
                }
                Progress::Done(read)
            }
            State::Done | State::Broken => Progress::Broken(read),
            _ => Progress::Open,
        }
    }

    /// What was read if there is no call in it.
    pub(super) fn raw(&mut self) -> String {
        if self.name.is_some() { String::new() } else { std::mem::take(&mut self.raw) }
    }

    fn letter(&mut self, letter: char, fresh: &mut String, out: &mut Vec<Piece>) {
        let state = std::mem::take(&mut self.state);
        self.state = match state {
            State::InKey(mut end) => {
                self.text.push(letter);
                if end.step(letter) == Step::Last { State::Colon } else { State::InKey(end) }
            }
            State::InValue(field, mut end) => match end.step(letter) {
                Step::Beyond => {
                    self.value_ends(field, fresh, out);
                    after_value(letter)
                }
                step => {
                    self.collect(field, letter, fresh);
                    if step == Step::Last {
                        self.value_ends(field, fresh, out);
                        State::Comma
                    } else {
                        State::InValue(field, end)
                    }
                }
            },
            state if letter.is_whitespace() => state,
            State::Start if letter == '{' => State::Key,
            State::Key if letter == '"' => {
                self.text.clear();
                self.text.push(letter);
                let mut end = ValueEnd::default();
                end.step(letter);
                State::InKey(end)
            }
            State::Key if letter == '}' => State::Done,
            State::Colon if letter == ':' => {
                let field = match self.text.as_str() {
                    "\"name\"" => Field::Name,
                    "\"arguments\"" | "\"parameters\"" => Field::Arguments,
                    _ => Field::Other,
                };
                self.text.clear();
                State::Value(field)
            }
            State::Value(field) => {
                let packed = field == Field::Arguments && letter == '"';
                let field = if packed { Field::Packed } else { field };
                let mut end = ValueEnd::default();
                if end.step(letter) == Step::Beyond {
                    State::Broken
                } else {
                    self.collect(field, letter, fresh);
                    State::InValue(field, end)
                }
            }
            State::Comma => after_value(letter),
            _ => State::Broken,
        };
    }

    fn collect(&mut self, field: Field, letter: char, fresh: &mut String) {
        match field {
            Field::Arguments => fresh.push(letter),
            Field::Name | Field::Packed => self.text.push(letter),
            Field::Other => {}
        }
    }

    fn value_ends(&mut self, field: Field, fresh: &mut String, out: &mut Vec<Piece>) {
        let unpacked = || serde_json::from_str::<String>(&self.text).ok();
        match field {
            Field::Name => {
                let Some(name) = unpacked().filter(|name| !name.is_empty()) else { return };
                out.push(Piece::Call { name: name.clone() });
                self.name = Some(name);
                if let Some(waiting) = &self.arguments {
                    out.push(Piece::Arguments(waiting.clone()));
                }
            }
            Field::Packed => fresh.push_str(&unpacked().unwrap_or_else(|| self.text.clone())),
            Field::Arguments | Field::Other => {}
        }
    }

    /// Arguments go out if the name has; else they wait.
    fn send(&mut self, fresh: String, out: &mut Vec<Piece>) {
        if fresh.is_empty() {
            return;
        }
        self.arguments.get_or_insert_default().push_str(&fresh);
        if self.name.is_some() {
            out.push(Piece::Arguments(fresh));
        }
    }
}

fn after_value(letter: char) -> State {
    match letter {
        ',' => State::Key,
        '}' => State::Done,
        letter if letter.is_whitespace() => State::Comma,
        _ => State::Broken,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{arguments, call};
    use super::*;

    fn read(text: &str) -> (Vec<Piece>, Progress) {
        let mut out = Vec::new();
        let progress = CallObject::default().push(text, &mut out);
        (out, progress)
    }

    #[test]
    fn calls_are_read() {
        let plain = r#"{"name": "f", "arguments": {"x": "}\"", "y": [1, 2]}} rest"#;
        let expected = vec![call("f"), arguments(r#"{"x": "}\"", "y": [1, 2]}"#)];
        assert_eq!(read(plain), (expected, Progress::Done(plain.len() - 5)));
        let turned = r#"{"parameters": {"x": 1}, "id": 7, "name": "f"}"#;
        assert_eq!(read(turned).0, [call("f"), arguments(r#"{"x": 1}"#)]);
        let packed = r#"{"name": "f", "arguments": "{\"x\": 1}"}"#;
        assert_eq!(read(packed).0, [call("f"), arguments(r#"{"x": 1}"#)]);
        assert_eq!(read(r#"{"name": "f"}"#).0, [call("f"), arguments("{}")]);
    }

    #[test]
    fn what_is_no_call_is_told() {
        for other in ["x", "[", r#"{"x": 1}"#, r#"{"name": 3}"#, "{1}", r#"{"name" "f"}"#] {
            assert!(matches!(read(other).1, Progress::Broken(_)), "{other}");
        }
        assert_eq!(read(r#"{"name": "f", "arg"#), (vec![call("f")], Progress::Open));
    }
}

//! Parsers that walk from state to state over text that they hold, and the steps that several of them take.

use super::held::Held;
use super::json::{CallObject, Progress, Step, ValueEnd};
use super::{Parser, Piece};

/// A parser's states, without the text that it holds.
pub(super) trait Steps: Send {
    /// Takes one step over the text; whether there may be another.
    fn advance(&mut self, held: &mut Held, out: &mut Vec<Piece>) -> bool;

    /// No more will come after `rest`, the text that is left.
    fn end(&mut self, rest: String, out: &mut Vec<Piece>);
}

/// A parser made of steps.
pub(super) struct Stepping<S> {
    held: Held,
    steps: S,
}

impl<S: Steps + 'static> Stepping<S> {
    pub(super) fn boxed(steps: S) -> Box<dyn Parser> {
        Box::new(Stepping { held: Held::default(), steps })
    }
}

impl<S: Steps> Parser for Stepping<S> {
    fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        self.held.push(text);
        while self.steps.advance(&mut self.held, out) {}
    }

    fn finish(&mut self, out: &mut Vec<Piece>) {
        self.steps.end(self.held.take(), out);
    }
}

/// Goes on to the next state, if there is one; whether there is.
pub(super) fn go<S>(state: &mut S, next: Option<S>) -> bool {
    let any = next.is_some();
    if let Some(next) = next {
        *state = next;
    }
    any
}

/// Gives text out as content, if there is any.
pub(super) fn say(text: String, out: &mut Vec<Piece>) {
    if !text.is_empty() {
        out.push(Piece::Content(text));
    }
}

/// Gives content out up to a marker; whether that has come.
pub(super) fn content_until(marker: &str, held: &mut Held, out: &mut Vec<Piece>) -> bool {
    let (text, found) = held.until(&[marker]);
    say(text, out);
    found.is_some()
}

/// Drops text up to a marker; whether that has come.
pub(super) fn skip_until(marker: &str, held: &mut Held) -> bool {
    held.until(&[marker]).1.is_some()
}

/// Gives arguments out up to the end of their object; whether that has come.
pub(super) fn arguments_until(end: &mut ValueEnd, held: &mut Held, out: &mut Vec<Piece>) -> bool {
    let text = held.take();
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
    held.push(&text[read..]);
    ended
}

/// How the object of a call ended.
pub(super) enum CallEnd {
    Called,
    /// It was none; this is what was read.
    Broken(String),
}

/// Reads the object of a call; how it ended, if it has.
pub(super) fn call_object(call: &mut CallObject, held: &mut Held, out: &mut Vec<Piece>) -> Option<CallEnd> {
    let text = held.take();
    let (read, end) = match call.push(&text, out) {
        Progress::Open => return None,
        Progress::Done(read) => (read, CallEnd::Called),
        Progress::Broken(read) => (read, CallEnd::Broken(call.raw())),
    };
    held.push(&text[read..]);
    Some(end)
}

//! Text as its tokens come.

use crate::{TextError, Tokenizer};

/// Text as its tokens come: whole characters only, and nothing from a stop string on.
pub struct DecodeStream {
    tokenizer: Tokenizer,
    stop: Vec<String>,
    skip_special: bool,
    ids: Vec<u32>,
    /// Tokens `..settled` have given their text; those of `context..settled` are decoded again with what
    /// follows, because a token's text depends on what is before it.
    settled: usize,
    context: usize,
    /// Text that may be the beginning of a stop string.
    held: String,
    /// Which stop string has come.
    stopped: Option<usize>,
}

impl DecodeStream {
    /// A stream that ends where one of the `stop` strings begins, with or without special tokens.
    pub fn new(tokenizer: &Tokenizer, stop: Vec<String>, skip_special: bool) -> Self {
        let stop = stop.into_iter().filter(|stop| !stop.is_empty()).collect();
        DecodeStream {
            tokenizer: tokenizer.clone(),
            stop,
            skip_special,
            ids: Vec::new(),
            settled: 0,
            context: 0,
            held: String::new(),
            stopped: None,
        }
    }

    /// Takes the next token; returns the text that is certain now.
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        self.ids.push(id);
        let text = self.unsettled()?;
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new()); // Part of a character.
        }
        (self.context, self.settled) = (self.settled, self.ids.len());
        Ok(self.release(&text))
    }

    /// No more tokens will come; returns the text that was held back.
    pub fn finish(&mut self) -> Result<String, TextError> {
        let text = self.unsettled()?;
        self.settled = self.ids.len();
        let mut rest = self.release(&text);
        rest.push_str(&std::mem::take(&mut self.held));
        Ok(rest)
    }

    /// Whether a stop string has come.
    pub fn stopped(&self) -> bool {
        self.stopped.is_some()
    }

    /// The stop string that has come.
    pub fn stopped_by(&self) -> Option<&str> {
        self.stopped.map(|which| self.stop[which].as_str())
    }

    /// Text of the tokens that have given none yet.
    fn unsettled(&self) -> Result<String, TextError> {
        let before = self.tokenizer.decode(&self.ids[self.context..self.settled], self.skip_special)?;
        let with = self.tokenizer.decode(&self.ids[self.context..], self.skip_special)?;
        Ok(with.strip_prefix(&before).unwrap_or_default().to_owned())
    }

    /// Adds text to what is held, and lets go what can belong to no stop string.
    fn release(&mut self, text: &str) -> String {
        if self.stopped() {
            return String::new();
        }
        self.held.push_str(text);
        let found =
            self.stop.iter().enumerate().filter_map(|(which, stop)| Some((self.held.find(stop)?, which)));
        if let Some((at, which)) = found.min() {
            self.stopped = Some(which);
            let mut before = std::mem::take(&mut self.held);
            before.truncate(at);
            return before;
        }
        let begun = self.stop.iter().map(|stop| longest_begun(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - begun);
        std::mem::replace(&mut self.held, rest)
    }
}

/// Bytes at the end of `text` that begin `stop`.
fn longest_begun(text: &str, stop: &str) -> usize {
    let begins = stop.char_indices().map(|(end, _)| end).rev();
    begins.into_iter().find(|&end| text.ends_with(&stop[..end])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn tokenizer() -> Tokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/mixtral");
        Tokenizer::open(&folder).unwrap().unwrap()
    }

    /// What a stream hands out token by token, and at the end.
    fn streamed(whole: &str, stop: &[&str]) -> (Vec<String>, bool) {
        let tokenizer = tokenizer();
        let mut stream =
            DecodeStream::new(&tokenizer, stop.iter().map(|stop| stop.to_string()).collect(), true);
        let mut pieces = Vec::new();
        for id in tokenizer.encode(whole).unwrap() {
            pieces.push(stream.push(id).unwrap());
        }
        pieces.push(stream.finish().unwrap());
        (pieces.into_iter().filter(|piece| !piece.is_empty()).collect(), stream.stopped())
    }

    #[test]
    fn streams_give_whole_characters() {
        let (pieces, stopped) = streamed("a🙂b", &[]);
        assert_eq!((pieces.concat().as_str(), stopped), ("a🙂b", false));
        assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)), "{pieces:?}");
        let tokenizer = tokenizer();
        let mut cut = DecodeStream::new(&tokenizer, Vec::new(), true);
        cut.push(tokenizer.encode("🙂").unwrap()[0]).unwrap();
        assert_eq!(cut.finish().unwrap(), "\u{fffd}");
    }

    #[test]
    fn nothing_follows_a_stop_string() {
        let check = |whole: &str, stop: &[&str]| {
            let (pieces, stopped) = streamed(whole, stop);
            (pieces.concat(), stopped)
        };
        assert_eq!(check("one two three", &["two"]), ("one ".into(), true));
        assert_eq!(check("one two three", &["zwei", "e t"]), ("on".into(), true));
        assert_eq!(check("one tw", &["two"]), ("one tw".into(), false));
        assert_eq!(check("one", &["", "x"]), ("one".into(), false));
    }
}

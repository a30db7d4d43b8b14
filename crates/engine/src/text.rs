//! Tokens to and from text.

use crate::{EngineError, files};
use epsmoe_device::threaded::panic_text;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use tokenizers::Tokenizer;

const FILE: &str = "tokenizer.json";

/// The largest tokenizer.json that is read, in bytes; published ones have up to about 20 MB.
const LIMIT: u64 = 256 << 20;

/// A checkpoint's tokenizer.
pub struct Text(Tokenizer);

impl Text {
    /// Reads `tokenizer.json` of a checkpoint folder; nothing if there is none.
    pub fn open(folder: &Path) -> Result<Option<Self>, EngineError> {
        let path = folder.join(FILE);
        files::read(&path, LIMIT)?.map(|bytes| Text::parse(&bytes, &path)).transpose()
    }

    /// Reads the text of the tokenizer.json at `path`.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, EngineError> {
        let tokenizer = guarded(|| Tokenizer::from_bytes(text)).map_err(|problem| {
            EngineError::Text(format!(
                "{}: cannot be read as a tokenizer ({problem}): fetch the file again",
                path.display()
            ))
        })?;
        Ok(Text(tokenizer))
    }

    /// Token ids of a text, where special tokens are found by their names; with `add_special`, those that the
    /// model wants around every text are added.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, EngineError> {
        let encoding = guarded(|| self.0.encode_fast(text, add_special))
            .map_err(|problem| EngineError::Text(format!("cannot turn the text into tokens: {problem}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, EngineError> {
        guarded(|| self.0.decode(ids, true))
            .map_err(|problem| EngineError::Text(format!("cannot turn tokens into text: {problem}")))
    }

    /// How the vocabulary writes a token, if it has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }
}

/// What the library says, its panics included: a strange tokenizer.json must not end the program.
fn guarded<T, E: ToString>(call: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("the tokenizer panicked: {}", panic_text(panic.as_ref()))),
    }
}

/// Text as its tokens come: whole characters only, and nothing from a stop string on.
pub struct TextStream<'a> {
    text: &'a Text,
    stop: Vec<String>,
    ids: Vec<u32>,
    /// Tokens `..settled` have given their text; those of `context..settled` are decoded again with what
    /// follows, because a token's text depends on what is before it.
    settled: usize,
    context: usize,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl<'a> TextStream<'a> {
    /// A stream that ends where one of the `stop` strings begins.
    pub fn new(text: &'a Text, stop: Vec<String>) -> Self {
        let stop = stop.into_iter().filter(|stop| !stop.is_empty()).collect();
        TextStream {
            text,
            stop,
            ids: Vec::new(),
            settled: 0,
            context: 0,
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes the next token; returns the text that is certain now.
    pub fn push(&mut self, id: u32) -> Result<String, EngineError> {
        self.ids.push(id);
        let text = self.unsettled()?;
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new()); // Part of a character.
        }
        (self.context, self.settled) = (self.settled, self.ids.len());
        Ok(self.release(&text))
    }

    /// No more tokens will come; returns the text that was held back.
    pub fn finish(&mut self) -> Result<String, EngineError> {
        let text = self.unsettled()?;
        self.settled = self.ids.len();
        let mut rest = self.release(&text);
        rest.push_str(&std::mem::take(&mut self.held));
        Ok(rest)
    }

    /// Whether a stop string has come.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Text of the tokens that have given none yet.
    fn unsettled(&self) -> Result<String, EngineError> {
        let before = self.text.decode(&self.ids[self.context..self.settled])?;
        let with = self.text.decode(&self.ids[self.context..])?;
        Ok(with.strip_prefix(&before).unwrap_or_default().to_owned())
    }

    /// Adds text to what is held, and lets go what can belong to no stop string.
    fn release(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(at) = self.stop.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.stopped = true;
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

    fn text() -> Text {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/mixtral");
        Text::open(&folder).unwrap().unwrap()
    }

    /// What a stream hands out token by token, and at the end.
    fn streamed(text: &Text, whole: &str, stop: &[&str]) -> (Vec<String>, bool) {
        let mut stream = TextStream::new(text, stop.iter().map(|stop| stop.to_string()).collect());
        let mut pieces = Vec::new();
        for id in text.encode(whole, false).unwrap() {
            pieces.push(stream.push(id).unwrap());
        }
        pieces.push(stream.finish().unwrap());
        (pieces.into_iter().filter(|piece| !piece.is_empty()).collect(), stream.stopped())
    }

    #[test]
    fn text_goes_to_tokens_and_back() {
        let text = text();
        for whole in ["Hello, world!", "naïve 日本語 🙂", ""] {
            assert_eq!(text.decode(&text.encode(whole, true).unwrap()).unwrap(), whole);
        }
        assert_eq!(text.encode("<s>", false).unwrap(), [0]);
        assert_eq!(text.token(0).as_deref(), Some("<s>"));
    }

    #[test]
    fn streams_give_whole_characters() {
        let (pieces, stopped) = streamed(&text(), "a🙂b", &[]);
        assert_eq!((pieces.concat().as_str(), stopped), ("a🙂b", false));
        assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)), "{pieces:?}");
        let text = text();
        let mut cut = TextStream::new(&text, Vec::new());
        cut.push(text.encode("🙂", false).unwrap()[0]).unwrap();
        assert_eq!(cut.finish().unwrap(), "\u{fffd}");
    }

    #[test]
    fn nothing_follows_a_stop_string() {
        let check = |whole: &str, stop: &[&str]| {
            let (pieces, stopped) = streamed(&text(), whole, stop);
            (pieces.concat(), stopped)
        };
        assert_eq!(check("one two three", &["two"]), ("one ".into(), true));
        assert_eq!(check("one two three", &["zwei", "e t"]), ("on".into(), true));
        assert_eq!(check("one tw", &["two"]), ("one tw".into(), false));
        assert_eq!(check("one", &["", "x"]), ("one".into(), false));
    }

    #[test]
    fn damaged_tokenizers_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Text::open(folder.path()).unwrap().is_none());
        for damaged in ["", "{", "[]", &"[".repeat(100_000), r#"{"version":"1.0","model":{"type":"BPE"}}"#] {
            std::fs::write(folder.path().join(FILE), damaged).unwrap();
            let Err(error) = Text::open(folder.path()) else { panic!("{damaged:.20} was read") };
            assert!(error.to_string().contains("cannot be read as a tokenizer"), "{error}");
        }
    }
}

//! Text as its tokens come.

use crate::token_bytes::{Decoding, First, fallback_byte};
use crate::{TextError, Tokenizer};
use std::ops::Range;

/// Tokens that the library is given at once where only it knows how they become text, and tokens before them.
const MOST_UNSETTLED: usize = 16;

/// Text as its tokens come: whole characters only, and nothing from a stop string on.
///
/// All pieces together are what the tokenizer makes of all tokens at once, as far as a stop string.
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    text: Unfinished,
    stop: Vec<String>,
    /// So many of the next tokens end no stop string.
    deaf: usize,
    held: Held,
    /// Which stop string has come.
    stopped: Option<usize>,
}

/// What is not yet text.
enum Unfinished {
    /// The beginning of a character.
    Bytes(Vec<u8>),
    /// A run of bytes, whose text depends on its end.
    Texts { run: Vec<u8>, bytes: bool, first: First },
    /// Tokens `..settled` have given their text; a token's text may depend on what is before it.
    Tokens { ids: Vec<u32>, settled: usize },
}

/// Text that may be the beginning of a stop string, and which parts of it are not shown.
#[derive(Default)]
struct Held {
    text: String,
    hidden: Vec<Range<usize>>,
    /// Bytes at the beginning in which no stop string may end.
    deaf: usize,
}

impl DecodeStream {
    /// A stream that ends where one of the `stop` strings begins. With `skip_special` special tokens are not shown,
    /// but stop strings see them.
    pub fn new(tokenizer: &Tokenizer, stop: Vec<String>, skip_special: bool) -> Self {
        let text = match tokenizer.decoding() {
            Decoding::Bytes => Unfinished::Bytes(Vec::new()),
            Decoding::Texts { bytes, first } => Unfinished::Texts { run: Vec::new(), bytes, first },
            Decoding::Other => Unfinished::Tokens { ids: Vec::new(), settled: 0 },
        };
        let stop = stop.into_iter().filter(|stop| !stop.is_empty()).collect();
        let tokenizer = tokenizer.clone();
        DecodeStream { tokenizer, skip_special, text, stop, deaf: 0, held: Held::default(), stopped: None }
    }

    /// The same, where the tokens go on from those of a prompt: the first of them is in the middle of a text.
    pub fn after(mut self, prompt: &[u32]) -> Self {
        let (tokenizer, skip) = (&self.tokenizer, self.skip_special);
        let mut shown = prompt.iter().rev().filter(|&&id| !(skip && tokenizer.is_special(id)));
        match &mut self.text {
            Unfinished::Bytes(_) => {}
            Unfinished::Texts { first, .. } => {
                if shown.any(|&id| tokenizer.token(id).is_some()) {
                    *first = First::None;
                }
            }
            Unfinished::Tokens { ids, settled } => {
                ids.extend(shown.take(MOST_UNSETTLED / 2));
                ids.reverse();
                *settled = ids.len();
            }
        }
        self
    }

    /// The same, where stop strings that end within so many tokens do not count.
    pub fn deaf_for(mut self, tokens: usize) -> Self {
        self.deaf = tokens;
        self
    }

    /// Takes the next token; returns the text that is certain now.
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        let deaf = self.deaf > 0;
        self.deaf = self.deaf.saturating_sub(1);
        if self.skip_special && self.tokenizer.is_special(id) {
            return Ok(match self.tokenizer.token(id) {
                Some(name) if !self.stop.is_empty() => self.release(&name, true, deaf),
                _ => String::new(),
            });
        }
        let text = self.text.push(&self.tokenizer, id)?;
        Ok(self.release(&text, false, deaf))
    }

    /// No more tokens will come; returns the text that was held back.
    pub fn finish(&mut self) -> Result<String, TextError> {
        let text = self.text.finish(&self.tokenizer)?;
        let mut rest = self.release(&text, false, self.deaf > 0);
        if self.stopped.is_none() {
            rest.push_str(&self.held.take(self.held.text.len()));
        }
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

    /// Adds text to what is held, and lets go what can belong to no stop string. No stop string ends in text that is `deaf`.
    fn release(&mut self, text: &str, hidden: bool, deaf: bool) -> String {
        if self.stopped() {
            return String::new();
        }
        self.held.push(text, hidden);
        if deaf {
            self.held.deaf = self.held.text.len();
        }
        let found =
            self.stop.iter().enumerate().filter_map(|(which, stop)| Some((self.held.find(stop)?, which)));
        if let Some((at, which)) = found.min() {
            self.stopped = Some(which);
            return self.held.take(at);
        }
        let begun = self.stop.iter().map(|stop| longest_begun(&self.held.text, stop)).max().unwrap_or(0);
        self.held.take(self.held.text.len() - begun)
    }
}

impl Unfinished {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TextError> {
        if let Unfinished::Tokens { ids, .. } = self {
            ids.push(id);
            return self.settle(tokenizer, false);
        }
        let Some(token) = tokenizer.token(id) else { return Ok(String::new()) };
        Ok(match self {
            Unfinished::Bytes(tail) => {
                tail.extend(tokenizer.spelling().bytes(&token));
                certain(tail)
            }
            Unfinished::Texts { run, bytes, first } => {
                if let Some(byte) = fallback_byte(&token).filter(|_| *bytes) {
                    run.push(byte);
                    return Ok(String::new());
                }
                let mut text = run_ended(run, first);
                let first = std::mem::replace(first, First::None);
                let spaced = token.replace('▁', " ");
                match first {
                    First::None => text.push_str(&spaced),
                    First::One => text.push_str(spaced.strip_prefix(' ').unwrap_or(&spaced)),
                    First::All => text.push_str(&token.replace('▁', "")),
                }
                text
            }
            Unfinished::Tokens { .. } => String::new(),
        })
    }

    fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, TextError> {
        match self {
            Unfinished::Bytes(tail) => Ok(String::from_utf8_lossy(&std::mem::take(tail)).into_owned()),
            Unfinished::Texts { run, first, .. } => Ok(run_ended(run, first)),
            Unfinished::Tokens { .. } => self.settle(tokenizer, true),
        }
    }

    /// Text of the tokens that have given none yet, if it ends with a whole character or must be settled.
    fn settle(&mut self, tokenizer: &Tokenizer, end: bool) -> Result<String, TextError> {
        let Unfinished::Tokens { ids, settled } = self else { return Ok(String::new()) };
        let before = tokenizer.decode(&ids[..*settled], false)?;
        let with = tokenizer.decode(ids, false)?;
        let open = with.len() <= before.len() || with.ends_with(char::REPLACEMENT_CHARACTER);
        if open && !end && ids.len() - *settled < MOST_UNSETTLED {
            return Ok(String::new());
        }
        let same =
            before.chars().zip(with.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        let text = with[same..].to_owned();
        ids.drain(..ids.len().saturating_sub(MOST_UNSETTLED / 2));
        *settled = ids.len();
        Ok(text)
    }
}

impl Held {
    fn push(&mut self, text: &str, hidden: bool) {
        let from = self.text.len();
        self.text.push_str(text);
        if hidden {
            self.hidden.push(from..self.text.len());
        }
    }

    /// Where a stop string begins that may end where it does.
    fn find(&self, stop: &str) -> Option<usize> {
        let first = (self.deaf + 1).saturating_sub(stop.len());
        let first = (first..=self.text.len()).find(|&at| self.text.is_char_boundary(at))?;
        self.text[first..].find(stop).map(|at| first + at)
    }

    /// Takes the first bytes out; returns what of them is shown.
    fn take(&mut self, bytes: usize) -> String {
        let rest = self.text.split_off(bytes);
        let taken = std::mem::replace(&mut self.text, rest);
        let (mut shown, mut at) = (String::with_capacity(taken.len()), 0);
        for hidden in &self.hidden {
            let (from, to) = (hidden.start.min(bytes), hidden.end.min(bytes));
            shown.push_str(&taken[at..from]);
            at = to;
        }
        shown.push_str(&taken[at..]);
        self.deaf = self.deaf.saturating_sub(bytes);
        self.hidden.retain(|hidden| hidden.end > bytes);
        for hidden in &mut self.hidden {
            *hidden = hidden.start.saturating_sub(bytes)..hidden.end - bytes;
        }
        shown
    }
}

/// Takes what is text out of bytes, and leaves the beginning of a character that may still come to its end.
fn certain(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut done = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        done += chunk.valid().len();
        let invalid = chunk.invalid();
        let may_go_on = done + invalid.len() == bytes.len()
            && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if !invalid.is_empty() && !may_go_on {
            text.push(char::REPLACEMENT_CHARACTER);
            done += invalid.len();
        }
    }
    bytes.drain(..done);
    text
}

/// The text of a run of bytes, which ends it; at the beginning of a text it too loses a space.
fn run_ended(run: &mut Vec<u8>, first: &mut First) -> String {
    if run.is_empty() {
        return String::new();
    }
    let text = run_text(run);
    match std::mem::replace(first, First::None) {
        First::None => text,
        First::One => text.strip_prefix(' ').unwrap_or(&text).to_owned(),
        First::All => text.replace(' ', ""),
    }
}

/// The text of a run of bytes.
fn run_text(run: &mut Vec<u8>) -> String {
    String::from_utf8(std::mem::take(run))
        .unwrap_or_else(|error| char::REPLACEMENT_CHARACTER.to_string().repeat(error.as_bytes().len()))
}

/// Bytes at the end of `text` that begin `stop`.
fn longest_begun(text: &str, stop: &str) -> usize {
    let begins = stop.char_indices().map(|(end, _)| end).rev();
    begins.into_iter().find(|&end| text.ends_with(&stop[..end])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpecialTokens;
    use epsmoe_base::{Mix, env};
    use serde_json::{Value, json};
    use std::path::Path;
    use std::time::{Duration, Instant};

    fn fixture() -> Value {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/mixtral/tokenizer.json");
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
    }

    fn parsed(value: &Value) -> Tokenizer {
        let path = Path::new("tokenizer.json");
        Tokenizer::parse(value.to_string().as_bytes(), path, &SpecialTokens::default()).unwrap()
    }

    fn tokenizer() -> Tokenizer {
        parsed(&fixture())
    }

    /// Words with `▁` for spaces, and bytes, as SentencePiece has them.
    fn sentence_piece(decoder: Value) -> Tokenizer {
        let words = ["<unk>", "<s>", "<|user|>", "▁", "▁Once", "▁upon", "▁a", "▁time", "x", "▁▁b"];
        let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
        let vocab = words.iter().map(|word| word.to_string()).chain(bytes);
        let vocab: serde_json::Map<String, Value> = vocab.zip((0..).map(Value::from)).collect();
        let special = |id: u32, content: &str| {
            json!({ "id": id, "content": content, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false })
        };
        parsed(&json!({
            "version": "1.0", "added_tokens": [special(1, "<s>"), special(2, "<|user|>")],
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<unk>" }, "decoder": decoder,
        }))
    }

    #[test]
    fn stop_strings_do_not_count_before_so_many_tokens() {
        let tokenizer = sentence_piece(decoders()[0].clone());
        // "x x xx"
        let ids = [8, 3, 8, 3, 8, 8];
        for (deaf, stop, expected) in [
            (0, "x", ""),
            (1, "x", "x "),
            (3, "x", "x x "),
            (6, "x", "x x xx"),
            // The end is what counts.
            (2, "x x", ""),
            (3, "x x", "x "),
            (5, "xx", "x x "),
            (6, "xx", "x x xx"),
        ] {
            let stream = DecodeStream::new(&tokenizer, vec![stop.into()], true).after(&[8]);
            let mut stream = stream.deaf_for(deaf);
            let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            text.push_str(&stream.finish().unwrap());
            assert_eq!(text, expected, "{deaf} {stop:?}");
        }
    }

    fn decoders() -> [Value; 5] {
        let spaces = json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " });
        let (bytes, fuse) = (json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" }));
        let strip = json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 });
        let metaspace = |scheme| json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme });
        [
            json!({ "type": "Sequence", "decoders": [spaces, bytes, fuse, strip] }),
            json!({ "type": "Sequence", "decoders": [spaces, bytes, fuse] }),
            metaspace("always"),
            metaspace("never"),
            json!({ "type": "Sequence", "decoders": [spaces, fuse] }),
        ]
    }

    fn strings(stop: &[&str]) -> Vec<String> {
        stop.iter().map(|stop| stop.to_string()).collect()
    }

    fn all(mut stream: DecodeStream, ids: &[u32]) -> (String, bool) {
        let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        text.push_str(&stream.finish().unwrap());
        (text, stream.stopped())
    }

    #[test]
    fn streams_give_whole_characters() {
        let tokenizer = tokenizer();
        let mut stream = DecodeStream::new(&tokenizer, Vec::new(), true);
        let ids = tokenizer.encode("a🙂b").unwrap();
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(pieces.concat(), "a🙂b");
        assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)), "{pieces:?}");
        let mut cut = DecodeStream::new(&tokenizer, Vec::new(), true);
        assert_eq!(cut.push(tokenizer.encode("🙂").unwrap()[0]).unwrap(), "");
        assert_eq!(cut.finish().unwrap(), "\u{fffd}");
    }

    /// `EPSMOE_TEST_SEED` repeats a run.
    #[test]
    fn pieces_are_the_whole() {
        let seed = env::test_seed();
        println!("EPSMOE_TEST_SEED={seed}");
        let mut mix = Mix::new(seed);
        let tokenizers = decoders().map(sentence_piece);
        for tokenizer in tokenizers.iter().chain([&tokenizer()]) {
            for _ in 0..300 {
                let vocab = tokenizer.vocab_size() + 2;
                let few = mix.below(2) == 0;
                let id = |mix: &mut Mix| mix.below(if few { vocab.min(12) } else { vocab }) as u32;
                let prompt: Vec<u32> = (0..mix.below(4)).map(|_| id(&mut mix)).collect();
                let ids: Vec<u32> = (0..mix.below(12)).map(|_| id(&mut mix)).collect();
                for skip in [false, true] {
                    let alone = all(DecodeStream::new(tokenizer, Vec::new(), skip), &ids).0;
                    assert_eq!(alone, tokenizer.decode(&ids, skip).unwrap(), "seed {seed}: {ids:?} {skip}");
                    // A run of bytes that the prompt has begun is none that the answer goes on with.
                    let ends_with_byte = prompt.last().is_some_and(|&id| {
                        tokenizer.decoding() == Decoding::Bytes || (10..266).contains(&id)
                    });
                    if !ends_with_byte && !prompt.iter().any(|id| (10..266).contains(id)) {
                        let stream = DecodeStream::new(tokenizer, Vec::new(), skip).after(&prompt);
                        let whole = tokenizer.decode(&[&prompt[..], &ids].concat(), skip).unwrap();
                        let before = tokenizer.decode(&prompt, skip).unwrap();
                        assert_eq!(
                            format!("{before}{}", all(stream, &ids).0),
                            whole,
                            "seed {seed}: {prompt:?} {ids:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_first_token_is_in_the_middle_of_a_text() {
        let [decoder, ..] = decoders();
        let tokenizer = sentence_piece(decoder);
        let stream = |stop: &[&str]| DecodeStream::new(&tokenizer, strings(stop), true);
        assert_eq!(all(stream(&[]), &[7]).0, "time");
        assert_eq!(all(stream(&[]).after(&[1, 4, 5, 6]), &[7]).0, " time");
        assert_eq!(all(stream(&[" time"]).after(&[4, 5, 6]), &[7]), (String::new(), true));
        assert_eq!(all(stream(&[]).after(&[1, 2]), &[7]).0, "time");
        // Bytes 0x20 and 0x31.
        assert_eq!(all(stream(&[]), &[10 + 0x20, 10 + 0x31]).0, "1");
        assert_eq!(all(stream(&[]), &[10 + 0x20, 7]).0, " time");
    }

    #[test]
    fn nothing_follows_a_stop_string() {
        let tokenizer = tokenizer();
        let check = |whole: &str, stop: &[&str]| {
            let ids = tokenizer.encode(whole).unwrap();
            all(DecodeStream::new(&tokenizer, strings(stop), true), &ids)
        };
        assert_eq!(check("one two three", &["two"]), ("one ".into(), true));
        assert_eq!(check("one two three", &["zwei", "e t"]), ("on".into(), true));
        assert_eq!(check("one tw", &["two"]), ("one tw".into(), false));
        assert_eq!(check("one", &["", "x"]), ("one".into(), false));
        assert_eq!(check("one two", &["two"]), ("one ".into(), true));
    }

    #[test]
    fn stop_strings_see_special_tokens() {
        let tokenizer = tokenizer();
        let check = |whole: &str, stop: &[&str], skip| {
            let ids = tokenizer.encode(whole).unwrap();
            all(DecodeStream::new(&tokenizer, strings(stop), skip), &ids)
        };
        assert_eq!(check("one<|user|>two", &["<|user|>"], true), ("one".into(), true));
        assert_eq!(check("one<|user|>two", &["<|user|>"], false), ("one".into(), true));
        assert_eq!(check("one<|user|>two", &["e<|user|>tw"], true), ("on".into(), true));
        assert_eq!(check("one<|user|>two", &["e<|user|>x"], true), ("onetwo".into(), false));
        assert_eq!(check("one<|user|>two", &["x"], false), ("one<|user|>two".into(), false));
    }

    #[test]
    fn tokens_that_never_complete_a_character_cost_no_more_than_others() {
        let tokenizer = tokenizer();
        let ids = vec![tokenizer.encode("🙂").unwrap()[0]; 200_000];
        let begun = Instant::now();
        let text = all(DecodeStream::new(&tokenizer, Vec::new(), true), &ids).0;
        assert_eq!(text.chars().count(), ids.len());
        let [.., other] = decoders().map(sentence_piece);
        all(DecodeStream::new(&other, Vec::new(), true), &vec![3; 50_000]);
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    }
}

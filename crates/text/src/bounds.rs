//! What a tokenizer.json may ask for. The library that reads it trusts it: it reserves what a table says that it has,
//! rewrites a text as often as it is told, and lets a regular expression try for as long as it likes. So sizes are
//! looked at first, and whatever may take long is waited for on a thread of its own.

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use epsmoe_base::panic_text;
use serde::Deserialize;
use serde_json::Value;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// Most that the steps of a tokenizer may lengthen a text: SentencePiece's own normaliser with all that usually follows it
/// has some two hundred.
const MOST_FACTOR: u64 = 4096;
/// The same for what turns tokens into text; usually nothing does.
const MOST_DECODED: u64 = 64;
/// Bytes that they may add to every text.
const MOST_ADDED: u64 = 1 << 20;
/// Bytes that a text may have between the steps. The library keeps two numbers beside each.
const MOST_BYTES: u64 = 256 << 20;

/// How much longer a text may become: x bytes become at most `factor`·x + `added`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Growth {
    factor: u64,
    added: u64,
}

impl Growth {
    const NONE: Growth = Growth { factor: 1, added: 0 };

    const fn times(factor: u64) -> Self {
        Growth { factor, added: 0 }
    }

    fn then(self, next: Growth) -> Self {
        Growth {
            factor: self.factor.saturating_mul(next.factor),
            added: self.added.saturating_mul(next.factor).saturating_add(next.added),
        }
    }

    /// Of a part of a tokenizer.json: a normaliser, a pre-tokeniser or a decoder.
    pub(crate) fn of(part: &Value) -> Self {
        let length = |key: &str| part[key].as_str().map_or(0, |text| text.len() as u64);
        let parts =
            ["normalizers", "pretokenizers", "decoders"].into_iter().filter_map(|key| part[key].as_array());
        match part["type"].as_str().unwrap_or_default() {
            "Sequence" => parts.flatten().map(Growth::of).fold(Growth::NONE, Growth::then),
            "Replace" => replaced(&part["pattern"], length("content")),
            "Prepend" => Growth { factor: 1, added: length("prepend") },
            // A space becomes a character of up to four bytes, and one more comes first.
            "Metaspace" => Growth { factor: 4, added: 4 },
            // A byte becomes a character of up to two bytes; back, it may become U+FFFD.
            "ByteLevel" => Growth { factor: 3, added: 1 },
            // The worst characters of Unicode.
            "NFC" | "NFD" => Growth::times(3),
            "NFKC" | "NFKD" | "BertNormalizer" => Growth::times(12),
            "Lowercase" | "WordPiece" | "CTC" | "BPEDecoder" => Growth { factor: 2, added: 1 },
            "Precompiled" => Growth::times(longest_replacement(part).max(1)),
            _ => Growth::NONE,
        }
    }

    /// Refuses what no tokenizer needs.
    pub(crate) fn check(self, what: &str, most: u64) -> Result<(), String> {
        if self.factor <= most && self.added <= MOST_ADDED {
            return Ok(());
        }
        let Growth { factor, added } = self;
        Err(format!(
            "{what} could make a text {factor} times as long and add {added} bytes, more than the {most} times and \
             {MOST_ADDED} bytes that are allowed"
        ))
    }

    /// Refuses a text that could become too long.
    pub(crate) fn allows(self, text: &str) -> Result<(), String> {
        let bytes = (text.len() as u64).saturating_mul(self.factor).saturating_add(self.added);
        if bytes <= MOST_BYTES {
            return Ok(());
        }
        Err(format!(
            "its {} bytes could become {bytes} on the way, more than the {MOST_BYTES} that are allowed: shorten it",
            text.len()
        ))
    }
}

/// Of every match of a pattern, by a text of so many bytes.
fn replaced(pattern: &Value, content: u64) -> Growth {
    match pattern["String"].as_str() {
        Some(text) if !text.is_empty() => Growth::times(content.div_ceil(text.len() as u64).max(1)),
        // It may match nothing at all, between any two characters and at the end.
        _ => Growth { factor: content.saturating_add(1), added: content },
    }
}

/// The longest text of a SentencePiece table, which may take the place of one byte.
fn longest_replacement(part: &Value) -> u64 {
    let table = charsmap(part).and_then(Result::ok).unwrap_or_default();
    let texts = trie_bytes(&table).and_then(|trie| table.get(4 + trie..)).unwrap_or_default();
    texts.split(|&byte| byte == 0).map(|text| text.len() as u64).max().unwrap_or(0)
}

/// Such a table, if the part has one; read as leniently as the library does.
fn charsmap(part: &Value) -> Option<Result<Vec<u8>, String>> {
    let text = part["precompiled_charsmap"].as_str()?;
    let lenient = GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true);
    let table = GeneralPurpose::new(&STANDARD, lenient).decode(text);
    Some(table.map_err(|error| format!("its `precompiled_charsmap` cannot be read: {error}")))
}

/// Bytes of the trie at the beginning of such a table, as the table says.
fn trie_bytes(table: &[u8]) -> Option<usize> {
    table.first_chunk().map(|length| u32::from_le_bytes(*length) as usize)
}

/// The parts of a tokenizer.json whose sizes are looked at before the library reads them.
#[derive(Deserialize)]
struct Parts {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
}

/// How much longer the steps of a tokenizer.json may make a text on its way to tokens. Refuses what no tokenizer needs;
/// what is no tokenizer at all is left to the library, which says it better.
pub(crate) fn growth(text: &[u8]) -> Result<Growth, String> {
    let Ok(Parts { normalizer, pre_tokenizer, decoder }) = serde_json::from_slice(text) else {
        return Ok(Growth::NONE);
    };
    check_tables(&normalizer)?;
    Growth::of(&decoder).check("its decoder", MOST_DECODED)?;
    let growth = Growth::of(&normalizer).then(Growth::of(&pre_tokenizer));
    growth.check("its normaliser and pre-tokeniser", MOST_FACTOR)?;
    Ok(growth)
}

/// Refuses a SentencePiece table that says it is longer than it is: so much would be reserved for it.
fn check_tables(part: &Value) -> Result<(), String> {
    if let Some(table) = charsmap(part).transpose()? {
        let (has, says) = (table.len().saturating_sub(4), trie_bytes(&table).unwrap_or(0));
        if says > has {
            return Err(format!(
                "the trie of its `precompiled_charsmap` has {has} bytes, but says that it has {says}"
            ));
        }
    }
    let mut inner = part["normalizers"].as_array().into_iter().flatten();
    inner.try_for_each(check_tables)
}

/// Threads that nobody waits for any more, at most: each keeps a core busy until it ends.
const MOST_ABANDONED: usize = 4;
static ABANDONED: AtomicUsize = AtomicUsize::new(0);

/// How long a call on so many bytes may take: a hundred times what it usually does.
pub(crate) fn time_for(bytes: usize) -> Duration {
    Duration::from_secs(10) + Duration::from_micros(4 * bytes as u64)
}

/// What the library says within so much time, its panics included: a strange tokenizer.json must not end the program.
/// A call that takes longer cannot be ended, only left alone.
pub(crate) fn within<T: Send + 'static, E: ToString>(
    most: Duration,
    call: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, String> {
    if ABANDONED.load(Ordering::Relaxed) >= MOST_ABANDONED {
        return Err("it took too long before, several times: nothing more is tried".into());
    }
    let (sender, receiver) = channel();
    // Set by whoever comes first: the thread at its end, or who waits when the time is over.
    let settled = Arc::new(AtomicBool::new(false));
    let of_thread = Arc::clone(&settled);
    let thread = thread::Builder::new().name("tokenizer".into()).spawn(move || {
        // Whoever waits may be gone.
        let _ = sender.send(guarded(call));
        if of_thread.swap(true, Ordering::AcqRel) {
            ABANDONED.fetch_sub(1, Ordering::Relaxed);
        }
    });
    thread.map_err(|error| format!("no thread could be started for it: {error}"))?;
    match receiver.recv_timeout(most) {
        Ok(result) => return result,
        Err(RecvTimeoutError::Disconnected) => return Err("its thread ended".into()),
        Err(RecvTimeoutError::Timeout) => ABANDONED.fetch_add(1, Ordering::Relaxed),
    };
    if settled.swap(true, Ordering::AcqRel) {
        // It ended just now.
        ABANDONED.fetch_sub(1, Ordering::Relaxed);
        return receiver.try_recv().unwrap_or_else(|_| Err("its thread ended".into()));
    }
    Err(format!("it takes longer than {} s", most.as_secs_f64()))
}

/// What the library says, its panics included.
pub(crate) fn guarded<T, E: ToString>(call: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("the tokenizer panicked: {}", panic_text(panic.as_ref()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Instant;

    fn replace(from: &str, to: &str) -> Value {
        json!({ "type": "Replace", "pattern": { "String": from }, "content": to })
    }

    fn refused(part: &str, value: &Value) -> String {
        growth(json!({ part: value }).to_string().as_bytes()).unwrap_err()
    }

    #[test]
    fn texts_that_grow_beyond_bounds_are_refused() {
        let doubled: Vec<Value> = (0..60).map(|_| replace("a", "aa")).collect();
        let normalizer = json!({ "type": "Sequence", "normalizers": doubled });
        assert!(refused("normalizer", &normalizer).contains("a text 1152921504606846976 times as long"));
        let nested = json!({ "type": "Sequence", "decoders": [
            { "type": "Sequence", "decoders": [replace("b", &"c".repeat(1000))] }] });
        assert!(refused("decoder", &nested).starts_with("its decoder could make a text 1000 times as long"));
        let levels = vec![json!({ "type": "ByteLevel" }); 40];
        let levels = json!({ "type": "Sequence", "pretokenizers": levels });
        assert!(refused("pre_tokenizer", &levels).contains("times as long"));
        let anywhere = json!({ "type": "Replace", "pattern": { "Regex": "" }, "content": "x".repeat(5000) });
        assert!(refused("normalizer", &anywhere).contains("a text 5001 times as long"));
        let prepend = json!({ "type": "Prepend", "prepend": "x".repeat(2 << 20) });
        assert!(refused("normalizer", &prepend).contains("add 2097152 bytes"));

        let usual = json!({ "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" }, replace(" ", "▁"), { "type": "NFKC" }] });
        let grown = growth(json!({ "normalizer": usual }).to_string().as_bytes()).unwrap();
        assert_eq!(grown, Growth { factor: 36, added: 108 });
        assert!(grown.allows(&"x".repeat(1 << 20)).is_ok());
        assert!(grown.allows(&"x".repeat(8 << 20)).unwrap_err().contains("shorten it"));
        assert_eq!(growth(b"{"), Ok(Growth::NONE));
    }

    #[test]
    fn tables_are_as_long_as_they_say() {
        let charsmap = |says: u32, bytes: &[u8]| {
            let table = [&says.to_le_bytes(), bytes].concat();
            let text = base64::engine::general_purpose::STANDARD_NO_PAD.encode(table);
            json!({ "type": "Precompiled", "precompiled_charsmap": text })
        };
        let message = refused("normalizer", &charsmap(u32::MAX, &[]));
        assert!(message.contains("has 0 bytes, but says that it has 4294967295"), "{message}");
        let inner = json!({ "type": "Sequence", "normalizers": [charsmap(9, &[0; 8])] });
        assert!(refused("normalizer", &inner).contains("has 8 bytes, but says that it has 9"));
        let long = charsmap(4, &[&[0; 4], "x".repeat(5000).as_bytes(), &[0]].concat());
        assert!(refused("normalizer", &long).contains("5000 times as long"));
        let table = charsmap(4, b"\0\0\0\0a\0bcd\0");
        let grown = growth(json!({ "normalizer": table }).to_string().as_bytes()).unwrap();
        assert_eq!(grown, Growth::times(3));
    }

    #[test]
    fn what_takes_too_long_is_left_alone() {
        let begun = Instant::now();
        let slow = || -> Result<(), String> {
            thread::sleep(Duration::from_secs(3));
            Ok(())
        };
        let message = within(Duration::from_millis(20), slow).unwrap_err();
        assert_eq!(message, "it takes longer than 0.02 s");
        assert!(begun.elapsed() < Duration::from_secs(2));
        assert_eq!(within(Duration::from_secs(9), || Ok::<_, String>(7)), Ok(7));
        let panics = within(Duration::from_secs(9), || -> Result<(), String> { panic!("strange") });
        assert_eq!(panics.unwrap_err(), "the tokenizer panicked: strange");
    }
}

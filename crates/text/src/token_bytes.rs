//! The bytes that a token stands for. Decoding gives text, in which a part of a character is lost; the vocabulary has it.

use serde_json::json;
use tokenizers::decoders::DecoderWrapper;

/// How a vocabulary writes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// Each byte is a character of its own, as GPT-2 has them.
    ByteLevel,
    /// Text, with `▁` for a space, and `<0x0A>` for a byte.
    SentencePiece,
    /// Text as it is.
    Plain,
}

impl Spelling {
    pub(crate) fn of(decoder: Option<&DecoderWrapper>) -> Self {
        match decoder {
            Some(DecoderWrapper::ByteLevel(_)) => Spelling::ByteLevel,
            Some(DecoderWrapper::Metaspace(_) | DecoderWrapper::ByteFallback(_)) => Spelling::SentencePiece,
            Some(DecoderWrapper::Sequence(all)) => {
                let parts = all.get_decoders().iter().map(|part| Spelling::of(Some(part)));
                parts.into_iter().find(|spelling| *spelling != Spelling::Plain).unwrap_or(Spelling::Plain)
            }
            _ => Spelling::Plain,
        }
    }

    /// The bytes of a token that the vocabulary writes like this.
    pub(crate) fn bytes(self, written: &str) -> Vec<u8> {
        match self {
            Spelling::ByteLevel => {
                // A token with a character that stands for no byte stands for itself, as decoding has it.
                let bytes: Option<Vec<u8>> = written.chars().map(byte_of).collect();
                bytes.unwrap_or_else(|| written.as_bytes().to_vec())
            }
            Spelling::SentencePiece => match fallback_byte(written) {
                Some(byte) => vec![byte],
                None => written.replace('▁', " ").into_bytes(),
            },
            Spelling::Plain => written.as_bytes().to_vec(),
        }
    }
}

/// The byte that GPT-2 writes as this character: visible ones of Latin-1 as themselves, the others in order from 256 on.
fn byte_of(letter: char) -> Option<u8> {
    let is_itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u8::try_from(letter) {
        Ok(byte) => is_itself(byte).then_some(byte),
        Err(_) => {
            let place = (letter as usize).checked_sub(256)?;
            (0..=255).filter(|&byte| !is_itself(byte)).nth(place)
        }
    }
}

/// The byte of `<0x0A>`.
pub(crate) fn fallback_byte(written: &str) -> Option<u8> {
    let hex = written.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// How the texts of tokens make up a whole text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decoding {
    /// Bytes one after the other; what is no UTF-8 becomes U+FFFD.
    Bytes,
    /// Texts one after the other. The first one loses spaces: at most one, or all.
    Texts {
        /// Whether `<0x0A>` is a byte; a run of bytes that is no UTF-8 becomes as many U+FFFD.
        bytes: bool,
        first: First,
    },
    /// In a way that only the library knows.
    Other,
}

/// The spaces that the first token of a text loses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum First {
    None,
    One,
    All,
}

impl Decoding {
    pub(crate) fn of(decoder: Option<&DecoderWrapper>) -> Self {
        let spaces = json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " });
        let (byte_fallback, fuse) = (json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" }));
        let strip = json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 });
        let described = serde_json::to_value(decoder).unwrap_or_default();
        let parts = described["decoders"].as_array().map(Vec::as_slice).unwrap_or_default();
        match (described["type"].as_str(), parts) {
            (Some("ByteLevel"), _) => Decoding::Bytes,
            (Some("Metaspace"), _) if described["replacement"] == "▁" => {
                let never = described["prepend_scheme"] == "never";
                Decoding::Texts { bytes: false, first: if never { First::None } else { First::All } }
            }
            (Some("Sequence"), [a, b, c]) if *a == spaces && *b == byte_fallback && *c == fuse => {
                Decoding::Texts { bytes: true, first: First::None }
            }
            (Some("Sequence"), [a, b, c, d])
                if *a == spaces && *b == byte_fallback && *c == fuse && *d == strip =>
            {
                Decoding::Texts { bytes: true, first: First::One }
            }
            _ => Decoding::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_tokens() {
        assert_eq!(Spelling::ByteLevel.bytes("ĠaĊ"), b" a\n");
        assert_eq!(Spelling::ByteLevel.bytes("ðŁĻĤ"), "🙂".as_bytes());
        assert_eq!(Spelling::ByteLevel.bytes("a → b"), "a → b".as_bytes());
        assert_eq!(Spelling::SentencePiece.bytes("▁the"), b" the");
        assert_eq!(Spelling::SentencePiece.bytes("<0xF0>"), [0xF0]);
        assert_eq!(Spelling::SentencePiece.bytes("<0xZZ>"), b"<0xZZ>");
        assert_eq!(Spelling::Plain.bytes("▁the"), "▁the".as_bytes());
    }

    #[test]
    fn every_byte_has_one_character() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }
}

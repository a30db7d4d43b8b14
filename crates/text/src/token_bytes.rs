//! The bytes that a token stands for. Decoding gives text, in which a part of a character is lost; the vocabulary has it.

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
                // A character that stands for no byte stands for itself.
                let bytes = |letter| match byte_of(letter) {
                    Some(byte) => vec![byte],
                    None => letter.to_string().into_bytes(),
                };
                written.chars().flat_map(bytes).collect()
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
fn fallback_byte(written: &str) -> Option<u8> {
    let hex = written.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_tokens() {
        assert_eq!(Spelling::ByteLevel.bytes("ĠaĊ"), b" a\n");
        assert_eq!(Spelling::ByteLevel.bytes("ðŁĻĤ"), "🙂".as_bytes());
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

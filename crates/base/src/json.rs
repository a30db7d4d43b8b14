//! JSON as Python writes and reads it.

use std::borrow::Cow;

/// The text with what only Python's JSON has made strings, for a strict reader: `NaN`, `Infinity` and `-Infinity`, and
/// numbers beyond all floats. So they do no harm where nobody needs them, and are named where somebody does. Halves of
/// surrogate pairs become U+FFFD, and a byte order mark is left out. Whatever else is wrong stays wrong.
pub fn from_python(text: &[u8]) -> Cow<'_, [u8]> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let mut out: Option<Vec<u8>> = None;
    // What was copied of the text so far.
    let (mut at, mut copied) = (0, 0);
    while at < text.len() {
        let (length, replacement) = match text[at] {
            b'"' => {
                let end = at + 1 + string_length(&text[at + 1..]);
                for (from, escape) in lonely_surrogates(&text[at..end]) {
                    let out = out.get_or_insert_with(Vec::new);
                    out.extend_from_slice(&text[copied..at + from]);
                    out.extend_from_slice(br"\ufffd");
                    copied = at + from + escape;
                }
                (end - at, None)
            }
            b'-' | b'+' | b'.' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => {
                let inside = |byte: &&u8| byte.is_ascii_alphanumeric() || b"+-.".contains(byte);
                let word = &text[at..at + text[at..].iter().take_while(inside).count()];
                (word.len(), is_pythons(word).then(|| [b"\"", word, b"\""].concat()))
            }
            _ => (1, None),
        };
        if let Some(replacement) = replacement {
            let out = out.get_or_insert_with(Vec::new);
            out.extend_from_slice(&text[copied..at]);
            out.extend_from_slice(&replacement);
            copied = at + length;
        }
        at += length;
    }
    match out {
        None => Cow::Borrowed(text),
        Some(mut out) => {
            out.extend_from_slice(&text[copied..]);
            Cow::Owned(out)
        }
    }
}

/// Whether only Python takes a word for a number.
fn is_pythons(word: &[u8]) -> bool {
    match word {
        b"NaN" | b"Infinity" | b"-Infinity" => true,
        // `inf` and `nan` parse too, but begin with letters.
        [b'-' | b'0'..=b'9', ..] if word.iter().all(|byte| b"+-.eE0123456789".contains(byte)) => {
            let number = std::str::from_utf8(word).ok().and_then(|word| word.parse::<f64>().ok());
            number.is_some_and(f64::is_infinite)
        }
        _ => false,
    }
}

/// Bytes of a string that begins here, with the quote that ends it.
fn string_length(text: &[u8]) -> usize {
    let mut at = 0;
    while at < text.len() {
        match text[at] {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    text.len()
}

/// Escapes in a string that are half of a pair: where they begin, and how long they are.
fn lonely_surrogates(string: &[u8]) -> Vec<(usize, usize)> {
    let unit = |at: usize| -> Option<u32> {
        let digits = string.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let (mut at, mut found) = (0, Vec::new());
    while at < string.len() {
        match unit(at) {
            Some(0xd800..=0xdbff) if matches!(unit(at + 6), Some(0xdc00..=0xdfff)) => at += 12,
            Some(0xd800..=0xdfff) => {
                found.push((at, 6));
                at += 6;
            }
            _ if string[at] == b'\\' => at += 2,
            _ => at += 1,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn becomes(text: &str, expected: &str) {
        assert_eq!(std::str::from_utf8(&from_python(text.as_bytes())).unwrap(), expected);
    }

    #[test]
    fn what_only_python_writes_becomes_a_string() {
        becomes(
            r#"{"a": NaN, "b": [Infinity,-Infinity], "c": 1e999, "d":-1e400}"#,
            r#"{"a": "NaN", "b": ["Infinity","-Infinity"], "c": "1e999", "d":"-1e400"}"#,
        );
        becomes("\u{feff}{\"a\": NaN}", r#"{"a": "NaN"}"#);
        becomes(
            r#"{"a": "\ud83d\ude42 \ud83d x \ude42\\ud800"}"#,
            r#"{"a": "\ud83d\ude42 \ufffd x \ufffd\\ud800"}"#,
        );
    }

    #[test]
    fn everything_else_stays_as_it_is() {
        for text in [
            r#"{"NaN": "Infinity", "x": "a \" NaN \\", "n": [0, -1.5e3, 1e308, 12345678901234567890123]}"#,
            r#"{"a": nan, "b": inf, "c": NaNs, "d": +Infinity, "e": --1}"#,
            r#"{"a": "open"#,
            "\"\\",
            "",
            r#"["\u12"]"#,
        ] {
            assert!(matches!(from_python(text.as_bytes()), Cow::Borrowed(_)), "{text}");
        }
    }
}

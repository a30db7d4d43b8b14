//! Text that nobody has to trust, on its way to a terminal.

use std::borrow::Cow;
use std::fmt::Write;

/// The text with everything that a terminal would obey instead of show written out, like `\u{1b}`: control characters,
/// also those of C1, line and paragraph separators, and characters that turn the direction of writing or have no
/// width. Line feeds and tabs too; whoever prints several lines calls this for each.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '\n' => shown.push_str("\\n"),
            '\r' => shown.push_str("\\r"),
            '\t' => shown.push_str("\\t"),
            c if is_obeyed(c) => {
                // Writing to a string cannot fail.
                let _ = write!(shown, "\\u{{{:x}}}", u32::from(c));
            }
            c => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

/// Whether a terminal obeys a character instead of showing it.
pub fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// At most so many characters: of a longer text its beginning, and how long it was.
pub fn shortened(text: &str, most: usize) -> Cow<'_, str> {
    match text.char_indices().nth(most) {
        None => Cow::Borrowed(text),
        Some((end, _)) => Cow::Owned(format!("{}… ({} bytes)", &text[..end], text.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        assert!(matches!(printable("Grüße, 世界 🙂"), Cow::Borrowed(_)));
        assert_eq!(printable("a\u{1b}[31mb\u{9b}2J\u{7f}"), "a\\u{1b}[31mb\\u{9b}2J\\u{7f}");
        assert_eq!(printable("one\ntwo\r\tthree\0"), "one\\ntwo\\r\\tthree\\u{0}");
        assert_eq!(printable("\u{202e}evil\u{2066}"), "\\u{202e}evil\\u{2066}");
        assert!(
            (0..=0x10_ffff)
                .filter_map(char::from_u32)
                .all(|c| !printable(&c.to_string()).contains(is_obeyed))
        );
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(shortened("äöü", 3), "äöü");
        assert_eq!(shortened("äöüß", 3), "äöü… (8 bytes)");
    }
}

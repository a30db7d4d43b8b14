//! Templates in Python's Jinja2, rewritten where the library's Jinja has no other way: a look at the words of each tag,
//! not at what they mean.

use std::ops::Range;

/// The filter behind `… % …`.
pub(super) const PERCENT: &str = "percent";
/// The filter behind what `~` joins.
pub(super) const PRINTED: &str = "printed";
/// The filter around what a loop walks over.
pub(super) const ITEMS: &str = "as_loop_items";

/// The source with ends of lines as Jinja2 reads them, and:
///
/// | written | becomes |
/// |---|---|
/// | `{% generation %}`, which marks the assistant's part for training | a block with a scope of its own |
/// | `+x` | `x` |
/// | `x % y` | `x` through [`PERCENT`], which formats a text and divides a number |
/// | `x ~ y` | `x` and `y` through [`PRINTED`], for floats |
/// | `{% for x in y %}` | `y` through [`ITEMS`], so that a text has a length |
pub(super) fn adapted(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%").into_iter().chain(rest.find("{{")).chain(rest.find("{#")).min() {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        if rest.starts_with("{#") {
            let end = rest.find("#}").map_or(rest.len(), |end| end + 2);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
            continue;
        }
        let is_block = rest.starts_with("{%");
        let (inside, words) = Words::of(&rest[2..], if is_block { "%}" } else { "}}" });
        out.push_str(&rest[..2]);
        out.push_str(&if is_block { block(inside, &words) } else { expression(inside, &words) });
        rest = &rest[2 + inside.len()..];
        let plain = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        if is_block && plain == "raw" {
            // What is inside is text.
            let end = end_of_raw(rest).unwrap_or(rest.len());
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        }
    }
    out.push_str(rest);
    out
}

/// Where `{% endraw %}` begins.
fn end_of_raw(text: &str) -> Option<usize> {
    let tags = text.match_indices("{%").map(|(at, _)| at);
    tags.into_iter()
        .find(|&at| text[at + 2..].trim_start_matches(['-', '+']).trim_start().starts_with("endraw"))
}

/// A block's inside, rewritten.
fn block(inside: &str, words: &[Word]) -> String {
    const MARKS: [(&str, &str); 2] = [("generation", "with"), ("endgeneration", "endwith")];
    let text = |word: &Word| &inside[word.at.clone()];
    if let [only] = words
        && let Some((mark, meaning)) = MARKS.iter().find(|(mark, _)| *mark == text(only))
    {
        return inside.replacen(mark, meaning, 1);
    }
    let is_loop = words.first().is_some_and(|word| text(word) == "for");
    let depths = depths(inside, words);
    let at_top =
        |name: &str| words.iter().zip(&depths).position(|(word, depth)| *depth == 0 && text(word) == name);
    let (Some(of), true) = (at_top("in"), is_loop) else { return expression(inside, words) };
    let end = at_top("if").or_else(|| at_top("recursive")).unwrap_or(words.len());
    if end <= of + 1 {
        return inside.to_owned();
    }
    let from = words[of].at.end;
    let to = words[end - 1].at.end;
    let part = |range: Range<usize>| {
        let inner: Vec<Word> =
            words.iter().filter(|word| word.within(&range)).map(|word| word.moved(range.start)).collect();
        expression(&inside[range], &inner)
    };
    format!("{} ({})|{ITEMS}{}", &inside[..from], part(from..to), part(to..inside.len()))
}

/// How many brackets are open around each word.
fn depths(inside: &str, words: &[Word]) -> Vec<usize> {
    let mut depth: usize = 0;
    let around = |word: &Word| match &inside[word.at.clone()] {
        "(" | "[" | "{" => {
            depth += 1;
            depth
        }
        ")" | "]" | "}" => {
            depth = depth.saturating_sub(1);
            depth + 1
        }
        _ => depth,
    };
    words.iter().map(around).collect()
}

/// An expression, or the inside of any other block, rewritten.
fn expression(inside: &str, words: &[Word]) -> String {
    let text = |at: usize| words.get(at).map_or("", |word| &inside[word.at.clone()]);
    let mut out = String::with_capacity(inside.len());
    let mut copied = 0;
    let print = format!("|{PRINTED}");
    // What goes behind operands that have begun: before which word, and what.
    let mut ends: Vec<(usize, &str)> = Vec::new();
    for (number, word) in words.iter().enumerate() {
        while let Some((_, suffix)) = ends.pop_if(|end| end.0 == number) {
            let end = words[number - 1].at.end;
            out.push_str(&inside[copied..end]);
            out.push_str(suffix);
            copied = end;
        }
        match text(number) {
            "+" if begins_operand(&text, number) => {
                out.push_str(&inside[copied..word.at.start]);
                copied = word.at.end;
            }
            "%" if number > 0 => {
                let (start, end) = (operand_start(&text, number), operand_end(words, &text, number + 1));
                if !is_bound(&text, start) && text(end) != "**" {
                    out.push_str(&inside[copied..word.at.start]);
                    out.push_str(&format!("|{PERCENT}("));
                    copied = word.at.end;
                    ends.push((end, ")"));
                }
            }
            "~" if number > 0 => {
                let (start, end) = (operand_start(&text, number), operand_end(words, &text, number + 1));
                let only_text =
                    |at: usize, of: usize| of == at + 1 && words.get(at).is_some_and(|word| word.is_text);
                if text(start.wrapping_sub(1)) != "~" && !is_bound(&text, start) && !only_text(start, number)
                {
                    out.push_str(&inside[copied..words[number - 1].at.end]);
                    out.push_str(&print);
                    copied = words[number - 1].at.end;
                }
                let signed = ["-", "+"].contains(&text(number + 1));
                if !signed && !FACTORS.contains(&text(end)) && !only_text(number + 1, end) {
                    ends.push((end, &print));
                }
            }
            _ => {}
        }
    }
    let end = words.last().map_or(0, |word| word.at.end).max(copied);
    out.push_str(&inside[copied..end]);
    out.extend(ends.iter().rev().map(|end| end.1));
    out.push_str(&inside[end..]);
    out
}

/// What binds its operands tighter than `~` does.
const FACTORS: [&str; 5] = ["*", "/", "//", "%", "**"];

/// Whether an operand begins here: the word is a sign of one number, not between two.
fn begins_operand<'a>(text: &impl Fn(usize) -> &'a str, number: usize) -> bool {
    let before = number.checked_sub(1).map(text);
    before.is_none_or(|before| before.ends_with(OPENS) || is_keyword(before))
}

/// Whether the operand that begins here belongs to an operator before it: a factor's, or a sign.
fn is_bound<'a>(text: &impl Fn(usize) -> &'a str, start: usize) -> bool {
    let Some(before) = start.checked_sub(1) else { return false };
    FACTORS.contains(&text(before)) || text(before) == "-" && begins_operand(text, before)
}

/// The first word of the value that ends before `end`: what is called or picked of it belongs to it.
fn operand_start<'a>(text: &impl Fn(usize) -> &'a str, end: usize) -> usize {
    let mut at = end - 1;
    loop {
        if [")", "]", "}"].contains(&text(at)) {
            let mut depth = 0usize;
            loop {
                match text(at) {
                    ")" | "]" | "}" => depth += 1,
                    "(" | "[" | "{" => depth = depth.saturating_sub(1),
                    _ => {}
                }
                if depth == 0 || at == 0 {
                    break;
                }
                at -= 1;
            }
            // A call or a subscript of what stands before it.
            if text(at) != "{" && !begins_operand(text, at) {
                at -= 1;
                continue;
            }
        }
        match at.checked_sub(1).map(text) {
            Some("." | "|") if at >= 2 => at -= 2,
            _ => return at,
        }
    }
}

/// What an operand may follow.
const OPENS: [char; 17] =
    ['(', '[', '{', ',', ':', '=', '<', '>', '!', '+', '-', '*', '/', '%', '~', '|', '.'];

fn is_keyword(word: &str) -> bool {
    ["in", "and", "or", "not", "if", "else", "elif", "is", "return", "set", "print", "do"].contains(&word)
}

/// The word behind a unary expression that begins at `first`: signs, one value, and what is called or picked of it.
fn operand_end<'a>(words: &[Word], text: &impl Fn(usize) -> &'a str, first: usize) -> usize {
    let mut at = first;
    while ["-", "+"].contains(&text(at)) {
        at += 1;
    }
    at = bracket_end(words, text, at);
    loop {
        match text(at) {
            "(" | "[" => at = bracket_end(words, text, at),
            "." | "|" => at += 2,
            _ => return at.min(words.len()),
        }
    }
}

/// The word behind a bracket and what it encloses, or behind one word.
fn bracket_end<'a>(words: &[Word], text: &impl Fn(usize) -> &'a str, first: usize) -> usize {
    let (mut at, mut depth) = (first, 0usize);
    loop {
        match text(at) {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
        if depth == 0 || at >= words.len() {
            return at;
        }
    }
}

/// A word of a tag: a name, a number, a text, or a sign.
struct Word {
    at: Range<usize>,
    is_text: bool,
}

impl Word {
    fn within(&self, range: &Range<usize>) -> bool {
        range.start <= self.at.start && self.at.end <= range.end
    }

    fn moved(&self, by: usize) -> Word {
        Word { at: self.at.start - by..self.at.end - by, is_text: self.is_text }
    }
}

/// The words of a tag.
struct Words;

impl Words {
    /// What is inside of a tag that ends with `end`, and its words; without an end, everything.
    fn of<'a>(text: &'a str, end: &str) -> (&'a str, Vec<Word>) {
        let bytes = text.as_bytes();
        let mut words = Vec::new();
        // A sign right at the beginning says what becomes of the space before it.
        let mut at = usize::from(text.starts_with(['-', '+']));
        let mut depth = 0usize;
        while at < bytes.len() {
            let rest = &text[at..];
            // A dictionary's `}}` does not end a tag.
            let ends = rest.starts_with(end) || rest.starts_with(['-', '+']) && rest[1..].starts_with(end);
            if ends && (depth == 0 || end == "%}") {
                return (&text[..at], words);
            }
            let first = rest.chars().next().unwrap_or_default();
            let is_word = |c: char| c == '_' || c.is_alphanumeric();
            let length = match first {
                '\'' | '"' => text_length(rest, first),
                c if c.is_ascii_digit() => number_length(rest),
                c if is_word(c) => rest.find(|c: char| !is_word(c)).unwrap_or(rest.len()),
                _ if ["//", "**", "==", "!=", "<=", ">="].iter().any(|sign| rest.starts_with(sign)) => 2,
                c => c.len_utf8(),
            };
            match first {
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if !first.is_whitespace() {
                words.push(Word { at: at..at + length, is_text: ['\'', '"'].contains(&first) });
            }
            at += length;
        }
        (text, words)
    }
}

/// Bytes of a text with its quotes.
fn text_length(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    let end = rest[1..].find(|c: char| {
        let ends = c == quote && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    });
    end.map_or(rest.len(), |end| end + 2)
}

/// Bytes of a number.
fn number_length(rest: &str) -> usize {
    let bytes = rest.as_bytes();
    let inside = |at: usize| match bytes[at] {
        b'.' => bytes.get(at + 1).is_some_and(u8::is_ascii_digit),
        b'+' | b'-' => matches!(bytes[at - 1], b'e' | b'E') && !rest.starts_with("0x"),
        byte => byte == b'_' || byte.is_ascii_alphanumeric(),
    };
    (1..bytes.len()).find(|&at| !inside(at)).unwrap_or(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_library_does_not_know_is_rewritten() {
        for (source, want) in [
            (
                "{{ +1 }} {{ 2 - +x }} {{ a + b }} {{ f(+1, +x)[+0] }}",
                "{{ 1 }} {{ 2 - x }} {{ a + b }} {{ f(1, x)[0] }}",
            ),
            ("{%+ if +x %}{{+ y }}{{- z -}}", "{%+ if x %}{{+ y }}{{- z -}}"),
            ("{{ '+1' + \"a'%\" }}{# +1 #}+1", "{{ '+1' + \"a'%\" }}{# +1 #}+1"),
            ("{{ 1e+5 + 2 }}", "{{ 1e+5 + 2 }}"),
            ("{% raw %}{{ +1 }}{% endraw %}{{ +1 }}", "{% raw %}{{ +1 }}{% endraw %}{{ 1 }}"),
            ("{% generation %}{%- endgeneration -%}", "{% with %}{%- endwith -%}"),
            ("a\r\nb\rc", "a\nb\nc"),
            ("{{ {'a': {'b': +1}} }}", "{{ {'a': {'b': 1}} }}"),
        ] {
            assert_eq!(adapted(source), want, "{source}");
        }
        let percent = |left: &str, right: &str| format!("{left} |{PERCENT}({right})");
        for (source, want) in [
            ("'%s' % x", percent("'%s'", " x")),
            ("'%s' % (x, y) ~ z", percent("'%s'", " (x, y)") + " ~ z|printed"),
            ("'%s' % x.y[0].z(1)|upper + w", percent("'%s'", " x.y[0].z(1)|upper") + " + w"),
            ("f('%s' % -x, 2)", format!("f({}, 2)", percent("'%s'", " -x"))),
            ("a % b", percent("a", " b")),
            ("a - b.c(d)[0]|e(1) % b", percent("a - b.c(d)[0]|e(1)", " b")),
            ("not (a, b) % (c % d)", percent("not (a, b)", &format!(" ({})", percent("c", " d")))),
            ("a % b % c", percent("a", " b") + " % c"),
            ("-a % b ** c", "-a % b ** c".into()),
            ("2 * '%s' % x", "2 * '%s' % x".into()),
            ("a ~ b.c ~ '%'", "a|printed ~ b.c|printed ~ '%'".into()),
            ("[a] ~ 'b' ~ f(c ~ 1)", "[a]|printed ~ 'b' ~ f(c|printed ~ 1|printed)|printed".into()),
            ("2 * a ~ b * c ~ -d", "2 * a ~ b * c ~ -d".into()),
            ("a ~ b % c", format!("a|printed ~ {}", percent("b", " c"))),
        ] {
            assert_eq!(adapted(&format!("{{{{ {source} }}}}")), format!("{{{{ {want} }}}}"), "{source}");
        }
        assert_eq!(adapted("{% for a in b if c %}"), format!("{{% for a in ( b)|{ITEMS} if c %}}"));
        assert_eq!(
            adapted("{%- for a, b in 1, 2 recursive -%}"),
            format!("{{%- for a, b in ( 1, 2)|{ITEMS} recursive -%}}")
        );
        assert_eq!(
            adapted("{% for a in (b if c else d) %}"),
            format!("{{% for a in ( (b if c else d))|{ITEMS} %}}")
        );
    }

    /// Whatever is written, nothing panics, and plain text stays.
    #[test]
    fn anything_may_be_written() {
        let mut mix = epsmoe_base::Mix::new(epsmoe_base::env::test_seed());
        let parts = [
            "{{",
            "~",
            "}}",
            "{%",
            "%}",
            "{#",
            "#}",
            "+",
            "-",
            "%",
            "'",
            "\"",
            "\\",
            "for",
            "in",
            " ",
            "x",
            "(",
            ")",
            "[",
            "]",
            "{",
            "}",
            "raw",
            "endraw",
            "generation",
            "1e",
            "ü",
            ".",
            "|",
            ",",
            "if",
            "\n",
        ];
        for _ in 0..20_000 {
            let source: String = (0..mix.below(14)).map(|_| parts[mix.below(parts.len())]).collect();
            adapted(&source);
        }
        assert_eq!(adapted("plain % + text"), "plain % + text");
    }
}

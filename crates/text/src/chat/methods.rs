//! Methods of Python's strings, lists and dictionaries. What changes a value is left out: transformers forbids it.

use super::arguments::{Argument, bind, required, required_text, wrong};
use minijinja::value::{Tuple, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// What `value.method(args)` gives.
pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let result = match value.kind() {
        ValueKind::String => string(value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Seq => sequence(value, method, args)?,
        ValueKind::Map if method == "copy" => bind(args, []).map(|[]| Some(value.clone()))?,
        _ => None,
    };
    result.map_or_else(|| pycompat::unknown_method_callback(state, value, method, args), Ok)
}

/// A method of strings; nothing where the library's own does what Python does.
fn string(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let value = match method {
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = bind(args, ["chars"])?;
            let chars = chars.text()?;
            let strip = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            Value::from(match method {
                "strip" => text.trim_matches(strip),
                "lstrip" => text.trim_start_matches(strip),
                _ => text.trim_end_matches(strip),
            })
        }
        "split" | "rsplit" => {
            let [separator, most] = bind(args, ["sep", "maxsplit"])?;
            let most = most.integer()?.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            if separator.text()? == Some("") {
                return Err(wrong("empty separator"));
            }
            Value::from(split(text, separator.text()?, most, method == "rsplit"))
        }
        "splitlines" => {
            let [keep] = bind(args, ["keepends"])?;
            let line =
                |(line, end): (&str, &str)| if keep.flag() { format!("{line}{end}") } else { line.into() };
            lines(text).into_iter().map(line).collect()
        }
        "partition" | "rpartition" => {
            let [separator] = bind(args, ["sep"])?;
            let separator = required_text(&separator, "sep")?;
            let found = if method == "partition" { text.find(separator) } else { text.rfind(separator) };
            let parts = match found {
                Some(at) => [&text[..at], separator, &text[at + separator.len()..]],
                None if method == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "startswith" | "endswith" => {
            let [affix, from, to] = bind(args, ["prefix", "start", "end"])?;
            let Some(part) = between(text, &from, &to)? else { return Ok(Some(Value::from(false))) };
            let affix = required(&affix, "prefix")?;
            let fits = |affix: &Value| {
                let affix = affix.as_str().ok_or_else(|| wrong(format!("{method} takes strings")))?;
                Ok::<_, Error>(if method == "startswith" {
                    part.starts_with(affix)
                } else {
                    part.ends_with(affix)
                })
            };
            Value::from(match affix.as_str() {
                Some(_) => fits(affix)?,
                None => affix
                    .try_iter()?
                    .map(|affix| fits(&affix))
                    .try_fold(false, |any, fits| Ok::<_, Error>(any | fits?))?,
            })
        }
        "find" | "rfind" | "index" | "rindex" => {
            let [wanted, from, to] = bind(args, ["sub", "start", "end"])?;
            let wanted = required_text(&wanted, "sub")?;
            match between(text, &from, &to)?.and_then(|part| {
                let at = if method.starts_with('r') { part.rfind(wanted) } else { part.find(wanted) }?;
                Some(text[..part.as_ptr() as usize - text.as_ptr() as usize + at].chars().count())
            }) {
                Some(at) => Value::from(at),
                None if method.ends_with("find") => Value::from(-1),
                None => return Err(wrong("substring not found")),
            }
        }
        "count" => {
            let [wanted, from, to] = bind(args, ["sub", "start", "end"])?;
            let wanted = required_text(&wanted, "sub")?;
            Value::from(between(text, &from, &to)?.map_or(0, |part| part.matches(wanted).count()))
        }
        "replace" => {
            let [old, new, most] = bind(args, ["old", "new", "count"])?;
            let (old, new) = (required_text(&old, "old")?, required_text(&new, "new")?);
            match most.integer()?.and_then(|most| usize::try_from(most).ok()) {
                Some(most) => Value::from(text.replacen(old, new, most)),
                None => Value::from(text.replace(old, new)),
            }
        }
        "removeprefix" | "removesuffix" => {
            let [affix] = bind(args, ["prefix"])?;
            let affix = required_text(&affix, "prefix")?;
            let rest =
                if method == "removeprefix" { text.strip_prefix(affix) } else { text.strip_suffix(affix) };
            Value::from(rest.unwrap_or(text))
        }
        "ljust" | "rjust" | "center" => {
            let [width, fill] = bind(args, ["width", "fillchar"])?;
            let width = required(&width, "width").and(width.length())?.unwrap_or(0);
            let fill = fill.text()?.unwrap_or(" ");
            let missing = width.saturating_sub(text.chars().count());
            let before = match method {
                "ljust" => 0,
                "rjust" => missing,
                _ => missing / 2 + (missing & width & 1),
            };
            Value::from(format!("{}{text}{}", fill.repeat(before), fill.repeat(missing - before)))
        }
        "zfill" => {
            let [width] = bind(args, ["width"])?;
            let zeros = "0".repeat(width.length()?.unwrap_or(0).saturating_sub(text.chars().count()));
            let sign = text.len() - text.strip_prefix(['+', '-']).unwrap_or(text).len();
            Value::from(format!("{}{zeros}{}", &text[..sign], &text[sign..]))
        }
        "expandtabs" => {
            let [size] = bind(args, ["tabsize"])?;
            Value::from(expanded(text, size.integer()?.map_or(8, |size| usize::try_from(size).unwrap_or(0))))
        }
        "swapcase" => {
            let [] = bind(args, [])?;
            let swap = |c: char| {
                let (lower, upper) = (c.to_lowercase().to_string(), c.to_uppercase().to_string());
                if c.is_uppercase() { lower } else { upper }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "casefold" => {
            let [] = bind(args, [])?;
            Value::from(text.to_lowercase().replace('ß', "ss").replace('ς', "σ").replace('ſ', "s"))
        }
        "isdecimal" => all(text, args, |c| c.is_ascii_digit())?,
        "isprintable" => {
            let printable = all(text, args, |c| c == ' ' || !(c.is_control() || c.is_whitespace()))?;
            Value::from(text.is_empty() || printable.is_true())
        }
        "isidentifier" => {
            let begins = !text.starts_with(|c: char| c.is_numeric());
            Value::from(begins && all(text, args, |c| c == '_' || c.is_alphanumeric())?.is_true())
        }
        "istitle" => {
            let [] = bind(args, [])?;
            Value::from(is_title(text))
        }
        _ => return Ok(None),
    };
    Ok(Some(value))
}

fn sequence(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "index" => {
            let [wanted] = bind(args, ["value"])?;
            let wanted = required(&wanted, "value")?;
            let at = value.try_iter()?.position(|item| item == *wanted);
            at.map(|at| Some(Value::from(at))).ok_or_else(|| wrong("the value is not in the list"))
        }
        "copy" => bind(args, []).map(|[]| Some(value.clone())),
        "append" | "clear" | "extend" | "insert" | "pop" | "remove" | "reverse" | "sort" => {
            let problem = format!("`{method}` would change a list, which templates may not");
            Err(Error::new(ErrorKind::InvalidOperation, problem))
        }
        _ => Ok(None),
    }
}

/// Whether there are characters, and all are of a kind.
fn all(text: &str, args: &[Value], kind: impl Fn(char) -> bool) -> Result<Value, Error> {
    let [] = bind(args, [])?;
    Ok(Value::from(!text.is_empty() && text.chars().all(kind)))
}

/// What Python takes for white space.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Lines with what ends them.
pub(super) fn lines(text: &str) -> Vec<(&str, &str)> {
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let (mut rest, mut lines) = (text, Vec::new());
    while let Some(at) = rest.find(ends) {
        let (line, after) = rest.split_at(at);
        let end = if after.starts_with("\r\n") { 2 } else { after.chars().next().map_or(0, char::len_utf8) };
        lines.push((line, &after[..end]));
        rest = &after[end..];
    }
    if !rest.is_empty() {
        lines.push((rest, ""));
    }
    lines
}

/// Cuts a text at a separator, or at white space, at most `most` times, from one end.
fn split(text: &str, separator: Option<&str>, most: usize, from_end: bool) -> Vec<String> {
    let mut parts = Vec::new();
    let mut rest = text;
    let trimmed = |text: &'_ str, end: bool| {
        if end { text.trim_end_matches(is_space).len() } else { text.trim_start_matches(is_space).len() }
    };
    loop {
        if separator.is_none() {
            // White space at the end that is worked on belongs to no part.
            let kept = trimmed(rest, from_end);
            rest = if from_end { &rest[..kept] } else { &rest[rest.len() - kept..] };
            if rest.is_empty() {
                break;
            }
        }
        let cut = (parts.len() < most).then(|| match (separator, from_end) {
            (Some(separator), false) => rest.split_once(separator),
            (Some(separator), true) => rest.rsplit_once(separator),
            (None, false) => rest.split_once(is_space),
            (None, true) => rest.rsplit_once(is_space),
        });
        let Some((before, after)) = cut.flatten() else {
            parts.push(rest.to_owned());
            break;
        };
        let (part, left) = if from_end { (after, before) } else { (before, after) };
        parts.push(part.to_owned());
        rest = left;
    }
    if from_end {
        parts.reverse();
    }
    parts
}

/// The part of a text between two positions as slices count them; nothing where the first is behind the text's end.
fn between<'a>(text: &'a str, from: &Option<Value>, to: &Option<Value>) -> Result<Option<&'a str>, Error> {
    let length = text.chars().count() as i64;
    let from = from.integer()?.unwrap_or(0);
    let counted = |at: i64| if at < 0 { (at + length).max(0) } else { at };
    let (from, to) = (counted(from), counted(to.integer()?.unwrap_or(length)).min(length));
    if from > to {
        return Ok(None);
    }
    let byte = |at: i64| text.char_indices().nth(at as usize).map_or(text.len(), |(byte, _)| byte);
    Ok(Some(&text[byte(from)..byte(to)]))
}

fn expanded(text: &str, size: usize) -> String {
    let (mut out, mut column) = (String::with_capacity(text.len()), 0);
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                out.extend(std::iter::repeat_n(' ', spaces));
                column += spaces;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            _ => {
                out.push(c);
                column += 1;
            }
        }
    }
    out
}

/// Whether every word begins with a capital and goes on in small letters.
fn is_title(text: &str) -> bool {
    let (mut inside, mut any) = (false, false);
    for c in text.chars() {
        let (upper, lower) = (c.is_uppercase(), c.is_lowercase());
        if upper && inside || lower && !inside {
            return false;
        }
        inside = upper || lower;
        any |= inside;
    }
    any
}

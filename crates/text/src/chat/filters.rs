//! Filters with the parameters, by position or by name, that Jinja2 gives them.

use super::arguments::{Argument, bind, required, required_text, wrong};
use super::json;
use super::methods::{is_space, lines};
use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, State, filters};
use minijinja_contrib::filters as contrib;

type Args = Rest<ValueOrKwargs>;

/// Adds the filters to an environment.
pub(super) fn add(environment: &mut Environment) {
    environment.add_filter("tojson", json::to_json);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("trim", trim);
    environment.add_filter("replace", replace);
    environment.add_filter("indent", indent);
    environment.add_filter("center", center);
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordwrap", wordwrap);
    environment.add_filter("wordcount", |text: String| words(&text));
    environment.add_filter("striptags", contrib::striptags);
    environment.add_filter("filesizeformat", contrib::filesizeformat);
    environment.add_filter("batch", batch);
    environment.add_filter("slice", slice);
    environment.add_filter("sort", sort);
    environment.add_filter("unique", unique);
    environment.add_filter("min", min);
    environment.add_filter("max", max);
    environment.add_filter("dictsort", dictsort);
    environment.add_filter("groupby", groupby);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("forceescape", |text: String| Value::from_safe_string(escaped(&text)));
    environment.add_filter("format", format);
}

fn values(args: Args) -> Vec<Value> {
    args.iter().map(|arg| (**arg).clone()).collect()
}

/// The keyword arguments of the library's filter.
fn named<const N: usize>(args: Args, names: [&'static str; N]) -> Result<Kwargs, Error> {
    let bound = bind(&values(args), names)?;
    Ok(names.into_iter().zip(bound).filter_map(|(name, value)| Some((name, value?))).collect())
}

fn default(value: Value, args: Args) -> Result<Value, Error> {
    let [other, even_false] = bind(&values(args), ["default_value", "boolean"])?;
    let missing = value.is_undefined() || even_false.flag() && !value.is_true();
    Ok(if missing { other.unwrap_or_else(|| Value::from("")) } else { value })
}

fn int(state: &State, value: Value, args: Args) -> Result<Value, Error> {
    let [other, base] = bind(&values(args), ["default", "base"])?;
    let other = other.unwrap_or_else(|| Value::from(0));
    let base = base.length()?.and_then(|base| u32::try_from(base).ok());
    let none = Kwargs::from_iter::<[(String, Value); 0]>([]);
    Ok(filters::int(state, &value, Some(other.clone()), base, none).unwrap_or(other))
}

fn float(state: &State, value: Value, args: Args) -> Result<Value, Error> {
    let [other] = bind(&values(args), ["default"])?;
    let other = other.unwrap_or_else(|| Value::from(0.0));
    let none = Kwargs::from_iter::<[(String, Value); 0]>([]);
    Ok(filters::float(state, &value, Some(other.clone()), none).unwrap_or(other))
}

fn trim(text: String, args: Args) -> Result<Value, Error> {
    let [chars] = bind(&values(args), ["chars"])?;
    let chars = chars.text()?;
    let strip = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    Ok(Value::from(text.trim_matches(strip)))
}

fn replace(text: String, args: Args) -> Result<Value, Error> {
    let [old, new, most] = bind(&values(args), ["old", "new", "count"])?;
    let (old, new) = (required(&old, "old")?.to_string(), required(&new, "new")?.to_string());
    Ok(Value::from(match most.integer()?.and_then(|most| usize::try_from(most).ok()) {
        Some(most) => text.replacen(&old, &new, most),
        None => text.replace(&old, &new),
    }))
}

/// `width` spaces, or that text, before every line but the first, and before empty ones only if `blank`.
fn indent(text: String, args: Args) -> Result<Value, Error> {
    let [width, first, blank] = bind(&values(args), ["width", "first", "blank"])?;
    let indentation = match width.given() {
        Some(width) if width.kind() == ValueKind::String => width.to_string(),
        _ => " ".repeat(width.length()?.unwrap_or(4)),
    };
    let mut out = String::with_capacity(text.len());
    let text = text + "\n";
    for (number, (line, _)) in lines(&text).into_iter().enumerate() {
        if number > 0 {
            out.push('\n');
        }
        if number == 0 && first.flag() || number > 0 && (blank.flag() || !line.is_empty()) {
            out.push_str(&indentation);
        }
        out.push_str(line);
    }
    Ok(Value::from(out))
}

fn center(text: String, args: Args) -> Result<Value, Error> {
    let [width] = bind(&values(args), ["width"])?;
    let width = width.length()?.unwrap_or(80);
    let missing = width.saturating_sub(text.chars().count());
    let before = missing / 2 + (missing & width & 1);
    Ok(Value::from(format!("{}{text}{}", " ".repeat(before), " ".repeat(missing - before))))
}

fn truncate(text: String, args: Args) -> Result<Value, Error> {
    let [length, kill_words, end, leeway] = bind(&values(args), ["length", "killwords", "end", "leeway"])?;
    let end = end.text()?.unwrap_or("...").to_owned();
    let length = length.length()?.unwrap_or(255);
    let leeway = leeway.length()?.unwrap_or(5);
    let mut kept = length
        .checked_sub(end.chars().count())
        .ok_or_else(|| wrong(format!("expected length >= {}, got {length}", end.chars().count())))?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(Value::from(text));
    }
    let beginning: String = text.chars().take(kept).collect();
    kept = beginning.len();
    if !kill_words.flag() {
        kept = beginning.rfind(' ').unwrap_or(kept);
    }
    Ok(Value::from(format!("{}{end}", &beginning[..kept])))
}

/// Lines of `width` characters at most, cut between words, or inside those that are too long.
fn wordwrap(text: String, args: Args) -> Result<Value, Error> {
    let [width, break_long, between, _] =
        bind(&values(args), ["width", "break_long_words", "wrapstring", "break_on_hyphens"])?;
    let width = width.length()?.unwrap_or(79).max(1);
    let break_long = break_long.is_none() || break_long.flag();
    let between = between.text()?.unwrap_or("\n").to_owned();
    let wrapped = lines(&text).into_iter().map(|(line, _)| wrapped(line, width, break_long).join(&between));
    Ok(Value::from(wrapped.collect::<Vec<_>>().join(&between)))
}

fn wrapped(line: &str, width: usize, break_long: bool) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let (mut current, mut length) = (String::new(), 0);
    let mut pieces = Vec::new();
    for word in line.split(' ') {
        pieces.push(word);
    }
    for (number, word) in pieces.into_iter().enumerate() {
        let characters = word.chars().count();
        let space = usize::from(number > 0);
        if length + space + characters <= width {
            current.extend(std::iter::repeat_n(' ', space));
            current.push_str(word);
            length += space + characters;
            continue;
        }
        if length > 0 {
            out.push(std::mem::take(&mut current));
        }
        let mut rest: Vec<char> = word.chars().collect();
        while break_long && rest.len() > width {
            let tail = rest.split_off(width);
            out.push(rest.into_iter().collect());
            rest = tail;
        }
        length = rest.len();
        current = rest.into_iter().collect();
    }
    if length > 0 {
        out.push(current);
    }
    out
}

/// Runs of letters, digits and underscores.
fn words(text: &str) -> usize {
    text.split(|c: char| !(c == '_' || c.is_alphanumeric())).filter(|word| !word.is_empty()).count()
}

fn batch(state: &mut State, value: Value, args: Args) -> Result<Value, Error> {
    let [count, fill] = bind(&values(args), ["linecount", "fill_with"])?;
    let count = required(&count, "linecount").and(count.length())?.unwrap_or(0);
    filters::batch(state, value, count, fill.given().cloned())
}

fn slice(state: &mut State, value: Value, args: Args) -> Result<Value, Error> {
    let [count, fill] = bind(&values(args), ["slices", "fill_with"])?;
    let count = required(&count, "slices").and(count.length())?.unwrap_or(0);
    filters::slice(state, value, count, fill.given().cloned())
}

fn sort(state: &State, value: Value, args: Args) -> Result<Value, Error> {
    filters::sort(state, value, named(args, ["reverse", "case_sensitive", "attribute"])?)
}

fn unique(state: &State, value: Value, args: Args) -> Result<Value, Error> {
    filters::unique(state, value, named(args, ["case_sensitive", "attribute"])?)
}

fn min(state: &State, value: Value, args: Args) -> Result<Value, Error> {
    filters::min(state, value, named(args, ["case_sensitive", "attribute"])?)
}

fn max(state: &State, value: Value, args: Args) -> Result<Value, Error> {
    filters::max(state, value, named(args, ["case_sensitive", "attribute"])?)
}

fn dictsort(value: Value, args: Args) -> Result<Value, Error> {
    filters::dictsort(&value, named(args, ["case_sensitive", "by", "reverse"])?)
}

fn groupby(value: Value, args: Args) -> Result<Value, Error> {
    let [attribute, default, case_sensitive] =
        bind(&values(args), ["attribute", "default", "case_sensitive"])?;
    let attribute = required_text(&attribute, "attribute")?;
    let options = [("default", default), ("case_sensitive", case_sensitive)];
    let options = options.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    filters::groupby(value, Some(attribute), options)
}

/// HTML as MarkupSafe escapes it.
fn escape(value: Value) -> Value {
    if value.is_safe() { value } else { Value::from_safe_string(escaped(&value.to_string())) }
}

fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('\'', "&#39;").replace('"', "&#34;")
}

/// Python's `left % right`: a text is formatted, a number divided, for what is left over.
pub(super) fn percent(state: &mut State, left: &Value, right: Value) -> Result<Value, Error> {
    if left.kind() != ValueKind::String {
        return remainder(left, &right);
    }
    // A tuple has a value for each place, a dictionary for each name.
    let values: Vec<Value> = match right.kind() {
        ValueKind::Seq if right.downcast_object_ref::<Tuple>().is_some() => right.try_iter()?.collect(),
        ValueKind::Map => {
            let names = right.try_iter()?.map(|key| Ok((key.to_string(), right.get_item(&key)?)));
            vec![Value::from(names.collect::<Result<Kwargs, Error>>()?)]
        }
        _ => vec![right],
    };
    let filter = Value::from_function(filters::format);
    let args: Vec<Value> = std::iter::once(left.clone()).chain(values).collect();
    filter.call(state, &args)
}

/// The remainder, which has the sign of the divisor.
fn remainder(left: &Value, right: &Value) -> Result<Value, Error> {
    let is_number = |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool);
    if !is_number(left) || !is_number(right) {
        return Err(wrong(format!("cannot divide {} by {}", left.kind(), right.kind())));
    }
    let whole = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        _ if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    };
    if let (Some(left), Some(right)) = (whole(left), whole(right)) {
        let rest = left.checked_rem(right).ok_or_else(|| wrong("division by zero"))?;
        return Ok(Value::from(if rest != 0 && (rest < 0) != (right < 0) { rest + right } else { rest }));
    }
    let float = |value: &Value| match value.kind() {
        ValueKind::Bool => Ok(f64::from(u8::from(value.is_true()))),
        _ => f64::try_from(value.clone()),
    };
    let (left, right) = (float(left)?, float(right)?);
    if right == 0.0 {
        return Err(wrong("division by zero"));
    }
    let rest = left % right;
    let rest = if rest != 0.0 && (rest < 0.0) != (right < 0.0) { rest + right } else { rest };
    // A zero has the divisor's sign too.
    Ok(Value::from(if rest == 0.0 { 0f64.copysign(right) } else { rest }))
}

fn format(state: &mut State, format: &Value, args: Args) -> Result<Value, Error> {
    match format.kind() {
        ValueKind::String => filters::format(state, format, args),
        _ => filters::format(state, &Value::from(format.to_string()), args),
    }
}

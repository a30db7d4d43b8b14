//! JSON as Python's `json.dumps` writes it.

use super::arguments::{Argument, bind, wrong};
use minijinja::value::{Rest, Value, ValueOrKwargs};
use minijinja::{Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};
use std::io::{self, Write};

/// More than anybody indents.
const MOST_INDENT: i64 = 64;

/// The filter `tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
pub(super) fn to_json(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args: Vec<Value> = args.iter().map(|arg| (**arg).clone()).collect();
    let [ensure_ascii, indent, separators, sort_keys] =
        bind(&args, ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = indent.given().map(indentation).transpose()?;
    let (between, after_key) = match separators.given() {
        Some(separators) => pair(separators)?,
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let formatter = Python { indent, between, after_key, depth: 0, empty: true };
    let json = if sort_keys.flag() {
        let mut sorted = serde_json::to_value(value).map_err(failed)?;
        sorted.sort_all_objects();
        written(&sorted, formatter)
    } else {
        written(value, formatter)
    }?;
    Ok(Value::from(if ensure_ascii.flag() { ascii(&json) } else { json }))
}

/// What a level is indented by: so many spaces, or a text.
fn indentation(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Ok(" ".repeat(i64::try_from(value.clone())?.clamp(0, MOST_INDENT) as usize)),
    }
}

fn pair(value: &Value) -> Result<(String, String), Error> {
    let parts: Vec<Value> = value.try_iter()?.collect();
    match &parts[..] {
        [between, after_key] => Ok((between.to_string(), after_key.to_string())),
        _ => Err(wrong("`separators` must be two strings")),
    }
}

fn failed(error: impl ToString) -> Error {
    Error::new(ErrorKind::BadSerialization, error.to_string())
}

fn written(value: &impl Serialize, formatter: Python) -> Result<String, Error> {
    let mut bytes = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter)).map_err(failed)?;
    String::from_utf8(bytes).map_err(failed)
}

/// Everything but ASCII, escaped.
fn ascii(json: &str) -> String {
    let mut ascii = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            ascii.push(c);
        } else {
            ascii.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    ascii
}

/// A float as Python's `repr` writes it: `1e16` is `1e+16`.
pub(super) fn float(value: f64) -> String {
    if !value.is_finite() {
        let name = if value.is_nan() { "nan" } else { "inf" };
        return if value == f64::NEG_INFINITY { "-inf".into() } else { name.into() };
    }
    // Rust changes to exponents where Python does, but writes them without sign and zero.
    let text = format!("{value:?}");
    match text.split_once('e') {
        Some((digits, exponent)) => format!("{digits}e{:+03}", exponent.parse::<i32>().unwrap_or(0)),
        None => text,
    }
}

struct Python {
    indent: Option<String>,
    /// What stands between items, and between a key and its value.
    between: String,
    after_key: String,
    depth: usize,
    /// Whether nothing stands in the innermost list or object yet.
    empty: bool,
}

impl Python {
    fn begin<W: Write + ?Sized>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        out.write_all(bracket)
    }

    fn end<W: Write + ?Sized>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.new_line(out)?;
        }
        self.empty = false;
        out.write_all(bracket)
    }

    fn item<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.between.as_bytes())?;
        }
        self.empty = false;
        self.new_line(out)
    }

    fn new_line<W: Write + ?Sized>(&self, out: &mut W) -> io::Result<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        out.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| out.write_all(indent.as_bytes()))
    }
}

impl Formatter for Python {
    fn write_f64<W: Write + ?Sized>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(float(value).as_bytes())
    }

    fn begin_array<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.begin(out, b"[")
    }

    fn end_array<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.end(out, b"]")
    }

    fn begin_array_value<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.begin(out, b"{")
    }

    fn end_object<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.end(out, b"}")
    }

    fn begin_object_key<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.after_key.as_bytes())
    }
}

//! Typed keys and values.

use super::cursor::Cursor;
use super::damaged;
use crate::QuantError;
use std::collections::BTreeMap;

const MOST_KEYS: u64 = 1 << 16;
const LONGEST_KEY: usize = 256;

/// Items of all lists together. The largest vocabularies have a quarter of a million tokens.
const MOST_ITEMS: u64 = 1 << 22;

/// Lists within lists.
const DEEPEST: usize = 3;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number without a sign.
    Unsigned(u64),
    /// A whole number.
    Signed(i64),
    /// A number.
    Float(f64),
    /// Yes or no.
    Bool(bool),
    /// A string.
    Text(String),
    /// Values of one type.
    List(List),
}

/// Values of one type.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "as the values of the same names")]
pub enum List {
    Unsigned(Vec<u64>),
    Signed(Vec<i64>),
    Float(Vec<f64>),
    Bool(Vec<bool>),
    Text(Vec<String>),
    List(Vec<List>),
}

/// Keys and their values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(BTreeMap<String, Value>);

impl Metadata {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// A whole number that is not negative. Another value is an error.
    pub fn whole(&self, key: &str) -> Result<Option<u64>, QuantError> {
        self.typed(key, "a whole number", |value| match *value {
            Value::Unsigned(number) => Some(number),
            Value::Signed(number) => u64::try_from(number).ok(),
            _ => None,
        })
    }

    /// A number. Another value is an error.
    pub fn number(&self, key: &str) -> Result<Option<f64>, QuantError> {
        self.typed(key, "a number", |value| match *value {
            Value::Float(number) => Some(number),
            Value::Unsigned(number) => Some(number as f64),
            Value::Signed(number) => Some(number as f64),
            _ => None,
        })
    }

    /// Yes or no. Another value is an error.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, QuantError> {
        self.typed(key, "true or false", |value| match *value {
            Value::Bool(flag) => Some(flag),
            _ => None,
        })
    }

    /// A string. Another value is an error.
    pub fn text(&self, key: &str) -> Result<Option<&str>, QuantError> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A list of strings. Another value is an error.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, QuantError> {
        self.typed(key, "a list of strings", |value| match value {
            Value::List(List::Text(texts)) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// A list of numbers. Another value is an error.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, QuantError> {
        self.typed(key, "a list of numbers", |value| match value {
            Value::List(List::Float(numbers)) => Some(numbers.clone()),
            Value::List(List::Unsigned(numbers)) => {
                Some(numbers.iter().map(|&number| number as f64).collect())
            }
            Value::List(List::Signed(numbers)) => Some(numbers.iter().map(|&number| number as f64).collect()),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        what: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, QuantError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| damaged(format!("`{key}` is not {what}")))
    }

    pub(super) fn read<E, F>(cursor: &mut Cursor<F>, keys: u64) -> Result<Metadata, E>
    where
        E: From<QuantError>,
        F: Fn(&mut [u8], u64) -> Result<(), E>,
    {
        if keys > MOST_KEYS {
            return Err(damaged(format!("it claims {keys} keys, of at most {MOST_KEYS}")).into());
        }
        let mut metadata = Metadata::default();
        let mut items = MOST_ITEMS;
        for number in 0..keys {
            let key = cursor.text(&format!("key {number}"))?;
            if key.len() > LONGEST_KEY {
                return Err(damaged(format!(
                    "key {number} has {} bytes, of at most {LONGEST_KEY}",
                    key.len()
                ))
                .into());
            }
            let kind = cursor.u32(&key)?;
            let value = Reader { cursor, key: &key, items: &mut items }.value(kind)?;
            if metadata.0.insert(key.clone(), value).is_some() {
                return Err(damaged(format!("key `{key}` is there twice")).into());
            }
        }
        Ok(metadata)
    }
}

/// Reads the value of a key.
struct Reader<'a, F> {
    cursor: &'a mut Cursor<F>,
    key: &'a str,
    /// How many items the lists of the file may still have.
    items: &'a mut u64,
}

const LIST: u32 = 9;

impl<E: From<QuantError>, F: Fn(&mut [u8], u64) -> Result<(), E>> Reader<'_, F> {
    fn value(&mut self, kind: u32) -> Result<Value, E> {
        if kind == LIST {
            return self.list(0).map(Value::List);
        }
        let (cursor, key) = (&mut *self.cursor, self.key);
        let finite = |number: f64| match number.is_finite() {
            true => Ok(Value::Float(number)),
            false => Err(damaged(format!("`{key}` is {number}, which is no number"))),
        };
        Ok(match kind {
            0 => Value::Unsigned(cursor.array::<1>(key)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(cursor.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(cursor.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(cursor.array(key)?).into()),
            4 => Value::Unsigned(cursor.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(cursor.array(key)?).into()),
            6 => finite(f32::from_le_bytes(cursor.array(key)?).into())?,
            7 => Value::Bool(cursor.array::<1>(key)?[0] != 0),
            8 => Value::Text(cursor.text(key)?),
            10 => Value::Unsigned(cursor.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(cursor.array(key)?)),
            12 => finite(f64::from_le_bytes(cursor.array(key)?))?,
            _ => return Err(self.unknown(kind)),
        })
    }

    fn list(&mut self, depth: usize) -> Result<List, E> {
        let kind = self.cursor.u32(self.key)?;
        let count = self.cursor.u64(self.key)?;
        // An item takes a byte at least, so that no list is longer than the file.
        let most = self.cursor.left().min(*self.items);
        if count > most {
            let key = self.key;
            return Err(damaged(format!("`{key}` claims {count} items, of at most {most}")).into());
        }
        *self.items -= count;
        let count = count as usize;
        Ok(match kind {
            0 => List::Unsigned(self.numbers::<1, _>(count, |bytes| u8::from_le_bytes(bytes).into())?),
            1 => List::Signed(self.numbers::<1, _>(count, |bytes| i8::from_le_bytes(bytes).into())?),
            2 => List::Unsigned(self.numbers::<2, _>(count, |bytes| u16::from_le_bytes(bytes).into())?),
            3 => List::Signed(self.numbers::<2, _>(count, |bytes| i16::from_le_bytes(bytes).into())?),
            4 => List::Unsigned(self.numbers::<4, _>(count, |bytes| u32::from_le_bytes(bytes).into())?),
            5 => List::Signed(self.numbers::<4, _>(count, |bytes| i32::from_le_bytes(bytes).into())?),
            6 => List::Float(self.numbers::<4, _>(count, |bytes| f32::from_le_bytes(bytes).into())?),
            7 => List::Bool(self.numbers::<1, _>(count, |[byte]| byte != 0)?),
            8 => List::Text((0..count).map(|_| self.cursor.text(self.key)).collect::<Result<_, E>>()?),
            LIST if depth < DEEPEST => {
                List::List((0..count).map(|_| self.list(depth + 1)).collect::<Result<_, E>>()?)
            }
            LIST => return Err(damaged(format!("`{}` has lists within {DEEPEST} lists", self.key)).into()),
            10 => List::Unsigned(self.numbers::<8, _>(count, u64::from_le_bytes)?),
            11 => List::Signed(self.numbers::<8, _>(count, i64::from_le_bytes)?),
            12 => List::Float(self.numbers::<8, _>(count, f64::from_le_bytes)?),
            _ => return Err(self.unknown(kind)),
        })
    }

    fn numbers<const N: usize, T>(
        &mut self,
        count: usize,
        convert: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, E> {
        let bytes = self.cursor.bytes((count * N) as u64, self.key)?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| convert(bytes)).collect())
    }

    fn unknown(&self, kind: u32) -> E {
        damaged(format!("`{}` has a value of type {kind}, which is none", self.key)).into()
    }
}

//! A thing, or a list of it.

use serde::de::value::SeqAccessDeserializer;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::marker::PhantomData;
use utoipa::PartialSchema;
use utoipa::openapi::schema::{AnyOf, Array, ArrayBuilder};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};

/// A text, or a list of `T`: what clients may shorten where a list would have one element.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum OneOrMany<T = String> {
    One(String),
    Many(Vec<T>),
}

impl OneOrMany<String> {
    pub(crate) fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMany::One(text) => vec![text],
            OneOrMany::Many(texts) => texts,
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrManyVisitor(PhantomData))
    }
}

struct OneOrManyVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrManyVisitor<T> {
    type Value = OneOrMany<T>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string or a list")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(OneOrMany::One(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(list)).map(OneOrMany::Many)
    }
}

/// The schema of a field that must be there.
pub(crate) fn schema<T: PartialSchema>() -> RefOr<Schema> {
    AnyOf::builder().item(String::schema()).item(Array::new(T::schema())).into()
}

/// The schema of a field that must be there, with something in it.
pub(crate) fn some_schema<T: PartialSchema>() -> RefOr<Schema> {
    AnyOf::builder()
        .item(String::schema())
        .item(ArrayBuilder::new().items(T::schema()).min_items(Some(1)))
        .into()
}

/// The schema of a field that may be absent or null.
pub(crate) fn optional_schema<T: PartialSchema>() -> RefOr<Schema> {
    let null = ObjectBuilder::new().schema_type(Type::Null);
    AnyOf::builder().item(String::schema()).item(Array::new(T::schema())).item(null).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_read_and_nothing_else() {
        let read = serde_json::from_str::<OneOrMany>;
        assert_eq!(read("\"a\"").unwrap().into_vec(), ["a"]);
        assert_eq!(read("[\"a\", \"b\"]").unwrap().into_vec(), ["a", "b"]);
        for other in ["3", "{}", "true", "[3]"] {
            assert!(read(other).is_err(), "{other}");
        }
    }
}

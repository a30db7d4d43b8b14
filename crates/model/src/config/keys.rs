//! The keys of a configuration, and what their values may be.

use epsmoe_base::text::{printable, shortened};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::fmt::Display;
use std::ops::RangeInclusive;

pub(super) const MEND: &str = "correct it or fetch the file again";
pub(super) const ACTIVATIONS: [&str; 2] = ["silu", "swish"];

// Bounds that no published model comes near, chosen so that no product of sizes overflows.
pub(super) const VOCABULARY: RangeInclusive<usize> = 1..=1 << 24;
pub(super) const WIDTH: RangeInclusive<usize> = 1..=1 << 20;
pub(super) const HEADS: RangeInclusive<usize> = 1..=4096;
pub(super) const HEAD_WIDTH: RangeInclusive<usize> = 1..=1 << 14;
pub(super) const LAYERS: RangeInclusive<usize> = 1..=1024;
pub(super) const EXPERTS: RangeInclusive<usize> = 1..=65_535;
pub(super) const POSITIONS: RangeInclusive<usize> = 1..=1 << 30;
pub(super) const EPSILON: RangeInclusive<f64> = 1e-30..=1.0;
pub(super) const FACTOR: RangeInclusive<f64> = 1e-6..=1e6;
pub(super) const THETA: RangeInclusive<f64> = 1.0..=1e12;
pub(super) const MOST_EXPERTS_IN_ALL: usize = 1 << 20;

/// Other names of a key, in the order they are tried.
pub(super) const SYNONYMS: [(&str, &[&str]); 7] = [
    ("hidden_size", &["d_model"]),
    ("num_attention_heads", &["n_heads"]),
    ("num_hidden_layers", &["n_layers"]),
    ("max_position_embeddings", &["max_seq_len"]),
    ("num_experts", &["num_local_experts", "n_routed_experts", "moe_num_experts"]),
    ("num_experts_per_tok", &["moe_topk", "moe_k"]),
    ("dtype", &["torch_dtype"]),
];

/// What is wrong and how to mend it.
pub(super) struct Wrong(pub(super) String);

pub(super) type Checked<T> = Result<T, Wrong>;

pub(super) fn wrong<T>(problem: impl Into<String>) -> Checked<T> {
    Err(Wrong(problem.into()))
}

/// Sentences about what was passed over.
pub(super) type Remarks = RefCell<Vec<String>>;

/// The keys of a section; null counts as absent.
pub(super) struct Keys<'a> {
    pub(super) map: Option<&'a Map<String, Value>>,
    /// Prefix of its keys in messages.
    pub(super) section: &'static str,
    pub(super) remarks: &'a Remarks,
}

impl<'a> Keys<'a> {
    /// A value and the name it was found under.
    pub(super) fn get(&self, key: &'static str) -> Option<(&'static str, &'a Value)> {
        let synonyms = SYNONYMS.iter().find(|(name, _)| *name == key).map_or(&[][..], |(_, others)| others);
        [&[key], synonyms]
            .concat()
            .into_iter()
            .find_map(|name| self.map?.get(name).filter(|value| !value.is_null()).map(|value| (name, value)))
    }

    /// Says what is passed over, and why that does no harm.
    pub(super) fn remark(&self, sentence: String) {
        self.remarks.borrow_mut().push(sentence);
    }

    pub(super) fn is_null(&self, key: &str) -> bool {
        self.map.and_then(|map| map.get(key)).is_some_and(Value::is_null)
    }

    pub(super) fn section(&self, key: &'static str, prefix: &'static str) -> Checked<Keys<'a>> {
        let map = self.read(key, "a JSON object", Value::as_object)?;
        Ok(Keys { map, section: prefix, remarks: self.remarks })
    }

    pub(super) fn whole(&self, key: &'static str, allowed: RangeInclusive<usize>) -> Checked<Option<usize>> {
        let what = format!("a whole number from {} to {}", allowed.start(), allowed.end());
        self.read(key, what, |value| whole(value).filter(|number| allowed.contains(number)))
    }

    pub(super) fn number(&self, key: &'static str, allowed: RangeInclusive<f64>) -> Checked<Option<f64>> {
        let what = format!("a number from {} to {}", allowed.start(), allowed.end());
        self.read(key, what, |value| value.as_f64().filter(|number| allowed.contains(number)))
    }

    pub(super) fn flag(&self, key: &'static str) -> Checked<Option<bool>> {
        self.read(key, "true or false", |value| value.as_bool().or_else(|| Some(whole(value)? != 0)))
    }

    pub(super) fn word(&self, key: &'static str) -> Checked<Option<&'a str>> {
        self.read(key, "a string", Value::as_str)
    }

    /// A list; none is an empty one.
    pub(super) fn list(&self, key: &'static str) -> Checked<&'a [Value]> {
        Ok(self.read(key, "a list", |value| value.as_array().map(Vec::as_slice))?.unwrap_or_default())
    }

    /// A word that must be one of some, if it is given.
    pub(super) fn only(&self, key: &'static str, supported: &[&str]) -> Checked<()> {
        let what = format!("`{}`, the only kind supported", supported[0]);
        let fits = |value: &Value| value.as_str().is_some_and(|word| supported.contains(&word)).then_some(());
        self.read(key, what, fits).map(|_| ())
    }

    pub(super) fn read<T>(
        &self,
        key: &'static str,
        allowed: impl Display,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Checked<Option<T>> {
        let Some((name, value)) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => {
                wrong(format!("`{}{name}` is {}, but must be {allowed}; {MEND}", self.section, shown(value)))
            }
        }
    }
}

/// A whole number, also one that was written as a float.
pub(super) fn whole(value: &Value) -> Option<usize> {
    let whole_float = || {
        // Floats beyond this are whole by lack of digits.
        value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..9e15).contains(number))
    };
    value.as_u64().or_else(|| Some(whole_float()? as u64)).and_then(|number| usize::try_from(number).ok())
}

/// A value for a message, of bearable length.
pub(super) fn shown(value: &Value) -> String {
    quoted(&value.to_string())
}

/// A word for a message, of bearable length.
pub(super) fn quoted(word: &str) -> String {
    printable(&shortened(word, 60)).into_owned()
}

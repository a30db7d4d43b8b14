//! Words that flags take.

use anyhow::{Result, bail};
use clap::ValueEnum;
use epsmoe_base::{CacheDType, DType, WireDType};
use epsmoe_fabric::Link;
use epsmoe_model::{Method, Target};
use epsmoe_plan::{Schedule, Stages, Transfer, parse_order};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;
use std::str::FromStr;

/// What was typed after `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceKind {
    /// This machine's processor.
    Cpu,
    /// Slow and plain code that checks the order of all work: the judge of the others.
    Reference,
    /// A GPU for each rank, from the first one on.
    Cuda,
    /// The GPU of that number, for all ranks.
    CudaAt(usize),
    /// A GPU for each rank if there are as many and they work, else the processor.
    Auto,
}

impl FromStr for DeviceKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(DeviceKind::Cpu),
            None if text == "reference" => Ok(DeviceKind::Reference),
            None if text == "cuda" => Ok(DeviceKind::Cuda),
            None if text == "auto" => Ok(DeviceKind::Auto),
            Some(("cuda", number)) => number
                .parse()
                .map(DeviceKind::CudaAt)
                .map_err(|_| format!("`{number}` is no number of a GPU: write cuda or cuda:0")),
            _ => Err(format!("`{text}` is no device: write cpu, cuda, cuda:N, auto or reference")),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    Auto,
    #[value(alias = "float")]
    Float32,
    Bfloat16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WireDtype {
    Auto,
    Bfloat16,
    Fp8,
}

impl WireDtype {
    /// What was asked for, of activations of `dtype`.
    ///
    /// # Errors
    /// bfloat16 rows of float32 activations.
    pub(crate) fn of(self, dtype: DType) -> Result<WireDType> {
        match self {
            WireDtype::Auto => Ok(WireDType::Auto),
            WireDtype::Fp8 => Ok(WireDType::Fp8),
            WireDtype::Bfloat16 if dtype == DType::BF16 => Ok(WireDType::BFloat16),
            WireDtype::Bfloat16 => bail!(
                "--wire-dtype bfloat16 sends activations in bfloat16, but they are in {dtype}: add --dtype bfloat16, or \
                 leave --wire-dtype out"
            ),
        }
    }
}

/// What becomes of activations before they are multiplied with weights in codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum ActivationScheme {
    Auto,
    None,
    Dynamic,
    Int8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvCacheDtype {
    Auto,
    Bfloat16,
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

impl KvCacheDtype {
    /// What was asked for, of activations of `dtype`.
    ///
    /// # Errors
    /// A cache in bfloat16 of float32 activations.
    pub(crate) fn of(self, dtype: DType) -> Result<CacheDType> {
        match self {
            KvCacheDtype::Fp8 => Ok(CacheDType::Fp8),
            KvCacheDtype::Bfloat16 if dtype != DType::BF16 => bail!(
                "--kv-cache-dtype bfloat16 caches keys and values in bfloat16, but they are in {dtype}: add --dtype bfloat16, or \
                 say --kv-cache-dtype fp8"
            ),
            KvCacheDtype::Auto | KvCacheDtype::Bfloat16 => Ok(CacheDType::Auto),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScheduleKind {
    Serial,
    Staged,
    Auto,
    TwoBatch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Gemm {
    Grouped,
    Dense,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SharedExpertPlace {
    BesideCountExchange,
    BesideFirstDispatch,
    BesideLastCombine,
    Alone,
}

/// A schedule to compare: `serial`, `two-batch`, `auto`, `staged:4` or `staged:4:ORDER`.
#[derive(Clone, Debug)]
pub(crate) struct ContenderSpec {
    pub(crate) schedule: Schedule,
    pub(crate) stages: Option<Stages>,
    pub(crate) order: Option<Vec<Transfer>>,
}

impl FromStr for ContenderSpec {
    type Err = epsmoe_plan::PlanError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.splitn(3, ':');
        let schedule = words.next().unwrap_or_default().parse()?;
        let stages = words.next().map(str::parse).transpose()?;
        let order = words.next().map(parse_order).transpose()?;
        Ok(ContenderSpec { schedule, stages, order })
    }
}

/// `d0 d1 c0 c1`.
#[derive(Clone, Debug)]
pub(crate) struct TransferOrder(pub(crate) Vec<Transfer>);

impl FromStr for TransferOrder {
    type Err = epsmoe_plan::PlanError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_order(text).map(TransferOrder)
    }
}

/// `10GB/s,50us`, or `none`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkSpeed(pub(crate) Option<Link>);

impl FromStr for LinkSpeed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" { Ok(LinkSpeed(None)) } else { text.parse().map(|link| LinkSpeed(Some(link))) }
    }
}

/// One rank of a world whose other ranks are not there: `0/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OneOf {
    pub(crate) rank: usize,
    pub(crate) size: usize,
}

impl FromStr for OneOf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers =
            text.split_once('/').and_then(|(rank, size)| Some((rank.parse().ok()?, size.parse().ok()?)));
        match numbers {
            Some((rank, size)) if rank < size && (2..=1024).contains(&size) => Ok(OneOf { rank, size }),
            _ => {
                Err(format!("`{text}` is no rank of a world: write which of how many, at least 2, like 0/8"))
            }
        }
    }
}

impl fmt::Display for OneOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.rank, self.size)
    }
}

/// How weights are coded, as it was typed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Quantisation {
    /// Whatever the checkpoint says.
    #[default]
    Auto,
    /// They become bfloat16, whatever the checkpoint says.
    None,
    /// The checkpoint must be quantised so.
    Method(Method),
    /// Plain weights are quantised so when they are loaded; a checkpoint that is quantised must be so, where that is a method.
    OnLine(Target),
}

impl FromStr for Quantisation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Quantisation::Auto),
            "none" | "dequantise" | "dequantize" => Ok(Quantisation::None),
            _ => {
                let on_line = Target::named(text).map(Quantisation::OnLine);
                on_line.or_else(|| Method::named(text).map(Quantisation::Method)).ok_or_else(|| {
                    let mut names: Vec<String> = Method::ALL.iter().map(Method::to_string).collect();
                    names.extend(Target::ALL.iter().map(Target::to_string).filter(|name| name != "mxfp4"));
                    format!("`{text}` is not known: write auto, none, {}", names.join(", "))
                })
            }
        }
    }
}

/// `5,6,7` or `5 6 7`.
#[derive(Clone, Debug)]
pub(crate) struct TokenIds(pub(crate) Vec<u32>);

impl FromStr for TokenIds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = || text.split(',').map(str::trim);
        if parts().count() > 1 && parts().any(str::is_empty) {
            return Err("there is a comma without an id beside it: write ids like 5,6,7".into());
        }
        let words = parts().flat_map(str::split_whitespace);
        let id = |word: &str| {
            word.parse().map_err(|_| format!("`{word}` is not a token id: write ids like 5,6,7"))
        };
        words.map(id).collect::<Result<_, _>>().map(TokenIds)
    }
}

/// An object of JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct JsonObject(pub(crate) Map<String, Value>);

impl FromStr for JsonObject {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let map = serde_json::from_str(text).map(JsonObject);
        map.map_err(|error| format!("this is no JSON object ({error}): write one like {{\"name\": 4}}"))
    }
}

/// A number of new tokens, or `-1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenLimit {
    /// As many as the context has room for.
    Context,
    /// So many.
    At(usize),
}

impl FromStr for TokenLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "-1" => Ok(TokenLimit::Context),
            _ => text.parse().map(TokenLimit::At).map_err(|_| {
                "must be a whole number of tokens, or -1 for as many as the context has room for".into()
            }),
        }
    }
}

/// Bytes: `500MB`, `8GiB`, and as vLLM writes them, `8g` (decimal) and `8G` (binary).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteSize(pub(crate) u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) =
            text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
        let (letter, base) = match (unit.strip_suffix("iB"), unit.strip_suffix(['B', 'b'])) {
            (Some(letter), _) => (letter, 1024f64),
            (None, Some(letter)) => (letter, 1000.0),
            (None, None) if unit.chars().all(|c| c.is_ascii_uppercase()) => (unit, 1024.0),
            (None, None) => (unit, 1000.0),
        };
        let power = ["", "k", "m", "g", "t"].iter().position(|known| letter.eq_ignore_ascii_case(known));
        let number: Option<f64> = number.trim().parse().ok();
        let size = number.zip(power).map(|(number, power)| number * base.powi(power as i32));
        size.filter(|size| (1.0..u64::MAX as f64).contains(size))
            .map(|size| ByteSize(size as u64))
            .ok_or_else(|| format!("`{text}` is not a size: write it like 5GB or 8GiB"))
    }
}

/// A share of something.
pub(crate) fn share(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| *number > 0.0 && *number <= 1.0);
    number.ok_or_else(|| "must be a number above 0, at most 1".to_owned())
}

/// An origin, or a JSON list of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origins(pub(crate) Vec<String>);

impl FromStr for Origins {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if !text.trim_start().starts_with('[') {
            return Ok(Origins(vec![text.to_owned()]));
        }
        let list = serde_json::from_str(text);
        list.map(Origins).map_err(|error| format!("write [\"http://localhost:3000\"]: {error}"))
    }
}

/// `auto`, `none`, or a parser by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parsers<T> {
    Auto,
    None,
    Named(T),
}

impl<T: FromStr> FromStr for Parsers<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        match text {
            "auto" => Ok(Parsers::Auto),
            "none" => Ok(Parsers::None),
            name => name.parse().map(Parsers::Named),
        }
    }
}

pub(crate) fn bounded(least: usize, most: usize) -> impl Fn(&str) -> Result<usize, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|number| (least..=most).contains(number));
        number.ok_or_else(|| format!("must be a whole number from {least} to {most}"))
    }
}

/// How many of the most likely tokens; both `0` and `-1` are all of them.
pub(crate) fn top_k(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(0),
        _ => text.parse().map_err(|_| "must be a whole number of tokens, or 0 or -1 for all of them".into()),
    }
}

pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| *number > 0.0 && *number <= 1e6);
    number.ok_or_else(|| "must be a number of seconds, above 0 and at most 1000000".into())
}

pub(crate) fn exponent(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| (0.0..=5.0).contains(number));
    number.ok_or_else(|| "must be a number from 0 to 5".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_several_ranks() {
        let one: OneOf = "3/8".parse().unwrap();
        assert_eq!((one, one.to_string()), (OneOf { rank: 3, size: 8 }, "3/8".to_owned()));
        for wrong in ["", "0", "8/8", "0/1", "-1/8", "0/9999", "0/8/2"] {
            assert!(wrong.parse::<OneOf>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn words_of_the_command_line() {
        assert_eq!("5, 6 7".parse::<TokenIds>().unwrap().0, [5, 6, 7]);
        assert!("5,x".parse::<TokenIds>().is_err());
        for (text, bytes) in [
            ("4096", 4096),
            ("12B", 12),
            ("5GB", 5_000_000_000),
            ("500mb", 500_000_000),
            ("500 MB", 500_000_000),
            ("8GiB", 8 << 30),
            ("8G", 8 << 30),
            ("25.6k", 25_600),
            ("1K", 1024),
            ("0.5TiB", 1 << 39),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GB", "0", "-1", "5XB", "5GiBs", "NaN", "inf", "1e30", "5 G B", "99999999999TB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!("cuda".parse(), Ok(DeviceKind::Cuda));
        assert_eq!("cuda:3".parse(), Ok(DeviceKind::CudaAt(3)));
        assert!("cuda:x".parse::<DeviceKind>().is_err() && "gpu".parse::<DeviceKind>().is_err());
        assert_eq!("{\"a\": {\"b\": 2}}".parse::<JsonObject>().unwrap().0["a"]["b"], 2);
        assert!("[1]".parse::<JsonObject>().is_err() && "{".parse::<JsonObject>().is_err());
        assert_eq!("-1".parse(), Ok(TokenLimit::Context));
        assert_eq!("7".parse(), Ok(TokenLimit::At(7)));
        assert!("-2".parse::<TokenLimit>().is_err() && top_k("-2").is_err());
        assert_eq!([top_k("-1"), top_k("0"), top_k("5")], [Ok(0), Ok(0), Ok(5)]);
        assert!(seconds("0").is_err() && seconds("nan").is_err() && seconds("2.5").is_ok());
    }
}

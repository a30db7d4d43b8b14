//! How weights are coded.
//!
//! A checkpoint keeps a matrix `[N, K]` as plain numbers, or as codes of four or eight bits with scales. This crate
//! tells which ([`CodedTensor::detect`]), decodes any part of it ([`CodedTensor::decode`]), hands out its codes in one order
//! ([`CodedTensor::codes`]), and codes plain numbers ([`Target::encode`]); it knows neither models nor devices.
//!
//! Three things are kept apart: what a code means ([`Element`]), which block of the matrix shares a scale
//! ([`Blocks`]), and where in the file the code is ([`Order`]). FP8, MXFP4, NVFP4, INT4 and INT8, AWQ and GPTQ are
//! combinations of them. GGUF's blocks ([`GgmlType`]) have scales within.

mod codes;
mod coding;
mod config;
mod decode;
pub mod element;
mod encode;
mod error;
mod fold;
mod ggml;
pub mod gguf;
mod stored;
mod transposed;

pub use codes::{Affine, Code, Codes, Format, Scale};
pub use coding::{Blocks, CodedTensor, Coding, Element, Hints, Order};
pub use config::{Activations, Method, QuantConfig};
pub use decode::Value;
pub use encode::{CodingError, Encoded, Target};
pub use error::{HeaderError, QuantError};
pub use ggml::GgmlType;
pub use stored::{Rows, StoredTensor, StoredTensors, StoredType};

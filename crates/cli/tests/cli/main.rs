//! The program as a user meets it: words in, text out.

mod commands;
mod common;
mod errors;

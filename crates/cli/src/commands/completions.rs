//! `epsmoe completions`.

use crate::args::{self, CompletionsArgs};
use crate::output;
use anyhow::Result;

/// Prints a completion script.
pub(crate) fn run(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut args::command(), "epsmoe", &mut script);
    output::show(&String::from_utf8_lossy(&script))
}

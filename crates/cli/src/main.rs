//! The program `epsmoe`: Mixture-of-Experts inference with an expert pipeline.
//!
//! In reading order: `args` (what was typed), `launch` (which process of a world this is), `setup` (what
//! it means: a model, a world of ranks, engines), `prompt`
//! (texts and conversations), one file per command in `commands`. Beside them: `locate` (where a model is), `watch` (how far loading is), `tensors` and `unfinished` (writing
//! checkpoints), `output` (what goes to the terminal and to files), `machine` and `memory` (what this computer is, and
//! what of it this process may use), `client` (asking a server).

mod args;
mod client;
mod commands;
mod launch;
mod locate;
mod machine;
mod memory;
mod output;
mod prompt;
mod report;
mod setup;
mod tensors;
mod unfinished;
mod watch;

use args::{BenchCommand, Cli, Command};
use clap::FromArgMatches;
use launch::Launch;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

fn main() -> ExitCode {
    let typed: Vec<_> = args::spelled_out(std::env::args_os()).collect();
    let program = args::overruling(args::command(), &typed);
    let typed = match args::with_config_file(&program, typed) {
        Ok(typed) => typed,
        Err(problem) => {
            output::report(&problem);
            return ExitCode::FAILURE;
        }
    };
    let matches = program.get_matches_from(typed);
    let mut cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if let Some(args) = cli.command.run_args() {
        args.flags = args::flags_of(&matches);
    }
    let panic = output::remember_panics();
    match catch_unwind(AssertUnwindSafe(|| run(&mut cli.command))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) if error.is::<output::Told>() => ExitCode::FAILURE,
        Ok(Err(error)) => {
            output::report(&output::flattened(&error));
            ExitCode::FAILURE
        }
        Err(_) => {
            output::report(&panic.sentence());
            ExitCode::FAILURE
        }
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    if let Some(args) = command.run_args()
        && let Some(launch) = Launch::find(args)?.filter(|launch| launch.rank > 0)
    {
        return commands::worker::instead_of(args, &launch);
    }
    match &*command {
        Command::Generate(args) => commands::generate::run(args),
        Command::Serve(args) => commands::serve::run(args),
        Command::Logits(args) => commands::logits::run(args),
        Command::Tokenize(args) => commands::tokenize::run(args),
        Command::Chat(args) => commands::chat::run(args),
        Command::Bench(args) => match &args.command {
            Some(BenchCommand::Serve(args)) => commands::bench_serve::run(args),
            Some(BenchCommand::Layer(args)) => commands::bench::layer::run(args),
            None => commands::bench::run(args),
        },
        Command::Worker(args) => commands::worker::run(args),
        Command::Models => commands::models::run(),
        Command::Plan(args) => commands::plan::run(args),
        Command::Profile(args) => commands::profile::run(args),
        Command::Synth(args) => commands::synth::run(args),
        Command::Convert(args) => commands::convert::run(args),
        Command::Eval(args) => commands::eval::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Kernels(args) => commands::kernels::run(args),
        Command::Completions(args) => commands::completions::run(args),
    }
}

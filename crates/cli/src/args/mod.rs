//! What was typed. No flag means anything here; `setup` and the commands say what it means.
//!
//! One file for each group of commands: `run` (what every command that runs a model takes), `generate` (prompts and
//! sampling), `serve` and `config_file` (flags that stand in a file), `client` (of a server), `bench`, `plan` (predictions and profiles), `tools` (everything else), `world` (ranks that are processes); `values` has the words that flags
//! take.

mod bench;
mod client;
mod config_file;
mod eval;
mod generate;
mod plan;
mod run;
mod serve;
mod tools;
mod values;
mod world;

pub(crate) use bench::{BenchArgs, BenchCommand, BenchLayerArgs};
pub(crate) use client::{BenchServeArgs, ChatArgs, Dataset, Goal, GoalFigure, ServerArgs};
pub(crate) use config_file::with_config_file;
pub(crate) use eval::{EvalArgs, EvalCommand, PerplexityArgs};
pub(crate) use generate::{GenerateArgs, LogitsArgs, SamplingArgs, TextArgs, TokenizeArgs};
pub(crate) use plan::{PlanArgs, ProfileArgs};
pub(crate) use run::{ModelArgs, RunArgs};
pub(crate) use serve::{CacheArgs, LogFormat, MetricsCompat, ServeArgs};
pub(crate) use tools::{
    CompletionsArgs, ConvertArgs, DoctorArgs, KernelsArgs, KernelsCommand, SynthArgs, WarmArgs,
};
pub(crate) use values::{
    ActivationScheme, ContenderSpec, DeviceKind, Dtype, Gemm, OneOf, Parsers, Quantisation, ScheduleKind,
    SharedExpertPlace, TokenLimit,
};
pub(crate) use world::{ExecutorBackend, FabricKind, WorkerArgs, WorldArgs};

use clap::builder::ArgPredicate;
use clap::{Arg, ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Id, Parser, Subcommand};
use std::ffi::OsString;

const EXAMPLES: &str = "\
Examples:
  epsmoe bench                                       schedules side by side, no download needed
  epsmoe generate --model ./Qwen3-30B-A3B --chat --prompt 'Why is the sky blue?'
  epsmoe generate --model preset:mixtral-mini --ids 5,6,7 --max-tokens 8 --json
  epsmoe serve ./Qwen3-30B-A3B                       an OpenAI-compatible server
  epsmoe logits --model ./model --ids 5,6,7 --out logits.safetensors -dp 2 -ep --stages 4
  epsmoe doctor                                      what works on this machine

Every flag can also be set by the environment variable that its help names; the flag wins.";

/// Mixture-of-Experts inference with an expert pipeline.
///
/// The experts of a rank are cut into stages; while one stage computes, the rows of the next travel in and the
/// results of the last travel back. Ranks are groups of threads of this process, or processes.
#[derive(Debug, Parser)]
#[command(name = "epsmoe", version, after_help = EXAMPLES, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Continue a prompt
    Generate(Box<GenerateArgs>),
    /// Serve a model to OpenAI's clients
    #[command(mut_arg("model", |model| model.long(None).index(1).value_name("MODEL")))]
    Serve(Box<ServeArgs>),
    /// Talk to a server
    Chat(ChatArgs),
    /// Write the logits of every token of a prompt to a file
    Logits(Box<LogitsArgs>),
    /// Show the tokens of a text
    Tokenize(TokenizeArgs),
    /// Compare schedules: serial, two micro-batches, stages, and what the cost model chooses
    #[command(mut_arg("model", |model| model.required(false).default_value("preset:deepseek-v2-mini")))]
    #[command(mut_arg("data_parallel_size", |size| {
        size.default_value("2").default_value_if("device", ArgPredicate::Equals("cuda".into()), "1")
    }))]
    #[command(mut_arg("enable_expert_parallel", |enable| enable.default_value("true")))]
    #[command(mut_arg("link", |link| {
        link.default_value("100MB/s,50us").default_value_if("device", ArgPredicate::Equals("cuda".into()), "none")
    }))]
    Bench(Box<BenchArgs>),
    /// Be one of the other ranks of a command that runs a model in several processes
    Worker(WorkerArgs),
    /// List the models that are supported, and how that is tested
    Models,
    /// Predict strategies and schedules on a machine that need not be here
    Plan(PlanArgs),
    /// Measure what MoE layers cost on this machine
    Profile(ProfileArgs),
    /// Write a checkpoint of random weights
    Synth(SynthArgs),
    /// Write a checkpoint with its weights in codes of eight or four bits
    Convert(ConvertArgs),
    /// Say how well a model predicts a text
    Eval(EvalArgs),
    /// Say what this machine is and what works on it
    Doctor(DoctorArgs),
    /// Compile GPU kernels ahead of their first use
    Kernels(KernelsArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

impl Command {
    /// What a command takes that runs a model.
    pub(crate) fn run_args(&mut self) -> Option<&mut RunArgs> {
        match self {
            Command::Generate(args) => Some(&mut args.run),
            Command::Serve(args) => Some(&mut args.run),
            Command::Logits(args) => Some(&mut args.run),
            Command::Bench(args) if args.command.is_none() => Some(&mut args.run),
            Command::Eval(EvalArgs { command: EvalCommand::Perplexity(args) }) => Some(&mut args.run),
            _ => None,
        }
    }
}

/// The flags of a command that runs a model, each with its value, wherever that is from, for ranks that are other
/// processes; without those that say which process this is.
pub(crate) fn flags_of(matches: &ArgMatches) -> Vec<String> {
    let mut matches = matches;
    while let Some((_, deeper)) = matches.subcommand() {
        matches = deeper;
    }
    let of_process = WorldArgs::augment_args(clap::Command::new("world"));
    let is_of_process = |arg: &Arg| of_process.get_arguments().any(|other| other.get_id() == arg.get_id());
    let mut flags = Vec::new();
    for arg in RunArgs::augment_args(clap::Command::new("run")).get_arguments() {
        let values = matches.try_get_raw(arg.get_id().as_str()).ok().flatten();
        if let (Some(long), Some(values)) = (arg.get_long().filter(|_| !is_of_process(arg)), values) {
            flags.extend(values.map(|value| format!("--{long}={}", value.to_string_lossy())));
        }
    }
    flags
}

/// What such flags mean; nothing else does, no variable either.
pub(crate) fn run_args(flags: &[String]) -> anyhow::Result<RunArgs> {
    let program = RunArgs::augment_args(clap::Command::new("worker").no_binary_name(true)).mut_args(|arg| {
        let arg = if matches!(arg.get_action(), ArgAction::SetTrue) { switch(arg) } else { arg };
        arg.env(None::<&'static str>)
    });
    let mut args = RunArgs::from_arg_matches(&program.try_get_matches_from(flags)?)?;
    args.flags = flags.to_vec();
    Ok(args)
}

/// The command line, where every flag has an environment variable: `EPSMOE_` and its name, with the command's name
/// between the two where only one command has it. What is on or off can be switched off too, by `--flag=false`.
pub(crate) fn command() -> clap::Command {
    Cli::command().mut_subcommands(|subcommand| {
        let command = subcommand.get_name().to_uppercase();
        subcommand.mut_args(|arg| {
            let arg = if matches!(arg.get_action(), ArgAction::SetTrue) { switch(arg) } else { arg };
            // A number that is too small is told so, and not taken for a flag.
            let arg = arg.allow_negative_numbers(true);
            match (arg.get_long(), arg.get_env()) {
                (Some(long), None) => {
                    let flag = long.replace('-', "_").to_uppercase();
                    arg.env(format!("EPSMOE_{command}_{flag}"))
                }
                _ => arg,
            }
        })
    })
}

fn switch(arg: Arg) -> Arg {
    let off = arg.get_default_values().is_empty();
    let arg = arg.action(ArgAction::Set).num_args(0..=1).require_equals(true).default_missing_value("true");
    let arg = arg.value_name("true|false");
    if off { arg.default_value("false").hide_default_value(true) } else { arg }
}

/// Flags that say the same in other words, or that one of the other decides, beside those that exclude each other.
const CONTRARY: [(&str, &str); 3] =
    [("schedule", "stages"), ("schedule", "transfer_order"), ("schedule", "shared_expert")];

/// The command line without the variables of flags that contradict flags that were typed: what is typed wins.
pub(crate) fn overruling(program: clap::Command, typed: &[OsString]) -> clap::Command {
    let is_typed = |arg: &Arg| {
        let names = arg.get_long_and_visible_aliases().into_iter().flatten();
        let names: Vec<String> = names
            .chain(arg.get_all_aliases().into_iter().flatten())
            .map(|name| format!("--{name}"))
            .collect();
        typed.iter().filter_map(|word| word.to_str()).any(|word| {
            let flag = word.split('=').next().unwrap_or_default();
            names.iter().any(|name| name == flag)
        })
    };
    program.mut_subcommands(|subcommand| {
        let on_line: Vec<&Arg> = subcommand.get_arguments().filter(|arg| is_typed(arg)).collect();
        let excluded = on_line.iter().flat_map(|arg| {
            let own = subcommand.get_arg_conflicts_with(arg).into_iter();
            let others = subcommand.get_arguments().filter(|other| {
                subcommand.get_arg_conflicts_with(other).iter().any(|it| it.get_id() == arg.get_id())
            });
            let contrary = CONTRARY.iter().flat_map(|pair| [*pair, (pair.1, pair.0)]);
            let contrary = contrary.filter(|pair| arg.get_id() == pair.0).map(|pair| Id::from(pair.1));
            own.chain(others).map(|arg| arg.get_id().clone()).chain(contrary).collect::<Vec<_>>()
        });
        let excluded: Vec<Id> = excluded.filter(|id| on_line.iter().all(|arg| arg.get_id() != id)).collect();
        subcommand.mut_args(
            |arg| {
                if excluded.contains(arg.get_id()) { arg.env(None::<&'static str>) } else { arg }
            },
        )
    })
}

/// Other engines have flags of two letters behind one dash, also with their value behind `=`, and take underscores for
/// the dashes of a flag.
pub(crate) fn spelled_out(args: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    args.map(|arg| {
        let Some(text) = arg.to_str() else { return arg };
        let (flag, value) = text.split_at(text.find('=').unwrap_or(text.len()));
        match flag {
            "-dp" | "-tp" | "-ep" => format!("-{flag}{value}").into(),
            _ if flag.starts_with("--") && flag.contains('_') => (flag.replace('_', "-") + value).into(),
            _ => arg,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    /// Whatever a command was told, and by whatever, another process is told the same.
    #[test]
    fn flags_say_the_same_to_another_process() {
        for words in [
            "logits --ids 5 --out x --model m -dp 4 -ep --stages 3,5 --link 10GB/s,50us --nnodes 2 --quantization none",
            "serve m --device reference --enable-expert-parallel=false --hf-overrides {\"a\":4} --master-addr here",
            "bench",
            "eval perplexity text.txt --model m --threads 3 --timeout 7",
        ] {
            let typed = std::iter::once("epsmoe").chain(words.split_whitespace()).map(OsString::from);
            let matches = command().get_matches_from(spelled_out(typed));
            let mut cli = Cli::from_arg_matches(&matches).unwrap();
            let flags = flags_of(&matches);
            let args = cli.command.run_args().unwrap();
            args.flags.clone_from(&flags);
            let told = run_args(&flags).unwrap();
            let world = told.world.clone();
            assert_eq!(
                format!("{told:?}"),
                format!("{:?}", RunArgs { world, ..std::mem::replace(args, run_args(&flags).unwrap()) })
            );
            assert!(
                flags.iter().all(|flag| !flag.contains("nnodes") && !flag.contains("master")),
                "{flags:?}"
            );
        }
    }

    #[test]
    fn spellings_of_other_engines() {
        let typed =
            ["-dp", "-tp=2", "-ep", "--max_model_len=a_b", "--max_tokens", "a_b", "-x_y", "--", "--stop=_"];
        let meant = [
            "--dp",
            "--tp=2",
            "--ep",
            "--max-model-len=a_b",
            "--max-tokens",
            "a_b",
            "-x_y",
            "--",
            "--stop=_",
        ];
        assert!(spelled_out(typed.into_iter().map(OsString::from)).eq(meant.map(OsString::from)));
    }

    #[test]
    fn every_flag_has_a_variable_of_its_own() {
        for subcommand in command().get_subcommands() {
            let mut variables = std::collections::BTreeSet::new();
            for arg in subcommand.get_arguments().filter(|arg| arg.get_long().is_some()) {
                let variable = arg.get_env().unwrap_or_else(|| panic!("{arg} has none"));
                assert!(variables.insert(variable), "{arg} shares its variable");
            }
        }
    }
}

//! `--config FILE`: a YAML file in which each key is a flag of the command. It becomes flags behind those that were typed,
//! so that everything after this knows only flags.

use clap::Command;
use epsmoe_base::env;
use serde_json::{Map, Value};
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The command whose flags may stand in a file.
const COMMAND: &str = "serve";

/// Largest file, in bytes.
const LIMIT: u64 = 1 << 20;

/// Adds the flags of a configuration file, if the command line names one. What was typed and what a variable says go
/// before the file.
pub(crate) fn with_config_file(program: &Command, mut args: Vec<OsString>) -> Result<Vec<OsString>, String> {
    // Other commands have a --config that is a model's.
    let command =
        program.find_subcommand(COMMAND).filter(|_| args.get(1).is_some_and(|name| name == COMMAND));
    let Some(command) = command else { return Ok(args) };
    let typed: Vec<&str> = args.iter().skip(2).filter_map(|arg| arg.to_str()).collect();
    let Some(file) = value_of(&typed, "config") else { return Ok(args) };
    let problem = |problem: String| format!("--config {file}: {problem}");
    let flags = flags(command, &typed, &read(Path::new(file)).map_err(problem)?).map_err(problem)?;
    args.extend(flags.into_iter().map(OsString::from));
    Ok(args)
}

/// What was typed after `--flag`, or after `--flag=`.
fn value_of<'a>(typed: &[&'a str], flag: &str) -> Option<&'a str> {
    let at = typed.iter().position(|word| is_flag(word, flag))?;
    match typed[at].split_once('=') {
        Some((_, value)) => Some(value),
        None => typed.get(at + 1).copied(),
    }
}

fn is_flag(word: &str, flag: &str) -> bool {
    word.strip_prefix("--").is_some_and(|word| word.split('=').next() == Some(flag))
}

fn read(file: &Path) -> Result<Map<String, Value>, String> {
    let metadata = std::fs::metadata(file).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("this is no plain file".into());
    }
    let mut text = String::new();
    let read = File::open(file).and_then(|file| file.take(LIMIT + 1).read_to_string(&mut text));
    if read.map_err(|error| error.to_string())? as u64 > LIMIT {
        return Err(format!("it has more than {LIMIT} bytes"));
    }
    serde_saphyr::from_str(&text).map_err(|error| error.to_string())
}

/// The keys as flags, without those that are given already.
fn flags(command: &Command, typed: &[&str], keys: &Map<String, Value>) -> Result<Vec<String>, String> {
    let mut flags = Vec::new();
    for (key, value) in keys {
        let name = key.replace('_', "-");
        let known = command.get_arguments().find(|arg| {
            let aliases = arg.get_all_aliases().unwrap_or_default();
            let positional = arg.is_positional() && arg.get_id().as_str() == name;
            positional || arg.get_long() == Some(&name) || aliases.contains(&name.as_str())
        });
        let Some(arg) = known.filter(|_| name != "config") else {
            return Err(format!("`{key}` is no flag of {}", command.get_name()));
        };
        let names = arg.get_long_and_visible_aliases().unwrap_or_default();
        let aliases = arg.get_all_aliases().unwrap_or_default();
        let is_typed = if arg.is_positional() {
            typed.first().is_some_and(|word| !word.starts_with('-'))
        } else {
            names.iter().chain(&aliases).any(|name| typed.iter().any(|word| is_flag(word, name)))
        };
        let in_environment = arg.get_env().and_then(|name| env::text(name.to_str()?)).is_some();
        if is_typed || in_environment {
            continue;
        }
        let values = values(key, value)?;
        if arg.is_hide_env_values_set() {
            check_secrets(key, &values)?;
        }
        for value in values {
            match value {
                value if arg.is_positional() => flags.push(plain(value)),
                value => flags.push(format!("--{name}={}", plain(value))),
            }
        }
    }
    Ok(flags)
}

/// A value, the values of a list, or nothing for null.
fn values<'a>(key: &str, value: &'a Value) -> Result<Vec<&'a Value>, String> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Object(_) => Err(format!("`{key}` is a map, but flags have values or lists of them")),
        Value::Array(list) => {
            list.iter().map(|value| values(key, value)).collect::<Result<Vec<_>, _>>().map(|all| all.concat())
        }
        value => Ok(vec![value]),
    }
}

/// A secret that YAML takes for a number would be another one, and without any everybody is let in.
fn check_secrets(key: &str, values: &[&Value]) -> Result<(), String> {
    if values.is_empty() {
        return Err(format!("`{key}` has no value: write one, or leave the key out"));
    }
    match values.iter().all(|value| value.is_string()) {
        true => Ok(()),
        false => Err(format!("`{key}` is a number or a truth value to YAML: write it in quotes")),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(file: &str, typed: &[&str]) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serve.yaml");
        std::fs::write(&path, file).unwrap();
        let config = ["epsmoe", "serve", "--config", path.to_str().unwrap()];
        let args = config.iter().chain(typed).map(OsString::from).collect();
        let args = with_config_file(&super::super::command(), args)?;
        Ok(args[config.len() + typed.len()..].iter().map(|arg| arg.to_str().unwrap().to_owned()).collect())
    }

    #[test]
    fn keys_become_flags() {
        let file = "model: ./model\nport: 9000\napi-key: [a, b]\nenable_expert_parallel: true\nexplain: false\nuds: null\n";
        let flags = expanded(file, &[]).unwrap();
        assert_eq!(
            flags,
            [
                "./model",
                "--port=9000",
                "--api-key=a",
                "--api-key=b",
                "--enable-expert-parallel=true",
                "--explain=false"
            ]
        );
    }

    #[test]
    fn what_was_typed_goes_first() {
        assert_eq!(
            expanded("port: 9000\ndp: 2\n", &["--port=1", "--data-parallel-size", "4"]).unwrap(),
            [""; 0]
        );
    }

    #[test]
    fn wrong_files_are_told() {
        for secret in ["api-key:\n", "api-key: []\n"] {
            assert!(expanded(secret, &[]).unwrap_err().contains("`api-key` has no value"), "{secret}");
        }
        for secret in ["api-key: 007\n", "api-key: [a, 1e5]\n", "api-key: true\n"] {
            assert!(expanded(secret, &[]).unwrap_err().contains("quotes"), "{secret}");
        }
        assert!(expanded("colour: red\n", &[]).unwrap_err().contains("`colour` is no flag of serve"));
        assert!(expanded("port: {a: 1}\n", &[]).unwrap_err().contains("`port` is a map"));
        assert!(expanded("port: [", &[]).is_err());
        let missing = ["epsmoe", "serve", "--config=/nowhere.yaml"].map(OsString::from).to_vec();
        assert!(with_config_file(&super::super::command(), missing).is_err());
    }
}

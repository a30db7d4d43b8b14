//! What goes to the terminal and to files.

use anyhow::{Context, Result};
use epsmoe_base::files;
use epsmoe_base::text::{is_obeyed, printable, shortened};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fmt;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Writes text to standard output at once.
pub(crate) fn show(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// Writes a line to standard output.
pub(crate) fn show_line(line: impl fmt::Display) -> Result<()> {
    show(&format!("{line}\n"))
}

/// Writes text of a model to standard output at once: to a terminal without what it would obey.
pub(crate) fn show_text(text: &str) -> Result<()> {
    if !io::stdout().is_terminal() {
        return show(text);
    }
    let shown = text.split_inclusive(['\n', '\t']).map(|part| {
        let end = part.len() - usize::from(part.ends_with(['\n', '\t']));
        printable(&part[..end]) + &part[end..]
    });
    show(&shown.collect::<String>())
}

/// Writes a line of JSON to standard output, with nothing in it that a terminal obeys.
pub(crate) fn show_json(value: &impl Serialize) -> Result<()> {
    let mut line = String::new();
    for c in serde_json::to_string(value)?.chars() {
        // Only strings can hold any, and JSON itself writes the first 32 as escapes.
        match is_obeyed(c) {
            true => line += &format!("\\u{:04x}", u32::from(c)),
            false => line.push(c),
        }
    }
    show_line(line)
}

/// Longest message in characters; what a file holds may be quoted in it.
const LONGEST: usize = 4000;

/// Writes a remark that is no result to standard error.
pub(crate) fn remark(text: impl fmt::Display) {
    for line in text.to_string().lines() {
        // Nobody reads where standard error is closed.
        let _ = writeln!(io::stderr(), "{}", printable(&shortened(line, LONGEST)));
    }
}

/// Says what was passed over, and goes on.
pub(crate) fn warn(message: impl fmt::Display) {
    remark(one_line(&format!("warning: {message}")));
}

/// Says in one line why the program ends without a result.
pub(crate) fn report(message: &str) {
    remark(one_line(&format!("error: {message}")));
}

fn one_line(message: &str) -> String {
    message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// An error and its causes in one line; a cause that a message already tells is not told again.
pub(crate) fn flattened(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |told, cause| {
        let cause = cause.to_string();
        match told.as_str() {
            "" => cause,
            _ if told.contains(&cause) => told,
            _ => format!("{told}: {cause}"),
        }
    })
}

/// Why the program ends has been told by another process.
#[derive(Debug)]
pub(crate) struct Told;

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("rank 0 has told why")
    }
}

impl std::error::Error for Told {}

/// Whether the reader of the output has seen enough.
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// The last panic of this process.
#[derive(Clone)]
pub(crate) struct LastPanic(Arc<Mutex<String>>);

impl LastPanic {
    /// Why the program ends: the system has no more of something, or it is a bug.
    pub(crate) fn sentence(&self) -> String {
        sentence(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn sentence(panic: &str) -> String {
    let says = |words: &[&str]| words.iter().any(|word| panic.contains(word));
    if says(&["out of memory", "memory allocation", "OutOfMemory", "Cannot allocate memory"]) {
        return "the system gave this process no more memory: use a smaller model, shorter contexts or fewer \
                sequences, or raise the limit (`ulimit -v`, or that of the control group)"
            .into();
    }
    if says(&["WouldBlock", "Resource temporarily unavailable", "failed to spawn thread"]) {
        return "the system gave this process no more threads: use fewer --threads or ranks, or raise the limit \
                (`ulimit -u`, or that of the control group)"
            .into();
    }
    format!("{panic}. This is a bug: please report it with the command that led here")
}

/// Keeps panics from the terminal: those of ranks become faults, which say what happened; any other is reported at
/// the end.
pub(crate) fn remember_panics() -> LastPanic {
    let last = LastPanic(Arc::default());
    let remembered = last.clone();
    std::panic::set_hook(Box::new(move |panic| {
        let what = panic.payload_as_str().unwrap_or("no message");
        let place = panic.location().map(|place| format!(" at {place}")).unwrap_or_default();
        *remembered.0.lock().unwrap_or_else(PoisonError::into_inner) = format!("panicked{place}: {what}");
    }));
    last
}

/// Refuses a place where no file can be, before anything is computed for it.
pub(crate) fn check_place(path: &Path) -> Result<()> {
    files::check_place(path).with_context(|| cannot_write(path))
}

/// Writes a whole file or none.
pub(crate) fn write_file(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    files::write_whole(path, write).with_context(|| cannot_write(path))
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

/// A line that says what is being done for how long, where standard error is a terminal.
pub(crate) fn spinner(what: impl Into<String>) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what.into());
    bar.set_style(style("{spinner} {msg} ({elapsed})"));
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// A bar of bytes.
pub(crate) fn byte_bar(what: impl Into<String>, bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes).with_message(what.into());
    bar.set_style(style(
        "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
    ));
    bar
}

/// A bar of steps.
pub(crate) fn step_bar(what: impl Into<String>, steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64).with_message(what.into());
    bar.set_style(style("{msg} {wide_bar} {pos}/{len}, {elapsed}"));
    bar
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_the_system_are_no_bugs() {
        for (panic, words) in [
            ("panicked at pack.rs:196:72: out of memory", "no more memory"),
            (
                "panicked at pool.rs:157:18: cannot start a compute thread: Os { code: 11, kind: WouldBlock }",
                "no more threads",
            ),
            ("panicked: failed to spawn thread: Os { code: 11 }", "no more threads"),
            ("panicked at maps.rs: index out of bounds", "This is a bug"),
        ] {
            assert!(sentence(panic).contains(words), "{panic}");
        }
    }

    #[test]
    fn messages_are_one_line() {
        assert_eq!(one_line("error: a\n  |\n1 | x\n\n"), "error: a | 1 | x");
    }
}

//! Running the program as a user does.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A published-style checkpoint of a few kilobytes.
pub(crate) fn fixture(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name);
    folder.to_str().unwrap().to_owned()
}

/// The program with words split at spaces, and nothing in the environment that could matter.
pub(crate) fn command(words: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_epsmoe"));
    command.args(words.split_whitespace());
    for (name, _) in
        std::env::vars().filter(|(name, _)| name.starts_with("EPSMOE_") || name.starts_with("HF_"))
    {
        command.env_remove(name);
    }
    command
}

/// What it prints; it must succeed.
pub(crate) fn printed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?} failed: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Its error message, without `error: `; it must fail, print nothing else, and not panic.
pub(crate) fn refused(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (stdout, stderr) = (text(&stdout), text(&stderr));
    assert!(matches!(status.code(), Some(1 | 2)), "{command:?} ended with {status}: {stdout}{stderr}");
    assert_eq!(stdout, "", "{command:?}");
    assert!(!stderr.contains("This is a bug"), "{stderr}");
    let message = stderr.strip_prefix("error: ").unwrap_or_else(|| panic!("{command:?} said {stderr}"));
    if status.code() == Some(1) {
        assert_eq!(message.trim_end().lines().count(), 1, "{message}");
    }
    message.trim_end().to_owned()
}

/// The last line of what is printed, as JSON.
pub(crate) fn json(command: &mut Command) -> serde_json::Value {
    serde_json::from_str(printed(command).lines().last().unwrap()).unwrap()
}

/// A folder that is gone after the test.
pub(crate) struct Folder(pub(crate) tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// A copy of a fixture that a test may spoil.
    pub(crate) fn copy_of(name: &str) -> Self {
        let folder = Folder::new();
        for entry in std::fs::read_dir(fixture(name)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.path(entry.file_name().to_str().unwrap())).unwrap();
        }
        folder
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

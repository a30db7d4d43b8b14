//! Where a model is: a preset, a folder, or a snapshot in the Hugging Face cache. Nothing here opens a socket,
//! whether HF_HUB_OFFLINE is set or not.

use anyhow::{Context, Result, bail};
use epsmoe_base::env;
use epsmoe_base::files::read_plain_text;
use epsmoe_model::PRESETS;
use std::path::{Path, PathBuf};

/// A model's place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A configuration by name, with weights out of nothing.
    Preset(String),
    /// A folder with config.json, or with GGUF files; or a GGUF file.
    Folder(PathBuf),
}

/// Finds what `--model` names.
pub(crate) fn locate(model: &str, revision: &str) -> Result<Place> {
    if let Some(name) = model.strip_prefix("preset:") {
        return Ok(Place::Preset(name.to_owned()));
    }
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(Place::Folder(path.to_owned()));
    }
    let is_gguf = path.extension().is_some_and(|ending| ending == "gguf");
    if path.is_file() && is_gguf {
        return Ok(Place::Folder(path.to_owned()));
    }
    if path.exists() {
        bail!(
            "{model} is neither a folder nor a GGUF file: give the folder with config.json and the weights"
        );
    }
    if is_gguf {
        bail!("there is no file {model}: give a GGUF file that is there");
    }
    if let Some((organisation, name)) = hub_name(model) {
        return Cache::from_environment()?.snapshot(organisation, name, revision).map(Place::Folder);
    }
    if PRESETS.iter().any(|(name, _)| *name == model) {
        bail!("there is no folder {model}: for the preset, write preset:{model}");
    }
    bail!(
        "there is no folder {model}: give a folder, a GGUF file, preset:NAME, or org/name of a model in the Hugging Face cache"
    )
}

/// `org/name`.
fn hub_name(model: &str) -> Option<(&str, &str)> {
    let plain = |part: &&str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && part.chars().all(fits) && !part.starts_with('.')
    };
    let (organisation, name) = model.split_once('/')?;
    (plain(&organisation) && plain(&name)).then_some((organisation, name))
}

/// Bytes that a file with the name of a commit may have.
const REFERENCE_LIMIT: u64 = 4096;

/// The Hugging Face cache.
struct Cache(PathBuf);

impl Cache {
    fn from_environment() -> Result<Self> {
        let home = || Some(Path::new(&env::text("HOME")?).join(".cache"));
        let caches = || env::text("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
        let hugging_face =
            || env::text("HF_HOME").map(PathBuf::from).or_else(|| Some(caches()?.join("huggingface")));
        let hub = env::text("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(hugging_face()?.join("hub")));
        hub.map(Cache)
            .context("there is no Hugging Face cache: set HF_HUB_CACHE, HF_HOME or HOME, or give a folder")
    }

    /// `models--ORG--NAME/snapshots/COMMIT`, where `refs/REVISION` may name the commit.
    fn snapshot(&self, organisation: &str, name: &str, revision: &str) -> Result<PathBuf> {
        let fetch = format!(
            "nothing is downloaded here: fetch it with `hf download {organisation}/{name} --revision {revision}`, or \
             give a folder"
        );
        let model = self.0.join(format!("models--{organisation}--{name}"));
        if !model.is_dir() {
            bail!(
                "there is no folder {organisation}/{name}, and no such model in the Hugging Face cache ({} does not \
                 exist); {fetch}",
                model.display()
            );
        }
        let reference = model.join("refs").join(revision);
        let commit = read_plain_text(&reference, REFERENCE_LIMIT)
            .map_or_else(|_| revision.to_owned(), |it| it.trim().to_owned());
        let snapshot = model.join("snapshots").join(&commit);
        // A commit names a folder right there; anything else does not come from a cache.
        let plain = commit.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !commit.starts_with('.');
        if !plain || !snapshot.is_dir() {
            bail!(
                "revision {revision} of {organisation}/{name} is not in the Hugging Face cache (looked for {} and {}); \
                 {fetch}",
                reference.display(),
                snapshot.display()
            );
        }
        Ok(snapshot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub() {
        assert_eq!(hub_name("Qwen/Qwen3-30B-A3B"), Some(("Qwen", "Qwen3-30B-A3B")));
        for other in ["model", "./model", "../model", "/a/b", "a/b/c", "a/", "a/..", "a b/c"] {
            assert_eq!(hub_name(other), None, "{other}");
        }
    }

    #[test]
    fn snapshots_are_found_by_reference_and_by_commit() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache(folder.path().to_owned());
        let model = folder.path().join("models--org--name");
        let refused = |revision: &str| cache.snapshot("org", "name", revision).unwrap_err().to_string();
        assert!(refused("main").contains("hf download org/name --revision main"));
        let snapshot = model.join("snapshots/0123abcd");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(model.join("refs")).unwrap();
        assert!(refused("main").contains("refs/main"));
        std::fs::write(model.join("refs/main"), "0123abcd\n").unwrap();
        assert_eq!(cache.snapshot("org", "name", "main").unwrap(), snapshot);
        assert_eq!(cache.snapshot("org", "name", "0123abcd").unwrap(), snapshot);
        // What may never end is not read.
        std::os::unix::fs::symlink("/dev/zero", model.join("refs/endless")).unwrap();
        assert!(refused("endless").contains("revision endless of org/name is not in"));
        std::fs::write(model.join("refs/main"), "../refs").unwrap();
        assert!(refused("main").contains("is not in the Hugging Face cache"));
    }
}

//! The one reader of the environment. Command-line flags read theirs through the argument parser; whatever
//! else the program takes from the environment is read here and documented in the README.

/// The value of an environment variable; absent when it is unset, empty or not Unicode.
#[expect(clippy::disallowed_methods, reason = "this is the one reader")]
pub fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The seed that randomised tests start from: `EPSMOE_TEST_SEED`, or one drawn from the clock. Tests print
/// it, so that a failure can be run again.
pub fn test_seed() -> u64 {
    match text("EPSMOE_TEST_SEED").and_then(|value| value.parse().ok()) {
        Some(seed) => seed,
        None => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as u64),
    }
}

//! What is compiled on its own: a source file, or where kernels take seconds each, some of its kernels.

use super::{HEADERS, SOURCES, Source};
use crate::DeviceError;
use crate::cuda::layout;
use crate::cuda::nvrtc::{self, Compiled, Unit};

/// A part of a source file: all of it, but of the lines at its end that make kernels only one.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) source: &'static Source,
    number: usize,
    of: usize,
}

/// Everything to be compiled for an architecture, what takes longest first.
pub(super) fn parts_for(architecture: &str) -> Vec<Part> {
    let wanted = |source: &&'static Source| source.is_for(architecture) && is_first_of_file(source);
    let mut sources: Vec<_> = SOURCES.iter().filter(wanted).collect();
    sources.sort_by_key(|source| !is_slow(source.file));
    sources.into_iter().flat_map(parts_of).collect()
}

/// The parts of a source's file.
pub(super) fn parts_of(source: &'static Source) -> impl Iterator<Item = Part> {
    let of = if is_slow(source.file) { makers(source.text).count().max(1) } else { 1 };
    (0..of).map(move |number| Part { source, number, of })
}

/// Whether a kernel of the file takes the compiler long.
fn is_slow(file: &str) -> bool {
    ["gemm", "attention", "recurrence"].iter().any(|start| file.starts_with(start))
}

/// Two entries may share a file; it is compiled once.
fn is_first_of_file(source: &Source) -> bool {
    SOURCES.iter().find(|other| other.file == source.file).is_some_and(|first| std::ptr::eq(first, source))
}

/// The lines at the end of a source that make its kernels, such as `GROUPED(128)`, last one first.
fn makers(text: &str) -> impl Iterator<Item = &str> {
    text.trim_end().lines().rev().take_while(|line| {
        line.starts_with(|first: char| first.is_ascii_uppercase())
            && line.ends_with(')')
            && line.contains('(')
    })
}

impl Part {
    /// A name for messages, and for the file that keeps it.
    pub(super) fn stem(&self) -> String {
        let stem = self.source.file.trim_end_matches(".cu");
        if self.of > 1 { format!("{stem}.{}", self.number) } else { stem.to_owned() }
    }

    /// Its source, with what is held against the host's side.
    pub(super) fn text(&self) -> String {
        let Source { file, text, .. } = *self.source;
        if self.of == 1 {
            return checked(file, text);
        }
        let lines = text.trim_end().lines().count() - self.of;
        let shared: Vec<&str> = text.lines().take(lines).collect();
        let made = makers(text).nth(self.number).unwrap_or_default();
        checked(file, &format!("{}\n{made}\n", shared.join("\n")))
    }

    pub(super) fn compile(&self, options: &[String]) -> Result<Compiled, DeviceError> {
        let headers = HEADERS.map(|(file, text)| (file, checked(file, text)));
        let headers: Vec<(&str, &str)> = headers.iter().map(|(file, text)| (*file, text.as_str())).collect();
        nvrtc::compile(&Unit { name: self.source.file, text: &self.text(), headers: &headers }, options)
    }
}

pub(super) fn options(architecture: &str) -> Vec<String> {
    [
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".into(),
        "--device-as-default-execution-space".into(),
    ]
    .into()
}

/// A source with what it is held against on the host's side.
pub(super) fn checked(file: &str, text: &str) -> String {
    format!("{text}\n{}", layout::checks(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_every_kernel_of_their_file_once() {
        for source in SOURCES.iter().filter(|source| is_slow(source.file)) {
            let parts: Vec<Part> = parts_of(source).collect();
            let lines: Vec<&str> = makers(source.text).collect();
            for (part, line) in parts.iter().zip(&lines) {
                let text = part.text();
                let found = lines.iter().filter(|made| text.lines().any(|line| line == **made));
                assert_eq!(found.collect::<Vec<_>>(), [line], "{}", part.stem());
            }
            let whole = source.text.trim_end();
            let shared = parts[0].text();
            let shared = shared.split(lines.first().unwrap_or(&"")).next().unwrap_or_default();
            assert!(whole.starts_with(shared.trim_end()) && parts.len() == lines.len().max(1));
        }
        let text = "#define MAKE(a)\nMAKE(1)\n}\n\nMAKE(2)\nOTHER(3, 4)\n";
        assert_eq!(makers(text).collect::<Vec<_>>(), ["OTHER(3, 4)", "MAKE(2)"]);
    }
}

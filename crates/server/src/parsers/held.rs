//! Text in which markers are looked for, wherever it is cut.

/// Text that has not been let go.
#[derive(Debug, Default)]
pub(super) struct Held(String);

impl Held {
    pub(super) fn push(&mut self, text: &str) {
        self.0.push_str(text);
    }

    /// Takes the text before the first of the markers, and the marker away; says which one it was. Without one, takes
    /// what can be no part of any.
    pub(super) fn until(&mut self, markers: &[&str]) -> (String, Option<usize>) {
        let found =
            markers.iter().enumerate().filter_map(|(which, marker)| Some((self.0.find(marker)?, which)));
        if let Some((at, which)) = found.min() {
            let rest = self.0.split_off(at + markers[which].len());
            let mut before = std::mem::replace(&mut self.0, rest);
            before.truncate(at);
            return (before, Some(which));
        }
        let begun = markers.iter().map(|marker| begun(&self.0, marker)).max().unwrap_or(0);
        let rest = self.0.split_off(self.0.len() - begun);
        (std::mem::replace(&mut self.0, rest), None)
    }

    /// Takes white space at the beginning away; whether anything is left.
    pub(super) fn skip_space(&mut self) -> bool {
        let space = self.0.len() - self.0.trim_start().len();
        self.0.drain(..space);
        !self.0.is_empty()
    }

    pub(super) fn text(&self) -> &str {
        &self.0
    }

    /// Takes all of it.
    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.0)
    }

    /// Takes the first `bytes` away.
    pub(super) fn skip(&mut self, bytes: usize) {
        self.0.drain(..bytes);
    }
}

/// Bytes at the end of `text` that may be the beginning of `marker`.
fn begun(text: &str, marker: &str) -> usize {
    let ends = marker.char_indices().map(|(end, _)| end).rev();
    ends.into_iter().find(|&end| text.ends_with(&marker[..end])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_a_marker_is_held() {
        let mut held = Held::default();
        held.push("one <mar");
        assert_eq!(held.until(&["<mark>", "<other>"]), ("one ".into(), None));
        held.push("k>two");
        assert_eq!(held.until(&["<mark>", "<other>"]), (String::new(), Some(0)));
        assert_eq!(held.until(&["<mark>"]), ("two".into(), None));
        held.push("<<other><mark>");
        assert_eq!(held.until(&["<mark>", "<other>"]), ("<".into(), Some(1)));
        assert_eq!(held.take(), "<mark>");
    }
}

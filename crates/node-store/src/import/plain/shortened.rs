//! Lists of warnings, of which only the first ones are kept: an image may have hundreds of layers that cause one. Pure.

/// Number of warnings of a kind, and of places in a warning.
pub(super) const SHOWN: usize = 12;

/// Warnings of a kind, one line each: the first ones, and the number of the others.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Shortened {
    first: Vec<String>,
    more: usize,
}

impl Shortened {
    pub(super) fn push(&mut self, line: String) {
        match self.first.len() {
            SHOWN.. => self.more += 1,
            _ => self.first.push(line),
        }
    }

    /// Adds the warnings of a layer.
    pub(super) fn append(&mut self, layer: &str, other: Self) {
        other.first.into_iter().for_each(|line| self.push(format!("{layer}: {line}")));
        self.more += other.more;
    }

    /// Returns the lines. The last one names the number of the others.
    pub(super) fn lines(mut self) -> Vec<String> {
        if let Some(last) = self.first.last_mut().filter(|_| self.more > 0) {
            last.push_str(&format!("; and {} more such warnings", self.more));
        }
        self.first
    }
}

impl Extend<String> for Shortened {
    fn extend<T: IntoIterator<Item = String>>(&mut self, lines: T) {
        lines.into_iter().for_each(|line| self.push(line));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_of_hundreds_of_layers_are_a_few_lines() {
        let lines = |count: usize| {
            let mut all = Shortened::default();
            for layer in 0..count {
                let mut own = Shortened::default();
                own.extend(["a".to_owned(), "b".to_owned()]);
                all.append(&format!("layer {layer}"), own);
            }
            all.lines()
        };
        assert_eq!(lines(1), ["layer 0: a", "layer 0: b"]);
        assert_eq!(lines(SHOWN / 2).last().map(String::as_str), Some("layer 5: b"));
        assert_eq!(lines(500).len(), SHOWN);
        assert_eq!(lines(500).last().map(String::as_str), Some("layer 5: b; and 988 more such warnings"));
    }
}

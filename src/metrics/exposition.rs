//! Takes the metrics as OpenMetrics text, which is all that `prometheus_client` writes, and keeps them in the format that was
//! asked for.
//!
//! The classic format differs in its comments alone: a counter is declared by its samples' name (with `_total`), and neither units
//! nor the end are told. So samples pass as they are, and a comment is held until the line behind it says what it is about.
//!
//! A large text takes long: after every [`SLICE_BYTES`] the thread gives way to those that serve sessions.

use std::fmt::{self, Write};
use std::thread;

use super::format::Format;

/// Some 0.2 ms of work.
const SLICE_BYTES: usize = 16 * 1024;

/// A text that grows.
#[derive(Debug)]
pub(super) struct Exposition {
    format: Format,
    text: String,
    /// The comment that is being written, without its line end; empty within a sample.
    comment: String,
    is_in_sample: bool,
    /// The name and the text of the last `# HELP`, until its `# TYPE` comes.
    help: Option<String>,
    /// The length of the text at which the thread gives way next.
    next_slice: usize,
}

impl Exposition {
    /// `size` is a guess of how many bytes it will have.
    pub(super) fn new(format: Format, size: usize) -> Self {
        Self {
            format,
            text: String::with_capacity(size),
            comment: String::new(),
            is_in_sample: false,
            help: None,
            next_slice: SLICE_BYTES,
        }
    }

    pub(super) fn into_text(mut self) -> String {
        self.text.shrink_to_fit();
        self.text
    }

    /// Takes a whole comment.
    fn end_comment(&mut self) {
        let comment = std::mem::take(&mut self.comment);
        if let Some(help) = comment.strip_prefix("# HELP ") {
            self.help = Some(help.to_owned());
        } else if let Some(kind) = comment.strip_prefix("# TYPE ") {
            let (name, kind) = kind.rsplit_once(' ').unwrap_or((kind, "untyped"));
            let total = if kind == "counter" { "_total" } else { "" };
            if let Some((_, help)) = self.help.take().as_deref().and_then(|help| help.split_once(' ')) {
                self.text.extend(["# HELP ", name, total, " ", help, "\n"]);
            }
            self.text.extend(["# TYPE ", name, total, " ", kind, "\n"]);
        }
    }
}

impl Write for Exposition {
    fn write_str(&mut self, piece: &str) -> fmt::Result {
        if self.format == Format::OpenMetrics {
            self.text.push_str(piece);
        } else {
            for part in piece.split_inclusive('\n') {
                let (line, ends) = part.strip_suffix('\n').map_or((part, false), |line| (line, true));
                self.is_in_sample |= self.comment.is_empty() && !line.is_empty() && !line.starts_with('#');
                if self.is_in_sample {
                    self.text.push_str(part);
                } else {
                    self.comment.push_str(line);
                    if ends {
                        self.end_comment();
                    }
                }
                self.is_in_sample &= !ends;
            }
        }
        if self.text.len() >= self.next_slice {
            self.next_slice = self.text.len() + SLICE_BYTES;
            thread::yield_now();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN_METRICS: &str = "# HELP a_connections Connections # accepted.\n# TYPE a_connections counter\n\
        a_connections_total{l=\"# TYPE x counter\"} 1\n# HELP b_seconds How long.\n# TYPE b_seconds histogram\n\
        # UNIT b_seconds seconds\nb_seconds_bucket{le=\"+Inf\"} 2\nb_seconds_count 2\n# HELP c No samples.\n# TYPE c gauge\n# EOF\n";
    const CLASSIC: &str = "# HELP a_connections_total Connections # accepted.\n# TYPE a_connections_total counter\n\
        a_connections_total{l=\"# TYPE x counter\"} 1\n# HELP b_seconds How long.\n# TYPE b_seconds histogram\n\
        b_seconds_bucket{le=\"+Inf\"} 2\nb_seconds_count 2\n# HELP c No samples.\n# TYPE c gauge\n";

    fn written(format: Format, pieces: &[&str]) -> String {
        let mut exposition = Exposition::new(format, 0);
        pieces.iter().for_each(|piece| exposition.write_str(piece).expect("it takes any text"));
        exposition.into_text()
    }

    #[test]
    fn the_classic_format_names_a_counter_by_its_samples_and_tells_neither_units_nor_the_end() {
        assert_eq!(written(Format::Classic, &[OPEN_METRICS]), CLASSIC);
        assert_eq!(written(Format::OpenMetrics, &[OPEN_METRICS]), OPEN_METRICS);
    }

    #[test]
    fn it_does_not_matter_in_which_pieces_the_text_comes() {
        for length in 1..60 {
            let pieces: Vec<&str> = OPEN_METRICS
                .as_bytes()
                .chunks(length)
                .map(|piece| std::str::from_utf8(piece).expect("ASCII"))
                .collect();
            assert_eq!(written(Format::Classic, &pieces), CLASSIC, "{length}");
        }
    }
}

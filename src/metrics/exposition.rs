//! Converts the OpenMetrics text that `prometheus_client` writes into the format that the scraper asked for.
//!
//! The classic format differs only in the comments: it declares a counter with `_total` at the end of its
//! name, and has neither `# UNIT` nor `# EOF`. So samples pass unchanged. A `# HELP` is held until the
//! `# TYPE` after it says whether it is a counter's.
//!
//! A large text takes long, so the thread yields to the workers after every [`SLICE_BYTES`].

use std::fmt::{self, Write};
use std::thread;

use super::format::Format;

/// The length of text between two yields: about 0.2 ms of work.
const SLICE_BYTES: usize = 16 * 1024;

/// The text so far, in one format.
#[derive(Debug)]
pub(super) struct Exposition {
    format: Format,
    text: String,
    /// The comment that is being written, without its line end. Empty while a sample is written.
    comment: String,
    /// The line that is being written is a sample.
    is_in_sample: bool,
    /// The name and the text of the last `# HELP`, until its `# TYPE` comes.
    help: Option<String>,
    /// The length of the text at which the thread yields next.
    next_slice: usize,
}

impl Exposition {
    /// An empty text. `size` is a guess of its final length in bytes.
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

    /// Handles a comment line that is complete.
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
        a_connections_total{l=\"# TYPE x counter\"} 1\n\
        # HELP b_seconds How long.\n# TYPE b_seconds histogram\n# UNIT b_seconds seconds\n\
        b_seconds_bucket{le=\"+Inf\"} 2\nb_seconds_count 2\n\
        # HELP c No samples.\n# TYPE c gauge\n# EOF\n";
    const CLASSIC: &str = "# HELP a_connections_total Connections # accepted.\n\
        # TYPE a_connections_total counter\n\
        a_connections_total{l=\"# TYPE x counter\"} 1\n\
        # HELP b_seconds How long.\n# TYPE b_seconds histogram\n\
        b_seconds_bucket{le=\"+Inf\"} 2\nb_seconds_count 2\n\
        # HELP c No samples.\n# TYPE c gauge\n";

    fn written(format: Format, pieces: &[&str]) -> String {
        let mut exposition = Exposition::new(format, 0);
        pieces.iter().for_each(|piece| exposition.write_str(piece).expect("it takes any text"));
        exposition.into_text()
    }

    #[test]
    fn the_classic_format_declares_counters_with_total_and_has_no_units_and_no_end() {
        assert_eq!(written(Format::Classic, &[OPEN_METRICS]), CLASSIC);
        assert_eq!(written(Format::OpenMetrics, &[OPEN_METRICS]), OPEN_METRICS);
    }

    #[test]
    fn the_pieces_in_which_the_text_comes_do_not_matter() {
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

//! The text formats of the metrics, and which of them a scraper's `Accept` header asks for (RFC 9110,
//! section 12.5.1).
//!
//! `exposition.rs` writes the formats.

/// A text format of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus's own format, which every scraper and `promtool` reads.
    Classic,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

impl Format {
    /// All formats, in the order of their declaration.
    pub const ALL: [Self; 2] = [Self::Classic, Self::OpenMetrics];

    /// The value of the answer's `Content-Type` header.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// Returns the format to answer with. `accept` has the values of all `Accept` headers, joined by commas.
    ///
    /// Returns OpenMetrics if the header prefers it, or names it with the same quality as the classic format.
    /// In all other cases returns the classic format, also for a malformed header or one that accepts neither
    /// format: a text is more use to a scraper than an error.
    #[must_use]
    pub fn wanted(accept: &str) -> Self {
        let Some(ranges) = ranges(accept) else { return Self::Classic };
        let classic = quality(&ranges, "text", "plain", "0.0.4");
        let open = quality(&ranges, "application", "openmetrics-text", "1.0.0");
        let is_preferred = open.thousandths > classic.thousandths;
        let is_as_good = open.thousandths == classic.thousandths && open.is_named;
        if open.thousandths > 0 && (is_preferred || is_as_good) { Self::OpenMetrics } else { Self::Classic }
    }
}

/// One media range of the header: `text/plain;version=0.0.4;q=0.5`.
struct Range {
    kind: String,
    subtype: String,
    version: Option<String>,
    /// The range's `q`, as 0 to 1,000.
    thousandths: u16,
}

#[derive(Clone, Copy, Default)]
struct Quality {
    thousandths: u16,
    /// The header names the format itself, not only `*/*` or `text/*`.
    is_named: bool,
}

/// Returns the quality of a format, which is the quality of the most specific range that covers it.
fn quality(ranges: &[Range], kind: &str, subtype: &str, version: &str) -> Quality {
    let specificity = |range: &Range| {
        let is_version = range.version.as_deref().is_none_or(|wanted| wanted == version);
        match (range.kind == kind, range.subtype == subtype) {
            (true, true) if is_version => Some(if range.version.is_some() { 4 } else { 3 }),
            (true, false) if range.subtype == "*" => Some(2),
            _ if range.kind == "*" => Some(1),
            _ => None,
        }
    };
    let covering = ranges.iter().filter_map(|range| Some((specificity(range)?, range.thousandths)));
    let best = covering.max();
    best.map_or(Quality::default(), |(specific, thousandths)| Quality {
        thousandths,
        is_named: specific >= 3,
    })
}

/// The media ranges of the header; `None` if it is malformed.
fn ranges(accept: &str) -> Option<Vec<Range>> {
    let parts = split(accept, ',')?;
    parts.into_iter().filter(|part| !part.is_empty()).map(range).collect()
}

fn range(text: &str) -> Option<Range> {
    let mut parts = split(text, ';')?.into_iter();
    let (kind, subtype) = parts.next()?.split_once('/')?;
    let is_possible = is_token(kind) && is_token(subtype) && (kind != "*" || subtype == "*");
    let mut range = Range {
        kind: is_possible.then(|| kind.to_ascii_lowercase())?,
        subtype: subtype.to_ascii_lowercase(),
        version: None,
        thousandths: 1_000,
    };
    for parameter in parts.filter(|part| !part.is_empty()) {
        let (name, value) = parameter.split_once('=')?;
        let unquoted = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        if !is_token(name) || unquoted.is_none() && !is_token(value) {
            return None;
        }
        if name.eq_ignore_ascii_case("q") {
            range.thousandths = thousandths(value)?;
        } else if name.eq_ignore_ascii_case("version") {
            range.version = Some(unquoted.unwrap_or(value).to_owned());
        }
    }
    Some(range)
}

/// Splits `text` at each `separator` outside of quotes and trims the parts. `None` if a quote is not closed.
fn split(text: &str, separator: char) -> Option<Vec<&str>> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    let parts = text.split(|character: char| {
        let is_literal = std::mem::take(&mut is_escaped);
        match character {
            '"' if !is_literal => is_quoted = !is_quoted,
            '\\' if is_quoted && !is_literal => is_escaped = true,
            _ => {}
        }
        character == separator && !is_quoted
    });
    let parts = parts.map(|part| part.trim_matches([' ', '\t'])).collect();
    (!is_quoted).then_some(parts)
}

fn is_token(text: &str) -> bool {
    let is_sign = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.bytes().all(is_sign)
}

/// Reads a `q` like `0`, `1`, `0.5` or `1.000`: at most 1, with at most three digits after the point.
fn thousandths(text: &str) -> Option<u16> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if !part.bytes().all(|byte| byte.is_ascii_digit()) || part.len() > 3 {
        return None;
    }
    let part: u16 = format!("{part:0<3}").parse().ok()?;
    match whole {
        "0" => Some(part),
        "1" if part == 0 => Some(1_000),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_scraper_gets_the_classic_format_unless_it_accepts_openmetrics() {
        use Format::{Classic, OpenMetrics};
        for (accept, expected) in [
            ("", Classic),
            ("*/*", Classic),
            ("text/plain", Classic),
            ("text/html, */*;q=0.8", Classic),
            ("application/json", Classic),
            ("application/openmetrics-text", OpenMetrics),
            ("Application/OpenMetrics-Text ; Version=1.0.0", OpenMetrics),
            ("application/openmetrics-text; version=\"1.0.0\"; charset=utf-8", OpenMetrics),
            ("application/openmetrics-text;version=0.0.1", Classic),
            ("application/openmetrics-text;q=0", Classic),
            ("application/openmetrics-text, */*;q=0.1", OpenMetrics),
            ("application/openmetrics-text, text/plain", OpenMetrics),
            ("application/openmetrics-text;q=0.5, text/plain", Classic),
            ("application/openmetrics-text;q=0.5, text/plain;q=0.4", OpenMetrics),
            ("application/openmetrics-text;q=0.5, text/plain;version=1.0.0;q=0.9", OpenMetrics),
            ("application/openmetrics-text;q=0.3, */*", Classic),
            ("application/*", OpenMetrics),
            ("application/*;q=0.5, text/*;q=0.6", Classic),
            (", application/openmetrics-text ,", OpenMetrics),
        ] {
            assert_eq!(Format::wanted(accept), expected, "{accept}");
        }
    }

    #[test]
    fn every_version_of_prometheus_gets_openmetrics() {
        for accept in [
            "application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1, \
             application/openmetrics-text;version=1.0.0",
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
             text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
             application/openmetrics-text;version=0.0.1;q=0.5,\
             text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,\
             text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
        ] {
            assert_eq!(Format::wanted(accept), Format::OpenMetrics, "{accept}");
        }
    }

    #[test]
    fn a_malformed_header_is_answered_in_the_classic_format() {
        for accept in [
            "application/openmetrics-text;q=1.5",
            "application/openmetrics-text;q=0.1234",
            "application/openmetrics-text;q=-1",
            "application/openmetrics-text;q=",
            "application/openmetrics-text;q",
            "application/openmetrics-text;q=\"1\"",
            "application/openmetrics-text;x=\"",
            "application/openmetrics-text, nothing",
            "application/openmetrics-text, /",
            "application/openmetrics-text, */plain",
            "application openmetrics-text",
            "application/openmetrics-text; charset = utf-8",
        ] {
            assert_eq!(Format::wanted(accept), Format::Classic, "{accept}");
        }
    }

    proptest! {
        #[test]
        fn no_header_makes_the_reader_panic(accept in "[a-z/*;=,.\"\\\\q0-9 ]{0,60}|.{0,40}") {
            let _ = Format::wanted(&accept);
        }
    }
}

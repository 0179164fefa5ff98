//! Log events in JSON with the time under the key `time`, as session lines have it.
//!
//! tracing-subscriber calls that key `timestamp`, and has no setting for it. Two keys for the time in one
//! stream would make every query over it two queries.

use std::fmt;

use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{Format, Json, JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent};
use tracing_subscriber::registry::LookupSpan;

/// The begin of each line of [`Json`], and what is written instead.
const TIMESTAMP: &str = "{\"timestamp\":";
const TIME: &str = "{\"time\":";

/// Formats events like [`Json`], but with `time` as the first key.
pub(super) struct JsonWithTime(Format<Json>);

impl JsonWithTime {
    pub(super) fn new() -> Self {
        Self(tracing_subscriber::fmt::format().with_target(false).json().flatten_event(true))
    }
}

impl<S> FormatEvent<S, JsonFields> for JsonWithTime
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::with_capacity(256);
        self.0.format_event(context, Writer::new(&mut line), event)?;
        match line.strip_prefix(TIMESTAMP) {
            Some(rest) => {
                writer.write_str(TIME)?;
                writer.write_str(rest)
            }
            None => writer.write_str(&line),
        }
    }
}

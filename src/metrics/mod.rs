//! The metrics: reads what all parts count and writes it as text ([`prometheus`]) in the [`format`] that the scraper asked for.

mod exposition;
pub mod format;
pub mod prometheus;

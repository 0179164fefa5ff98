//! What came out: tables for people, JSON for programs. The chart is drawn in `chart.rs`.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::measure::{Measure, Metric, Sample};
use super::peers::Kind;

/// All samples of one peer in one cell, one a round.
#[derive(Debug)]
pub struct Row {
    pub peer: Kind,
    pub samples: Vec<Sample>,
    /// Why it has none, or not all.
    pub failure: Option<String>,
}

/// One measure of all peers.
#[derive(Debug)]
pub struct Cell {
    pub measure: Measure,
    pub rows: Vec<Row>,
}

impl Cell {
    pub fn metrics(&self) -> Vec<Metric> {
        let samples = self.rows.iter().flat_map(|row| &row.samples);
        let longest = samples.max_by_key(|sample| sample.figures.len());
        longest.map(|sample| sample.figures.iter().map(|(metric, _)| *metric).collect()).unwrap_or_default()
    }

    /// Statera's figure divided by that of `row` in the same round: the median of all rounds. Two samples of
    /// a round were taken within seconds, so that what changes from minute to minute on a shared machine is
    /// in both.
    pub fn ratio(&self, row: &Row, metric: Metric) -> Option<f64> {
        let statera = self.rows.iter().find(|row| row.peer == Kind::Statera)?;
        if row.peer == Kind::Statera {
            return None;
        }
        let pairs = statera.values(metric).into_iter().zip(row.values(metric));
        let ratios = pairs.filter(|(_, theirs)| *theirs > 0.0).map(|(ours, theirs)| ours / theirs).collect();
        Some(Spread::of(ratios)?.median)
    }
}

/// The median of all rounds.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Row {
    pub fn values(&self, metric: Metric) -> Vec<f64> {
        let figures = self.samples.iter().flat_map(|sample| &sample.figures);
        figures.filter(|(of, _)| *of == metric).map(|(_, value)| *value).collect()
    }

    pub fn spread(&self, metric: Metric) -> Option<Spread> {
        Spread::of(self.values(metric))
    }
}

impl Spread {
    /// `None` where there are no values.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { values[middle - 1].midpoint(values[middle]) };
        Some(Spread { median, min, max })
    }
}

/// Three significant digits, as few letters as possible.
pub fn short(value: f64) -> String {
    match value {
        v if v >= 1000.0 => {
            let digits = format!("{v:.0}");
            let (head, tail) = digits.split_at(digits.len() - 3);
            match head.len() {
                0..=3 => format!("{head},{tail}"),
                n => format!("{},{},{tail}", &head[..n - 3], &head[n - 3..]),
            }
        }
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 1.0 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}

/// A table a cell: for each metric the median, the least and the most of the rounds, and the ratio of
/// Statera's median to it.
pub fn table(cell: &Cell) -> String {
    let mut text = format!("\n{}\n{:16}", cell.measure.name(), "");
    let metrics = cell.metrics();
    for metric in &metrics {
        let wish = if metric.more_is_better { "more is better" } else { "less is better" };
        let _ = write!(text, "  {:>32}", format!("{}, {wish}", metric.name));
    }
    let _ = write!(text, "\n{:16}", "");
    for _ in &metrics {
        let _ = write!(text, "  {:>8} {:>16} {:>6}", "median", "min–max", "ratio");
    }
    text.push('\n');
    for row in &cell.rows {
        let _ = write!(text, "{:16}", row.peer.name());
        for metric in &metrics {
            let Some(spread) = row.spread(*metric) else {
                let _ = write!(text, "  {:>8} {:>16} {:>6}", "-", "", "");
                continue;
            };
            let range = format!("{}–{}", short(spread.min), short(spread.max));
            let ratio = cell.ratio(row, *metric).map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
            let _ = write!(text, "  {:>8} {range:>16} {ratio:>6}", short(spread.median));
        }
        if let Some(failure) = &row.failure {
            let _ = write!(text, "  FAILED: {failure}");
        }
        let trimmed = text.trim_end().len();
        text.truncate(trimmed);
        text.push('\n');
    }
    text
}

/// Everything, every sample included.
pub fn json(cells: &[Cell], about: &Value) -> Value {
    let cells: Vec<Value> = cells
        .iter()
        .map(|cell| {
            let rows: Vec<Value> = cell.rows.iter().map(|row| of_row(cell, row)).collect();
            json!({ "name": cell.measure.name(), "measure": cell.measure.group(), "peers": rows })
        })
        .collect();
    json!({ "about": about, "cells": cells })
}

fn of_row(cell: &Cell, row: &Row) -> Value {
    let figures: Vec<Value> = cell
        .metrics()
        .into_iter()
        .filter_map(|metric| {
            let spread = row.spread(metric)?;
            Some(json!({
                "metric": metric.name,
                "more_is_better": metric.more_is_better,
                "median": spread.median,
                "min": spread.min,
                "max": spread.max,
                "statera_divided_by_it": cell.ratio(row, metric),
                "rounds": row.values(metric),
            }))
        })
        .collect();
    let disturbances = row.samples.iter().map(|sample| sample.disturbance);
    let parts = row.samples.last().map(|sample| &sample.parts[..]).unwrap_or_default();
    let parts: serde_json::Map<String, Value> =
        parts.iter().map(|(name, calls)| (name.clone(), json!(calls))).collect();
    let mut value = json!({
        "peer": row.peer.name(),
        "figures": figures,
        "stolen": disturbances.clone().map(|d| d.stolen).collect::<Vec<_>>(),
        "other_programs": disturbances.map(|d| d.others).collect::<Vec<_>>(),
        "failure": row.failure,
    });
    if !parts.is_empty() {
        value["calls_of_a_session"] = Value::Object(parts);
    }
    value
}

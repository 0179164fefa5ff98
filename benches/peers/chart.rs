//! The chart: a panel for each metric of each cell, a bar for each peer (the median), a line for the spread.

use std::fmt::Write as _;

use super::measure::Metric;
use super::peers::Kind;
use super::report::{Cell, short};

const COLUMNS: usize = 3;
const PANEL_WIDTH: usize = 400;
const NAME_WIDTH: usize = 100;
const BAR_MAX: f64 = 190.0;
const ROW_HEIGHT: usize = 17;
const TITLE_HEIGHT: usize = 40;
const HEADER_HEIGHT: usize = 60;

fn colour(peer: Kind) -> &'static str {
    match peer {
        Kind::Statera => "#c2410c",
        Kind::StateraCubic => "#e07b45",
        Kind::Baseline => "#f0a878",
        Kind::Haproxy => "#2f5d8a",
        Kind::HaproxySplice => "#6f9bc4",
        Kind::HaproxyPipes => "#9fbfdc",
        Kind::Nginx => "#3c7a4e",
        Kind::Envoy => "#8a5fa8",
        Kind::Direct => "#b8b8b8",
    }
}

/// An SVG file. `subtitle` is one line on the machine and the rounds.
pub fn svg(cells: &[Cell], subtitle: &str) -> String {
    let panels: Vec<(&Cell, Metric)> =
        cells.iter().flat_map(|cell| cell.metrics().into_iter().map(move |metric| (cell, metric))).collect();
    let rows = cells.iter().map(|cell| cell.rows.len()).max().unwrap_or(0);
    let panel_height = TITLE_HEIGHT + rows * ROW_HEIGHT + 12;
    let (width, height) =
        (COLUMNS * PANEL_WIDTH + 20, HEADER_HEIGHT + panels.len().div_ceil(COLUMNS) * panel_height);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"24\" font-size=\"17\" font-weight=\"bold\">Statera and its peers, side by side</text>\n\
         <text x=\"12\" y=\"43\" fill=\"#666\">{}</text>\n",
        escaped(subtitle)
    );
    for (index, (cell, metric)) in panels.iter().enumerate() {
        let left = 12 + index % COLUMNS * PANEL_WIDTH;
        let top = HEADER_HEIGHT + index / COLUMNS * panel_height;
        panel(&mut text, cell, *metric, left, top);
    }
    text.push_str("</svg>\n");
    text
}

fn panel(text: &mut String, cell: &Cell, metric: Metric, left: usize, top: usize) {
    let wish = if metric.more_is_better { "more is better" } else { "less is better" };
    let _ = writeln!(
        text,
        "<text x=\"{left}\" y=\"{}\" font-weight=\"bold\">{}</text>\n\
         <text x=\"{left}\" y=\"{}\" fill=\"#666\">{} ({wish})</text>",
        top + 14,
        escaped(&cell.measure.name()),
        top + 29,
        escaped(metric.name)
    );
    // Without a proxy everything is so fast that the others could not be told apart: that bar is cut off.
    let proxies = cell.rows.iter().filter(|row| row.peer != Kind::Direct);
    let most = proxies.filter_map(|row| row.spread(metric)).map(|spread| spread.max).fold(0.0, f64::max);
    let scale = if most > 0.0 { BAR_MAX / most } else { 0.0 };
    for (index, row) in cell.rows.iter().enumerate() {
        let y = top + TITLE_HEIGHT + index * ROW_HEIGHT;
        let start = left + NAME_WIDTH;
        let Some(spread) = row.spread(metric) else { continue };
        let cut = if spread.max * scale > BAR_MAX + 1.0 { "… " } else { "" };
        let x = |value: f64| start as f64 + (value * scale).min(BAR_MAX);
        let ratio = cell.ratio(row, metric).map(|ratio| format!(" · {ratio:.2}×")).unwrap_or_default();
        let middle = y as f64 + 6.5;
        let _ = writeln!(
            text,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{start}\" y=\"{y}\" width=\"{:.1}\" height=\"13\" fill=\"{}\"/>\
             <path d=\"M{:.1} {middle}H{:.1}\" stroke=\"#222\"/>\
             <text x=\"{:.1}\" y=\"{}\" font-size=\"11\">{cut}{}{ratio}</text>",
            start - 6,
            y + 11,
            row.peer.name(),
            x(spread.median) - start as f64,
            colour(row.peer),
            x(spread.min),
            x(spread.max),
            x(spread.max) + 5.0,
            y + 11,
            short(spread.median),
        );
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

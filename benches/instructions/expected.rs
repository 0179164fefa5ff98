//! The figures that are expected, kept in `expected.yaml`: compares, and rewrites the file where that is
//! asked for.
//!
//! Another compiler or valgrind counts differently, so figures are compared only where both are the same.
//!
//! Fewer instructions than expected fail as well. Otherwise a gain could be lost again unnoticed, and a
//! figure that fell by itself means that the case does not do its work any more.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::valgrind::Valgrind;

const ACCEPT: &str = "STATERA_ACCEPT=1 make bench-instructions";
/// The tolerance of a case that the file does not have yet.
const NEW_TOLERANCE_PERCENT: f64 = 5.0;
const HEAD: &str = "\
# What one unit of each case may take, and how far a figure may be from that, up or down.
# `make bench-instructions` compares. To accept new figures on purpose: STATERA_ACCEPT=1 make bench-instructions,
# then read the diff and say in the commit why. Tolerances are written by hand and stay. benches/README.md says
# what is counted.
";

/// One measured case.
pub struct Figure {
    pub name: String,
    /// The figure for one unit.
    pub count: f64,
}

/// What the file says, for each architecture: instructions of one are not those of another.
pub struct Expected {
    path: PathBuf,
    architectures: BTreeMap<String, Architecture>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Architecture {
    /// The versions that the figures were made with.
    with: String,
    cases: BTreeMap<String, Case>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    count: f64,
    tolerance_percent: f64,
}

/// What is counted over a thousand units and should be none may be this many, for each unit: a growing table,
/// a log line.
const NEARLY_NONE: f64 = 0.05;

impl Expected {
    pub fn read() -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions/expected.yaml");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let architectures =
            serde_yaml::from_str(&text).with_context(|| format!("cannot use {}", path.display()))?;
        Ok(Self { path, architectures })
    }

    /// Compares, or accepts if `STATERA_ACCEPT` is set. Returns false if a figure is off.
    pub fn judge(mut self, figures: &[Figure], valgrind: &Valgrind) -> Result<bool> {
        let known = self.architectures.entry(ARCH.to_owned()).or_default();
        if std::env::var_os("STATERA_ACCEPT").is_some() {
            known.with.clone_from(&valgrind.versions);
            for figure in figures {
                let tolerance_percent = known
                    .cases
                    .get(&figure.name)
                    .map_or(NEW_TOLERANCE_PERCENT, |case| case.tolerance_percent);
                let case = Case { count: figure.count, tolerance_percent };
                known.cases.insert(figure.name.clone(), case);
            }
            fs::write(&self.path, self.yaml())
                .with_context(|| format!("cannot write {}", self.path.display()))?;
            println!("accepted: read the diff of {}", self.path.display());
            return Ok(true);
        }

        if known.with != valgrind.versions {
            let expected = if known.with.is_empty() { "nothing" } else { &known.with };
            println!(
                "not compared: on {ARCH} the figures were made with {expected}, these with {}",
                valgrind.versions
            );
            println!("to accept these on purpose: {ACCEPT}");
            return Ok(true);
        }
        let wrong: Vec<String> = figures.iter().filter_map(|figure| known.complaint(figure)).collect();
        for complaint in &wrong {
            eprintln!("instructions: {complaint}");
        }
        if !wrong.is_empty() {
            eprintln!("instructions: where they went: callgrind_annotate target/instructions/CASE.callgrind");
            eprintln!("instructions: to accept the new figures on purpose: {ACCEPT}");
        }
        Ok(wrong.is_empty())
    }

    fn yaml(&self) -> String {
        let mut text = HEAD.to_owned();
        for (name, architecture) in &self.architectures {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "\n{name}:\n  with: \"{}\"\n  cases:", architecture.with);
            for (name, Case { count, tolerance_percent }) in &architecture.cases {
                let _ = writeln!(
                    text,
                    "    \"{name}\": {{count: {count:.1}, tolerance_percent: {tolerance_percent}}}"
                );
            }
        }
        text
    }
}

impl Architecture {
    /// `None`: the figure is as expected.
    fn complaint(&self, figure: &Figure) -> Option<String> {
        let Figure { name, count } = figure;
        let Some(Case { count: expected, tolerance_percent }) = self.cases.get(name) else {
            return Some(format!("{name}: {count:.1}, and no figure is expected on {ARCH} yet"));
        };
        let margin = (expected * tolerance_percent / 100.0).max(NEARLY_NONE);
        let what = match count - expected {
            off if off > margin => "more than expected",
            off if off < -margin => "fewer than expected: if that was gained, keep it",
            _ => return None,
        };
        Some(format!(
            "{name}: {count:.1}, {expected:.1} expected, give or take {tolerance_percent} %: {what}"
        ))
    }
}

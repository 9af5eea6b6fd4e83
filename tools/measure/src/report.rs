//! Samples as tables with bars, and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::monitor::{CommandLine, Monitor};
use crate::rounds::Figure;
use crate::stats::{self, Ratio, Summary};

/// All that one run has measured.
#[derive(Debug)]
pub struct Measured {
    /// The rows of the tables.
    pub rows: Vec<Monitor>,
    /// The tables.
    pub figures: Vec<Figure>,
    /// What is said below them.
    pub notes: String,
    /// A monitor failed and was left out of a figure.
    pub has_failures: bool,
    /// The machine was too busy for the figures to be believed.
    pub is_too_busy: bool,
}

const BAR_CELLS: f64 = 48.0;
/// Bars reach to this multiple of the greatest median; longer ones are cut.
const BAR_REACH: f64 = 1.5;

/// A figure as a table, one line for each monitor, with a bar to the minimum, the median and the maximum.
pub fn table(figure: &Figure, monitors: &[Monitor], ours: &str) -> String {
    let rows: Vec<(usize, Summary)> = figure
        .samples
        .iter()
        .enumerate()
        .filter_map(|(index, samples)| Some((index, stats::summary(samples)?)))
        .collect();
    let greatest = rows.iter().map(|(_, row)| row.median).fold(0.0, f64::max);
    let width = monitors.iter().map(|m| m.name.len()).max().unwrap_or(0);
    let floor = floor(figure, monitors);
    let us = monitors.iter().position(|m| m.name == ours);

    let mut text = format!("{} ({})\n", figure.name, figure.unit);
    let ours_over = format!("{ours} / this");
    let _ = writeln!(
        text,
        "  {:width$} {:>9} {:>9} {:>9}   {:>15}   {:>15}",
        "", "min", "median", "max", "this / floor", ours_over
    );
    for (index, row) in rows {
        let _ = writeln!(
            text,
            "  {:width$} {} {} {}   {}   {}  {}",
            monitors[index].name,
            number(row.min),
            number(row.median),
            number(row.max),
            ratio_text(floor.filter(|f| *f != index), |f| between(figure, index, f)),
            ratio_text(us.filter(|u| *u != index), |u| between(figure, u, index)),
            bar(row, greatest * BAR_REACH),
        );
    }
    text
}

/// Explains the columns, once.
pub const LEGEND: &str = "\
ratios: of the medians, then (in brackets) the median of the ratios of each round
bars:   \u{2588} to the minimum, \u{2593} to the median, \u{2591} to the maximum; > is cut
";

/// A figure for machines: every sample, so that others can make their own statistics.
pub fn json(figure: &Figure, monitors: &[Monitor], ours: &str) -> Value {
    let us = monitors.iter().position(|monitor| monitor.name == ours);
    let floor = floor(figure, monitors);
    let entry = |(index, samples): (usize, &Vec<f64>)| {
        let all = stats::summary(samples)?;
        let pair = |found: Option<Ratio>| {
            found.map(|r| json!({ "of_medians": r.of_medians, "per_round": r.per_round }))
        };
        Some(json!({
            "monitor": monitors[index].name,
            "min": all.min,
            "median": all.median,
            "max": all.max,
            "over_floor": pair(floor.and_then(|floor| between(figure, index, floor))),
            "ours_over_this": pair(us.and_then(|us| between(figure, us, index))),
            "samples": samples,
        }))
    };
    let entries: Vec<Value> = figure
        .samples
        .iter()
        .enumerate()
        .filter_map(entry)
        .collect();
    json!({ "figure": figure.name, "unit": figure.unit, "monitors": entries })
}

/// The first floor that the figure has.
fn floor(figure: &Figure, monitors: &[Monitor]) -> Option<usize> {
    let mut rows = monitors.iter().zip(&figure.samples);
    rows.position(|(monitor, samples)| {
        monitor.command_line == CommandLine::Floor && !samples.is_empty()
    })
}

fn between(figure: &Figure, above: usize, below: usize) -> Option<Ratio> {
    stats::ratio(&figure.samples[above], &figure.samples[below])
}

fn ratio_text(other: Option<usize>, find: impl FnOnce(usize) -> Option<Ratio>) -> String {
    match other.and_then(find) {
        Some(found) => format!("{:>6.2} ({:>6.2})", found.of_medians, found.per_round),
        None => format!("{:>15}", "-"),
    }
}

fn number(value: f64) -> String {
    if value >= 1000.0 {
        format!("{value:>9.0}")
    } else {
        format!("{value:>9.3}")
    }
}

fn bar(row: Summary, reach: f64) -> String {
    let mut bar = String::new();
    if reach <= 0.0 {
        return bar;
    }
    let cells = |value: f64| (value.clamp(0.0, reach) / reach * BAR_CELLS).round() as usize;
    let (min, median, max) = (cells(row.min), cells(row.median), cells(row.max));
    bar.push_str(&"\u{2588}".repeat(min));
    bar.push_str(&"\u{2593}".repeat(median - min));
    bar.push_str(&"\u{2591}".repeat(max - median));
    if row.max > reach {
        bar.push('>');
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bar_when_drawn_has_three_shades_in_proportion() {
        let row = Summary {
            min: 1.0,
            median: 2.0,
            max: 3.0,
        };
        let text = bar(row, 3.0);
        for shade in ['\u{2588}', '\u{2593}', '\u{2591}'] {
            assert_eq!(text.matches(shade).count(), 16);
        }
    }

    #[test]
    fn floor_when_two_are_there_is_the_first_that_has_samples() {
        let monitor = |name: &str, command_line| Monitor {
            name: name.to_owned(),
            path: "/nowhere".into(),
            command_line,
            extra: Vec::new(),
        };
        let monitors = [
            monitor("floor (split)", CommandLine::Floor),
            monitor("floor", CommandLine::Floor),
            monitor("b", CommandLine::Firecracker),
        ];
        let mut figure = Figure {
            name: "x".to_owned(),
            unit: "ms",
            samples: vec![vec![], vec![1.0], vec![2.0]],
        };
        assert_eq!(floor(&figure, &monitors), Some(1));
        figure.samples[1].clear();
        assert_eq!(floor(&figure, &monitors), None);
    }

    #[test]
    fn bar_when_longer_than_the_reach_is_cut() {
        let row = Summary {
            min: 1.0,
            median: 1.0,
            max: 9.0,
        };
        assert!(bar(row, 1.5).ends_with('>'));
    }
}

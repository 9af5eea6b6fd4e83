//! One line for each figure: our monitor beside the floor and beside the best peer.

use std::fmt::Write;

use crate::monitor::{CommandLine, Monitor};
use crate::rounds::Figure;
use crate::stats;

/// Whether more is better, by the unit.
pub fn more_is_better(figure: &Figure) -> bool {
    !matches!(figure.unit, "ms" | "us" | "MiB")
}

/// The row that our own is compared with: of all others, the one with the best median.
pub fn best_peer(figure: &Figure, rows: &[Monitor], ours: &str) -> Option<usize> {
    let sign = if more_is_better(figure) { 1.0 } else { -1.0 };
    rows.iter()
        .enumerate()
        .filter(|(_, row)| row.command_line != CommandLine::Floor && row.name != ours)
        .filter_map(|(index, _)| Some((index, stats::summary(&figure.samples[index])?.median)))
        .max_by(|(_, a), (_, b)| (a * sign).total_cmp(&(b * sign)))
        .map(|(index, _)| index)
}

/// The table; empty when our own monitor was not measured.
pub fn text(figures: &[Figure], rows: &[Monitor], ours: &str) -> String {
    let Some(us) = rows.iter().position(|row| row.name == ours) else {
        return String::new();
    };
    let floor = rows
        .iter()
        .position(|row| row.command_line == CommandLine::Floor);
    let width = figures.iter().map(|f| f.name.len()).max().unwrap_or(0);
    let mut text = format!(
        "{:width$} {:>6} {:>10} {:>10} {:>10}  {:>7} {:>9}  {:>7}\n",
        "summary (medians)", "", "floor", ours, "best peer", "ratio", "per round", "/ floor"
    );
    for figure in figures {
        let median = |index: usize| stats::summary(&figure.samples[index]).map(|all| all.median);
        let ratio = |other: usize| stats::ratio(&figure.samples[us], &figure.samples[other]);
        let peer = best_peer(figure, rows, ours);
        let over_peer = peer.and_then(ratio);
        let _ = writeln!(
            text,
            "{:width$} {:>6} {} {} {}  {} {}  {}  {}",
            figure.name,
            figure.unit,
            number(floor.and_then(median), 10),
            number(median(us), 10),
            number(peer.and_then(median), 10),
            number(over_peer.map(|ratio| ratio.of_medians), 7),
            number(over_peer.map(|ratio| ratio.per_round), 9),
            number(floor.and_then(ratio).map(|ratio| ratio.of_medians), 7),
            peer.map_or("", |peer| rows[peer].name.as_str()),
        );
    }
    text.push_str("ratio: mayfly / best peer; more is better, but for times (ms, us) less\n\n");
    text
}

fn number(value: Option<f64>, width: usize) -> String {
    match value {
        None => format!("{:>width$}", "-"),
        Some(value) if value >= 1000.0 => format!("{value:>width$.0}"),
        Some(value) => format!("{value:>width$.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Monitor> {
        [
            ("floor", CommandLine::Floor),
            ("mayfly", CommandLine::Firecracker),
            ("b sync", CommandLine::Firecracker),
            ("b async", CommandLine::Firecracker),
        ]
        .map(|(name, command_line)| Monitor {
            name: name.to_owned(),
            path: "/nowhere".into(),
            command_line,
            extra: Vec::new(),
        })
        .into()
    }

    #[test]
    fn best_peer_when_time_is_counted_is_the_fastest() {
        let mut figure = Figure {
            name: "x".to_owned(),
            unit: "IOPS",
            samples: vec![vec![9.0], vec![8.0], vec![4.0], vec![2.0]],
        };
        assert_eq!(best_peer(&figure, &rows(), "mayfly"), Some(2));
        let text = text(std::slice::from_ref(&figure), &rows(), "mayfly");
        assert!(text.contains("2.00") && text.contains("b sync"), "{text}");
        figure.unit = "us";
        assert_eq!(best_peer(&figure, &rows(), "mayfly"), Some(3));
    }

    #[test]
    fn text_when_a_row_has_no_samples_leaves_it_out() {
        let figure = Figure {
            name: "x".to_owned(),
            unit: "us",
            samples: vec![vec![], vec![8.0], vec![], vec![]],
        };
        let text = text(&[figure], &rows(), "mayfly");
        assert!(text.contains("8.00"), "{text}");
    }
}

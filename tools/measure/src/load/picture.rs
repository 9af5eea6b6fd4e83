//! The comparison as a bar chart (SVG), for the documentation.
//!
//! Two panels: more is better, less is better. In each, a figure is a group of bars, one for each monitor, as multiples
//! of the median of the best peer; the thin line reaches from the minimum to the maximum. The floor is a mark, where it
//! is within the panel.

use super::summary::{best_peer, more_is_better};
use crate::monitor::{CommandLine, Monitor};
use crate::rounds::Figure;
use crate::stats;
use crate::svg::{self, line, rect, text};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 250.0;
/// Room for numbers at the right of the bars.
const RIGHT: f64 = 250.0;
const BAR: f64 = 11.0;
const GROUP_GAP: f64 = 12.0;
const OURS: &str = "#1f6feb";
const OTHERS: [&str; 4] = ["#8c959f", "#bfc7cf", "#6e7781", "#d8dee4"];

/// What stands above the chart.
#[derive(Clone, Debug)]
pub struct Heading {
    /// What was compared.
    pub title: String,
    /// Date, machine, commit; and what else has to be known.
    pub lines: Vec<String>,
}

/// The chart as the text of an SVG file.
pub fn draw(figures: &[Figure], rows: &[Monitor], ours: &str, heading: &Heading) -> String {
    let mut body = String::new();
    let mut y = 34.0;
    text(&mut body, (16.0, y), "title", &heading.title);
    for line in &heading.lines {
        y += 16.0;
        text(&mut body, (16.0, y), "small", line);
    }
    y += 26.0;
    y = legend(&mut body, y, rows, ours);
    for (name, more) in [
        ("More is better; the best peer is 1", true),
        ("Less is better; the best peer is 1", false),
    ] {
        let groups: Vec<&Figure> = figures
            .iter()
            .filter(|figure| more_is_better(figure) == more)
            .filter(|figure| best_peer(figure, rows, ours).is_some())
            .collect();
        if !groups.is_empty() {
            y = panel(&mut body, y, name, &groups, rows, ours);
        }
    }
    let height = y + 10.0;
    svg::document((WIDTH, height), &body)
}

fn legend(body: &mut String, y: f64, rows: &[Monitor], ours: &str) -> f64 {
    let mut x = LEFT;
    for (index, row) in rows.iter().enumerate() {
        if row.command_line == CommandLine::Floor {
            mark(body, x + 5.0, y - 10.0, y + 1.0);
        } else {
            let colour = colour(rows, index, ours);
            rect(body, (x, y - 9.0), (10.0, 10.0), colour);
        }
        let name = match row.command_line {
            CommandLine::Floor => "the host's own floor",
            CommandLine::Firecracker | CommandLine::Runtime => &row.name,
        };
        text(body, (x + 15.0, y), "small", name);
        x += 40.0 + 7.0 * name.len() as f64;
    }
    y + 24.0
}

/// One panel with its groups; where the next may begin.
fn panel(
    body: &mut String,
    mut y: f64,
    name: &str,
    groups: &[&Figure],
    rows: &[Monitor],
    ours: &str,
) -> f64 {
    text(body, (16.0, y), "head", name);
    y += 16.0;
    // Bars end at the greatest multiple of all medians.
    let relative = |figure: &Figure, value: f64| {
        let peer = best_peer(figure, rows, ours).and_then(|peer| median(figure, peer));
        value / peer.unwrap_or(value).max(f64::MIN_POSITIVE)
    };
    let all = groups.iter().flat_map(|figure| {
        let bars = bars(figure, rows).into_iter();
        bars.filter_map(|row| Some(relative(figure, median(figure, row)?)))
    });
    let reach = all.fold(1.0, f64::max) * 1.05;
    let place = |multiple: f64| LEFT + (WIDTH - LEFT - RIGHT) * (multiple / reach).min(1.0);
    let top = y;
    for figure in groups {
        let bars = bars(figure, rows);
        let height = BAR * bars.len() as f64;
        text(body, (16.0, y + height / 2.0 + 4.0), "", &figure.name);
        for row in &bars {
            let Some(all) = stats::summary(&figure.samples[*row]) else {
                continue;
            };
            let [min, median, max] = [all.min, all.median, all.max].map(|v| relative(figure, v));
            let length = place(median) - LEFT;
            let colour = colour(rows, *row, ours);
            rect(body, (LEFT, y), (length, BAR - 1.5), colour);
            let middle = y + BAR / 2.0 - 0.75;
            line(
                body,
                (place(min), middle),
                (place(max), middle),
                "#24292f",
                1.0,
            );
            let told = format!("{} {} ({median:.2})", number(all.median), figure.unit);
            text(body, (WIDTH - RIGHT + 10.0, y + BAR - 2.0), "num", &told);
            y += BAR;
        }
        let floor = rows
            .iter()
            .position(|row| row.command_line == CommandLine::Floor);
        let floor = floor.and_then(|floor| Some(relative(figure, median(figure, floor)?)));
        if let Some(floor) = floor.filter(|floor| *floor <= reach) {
            mark(body, place(floor), y - height - 2.0, y);
        }
        y += GROUP_GAP;
    }
    line(
        body,
        (place(1.0), top - 4.0),
        (place(1.0), y - GROUP_GAP + 4.0),
        "#cf222e",
        0.7,
    );
    y + 14.0
}

/// The rows that a figure has bars for.
fn bars(figure: &Figure, rows: &[Monitor]) -> Vec<usize> {
    (0..rows.len())
        .filter(|row| rows[*row].command_line != CommandLine::Floor)
        .filter(|row| !figure.samples[*row].is_empty())
        .collect()
}

fn median(figure: &Figure, row: usize) -> Option<f64> {
    stats::summary(&figure.samples[row]).map(|all| all.median)
}

fn colour(rows: &[Monitor], row: usize, ours: &str) -> &'static str {
    if rows[row].name == ours {
        return OURS;
    }
    let others = rows[..row]
        .iter()
        .filter(|row| row.command_line != CommandLine::Floor && row.name != ours);
    OTHERS[others.count() % OTHERS.len()]
}

fn number(value: f64) -> String {
    if value >= 1e6 {
        format!("{:.2}M", value / 1e6)
    } else if value >= 1e4 {
        format!("{:.0}k", value / 1e3)
    } else if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

/// The floor.
fn mark(body: &mut String, x: f64, top: f64, bottom: f64) {
    line(body, (x, top), (x, bottom), "#24292f", 2.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Monitor> {
        [
            ("floor", CommandLine::Floor),
            ("mayfly", CommandLine::Firecracker),
            ("b <sync>", CommandLine::Firecracker),
        ]
        .map(|(name, command_line)| Monitor {
            name: name.to_owned(),
            path: "/nowhere".into(),
            command_line,
            extra: Vec::new(),
        })
        .into()
    }

    fn drawn(unit: &'static str, samples: Vec<Vec<f64>>) -> String {
        let figure = Figure {
            name: "x & y".to_owned(),
            unit,
            samples,
        };
        let heading = Heading {
            title: "title".to_owned(),
            lines: vec!["2026-11-29".to_owned()],
        };
        draw(&[figure], &rows(), "mayfly", &heading)
    }

    #[test]
    fn picture_when_drawn_has_a_bar_for_each_monitor_in_proportion() {
        let text = drawn("IOPS", vec![vec![3.0], vec![2.0], vec![1.0]]);
        let widths: Vec<f64> = text
            .lines()
            .filter(|line| line.contains("height=\"9.5\""))
            .map(|line| {
                let (_, rest) = line.split_once("width=\"").unwrap();
                rest.split_once('"').unwrap().0.parse().unwrap()
            })
            .collect();
        assert_eq!(widths.len(), 2);
        assert!((widths[0] / widths[1] - 2.0).abs() < 0.01, "{widths:?}");
        assert!(text.contains("More is better") && !text.contains("Less is better"));
    }

    #[test]
    fn picture_when_names_hold_marks_escapes_them() {
        let text = drawn("us", vec![vec![], vec![2.0], vec![1.0]]);
        assert!(text.contains("x &amp; y") && text.contains("b &lt;sync&gt;"));
        assert!(text.contains("Less is better") && text.contains("(2.00)"));
    }

    #[test]
    fn picture_when_there_is_no_peer_leaves_the_figure_out() {
        let text = drawn("us", vec![vec![1.0], vec![2.0], vec![]]);
        assert!(!text.contains("x &amp; y"), "{text}");
    }
}

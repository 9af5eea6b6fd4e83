//! What was seen, over time, as a picture.

use super::census::Usage;
use super::lives::Kind;
use super::record::{GROWTH, Record};
use crate::stats;
use crate::svg::{self, line, polyline, rect, text};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 60.0;
/// Room for names at the right of the lines.
const RIGHT: f64 = 200.0;
const HEIGHT: f64 = 150.0;
/// Points of a line: more cannot be seen.
const POINTS: usize = 240;
const COLOURS: [&str; 10] = [
    "#1f6feb", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#57606a", "#0598bc",
    "#bc4c00", "#24292f",
];

/// Values of one name at their seconds.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// The picture as the text of an SVG file.
pub fn draw(record: &Record, heading: &[String]) -> String {
    let mut body = String::new();
    let mut y = 34.0;
    text(
        &mut body,
        (16.0, y),
        "title",
        "Soak: what long lives have, and how long short ones take",
    );
    for words in heading {
        y += 16.0;
        text(&mut body, (16.0, y), "small", words);
    }
    y += 30.0;
    let bound = format!(
        "Memory of the long lives' processes, MiB, without the guest's (may grow by {GROWTH} from the first point)"
    );
    for (name, series) in [
        (bound, usages(record, |usage| usage.memory)),
        (
            "Descriptors".to_owned(),
            usages(record, |usage| usage.open() as f64),
        ),
        (
            "Mappings".to_owned(),
            usages(record, |usage| usage.mappings as f64),
        ),
        ("Short lives: median, ms".to_owned(), lives(record)),
        (
            "Memory of the host's kernel (slabs of all programs), MiB".to_owned(),
            host(record),
        ),
    ] {
        y = panel(&mut body, y, &name, &series);
    }
    svg::document((WIDTH, y), &body)
}

fn usages(record: &Record, value: impl Fn(&Usage) -> f64) -> Vec<Series> {
    let Some(first) = record.samples.first() else {
        return Vec::new();
    };
    first
        .processes
        .keys()
        .map(|name| {
            let at = |sample: &super::record::Sample| {
                Some((sample.at, value(sample.processes.get(name)?)))
            };
            Series {
                name: name.clone(),
                points: record.samples.iter().filter_map(at).collect(),
            }
        })
        .collect()
}

fn host(record: &Record) -> Vec<Series> {
    vec![Series {
        name: "host".to_owned(),
        points: record
            .samples
            .iter()
            .map(|sample| (sample.at, sample.slab))
            .collect(),
    }]
}

fn lives(record: &Record) -> Vec<Series> {
    let series = |(kind, lives): (&Kind, &Vec<(f64, f64)>)| Series {
        name: format!("{} ({})", kind.name(), lives.len()),
        points: lives.clone(),
    };
    record.lives.iter().map(series).collect()
}

/// One panel; where the next may begin.
fn panel(body: &mut String, y: f64, name: &str, series: &[Series]) -> f64 {
    text(body, (16.0, y), "head", name);
    let (top, bottom) = (y + 12.0, y + 12.0 + HEIGHT);
    let thinned: Vec<Vec<(f64, f64)>> = series.iter().map(|one| thin(&one.points)).collect();
    let all = || thinned.iter().flatten();
    let end = all().map(|(at, _)| *at).fold(1.0, f64::max);
    let most = all().map(|(_, value)| *value).fold(0.0, f64::max) * 1.1;
    let most = if most > 0.0 { most } else { 1.0 };
    let x_of = |at: f64| LEFT + (WIDTH - LEFT - RIGHT) * at / end;
    let y_of = |value: f64| bottom - HEIGHT * value / most;
    for share in [0.0, 0.5, 1.0] {
        let value = most * share;
        line(
            body,
            (LEFT, y_of(value)),
            (x_of(end), y_of(value)),
            "#d8dee4",
            1.0,
        );
        text(body, (16.0, y_of(value) + 4.0), "num", &number(value));
        text(
            body,
            (x_of(end * share) - 12.0, bottom + 15.0),
            "num",
            &minutes(end * share),
        );
    }
    for (index, (one, points)) in series.iter().zip(&thinned).enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let places: Vec<(f64, f64)> = points
            .iter()
            .map(|(at, value)| (x_of(*at), y_of(*value)))
            .collect();
        polyline(body, &places, colour);
        let at = top + 14.0 * index as f64;
        rect(body, (WIDTH - RIGHT + 10.0, at), (10.0, 10.0), colour);
        text(body, (WIDTH - RIGHT + 25.0, at + 9.0), "small", &one.name);
    }
    let legend = top + 14.0 * series.len() as f64;
    (bottom + 20.0).max(legend) + 28.0
}

/// So many medians of neighbours that a line can be drawn.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(POINTS).max(1);
    points
        .chunks(step)
        .filter_map(|part| {
            let values: Vec<f64> = part.iter().map(|(_, value)| *value).collect();
            Some((part.last()?.0, stats::summary(&values)?.median))
        })
        .collect()
}

fn number(value: f64) -> String {
    if value >= 10.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

fn minutes(seconds: f64) -> String {
    if seconds >= 120.0 {
        format!("{:.0} min", seconds / 60.0)
    } else {
        format!("{seconds:.0} s")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::super::record::Sample;
    use super::*;

    #[test]
    fn picture_when_drawn_has_a_line_for_each_process_and_kind_of_life() {
        let mut record = Record::new(1);
        for at in 0..1000 {
            let usage = Usage {
                memory: 3.0,
                ..Usage::default()
            };
            record.samples.push(Sample {
                at: f64::from(at),
                processes: BTreeMap::from([("a & b".to_owned(), usage)]),
                slab: 5.0,
            });
        }
        record.lived(Kind::Api, Duration::from_millis(20));
        let drawn = draw(&record, &["2026-11-30".to_owned()]);
        assert_eq!(drawn.matches("<polyline").count(), 5);
        assert!(drawn.contains("a &amp; b") && drawn.contains("booted by requests (1)"));
        assert!(drawn.contains("17 min") && drawn.contains("2026-11-30"));
    }

    #[test]
    fn points_when_many_are_thinned_to_medians() {
        let points: Vec<(f64, f64)> = (0..480).map(|n| (f64::from(n), f64::from(n % 2))).collect();
        let thinned = thin(&points);
        assert_eq!(thinned.len(), 240);
        assert!(thinned.iter().all(|(_, value)| *value == 0.5));
    }
}

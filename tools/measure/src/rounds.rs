//! Who runs when: every monitor once in each round, in an order that rotates, so that what disturbs the machine
//! disturbs all of them alike.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::failure::{Failure, Result};
use crate::progress::Progress;
use crate::sys;

/// One measured quantity.
#[derive(Debug)]
pub struct Figure {
    /// What it is.
    pub name: String,
    /// What it is counted in.
    pub unit: &'static str,
    /// Samples of each monitor, in the order of the monitors; one for each round, or none.
    pub samples: Vec<Vec<f64>>,
}

/// One value of one figure.
#[derive(Debug)]
pub struct Sample {
    figure: String,
    unit: &'static str,
    value: f64,
}

impl Sample {
    /// A time in milliseconds.
    pub fn ms(figure: impl Into<String>, value: f64) -> Self {
        Self::new(figure, "ms", value)
    }

    /// An amount of memory in MiB.
    pub fn mib(figure: impl Into<String>, value: f64) -> Self {
        Self::new(figure, "MiB", value)
    }

    /// Anything else.
    pub fn new(figure: impl Into<String>, unit: &'static str, value: f64) -> Self {
        Self {
            figure: figure.into(),
            unit,
            value,
        }
    }
}

/// How often.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Rounds whose samples are thrown away: they bring files into memory.
    pub warm_up: usize,
    /// Rounds that count.
    pub runs: usize,
}

/// Runs `measure` once for each row (a monitor, or one in one of several ways) and round, and gathers the samples.
pub fn run<R>(
    plan: Plan,
    monitors: &[R],
    mut measure: impl FnMut(&R) -> Result<Vec<Sample>>,
) -> Result<Vec<Figure>> {
    let mut figures: Vec<Figure> = Vec::new();
    let mut progress = Progress::new((plan.warm_up + plan.runs) * monitors.len());
    for round in 0..plan.warm_up + plan.runs {
        for index in order(round, monitors.len()) {
            if sys::interrupted() {
                return Err(Failure::interrupted());
            }
            for sample in measure(&monitors[index])? {
                if round >= plan.warm_up {
                    gather(&mut figures, monitors.len(), index, sample);
                }
            }
            progress.step();
        }
    }
    Ok(figures)
}

fn order(round: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |place| (place + round) % count)
}

fn gather(figures: &mut Vec<Figure>, monitors: usize, monitor: usize, sample: Sample) {
    let place = figures
        .iter()
        .position(|figure| figure.name == sample.figure);
    let figure = match place {
        Some(place) => &mut figures[place],
        None => {
            figures.push(Figure {
                name: sample.figure,
                unit: sample.unit,
                samples: vec![Vec::new(); monitors],
            });
            figures.last_mut().expect("one was pushed just now")
        }
    };
    figure.samples[monitor].push(sample.value);
}

/// Does `work` `count` times, `at_once` at a time; a failure keeps its thread from going on.
pub fn in_parallel<T: Send>(
    count: usize,
    at_once: usize,
    work: impl Fn() -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let taken = AtomicUsize::new(0);
    let turn = || {
        let mut done = Vec::new();
        while taken.fetch_add(1, Ordering::Relaxed) < count {
            let one = match sys::interrupted() {
                true => Err(Failure::interrupted()),
                false => work(),
            };
            let failed = one.is_err();
            done.push(one);
            if failed {
                break;
            }
        }
        done
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(turn)).collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("a thread of starts does not panic"))
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::{CommandLine, Monitor};

    fn monitors(names: &[&str]) -> Vec<Monitor> {
        let make = |name: &&str| Monitor {
            name: (*name).to_owned(),
            path: "/nowhere".into(),
            command_line: CommandLine::Floor,
            extra: Vec::new(),
        };
        names.iter().map(make).collect()
    }

    #[test]
    fn rounds_when_run_rotate_the_order() {
        let mut seen = String::new();
        let plan = Plan {
            warm_up: 1,
            runs: 2,
        };
        run(plan, &monitors(&["a", "b", "c"]), |monitor| {
            seen.push_str(&monitor.name);
            Ok(Vec::new())
        })
        .unwrap();
        assert_eq!(seen, "abcbcacab");
    }

    #[test]
    fn samples_when_of_the_warm_up_are_thrown_away() {
        let mut count = 0.0;
        let plan = Plan {
            warm_up: 2,
            runs: 3,
        };
        let figures = run(plan, &monitors(&["a"]), |_| {
            count += 1.0;
            Ok(vec![Sample::ms("x", count)])
        })
        .unwrap();
        assert_eq!(figures[0].samples, [[3.0, 4.0, 5.0]]);
    }

    #[test]
    fn figure_when_a_monitor_lacks_it_keeps_its_place_empty() {
        let plan = Plan {
            warm_up: 0,
            runs: 1,
        };
        let figures = run(plan, &monitors(&["a", "b"]), |monitor| {
            Ok(if monitor.name == "b" {
                vec![Sample::ms("x", 1.0)]
            } else {
                Vec::new()
            })
        })
        .unwrap();
        assert_eq!(figures[0].samples, [vec![], vec![1.0]]);
    }
}

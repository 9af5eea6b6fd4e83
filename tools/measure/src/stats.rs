//! Minimum, median, maximum and ratios.

/// The three numbers a figure is printed with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// The smallest sample: what the work costs when nothing interferes.
    pub min: f64,
    /// The middle sample, or the mean of the two in the middle.
    pub median: f64,
    /// The largest sample.
    pub max: f64,
}

/// Summarises samples; nothing for no samples.
pub fn summary(samples: &[f64]) -> Option<Summary> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some(Summary {
        min: *sorted.first()?,
        median: median(&sorted)?,
        max: *sorted.last()?,
    })
}

/// How one series relates to another measured in the same rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// Median over median.
    pub of_medians: f64,
    /// The median of the ratios of each round: noise that lasts longer than a round cancels out.
    pub per_round: f64,
}

/// `ours` over `theirs`; nothing unless both have one sample for each round and all of theirs are above zero.
pub fn ratio(ours: &[f64], theirs: &[f64]) -> Option<Ratio> {
    if ours.len() != theirs.len() || theirs.iter().any(|value| *value <= 0.0) {
        return None;
    }
    let mut rounds: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
    rounds.sort_by(f64::total_cmp);
    Some(Ratio {
        of_medians: summary(ours)?.median / summary(theirs)?.median,
        per_round: median(&rounds)?,
    })
}

/// The smallest sample that at least `share` of all samples are not above; nothing for no samples.
pub fn percentile(samples: &[f64], share: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted.get(middle).copied()
    } else {
        Some((sorted.get(middle.checked_sub(1)?)? + sorted.get(middle)?) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_when_odd_takes_the_middle() {
        let all = summary(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((all.min, all.median, all.max), (1.0, 2.0, 3.0));
    }

    #[test]
    fn summary_when_even_takes_the_mean_of_the_middle() {
        assert_eq!(summary(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
    }

    #[test]
    fn summary_when_one_sample_is_that_sample() {
        let all = summary(&[7.0]).unwrap();
        assert_eq!((all.min, all.median, all.max), (7.0, 7.0, 7.0));
    }

    #[test]
    fn summary_when_empty_is_nothing() {
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn percentile_when_taken_is_a_sample() {
        let samples: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        let found = [0.0, 0.5, 0.99, 1.0].map(|share| percentile(&samples, share).unwrap());
        assert_eq!(found, [1.0, 100.0, 198.0, 200.0]);
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn ratio_when_a_round_is_disturbed_differs_from_the_rounds() {
        // The third round was slow for both, the second only for them.
        let found = ratio(&[1.0, 1.0, 10.0], &[2.0, 8.0, 20.0]).unwrap();
        assert_eq!(found.of_medians, 0.125);
        assert_eq!(found.per_round, 0.5);
    }

    #[test]
    fn ratio_when_lengths_differ_is_nothing() {
        assert_eq!(ratio(&[1.0], &[1.0, 2.0]), None);
    }

    #[test]
    fn ratio_when_empty_or_divided_by_zero_is_nothing() {
        assert_eq!(ratio(&[], &[]), None);
        assert_eq!(ratio(&[1.0], &[0.0]), None);
    }
}

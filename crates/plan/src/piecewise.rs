//! A measured quantity at a few sizes, and whole numbers in between.

use serde::{Deserialize, Serialize};

/// The longest time that anything is priced at, in nanoseconds: under three hours for one operation or exchange. What
/// would take longer takes as long, so that sums over a layer stay in 64 bits.
pub const MOST_NS: u64 = 10_000_000_000_000;

/// Points (x, y) with ascending x, joined by straight lines; all whole numbers, so that every rank reads the same
/// value from the same points.
///
/// An exchange that takes 20 µs to start and then carries 100 bytes a nanosecond:
///
/// ```
/// # use epsmoe_plan::Piecewise;
/// let link = Piecewise::line(20_000, 100_000_000_000);
/// assert_eq!(link.extended(0), 20_000);
/// assert_eq!(link.extended(5_000_000), 70_000);
/// // An efficiency does not grow beyond what was measured.
/// let efficiency = Piecewise::of([(16, 100), (256, 900)]);
/// assert_eq!([1, 16, 136, 256, 4096].map(|rows| efficiency.clamped(rows)), [100, 100, 500, 900, 900]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Piecewise(Vec<(u64, u64)>);

impl Default for Piecewise {
    /// Zero everywhere.
    fn default() -> Self {
        Piecewise::flat(0)
    }
}

impl Piecewise {
    /// Most points of a fitted curve.
    const POINTS: usize = 16;

    /// Through these points, sorted by x; of equal x the first one counts. Without points it is zero.
    pub fn of(points: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut points: Vec<_> = points.into_iter().collect();
        points.sort_by_key(|point| point.0);
        points.dedup_by_key(|point| point.0);
        Piecewise(points)
    }

    /// The same value everywhere.
    pub fn flat(value: u64) -> Self {
        Piecewise(vec![(0, value)])
    }

    /// Nanoseconds for x units: `start` and then a second for every `per_second` units.
    pub fn line(start: u64, per_second: u64) -> Self {
        // The far point is exact to a part in 10⁹ for rates up to 10¹⁸.
        let far = per_second.max(1);
        Piecewise(vec![(0, start), (far, start.saturating_add(1_000_000_000))])
    }

    /// Whether the points ascend as they must.
    pub(crate) fn is_sorted(&self) -> bool {
        !self.0.is_empty() && self.0.windows(2).all(|pair| pair[0].0 < pair[1].0)
    }

    /// The points.
    pub fn points(&self) -> &[(u64, u64)] {
        &self.0
    }

    /// The value at `x`; before the first and after the last point, the value there.
    pub fn clamped(&self, x: u64) -> u64 {
        let after = self.0.partition_point(|point| point.0 <= x);
        match (after.checked_sub(1).map(|before| self.0[before]), self.0.get(after)) {
            (Some(left), Some(&right)) => between(left, right, x),
            (Some(end), None) | (None, Some(&end)) => end.1,
            (None, None) => 0,
        }
    }

    /// The value at `x`; after the last point, along the last line, at most [`MOST_NS`]. Meant for rising curves: times by
    /// size.
    pub fn extended(&self, x: u64) -> u64 {
        let value = match *self.0.as_slice() {
            [.., left, right] if x > right.0 && right.1 > left.1 => between(left, right, x),
            _ => self.clamped(x),
        };
        value.min(MOST_NS)
    }

    /// Every value times `permille` / 1000, rounded up.
    #[must_use]
    pub fn scaled(&self, permille: u64) -> Self {
        Piecewise(self.0.iter().map(|&(x, y)| (x, scale(y, permille))).collect())
    }

    /// A rising curve through measured (x, time): at every x the median, never more than at a larger x (what disturbs
    /// a measurement makes it longer), at most sixteen points.
    pub fn fit(samples: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut rising: Vec<(u64, u64)> = medians(samples);
        for index in (1..rising.len()).rev() {
            rising[index - 1].1 = rising[index - 1].1.min(rising[index].1);
        }
        let (all, kept) = (rising.len(), rising.len().min(Self::POINTS));
        let thin = (0..kept).map(|index| rising[index * (all - 1) / (kept - 1).max(1)]);
        Piecewise::of(thin)
    }
}

/// `value · permille / 1000`, rounded up.
pub(crate) fn scale(value: u64, permille: u64) -> u64 {
    saturated((u128::from(value) * u128::from(permille)).div_ceil(1000))
}

/// The number, or the largest there is.
pub(crate) fn saturated(number: u128) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// (x, median of its values), by ascending x.
pub(crate) fn medians(samples: impl IntoIterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut samples: Vec<_> = samples.into_iter().collect();
    samples.sort_unstable();
    samples.chunk_by(|left, right| left.0 == right.0).map(|equal| equal[equal.len() / 2]).collect()
}

fn between(left: (u64, u64), right: (u64, u64), x: u64) -> u64 {
    let (run, part) = (right.0 - left.0, x - left.0);
    let rise = right.1.abs_diff(left.1);
    let step = match part.checked_mul(rise) {
        Some(product) => product / run,
        None => saturated(u128::from(part) * u128::from(rise) / u128::from(run)),
    };
    if right.1 >= left.1 { left.1.saturating_add(step) } else { left.1 - step.min(left.1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_between_and_beyond() {
        let curve = Piecewise::of([(10, 100), (20, 200), (10, 7)]);
        assert_eq!([0, 10, 15, 20, 40].map(|x| curve.clamped(x)), [100, 100, 150, 200, 200]);
        assert_eq!([0, 15, 40].map(|x| curve.extended(x)), [100, 150, 400]);
        let falling = Piecewise::of([(0, 10), (10, 0)]);
        assert_eq!([3, 10, 50].map(|x| falling.extended(x)), [7, 0, 0]);
        assert_eq!(Piecewise::of([]).extended(5), 0);
        assert_eq!(Piecewise::flat(3).extended(u64::MAX), 3);
        // Beyond all numbers.
        let steep = Piecewise::of([(0, 0), (1, 1 << 40)]);
        assert_eq!([steep.extended(u64::MAX), steep.clamped(u64::MAX)], [MOST_NS, 1 << 40]);
        assert_eq!(Piecewise::line(u64::MAX, 1).extended(7), MOST_NS);
        assert_eq!(Piecewise::line(5, u64::MAX / 2).extended(u64::MAX / 2), 1_000_000_005);
        assert_eq!(Piecewise::line(5, 1_000_000_000).scaled(1500).extended(100), 158);
    }

    #[test]
    fn a_fit_ignores_outliers_and_rises() {
        let noisy = [(1, 10), (1, 11), (1, 900), (2, 9), (2, 9), (4, 40), (4, 41), (4, 1)];
        assert_eq!(Piecewise::fit(noisy).points(), [(1, 9), (2, 9), (4, 40)]);
        let long = Piecewise::fit((0..100).map(|x| (x, 3 * x)));
        assert_eq!(long.points().len(), Piecewise::POINTS);
        assert!((0..100).all(|x| long.extended(x) == 3 * x));
        assert_eq!(Piecewise::fit([]).points(), []);
        assert_eq!(Piecewise::fit([(3, 4)]).points(), [(3, 4)]);
    }
}

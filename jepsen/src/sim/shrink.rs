//! A failing run told again with fewer faults, as long as it breaks the same invariant (delta debugging, Zeller 1999).

use super::Options;
use super::Outcome;
use super::faults::Planned;
use super::run;

/// Runs that a minimisation may take.
const RUNS: usize = 60;

/// Fewer faults that still break the invariant that `found` broke.
pub fn shrink(found: &Outcome, options: &Options, mut tell: impl FnMut(usize)) -> Outcome {
    let Some(broken) = found.violation.as_ref().map(|violation| violation.invariant) else { return found.clone() };
    let mut best = found.clone();
    let mut runs = 0;
    let mut pieces = 2;
    while pieces <= best.faults.len().max(1) && runs < RUNS {
        let size = best.faults.len().div_ceil(pieces);
        let without = (0..best.faults.len()).step_by(size.max(1)).find_map(|from| {
            let faults: Vec<Planned> = leave_out(&best.faults, from, size);
            runs += 1;
            let told = run(found.seed, &Options { faults: Some(faults), ..options.clone() });
            let same = told.violation.as_ref().is_some_and(|violation| violation.invariant == broken);
            (same && runs <= RUNS).then_some(told)
        });
        match without {
            Some(told) => {
                best = told;
                pieces = 2.max(pieces - 1);
                tell(best.faults.len());
            }
            None => pieces *= 2,
        }
    }
    best
}

fn leave_out(faults: &[Planned], from: usize, size: usize) -> Vec<Planned> {
    let to = (from + size).min(faults.len());
    [&faults[..from], &faults[to..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::faults::Fault;

    #[test]
    fn pieces_are_left_out_one_at_a_time() {
        let faults: Vec<Planned> = (0..5).map(|at_ms| Planned { at_ms, fault: Fault::Join }).collect();
        let times = |faults: Vec<Planned>| faults.iter().map(|fault| fault.at_ms).collect::<Vec<_>>();
        assert_eq!(times(leave_out(&faults, 0, 2)), [2, 3, 4]);
        assert_eq!(times(leave_out(&faults, 4, 2)), [0, 1, 2, 3]);
    }
}

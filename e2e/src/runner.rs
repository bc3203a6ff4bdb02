//! Runs the cases of a file one after the other and counts what happened.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use crate::{Census, Scratch};

/// One end-to-end test.
#[derive(Clone, Copy)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// What it does; an error fails it, a [`Skip`] skips it.
    pub run: fn(&Scratch) -> anyhow::Result<()>,
}

/// Why a case cannot run here.
#[derive(Debug)]
pub struct Skip(
    /// The reason, for the one who reads the output.
    pub String,
);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

/// Runs the cases whose name contains the first argument that is not an option (all without one), prints a line for each,
/// and closes with `N passed, N failed, N skipped`.
pub fn run(cases: &[Case]) -> ExitCode {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for case in cases.iter().filter(|case| case.name.contains(&filter)) {
        let start = Instant::now();
        let outcome = run_one(*case);
        let seconds = start.elapsed().as_secs_f32();
        match outcome {
            Outcome::Passed => {
                passed += 1;
                println!("test {} ... ok ({seconds:.1} s)", case.name);
            }
            Outcome::Failed(why) => {
                failed += 1;
                println!("test {} ... FAILED ({seconds:.1} s)\n{why}", case.name);
            }
            Outcome::Skipped(why) => {
                skipped += 1;
                println!("test {} ... skipped: {why}", case.name);
            }
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_one(case: Case) -> Outcome {
    let scratch = match Scratch::new() {
        Ok(scratch) => scratch,
        Err(error) => return outcome_of(error),
    };
    let roots: Vec<PathBuf> = vec![scratch.state_root()];
    let before = Census::take(&roots);
    let result = catch_unwind(AssertUnwindSafe(|| (case.run)(&scratch)));
    let result = result.unwrap_or_else(|_| Err(anyhow::anyhow!("the case panicked; see above")));
    match (result, before.nothing_more(&roots)) {
        (Ok(()), Ok(())) => Outcome::Passed,
        (Ok(()), Err(left)) => Outcome::Failed(left.to_string()),
        (Err(error), Ok(())) => outcome_of(error),
        (Err(error), Err(left)) => Outcome::Failed(format!("{error:?}\n{left}")),
    }
}

fn outcome_of(error: anyhow::Error) -> Outcome {
    match error.downcast_ref::<Skip>() {
        Some(skip) => Outcome::Skipped(skip.to_string()),
        None => Outcome::Failed(format!("{error:?}")),
    }
}

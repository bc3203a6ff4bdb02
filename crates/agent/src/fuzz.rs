//! One function for each decoder of the agent: it may refuse any bytes, and must not do anything else with them.
//!
//! `cargo xtask fuzz` looks for bytes that break one; what it began from and what it found is in `fuzz/corpus/<function>`,
//! and the test here feeds that to the functions again. A new one gets a line in [`TARGETS`], a file in `fuzz/fuzz_targets`
//! and an entry in `fuzz/Cargo.toml`.

use crate::policy;

/// A decoder under test.
pub type Target = fn(&[u8]);

/// Every function here, by its name.
pub const TARGETS: &[(&str, Target)] = &[("policy_text", policy_text), ("policy_input", policy_input)];

/// A policy, held against every request.
pub fn policy_text(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        policy::fuzz_text(text);
    }
}

/// A request's bytes as the input of a policy; the first byte says which request.
pub fn policy_input(data: &[u8]) {
    policy::fuzz_input(data);
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// The files of a target's corpus.
    fn corpus(name: &str) -> Vec<Vec<u8>> {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
        assert!(fuzz.join(format!("fuzz_targets/{name}.rs")).exists(), "{name} has no program");
        let files = fs::read_dir(fuzz.join("corpus").join(name)).unwrap();
        let files: Vec<_> = files.map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect();
        assert!(!files.is_empty(), "{name} has no corpus");
        files
    }

    #[test]
    fn the_corpus_breaks_nothing() {
        for (name, target) in TARGETS {
            corpus(name).iter().for_each(|file| target(file));
            target(&[]);
        }
    }

    /// A fuzzer for toolchains that have none: the same changes each time, `BULKHEAD_FUZZ_ROUNDS` for more of them.
    #[test]
    fn what_is_like_the_corpus_breaks_nothing() {
        let rounds = std::env::var("BULKHEAD_FUZZ_ROUNDS").map_or(1000, |rounds| rounds.parse().unwrap());
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state >> 16).unwrap() % below.max(1)
        };
        for (name, target) in TARGETS {
            let files = corpus(name);
            for _ in 0..rounds {
                let mut data = files[random(files.len())].clone();
                for _ in 0..=random(6) {
                    let (at, other) = (random(data.len() + 1), &files[random(files.len())]);
                    match random(4) {
                        0 if at < data.len() => data[at] ^= 1 << random(8),
                        1 if at < data.len() => drop(data.remove(at)),
                        2 => data.insert(at, u8::try_from(random(256)).unwrap()),
                        _ => {
                            let from = random(other.len());
                            let piece = other[from..].iter().take(random(40)).copied();
                            data.splice(at..at, piece.collect::<Vec<u8>>());
                        }
                    }
                }
                target(&data);
            }
        }
    }
}

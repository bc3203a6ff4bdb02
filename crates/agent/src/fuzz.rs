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

    #[test]
    fn the_corpus_breaks_nothing() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
        for (name, target) in TARGETS {
            assert!(fuzz.join(format!("fuzz_targets/{name}.rs")).exists(), "{name} has no program");
            let corpus = fuzz.join("corpus").join(name);
            let files: Vec<_> = fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(!files.is_empty(), "{name} has no corpus");
            for file in files {
                target(&fs::read(file).unwrap());
            }
            target(&[]);
        }
    }
}

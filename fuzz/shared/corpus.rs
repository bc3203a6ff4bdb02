//! The corpora in tests of a stable toolchain: each file, and what is like it.

use std::{fs, path::Path};

/// A target and its name.
type Named = (&'static str, fn(&[u8]));

/// The files of a target's corpus.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    assert!(fuzz.join(format!("fuzz_targets/{name}.rs")).exists(), "{name} has no program");
    let files = fs::read_dir(fuzz.join("corpus").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let files: Vec<_> = files.map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect();
    assert!(!files.is_empty(), "{name} has no corpus");
    files
}

/// Feeds the corpora to their targets.
pub(crate) fn feed(targets: &[Named]) {
    for (name, target) in targets {
        corpus(name).iter().for_each(|file| target(file));
        target(&[]);
    }
}

/// A fuzzer for toolchains that have none: the same changes each time, `BULKHEAD_FUZZ_ROUNDS` for more of them.
pub(crate) fn change(targets: &[Named]) {
    let rounds = std::env::var("BULKHEAD_FUZZ_ROUNDS").map_or(300, |rounds| rounds.parse().unwrap());
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 16).unwrap() % below.max(1)
    };
    for (name, target) in targets {
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

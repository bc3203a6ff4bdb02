//! SPECIFICATION.md keeps its word: every method of the API has a row, and every test that a row names exists.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use bulkhead_protocol::{agent, health};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The rows of the table below a heading: the cells of each.
fn table(heading: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join("SPECIFICATION.md")).unwrap();
    let (_, rest) = text.split_once(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("no {heading:?}"));
    let section = rest.split_once("\n## ").map_or(rest, |(section, _)| section);
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|row| row.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()).collect()
}

/// What is in backticks.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// The names of all functions in the tests and sources of the repository.
fn functions() -> BTreeSet<String> {
    fn collect(path: &Path, names: &mut BTreeSet<String>) {
        for entry in fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, names);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let after = text.split("fn ").skip(1);
                names.extend(after.filter_map(|rest| rest.split(['(', '<']).next()).map(str::to_owned));
            }
        }
    }
    let mut names = BTreeSet::new();
    for directory in ["crates", "e2e"] {
        collect(&root().join(directory), &mut names);
    }
    names
}

fn methods() -> BTreeSet<String> {
    let services = [agent::file_descriptor(), health::file_descriptor()];
    let methods = services.into_iter().flat_map(|file| file.services().collect::<Vec<_>>());
    let names = methods.flat_map(|service| {
        service.methods().map(|method| method.proto().name().to_owned()).collect::<Vec<_>>()
    });
    names.collect()
}

#[test]
fn every_method_has_a_row_with_a_test_that_exists() {
    let functions = functions();
    let rows = table("Agent API");
    let named: Vec<&str> = rows.iter().flat_map(|row| quoted(&row[0])).collect();
    for method in methods() {
        assert!(named.contains(&method.as_str()), "{method} has no row in SPECIFICATION.md");
    }
    assert_eq!(named.len(), methods().len(), "a row for each method, and for nothing else");
    for row in rows {
        let tests: Vec<&str> = quoted(&row[2]).collect();
        assert!(!tests.is_empty(), "{} names no test", row[0]);
        for test in tests {
            assert!(functions.contains(test), "{}: there is no test {test}", row[0]);
        }
    }
}

#[test]
fn every_known_defect_is_mended_with_a_test_or_kept_with_a_reason() {
    let functions = functions();
    let rows = table("Defects of Kata's agent, and ours");
    assert!(rows.len() >= 50, "{} rows", rows.len());
    for row in rows {
        let verdict = &row[1];
        let tests: Vec<&str> = quoted(&row[2]).collect();
        for test in &tests {
            assert!(functions.contains(*test), "{}: there is no test {test}", row[0]);
        }
        let reasoned = !row[2].is_empty();
        match verdict.as_str() {
            "mended" => assert!(!tests.is_empty(), "{} names no test", row[0]),
            "kept" | "absent" => assert!(reasoned, "{} gives no reason", row[0]),
            other => panic!("{}: {other:?} is no verdict", row[0]),
        }
    }
}

//! The guest's processors and memory as the kernel shows them: what was plugged is used only once it is brought online.
//!
//! Containers need nothing: a cgroup's `cpuset.cpus` may name processors that are not there yet, and the kernel works out
//! anew what is effective, there and in every cgroup above, when one comes or goes.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    device::{Look, Places},
    error::{During, Error, Result},
};

/// The most processors that a kernel can have.
const MOST: u32 = 8192;

/// Brings processors online until so many are; what is missing, in words.
pub(crate) fn processors(places: &Places, wanted: u32) -> Result<Look<()>> {
    let directory = places.sys.join("devices/system/cpu");
    let mut refused = None;
    let mut online = count(&directory.join("online"))?;
    for file in numbered(&directory, "cpu")? {
        if online >= wanted {
            return Ok(Look::Found(()));
        }
        match bring_online(&file) {
            Ok(true) => online = count(&directory.join("online"))?,
            Ok(false) => {}
            // It may be on its way out, or the kernel busy; whether it matters is a question of the number.
            Err(error) => refused = Some(format!("; {} was refused: {error}", file.display())),
        }
    }
    if online >= wanted {
        return Ok(Look::Found(()));
    }
    let present = count(&directory.join("present"))?;
    let refused = refused.unwrap_or_default();
    Ok(Look::Missing(format!("{online} are, of {present} that are there{refused}")))
}

/// Brings all memory online that is there.
pub(crate) fn memory(places: &Places) -> Result<()> {
    let directory = places.sys.join("devices/system/memory");
    // Each block gets its chance before the first failure is told.
    let mut first = Ok(());
    for file in numbered(&directory, "memory")? {
        let done = bring_online(&file).during(|| format!("bring memory online: {}", file.display()));
        first = first.and(done.map(drop));
    }
    first
}

/// Lets the kernel bring memory online by itself when it is plugged, and brings online what was plugged before.
pub(crate) fn memory_from_now_on(places: &Places) -> Result<()> {
    let file = places.sys.join("devices/system/memory/auto_online_blocks");
    match fs::read_to_string(&file) {
        Ok(policy) if policy.trim() == "offline" => {
            fs::write(&file, "online").during(|| format!("write {}", file.display()))?;
        }
        // It does so already, or cannot be plugged any memory.
        _ => {}
    }
    memory(places)
}

/// Tells the kernel where memory was plugged, for machines that do not tell it themselves.
pub(crate) fn probe(places: &Places, addresses: &[u64]) -> Result<()> {
    let file = places.sys.join("devices/system/memory/probe");
    if !file.exists() {
        let file = file.display();
        return Err(Error::State(format!(
            "this kernel finds plugged memory by itself and cannot be told where it is: there is no {file}"
        )));
    }
    for address in addresses {
        fs::write(&file, format!("{address:#X}").replace("0X", "0x"))
            .during(|| format!("add the memory at {address:#x}: write {}", file.display()))?;
    }
    Ok(())
}

/// The `online` files of a directory's `<prefix><number>`, in the order of the numbers. What cannot go offline has none.
fn numbered(directory: &Path, prefix: &str) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        // A kernel without hotplug.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.during(|| format!("list {}", directory.display()))?,
    };
    let mut files: Vec<(u32, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((number, entry.path().join("online")))
        })
        .filter(|(_, file)| file.exists())
        .collect();
    files.sort_unstable();
    Ok(files.into_iter().map(|(_, file)| file).collect())
}

/// Whether it was offline before.
fn bring_online(file: &Path) -> io::Result<bool> {
    if fs::read_to_string(file)?.trim() != "0" {
        return Ok(false);
    }
    fs::write(file, "1")?;
    Ok(true)
}

/// How many numbers are in a list of ranges, `0-3,8`.
fn count(file: &Path) -> Result<u32> {
    let text = fs::read_to_string(file).during(|| format!("read {}", file.display()))?;
    let mut sum = 0_u32;
    for range in text.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let length = match (first.parse::<u32>(), last.parse::<u32>()) {
            (Ok(first), Ok(last)) if first <= last && last < MOST => last - first + 1,
            _ => return Err(Error::State(format!("{} is not a list of numbers: {text:?}", file.display()))),
        };
        sum = sum.saturating_add(length);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::test_tree::Tree;

    const CPU: &str = "devices/system/cpu";
    const MEMORY: &str = "devices/system/memory";

    fn tree(online: &str, present: &str, switches: &[(u32, &str)]) -> Tree {
        let tree = Tree::new();
        tree.sysfs(&format!("{CPU}/online"), online);
        tree.sysfs(&format!("{CPU}/present"), present);
        tree.directory(&format!("{CPU}/cpu0"));
        tree.directory(&format!("{CPU}/cpufreq"));
        for (number, state) in switches {
            tree.sysfs(&format!("{CPU}/cpu{number}/online"), state);
        }
        tree
    }

    #[test]
    fn processors_are_counted() {
        let tree = Tree::new();
        let count = |text: &str| {
            tree.sysfs("list", text);
            count(&tree.places().sys.join("list"))
        };
        for (text, expected) in [("0\n", 1), ("0-3\n", 4), ("0,2-3,7\n", 4), ("\n", 0), ("", 0), ("8191", 1)]
        {
            assert_eq!(count(text).unwrap(), expected, "{text:?}");
        }
        for text in ["x", "3-1", "1-", "-", "0-4294967295", "0,,x"] {
            assert!(matches!(count(text), Err(Error::State(_))), "{text:?}");
        }
    }

    #[test]
    fn processors_that_are_missing_are_told_and_those_that_are_there_come_online() {
        let few = tree("0-1", "0-2", &[(1, "1"), (2, "0")]);
        let Look::Missing(text) = processors(few.places(), 4).unwrap() else { panic!("too few") };
        // The made-up kernel counts nothing by itself.
        assert_eq!(text, "2 are, of 3 that are there");
        assert_eq!(few.read(&format!("{CPU}/cpu2/online")), "1");

        let enough = tree("0-1", "0-2", &[(1, "1"), (2, "0")]);
        assert!(matches!(processors(enough.places(), 2).unwrap(), Look::Found(())));
        assert_eq!(enough.read(&format!("{CPU}/cpu2/online")), "0", "no more than asked for");
    }

    #[test]
    fn a_processor_that_refuses_is_named() {
        let tree = tree("0", "0-1", &[]);
        // A directory cannot be read as a switch.
        tree.directory(&format!("{CPU}/cpu1/online"));
        let Look::Missing(text) = processors(tree.places(), 2).unwrap() else { panic!("too few") };
        assert!(text.contains("cpu1/online was refused"), "{text}");
    }

    #[test]
    fn memory_comes_online_block_by_block() {
        let tree = Tree::new();
        memory(tree.places()).unwrap();
        for (block, state) in [(0, "1\n"), (8, "0\n"), (9, "0\n")] {
            tree.sysfs(&format!("{MEMORY}/memory{block}/online"), state);
        }
        tree.sysfs(&format!("{MEMORY}/block_size_bytes"), "8000000");
        memory(tree.places()).unwrap();
        for (block, state) in [(0, "1\n"), (8, "1"), (9, "1")] {
            assert_eq!(tree.read(&format!("{MEMORY}/memory{block}/online")), state);
        }
        tree.directory(&format!("{MEMORY}/memory3/online"));
        tree.sysfs(&format!("{MEMORY}/memory9/online"), "0");
        let error = memory(tree.places()).unwrap_err().to_string();
        assert!(error.contains("memory3/online"), "{error}");
        assert_eq!(
            tree.read(&format!("{MEMORY}/memory9/online")),
            "1",
            "the others come online all the same"
        );
    }

    #[test]
    fn the_kernel_is_told_to_bring_memory_online_by_itself() {
        let tree = Tree::new();
        memory_from_now_on(tree.places()).unwrap();
        let policy = format!("{MEMORY}/auto_online_blocks");
        for (before, after) in [("offline\n", "online"), ("online_movable\n", "online_movable\n")] {
            tree.sysfs(&policy, before);
            memory_from_now_on(tree.places()).unwrap();
            assert_eq!(tree.read(&policy), after);
        }
    }

    #[test]
    fn memory_is_probed_at_each_address() {
        let tree = Tree::new();
        let error = probe(tree.places(), &[0]).unwrap_err();
        assert!(matches!(&error, Error::State(text) if text.contains("memory/probe")), "{error}");
        tree.sysfs(&format!("{MEMORY}/probe"), "");
        probe(tree.places(), &[0x1_0000_0000, 0x4_8ABC_0000]).unwrap();
        assert_eq!(tree.read(&format!("{MEMORY}/probe")), "0x48ABC0000");
    }
}

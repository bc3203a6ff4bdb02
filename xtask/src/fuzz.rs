//! `cargo xtask fuzz`: looks for bytes that break a decoder, with cargo-fuzz and a nightly toolchain.
//!
//! What is found stays in the target directory; `--keep` adds to `fuzz/corpus` what reaches code that nothing there does.

use std::{env, fs};

use anyhow::{Context, Result, bail};

use crate::{process, progress::heading, workspace::Workspace};

/// The version of cargo-fuzz.
const VERSION: &str = "0.13.2";

/// What to fuzz, and for how long.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only this target
    target: Option<String>,
    /// Seconds for each target
    #[arg(long, default_value = "60")]
    seconds: u32,
    /// Add what was found to the corpus of the repository
    #[arg(long)]
    keep: bool,
}

/// Fuzzes.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    install(workspace)?;
    let targets = targets(workspace)?;
    if let Some(target) = &arguments.target
        && !targets.contains(target)
    {
        bail!("there is no target {target}; there are {}", targets.join(", "));
    }
    for target in targets.iter().filter(|name| arguments.target.as_ref().is_none_or(|only| only == *name)) {
        heading(&format!("Fuzzing {target}"));
        let found = workspace.target.join("fuzz-corpus").join(target);
        fs::create_dir_all(&found).with_context(|| format!("cannot make {}", found.display()))?;
        let kept = workspace.root.join("fuzz/corpus").join(target);
        let time = format!("-max_total_time={}", arguments.seconds);
        let limits = ["--", &time, "-timeout=10", "-rss_limit_mb=2048"];
        process::run(fuzz(workspace, target)?.args([&found, &kept]).args(limits))?;
        if arguments.keep {
            process::run(fuzz(workspace, target)?.args([&kept, &found]).args(["--", "-merge=1"]))?;
        }
    }
    Ok(())
}

/// The targets, as `fuzz/fuzz_targets` has them.
fn targets(workspace: &Workspace) -> Result<Vec<String>> {
    let directory = workspace.root.join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let names = entries.flatten().map(|entry| entry.path().with_extension(""));
    let mut names: Vec<String> =
        names.filter_map(|path| path.file_name()?.to_str().map(str::to_owned)).collect();
    names.sort();
    Ok(names)
}

/// `cargo fuzz run`, by the nightly toolchain.
fn fuzz(workspace: &Workspace, target: &str) -> Result<std::process::Command> {
    let mut command = process::command("cargo");
    let path = env::var_os("PATH").unwrap_or_default();
    let tools = [workspace.target.join("tools/bin")];
    let path = env::join_paths(tools.into_iter().chain(env::split_paths(&path)))?;
    command.current_dir(&workspace.root).env("PATH", path);
    // Of the toolchain that runs this program.
    for variable in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN", "CARGO_TARGET_DIR"] {
        command.env_remove(variable);
    }
    command.args(["+nightly", "fuzz", "run", "--target-dir"]).arg(workspace.target.join("fuzz")).arg(target);
    Ok(command)
}

fn install(workspace: &Workspace) -> Result<()> {
    let tools = workspace.target.join("tools");
    if tools.join("bin/cargo-fuzz").exists() {
        return Ok(());
    }
    heading("Installing cargo-fuzz");
    let mut install = workspace.cargo("install");
    process::run(install.args(["cargo-fuzz", "--version", VERSION, "--locked", "--root"]).arg(&tools))
}

//! What can be found wrong without a VM, by the real binary: codes, words, and nothing left.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    time::{Duration, Instant},
};

use fixture::{Place, is_root};
use sha2::{Digest as _, Sha256};

/// No hypervisor that could be started.
fn place() -> Place {
    let place = Place::new(
        "[hypervisor.qemu]\npath = \"/no/qemu\"\nkernel = \"/no/kernel\"\ninitrd = \"/no/initrd\"\nbackend = \"/no/backend\"",
        "",
    );
    fs::create_dir_all(place.path("rootfs/etc")).unwrap();
    place
}

#[test]
fn usage_errors_are_ours() {
    let place = place();
    for args in [
        &["run"][..],
        &["run", "--no-such-option", "x"],
        &["run", "--rootfs", "rootfs", "image.tar"],
        &["run", "--name", "a/b", "--rootfs", "rootfs", "--", "x"],
        &["run", "-m", "1x", "--rootfs", "rootfs", "--", "x"],
        &["run", "-u", "99999999999", "--rootfs", "rootfs", "--", "x"],
        &["exec", "name"],
        &["kill", "-s", "NOSUCH", "name"],
    ] {
        let outcome = place.run(args);
        assert_eq!(outcome.code, 125, "{args:?}: {outcome:?}");
        assert!(outcome.stderr.contains("error:") && outcome.stdout.is_empty(), "{outcome:?}");
    }
    let help = place.run(&["run", "--help"]);
    assert_eq!((help.code, help.stderr.as_str()), (0, ""));
    assert!(help.stdout.contains("--rootfs"));
    assert_eq!(place.run(&["--version"]).stdout, place.run(&["version"]).stdout);
    place.is_clean();
}

#[test]
fn what_a_run_is_made_from_is_checked_first() {
    if !is_root("what_a_run_is_made_from_is_checked_first") {
        return;
    }
    let place = place();
    fs::write(place.path("text"), "this is no image, whatever its name says").unwrap();
    let run = |args: &[&str]| place.run(&[&["run"], args].concat());
    run(&["text"]).fails(125, &["image text", "not a tar archive", "docker save"]);
    run(&["rootfs"]).fails(125, &["image rootfs", "--rootfs"]);
    run(&["absent.tar"]).fails(125, &["image absent.tar", "No such file"]);
    run(&["--rootfs", "absent", "--", "x"]).fails(125, &["root file system absent", "No such file"]);
    run(&["--rootfs", "text", "--", "x"]).fails(125, &["root file system text", "not a directory"]);
    run(&["--rootfs", "/", "--", "x"]).fails(125, &["root file system /"]);
    run(&["--rootfs", "rootfs"]).fails(125, &["no command"]);
    run(&["-v", "/no/such/path:/x", "--rootfs", "rootfs", "--", "x"])
        .fails(125, &["/no/such/path", "no such file"]);
    run(&["-it", "--rootfs", "rootfs", "--", "x"]).fails(125, &["-i and -t", "terminal"]);
    place.is_clean();
}

#[test]
fn an_archive_without_an_image_is_no_image() {
    if !is_root("an_archive_without_an_image_is_no_image") {
        return;
    }
    let place = place();
    let mut builder = tar::Builder::new(fs::File::create(place.path("x.tar")).unwrap());
    builder.append_dir("rootfs", place.path("rootfs")).unwrap();
    builder.into_inner().unwrap().flush().unwrap();
    place.run(&["run", "x.tar"]).fails(125, &["image x.tar", "neither manifest.json nor index.json"]);
    place.is_clean();
}

#[test]
fn without_a_hypervisor_nothing_starts_and_check_says_why() {
    if !is_root("without_a_hypervisor_nothing_starts_and_check_says_why") {
        return;
    }
    let place = place();
    fs::write(place.path("rootfs/x"), "").unwrap();
    let outcome = place.run(&["run", "--rootfs", "rootfs", "--", "/x"]);
    outcome.fails(125, &["start the sandbox", "/no/"]);
    let check = place.run(&["check"]);
    assert_eq!(check.code, 1, "{check:?}");
    for word in ["/no/qemu", "/no/kernel", "/no/initrd", "/no/backend", "apt-get install", "cannot run VMs"] {
        assert!(check.stdout.contains(word), "{word}: {}", check.stdout);
    }
    let json = place.run(&["check", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((report["usable"].as_bool(), json.code), (Some(false), 1));
    place.is_clean();
}

#[test]
fn a_command_that_is_not_there_is_missed_before_any_hypervisor_is() {
    if !is_root("a_command_that_is_not_there_is_missed_before_any_hypervisor_is") {
        return;
    }
    let place = place();
    fs::create_dir_all(place.path("rootfs/opt/bin")).unwrap();
    fs::write(place.path("rootfs/opt/bin/tool"), "").unwrap();
    let run = |options: &[&str], command: &str| {
        place.run(&[&["run", "--rootfs", "rootfs"], options, &["--", command]].concat())
    };
    run(&[], "tool").fails(127, &["exec: \"tool\": executable file not found in $PATH"]);
    run(&[], "/no/such").fails(127, &["exec: \"/no/such\": stat /no/such: no such file or directory"]);
    run(&["-w", "/opt"], "./tool").fails(127, &["exec: \"./tool\": stat ./tool: no such file or directory"]);
    // What is there, or may be, gets as far as to the hypervisor.
    run(&["-e", "PATH=/opt/bin"], "tool").fails(125, &["start the sandbox", "/no/qemu"]);
    run(&["-w", "/opt"], "bin/tool").fails(125, &["start the sandbox"]);
    run(&[], "/proc/self/exe").fails(125, &["start the sandbox"]);
    run(&["-v", "/tmp:/mnt"], "/mnt/tool").fails(125, &["start the sandbox"]);
    place.is_clean();
}

/// An image with one layer that has one directory, as `docker save` would write it.
fn image(place: &Place, name: &str) {
    let mut layer = tar::Builder::new(Vec::new());
    layer.append_dir("opt", place.path("rootfs")).unwrap();
    let layer = layer.into_inner().unwrap();
    let digest: String = Sha256::digest(&layer).iter().map(|byte| format!("{byte:02x}")).collect();
    let config = serde_json::json!({"rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]}});
    let manifest = serde_json::json!([{"Config": "config.json", "Layers": ["layer.tar"]}]);
    let mut archive = tar::Builder::new(fs::File::create(place.path(name)).unwrap());
    let (config, manifest) = (config.to_string().into_bytes(), manifest.to_string().into_bytes());
    for (name, bytes) in [("manifest.json", manifest), ("config.json", config), ("layer.tar", layer)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    archive.into_inner().unwrap().flush().unwrap();
}

#[test]
fn an_image_without_the_command_ends_the_boot() {
    if !is_root("an_image_without_the_command_ends_the_boot") {
        return;
    }
    // An agent that never answers: whoever waits for it waits long.
    let place = Place::new("", "");
    fs::write(place.path("silent"), "#!/bin/sh\nexec sleep 60\n").unwrap();
    fs::set_permissions(place.path("silent"), fs::Permissions::from_mode(0o755)).unwrap();
    let at = place.dir.path().display();
    let text = format!(
        "[hypervisor.local]\nagent = \"{at}/silent\"\n[runtime]\nhypervisor_name = \"local\"\n\
         state_root = \"{at}/state\"\ncache_dir = \"{at}/cache\"\n"
    );
    fs::write(place.path("configuration.toml"), text).unwrap();
    fs::create_dir(place.path("rootfs")).unwrap();
    image(&place, "image.tar");
    let begun = Instant::now();
    let outcome = place.run(&["run", "image.tar", "--", "tool"]);
    outcome.fails(127, &["exec: \"tool\": executable file not found in $PATH"]);
    assert!(begun.elapsed() < Duration::from_secs(10), "it waited for the agent");
    place.is_clean();
}

#[test]
fn runs_that_are_not_there() {
    if !is_root("runs_that_are_not_there") {
        return;
    }
    let place = place();
    place.run(&["exec", "nobody", "--", "x"]).fails(125, &["no run is named nobody", "bulkhead ps"]);
    place.run(&["kill", "nobody"]).fails(1, &["no run is named nobody"]);
    place.run(&["rm", "nobody"]).fails(1, &["no run is named nobody"]);
    assert_eq!(place.run(&["rm", "-f", "nobody"]).code, 0);
    let ps = place.run(&["ps"]);
    assert_eq!((ps.code, ps.stdout.lines().count()), (0, 1));
    assert_eq!(place.run(&["ps", "--json"]).stdout.trim(), "[]");
    place.is_clean();
}

#[test]
fn a_wrong_configuration_is_named() {
    let place = Place::new("[hypervisor.nonsense]\nx = 1", "");
    place.run(&["ps"]).fails(1, &["configuration.toml", "nonsense"]);
}

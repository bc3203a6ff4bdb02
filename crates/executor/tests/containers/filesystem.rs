//! What a container sees of files.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
};

use bulkhead_protocol::oci;

use bulkhead_executor::UserNames;

use crate::{cases, support::*};

cases![
    the_root_is_the_rootfs_and_nothing_else,
    bind_mounts,
    mount_options_reach_the_kernel,
    mount_targets_are_made_inside_the_root,
    links_in_an_image_lead_nowhere_outside,
    proc_cannot_be_faked,
    masked_and_readonly_paths,
    a_readonly_root,
    a_readonly_root_keeps_its_devices,
    devices,
    hostile_dev,
    shared_propagation,
    slave_propagation,
    the_working_directory,
    no_descriptor_leaks,
];

fn the_root_is_the_rootfs_and_nothing_else() {
    let rootfs = Rootfs::new();
    let listing = succeed(rootfs.spec("ls / | sort | tr '\\n' ' '; ls -a /.. | wc -l; ls -a / | wc -l"));
    let lines: Vec<_> = listing.split_whitespace().collect();
    assert_eq!(lines[..8], ["bin", "dev", "etc", "home", "proc", "root", "sys", "tmp"]);
    assert_eq!(lines[8], lines[9]);
    let mounts = succeed(rootfs.spec("cut -d' ' -f5 /proc/self/mountinfo | sort"));
    let allowed = |m: &str| m == "/" || ["/dev", "/proc", "/sys"].iter().any(|p| m.starts_with(p));
    assert!(mounts.lines().all(allowed), "{mounts}");
}

fn bind_mounts() {
    let rootfs = Rootfs::new();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("file"), "content\n").unwrap();
    let mut spec = rootfs.spec(
        "cat /ro/file /etc/single; echo new > /rw/new; echo x 2>/dev/null > /ro/x || echo refused; \
         echo x 2>/dev/null > /etc/single || echo refused",
    );
    spec.Mounts.push(bind(volume.path(), "/ro", &["rbind", "ro", "rprivate"]));
    spec.Mounts.push(bind(volume.path(), "/rw", &["rbind", "rprivate"]));
    spec.Mounts.push(bind(&volume.path().join("file"), "/etc/single", &["bind", "ro"]));
    assert_eq!(succeed(spec), "content\ncontent\nrefused\nrefused\n");
    assert_eq!(fs::read_to_string(volume.path().join("new")).unwrap(), "\n".replace('\n', "new\n"));
    assert!(!volume.path().join("x").exists());

    let mut spec = rootfs.spec("true");
    spec.Mounts.push(bind(&volume.path().join("missing"), "/x", &["bind"]));
    let missing = format!("mounting ({}/missing at /x: source): No such file", volume.path().display());
    assert_refused(spec, &missing);
}

fn mount_options_reach_the_kernel() {
    let rootfs = Rootfs::new();
    let volume = tempfile::tempdir().unwrap();
    let mut spec = rootfs.spec("grep ' /m' /proc/self/mountinfo | cut -d' ' -f5,6,7- | sort");
    for (target, options) in [
        ("/m1", &["bind", "ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime"][..]),
        ("/m2", &["rbind", "rro", "rnosuid"]),
        ("/m3", &["bind", "nosymfollow", "shared"]),
        ("/m4", &["bind", "strictatime", "unbindable"]),
    ] {
        spec.Mounts.push(bind(volume.path(), target, options));
    }
    spec.Mounts.push(mount("/m5", "tmpfs", "mine", &["ro", "size=4k", "mode=700", "noexec", "slave"]));
    let output = succeed(spec);
    let lines: Vec<_> = output.lines().collect();
    assert!(lines[0].starts_with("/m1 ro,nosuid,nodev,noexec,noatime,nodiratime - "), "{}", lines[0]);
    assert!(lines[1].starts_with("/m2 ro,nosuid,"), "{}", lines[1]);
    assert!(lines[2].contains("nosymfollow") && lines[2].contains(" shared:"), "{}", lines[2]);
    assert!(!lines[3].contains("atime") && lines[3].contains(" unbindable "), "{}", lines[3]);
    assert!(lines[4].starts_with("/m5 ro,noexec,"), "{}", lines[4]);
    assert!(lines[4].contains("tmpfs mine") && lines[4].contains("size=4k,mode=700"), "{}", lines[4]);

    let mut spec = rootfs.spec("true");
    spec.Mounts.push(mount("/m", "tmpfs", "tmpfs", &["no-such-option=1"]));
    assert_refused(spec, "mounting (tmpfs at /m: options no-such-option=1): Invalid argument");
    let mut spec = rootfs.spec("true");
    spec.Mounts.push(mount("/m", "nosuchfs", "x", &[]));
    assert_refused(spec, "mounting (nosuchfs at /m): No such device");
}

fn mount_targets_are_made_inside_the_root() {
    let rootfs = Rootfs::new();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("f"), "volume\n").unwrap();
    symlink("../run/deep/resolv.conf", rootfs.at("etc/resolv.conf")).unwrap();
    let mut spec = rootfs.spec("cat /a/b/c/f /etc/resolv.conf /run/deep/resolv.conf");
    spec.Mounts.push(bind(volume.path(), "/a/b/c", &["bind"]));
    spec.Mounts.push(bind(&volume.path().join("f"), "/etc/resolv.conf", &["bind"]));
    assert_eq!(succeed(spec), "volume\n".repeat(3));
    assert_eq!(fs::metadata(rootfs.at("a/b")).unwrap().permissions().mode() & 0o777, 0o755);
}

fn links_in_an_image_lead_nowhere_outside() {
    let rootfs = Rootfs::new();
    let outside = tempfile::tempdir().unwrap();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("f"), "volume\n").unwrap();
    symlink(outside.path(), rootfs.at("absolute")).unwrap();
    symlink(format!("../../../../../..{}", outside.path().display()), rootfs.at("relative")).unwrap();
    for link in ["absolute", "relative"] {
        let mut spec = rootfs.spec(&format!("cat /{link}/x/f {}/x/f", outside.path().display()));
        spec.Mounts.push(bind(volume.path(), &format!("/{link}/x"), &["bind"]));
        linux(&mut spec).Devices.push(oci::LinuxDevice {
            Path: format!("/{link}/device"),
            Type: "p".into(),
            ..Default::default()
        });
        linux(&mut spec).MaskedPaths.push(format!("/{link}"));
        linux(&mut spec).MaskedPaths.clear();
        process(&mut spec).Cwd = format!("/{link}/cwd");
        assert_eq!(succeed(spec), "volume\nvolume\n");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "{link}");
    }
}

fn proc_cannot_be_faked() {
    let rootfs = Rootfs::new();
    let volume = tempfile::tempdir().unwrap();
    fs::create_dir(volume.path().join("self")).unwrap();
    let mut spec = rootfs.spec("true");
    spec.Mounts[0] = bind(volume.path(), "/proc", &["bind"]);
    assert_refused(spec, "only proc can be mounted at /proc");
    for inside in ["/proc/self/attr", "/proc/sys", "/proc/1"] {
        let mut spec = rootfs.spec("true");
        spec.Mounts.push(bind(volume.path(), inside, &["bind"]));
        assert_refused(spec, "inside /proc");
    }
    fs::write(volume.path().join("cpuinfo"), "mine\n").unwrap();
    let mut spec = rootfs.spec("cat /proc/cpuinfo");
    spec.Mounts.push(bind(&volume.path().join("cpuinfo"), "/proc/cpuinfo", &["bind", "ro"]));
    assert_eq!(succeed(spec), "mine\n");

    let rootfs = Rootfs::new();
    fs::create_dir(rootfs.at("fake")).unwrap();
    symlink("fake", rootfs.at("proc")).unwrap();
    assert_refused(rootfs.spec("true"), "a link is in the way");
}

fn masked_and_readonly_paths() {
    let rootfs = Rootfs::new();
    fs::create_dir_all(rootfs.at("secret/inside")).unwrap();
    fs::write(rootfs.at("key"), "secret").unwrap();
    fs::create_dir(rootfs.at("frozen")).unwrap();
    let mut spec = rootfs.spec(
        "cat /key; ls -A /secret; (touch /secret/x; echo x > /frozen/x; echo 1 > /proc/sys/kernel/msgmax) 2>&1 | \
         grep -c 'Read-only file system'; [ -c /key ] && echo null",
    );
    linux(&mut spec).MaskedPaths.extend(["/key".into(), "/secret".into()]);
    linux(&mut spec).ReadonlyPaths.push("/frozen".into());
    assert_eq!(succeed(spec), "3\nnull\n");
    let kcore = succeed(rootfs.spec("cat /proc/kcore 2> /dev/null | wc -c; ls /sys/firmware | wc -l"));
    assert_eq!(kcore, "0\n0\n");
}

fn a_readonly_root() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("touch /x 2>&1; touch /dev/shm/x && pwd");
    spec.Root.as_mut().unwrap().Readonly = true;
    process(&mut spec).Cwd = "/made/first".into();
    let output = run(spec);
    assert_eq!(output.stdout, "touch: /x: Read-only file system\n/made/first\n");
    assert!(!rootfs.at("x").exists());

    let mut spec = rootfs.spec("ls /dev/null; touch /dev/x 2>&1; echo y > /dev/null && echo writable");
    spec.Mounts[1].options.push("ro".into());
    assert_eq!(run(spec).stdout, "/dev/null\ntouch: /dev/x: Read-only file system\nwritable\n");
}

/// Read-only is all that a read-only root becomes: a node in it can be used as before.
fn a_readonly_root_keeps_its_devices() {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    let rootfs = Rootfs::new();
    let mode = Mode::from_raw_mode(0o666);
    mknodat(CWD, rootfs.at("sink"), FileType::CharacterDevice, mode, makedev(1, 3)).unwrap();
    let script = "echo x > /sink && echo used; awk '$5 == \"/\" { print $6 }' /proc/self/mountinfo";
    let writable = run(rootfs.spec(script)).stdout;
    let mut spec = rootfs.spec(script);
    spec.Root.as_mut().unwrap().Readonly = true;
    let readonly = run(spec).stdout;
    assert!(writable.contains("rw,"), "{writable}");
    assert_eq!(readonly, writable.replace("rw,", "ro,"));
    if !writable.contains("nodev") {
        assert!(readonly.starts_with("used\n"), "{readonly}");
    }
}

fn devices() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec(
        "for d in null zero full random urandom tty; do stat -c '%n %t:%T %a %F' /dev/$d; done; \
         for l in fd stdin stdout stderr core ptmx; do readlink /dev/$l; done; \
         stat -c '%n %t:%T %a %u:%g %F' /dev/mine /dev/sub/block /dev/pipe; head -c 4 /dev/zero | wc -c; umask",
    );
    for (path, kind, major, minor) in
        [("/dev/mine", "c", 1, 5), ("/dev/sub/block", "b", 7, 99), ("/dev/pipe", "p", 0, 0)]
    {
        linux(&mut spec).Devices.push(oci::LinuxDevice {
            Path: path.into(),
            Type: kind.into(),
            Major: major,
            Minor: minor,
            FileMode: 0o640,
            UID: 7,
            GID: 8,
            ..Default::default()
        });
    }
    let wanted = "/dev/null 1:3 666 character special file\n/dev/zero 1:5 666 character special file\n\
         /dev/full 1:7 666 character special file\n/dev/random 1:8 666 character special file\n\
         /dev/urandom 1:9 666 character special file\n/dev/tty 5:0 666 character special file\n\
         /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\n/proc/kcore\npts/ptmx\n\
         /dev/mine 1:5 640 7:8 character special file\n/dev/sub/block 7:63 640 7:8 block special file\n\
         /dev/pipe 0:0 640 7:8 fifo\n4\n0022\n";
    assert_eq!(succeed(spec), wanted);

    // Without a mount at /dev, the rootfs' own directory is filled; a second time finds everything there.
    for _ in 0..2 {
        let mut spec = rootfs.spec("echo x > /dev/null && readlink /dev/ptmx");
        spec.Mounts.retain(|m| !m.destination.starts_with("/dev"));
        assert_eq!(succeed(spec), "pts/ptmx\n");
    }
    assert!(rootfs.at("dev/null").metadata().unwrap().file_type().is_char_device());
}

fn hostile_dev() {
    let outside = tempfile::tempdir().unwrap();
    let rootfs = Rootfs::new();
    symlink(outside.path(), rootfs.at("dev")).unwrap();
    let mut spec = rootfs.spec("true");
    spec.Mounts.retain(|m| !m.destination.starts_with("/dev"));
    succeed(spec);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);

    let rootfs = Rootfs::new();
    fs::create_dir(rootfs.at("dev")).unwrap();
    fs::write(rootfs.at("dev/null"), "not null").unwrap();
    let mut spec = rootfs.spec("true");
    spec.Mounts.retain(|m| !m.destination.starts_with("/dev"));
    assert_refused(spec, "making the devices (/dev/null: there is something else at its place)");

    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("true");
    spec.Mounts.retain(|m| m.destination != "/dev/pts");
    process(&mut spec).Terminal = true;
    assert_refused(spec, "opening the terminal (/dev/pts/ptmx; a terminal needs a devpts mount at /dev/pts)");
}

fn mounted_at(path: &std::path::Path) -> bool {
    fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&format!(" {} ", path.display()))
}

fn make_shared(path: &std::path::Path) {
    use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
    mount_bind(path, path).unwrap();
    mount_change(path, MountPropagationFlags::SHARED).unwrap();
}

/// What the container mounts in a shared volume reaches the caller, and nothing else does.
fn shared_propagation() {
    let rootfs = Rootfs::new();
    let volume = tempfile::tempdir().unwrap();
    fs::create_dir(volume.path().join("sub")).unwrap();
    make_shared(volume.path());
    let mut spec = rootfs.spec("mount -t tmpfs inner /v/sub && echo; sleep 1000");
    capabilities(process(&mut spec), &["SYS_ADMIN"]);
    linux(&mut spec).RootfsPropagation = "rshared".into();
    spec.Mounts.push(bind(volume.path(), "/v", &["rbind", "rshared"]));
    let (container, init) = start(spec);
    let mut stdout = blocking(init.streams.stdout.unwrap());
    read_until(&mut stdout, "\n");
    assert!(mounted_at(&volume.path().join("sub")));
    assert!(!mounted_at(&rootfs.at("proc")));
    container.delete().unwrap();
    wait(init.pid);
    rustix::mount::unmount(volume.path().join("sub"), rustix::mount::UnmountFlags::empty()).unwrap();
    rustix::mount::unmount(volume.path(), rustix::mount::UnmountFlags::empty()).unwrap();
}

/// What the caller mounts reaches the container, and not the other way round.
fn slave_propagation() {
    let rootfs = Rootfs::new();
    let volume = tempfile::tempdir().unwrap();
    fs::create_dir(volume.path().join("from-caller")).unwrap();
    fs::create_dir(volume.path().join("from-container")).unwrap();
    make_shared(volume.path());
    let mut spec = rootfs.spec("mount -t tmpfs inner /v/from-container && echo; sleep 1000");
    capabilities(process(&mut spec), &["SYS_ADMIN"]);
    spec.Mounts.push(bind(volume.path(), "/v", &["rbind", "rslave"]));
    let (container, init) = start(spec);
    let mut stdout = blocking(init.streams.stdout.unwrap());
    read_until(&mut stdout, "\n");
    assert!(!mounted_at(&volume.path().join("from-container")));
    let target = volume.path().join("from-caller");
    rustix::mount::mount("outer", &target, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    assert_eq!(exec_script(&container, "grep -c '/v/from-caller .* outer ' /proc/self/mountinfo"), "1\n");
    container.delete().unwrap();
    wait(init.pid);
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();
    rustix::mount::unmount(volume.path(), rustix::mount::UnmountFlags::empty()).unwrap();
}

fn the_working_directory() {
    let rootfs = Rootfs::new();
    let mut spec = rootfs.spec("pwd; stat -c '%a %u' .");
    process(&mut spec).Cwd = "/new/dir".into();
    process(&mut spec).User.mut_or_insert_default().UID = 1000;
    assert_eq!(succeed(spec), "/new/dir\n755 0\n");
    assert_eq!(rootfs.at("new/dir").metadata().unwrap().uid(), 0);

    let (container, init) = start(rootfs.spec("sleep 1000"));
    for fd in 0..64 {
        let cwd = format!("/proc/self/fd/{fd}");
        let mut spec = rootfs.spec("pwd");
        process(&mut spec).Cwd.clone_from(&cwd);
        refused(spec);
        let mut process = shell("pwd");
        process.Cwd = cwd;
        assert!(container.exec(process, UserNames::default()).is_err());
    }
    finish(&container, init);
}

fn no_descriptor_leaks() {
    let rootfs = Rootfs::new();
    // A descriptor that its owner forgot to mark.
    let leak = fs::File::open("/").unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let sleep = |process: &mut oci::Process| process.Args = ["/bin/sleep", "1000"].map(String::from).to_vec();
    let mut spec = rootfs.spec("");
    sleep(process(&mut spec));
    let mut beside = shell("");
    sleep(&mut beside);
    let (container, init) = start(spec);
    let exec = container.exec(beside, UserNames::default()).unwrap();
    for pid in [init.pid, exec.pid] {
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let mut open: Vec<_> = entries.map(|e| (e.file_name(), fs::read_link(e.path()).unwrap())).collect();
        open.sort();
        assert_eq!(open.iter().map(|(name, _)| name.to_str().unwrap()).collect::<Vec<_>>(), ["0", "1", "2"]);
        assert!(open.iter().all(|(_, target)| target.to_str().unwrap().starts_with("pipe:")), "{open:?}");
    }
    finish(&container, init);
    wait(exec.pid);
}

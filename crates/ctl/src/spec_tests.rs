//! What a container's configuration says, by what it was made from.

use std::path::Path;

use oci_spec::runtime::{Capability, Spec};

use super::spec::*;
use crate::{archive::Execution, user::User};

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn image() -> Execution {
    Execution {
        user: String::new(),
        env: texts(&["PATH=/image/bin", "MODE=image"]),
        entrypoint: texts(&["/entry"]),
        cmd: texts(&["default"]),
        working_dir: "/srv".into(),
    }
}

fn spec(execution: &Execution, overrides: &Overrides, user: &User) -> Spec {
    let volumes = ["/data:/mnt:ro".parse().unwrap()];
    container(&Container {
        hostname: "host1",
        rootfs: Path::new("/rootfs"),
        execution,
        overrides,
        user,
        volumes: &volumes,
        memory: Some("64m".parse().unwrap()),
        cpus: Some("1.5".parse().unwrap()),
    })
    .unwrap()
}

#[test]
fn the_image_decides_what_the_command_line_leaves_open() {
    let spec = spec(&image(), &Overrides::default(), &User { home: "/root".into(), ..User::default() });
    let process = spec.process().as_ref().unwrap();
    assert_eq!(process.args().as_ref().unwrap(), &texts(&["/entry", "default"]));
    assert_eq!(process.cwd(), Path::new("/srv"));
    let env = process.env().as_ref().unwrap();
    assert_eq!(env, &texts(&["PATH=/image/bin", "HOSTNAME=host1", "MODE=image", "HOME=/root"]));
    let linux = spec.linux().as_ref().unwrap();
    let resources = linux.resources().as_ref().unwrap();
    assert_eq!(resources.memory().as_ref().unwrap().limit(), Some(64 << 20));
    assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(150_000));
    assert!(!resources.devices().as_ref().unwrap()[0].allow());
    assert!(linux.masked_paths().as_ref().unwrap().contains(&"/proc/kcore".to_owned()));
    assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(false));
}

#[test]
fn the_command_line_wins() {
    let overrides = Overrides {
        env: texts(&["MODE=mine", "HOME=/h", "A=1", "A=2"]),
        cwd: Some("/w".into()),
        command: texts(&["other", "args"]),
        terminal: true,
        size: Some((24, 80)),
    };
    let spec = spec(&image(), &overrides, &User::default());
    let process = spec.process().as_ref().unwrap();
    assert_eq!(process.args().as_ref().unwrap(), &texts(&["/entry", "other", "args"]));
    let env = process.env().as_ref().unwrap();
    assert_eq!(
        env,
        &texts(&["PATH=/image/bin", "HOSTNAME=host1", "TERM=xterm", "MODE=mine", "HOME=/h", "A=2"])
    );
    assert_eq!(process.terminal(), Some(true));
    assert_eq!(process.console_size().as_ref().unwrap().height(), 24);
    assert_eq!(process.cwd(), Path::new("/w"));
}

#[test]
fn commands_are_looked_for_where_the_process_will_look() {
    let with = |env: &[&str]| Overrides { env: texts(env), ..Overrides::default() };
    assert_eq!(search_path(&image(), &with(&["A=2"])), "/image/bin");
    assert_eq!(search_path(&image(), &with(&["PATH=/a", "PATH=/b:/c"])), "/b:/c");
    assert_eq!(search_path(&image(), &with(&["PATH="])), "");
    assert!(search_path(&Execution::default(), &with(&[])).ends_with(":/sbin:/bin"));
}

#[test]
fn only_root_starts_with_capabilities() {
    for (uid, held) in [(0, 14), (1000, 0)] {
        let spec =
            spec(&image(), &Overrides::default(), &User { uid, gid: 7, groups: vec![8], ..User::default() });
        let process = spec.process().as_ref().unwrap();
        let capabilities = process.capabilities().as_ref().unwrap();
        assert_eq!(capabilities.effective().as_ref().unwrap().len(), held);
        assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 14);
        assert!(!capabilities.bounding().as_ref().unwrap().contains(&Capability::SysAdmin));
        assert_eq!((process.user().uid(), process.user().gid()), (uid, 7));
        assert_eq!(process.user().additional_gids().as_ref().unwrap(), &[8]);
    }
}

#[test]
fn volumes_follow_the_defaults() {
    let spec = spec(&image(), &Overrides::default(), &User::default());
    let mounts = spec.mounts().as_ref().unwrap();
    let last = mounts.last().unwrap();
    assert_eq!(
        (last.destination().as_path(), last.source().as_ref().unwrap().as_path()),
        (Path::new("/mnt"), Path::new("/data"))
    );
    assert!(last.options().as_ref().unwrap().contains(&"ro".to_owned()));
    assert_eq!(mounts[0].destination(), Path::new("/proc"));
    assert_eq!(mounts.len(), 8);
}

#[test]
fn something_must_be_run_somewhere() {
    assert!(command(&Execution::default(), &[]).is_err());
    assert_eq!(command(&Execution::default(), &texts(&["x"])).unwrap(), ["x"]);
    let overrides =
        Overrides { cwd: Some("relative".into()), command: texts(&["x"]), ..Overrides::default() };
    let from = Container {
        hostname: "h",
        rootfs: Path::new("/r"),
        execution: &Execution::default(),
        overrides: &overrides,
        user: &User::default(),
        volumes: &[],
        memory: None,
        cpus: None,
    };
    assert!(container(&from).unwrap_err().to_string().contains("absolute"));
    let overrides = Overrides { command: texts(&["x"]), ..Overrides::default() };
    let spec = container(&Container { overrides: &overrides, ..from }).unwrap();
    let resources = spec.linux().as_ref().unwrap().resources().as_ref().unwrap();
    assert!(resources.memory().is_none() && resources.cpu().is_none());
}

#[test]
fn an_exec_inherits_from_its_container() {
    let spec = spec(&image(), &Overrides::default(), &User { home: "/root".into(), ..User::default() });
    let overrides = Overrides { env: texts(&["MODE=exec"]), command: texts(&["id"]), ..Overrides::default() };
    let process = exec(&spec, &overrides, None).unwrap();
    assert_eq!(process.args().as_ref().unwrap(), &texts(&["id"]));
    assert_eq!(process.cwd(), Path::new("/srv"));
    assert!(process.env().as_ref().unwrap().contains(&"MODE=exec".to_owned()));
    assert_eq!(process.capabilities().as_ref().unwrap().effective().as_ref().unwrap().len(), 14);
    let user = User { uid: 5, gid: 6, groups: vec![], home: "/home/five".into() };
    let overrides = Overrides { terminal: true, cwd: Some("/".into()), ..overrides };
    let process = exec(&spec, &overrides, Some(&user)).unwrap();
    assert_eq!(process.user().uid(), 5);
    assert!(process.capabilities().as_ref().unwrap().effective().as_ref().unwrap().is_empty());
    let env = process.env().as_ref().unwrap();
    assert!(env.contains(&"HOME=/home/five".to_owned()) && env.contains(&"TERM=xterm".to_owned()));
    assert!(!env.contains(&"HOME=/root".to_owned()));
}

#[test]
fn settings_may_be_passed_on() {
    let environment = |name: &str| (name == "KNOWN").then(|| "value".to_owned());
    let given = texts(&["A=b=c", "KNOWN", "UNKNOWN", "EMPTY="]);
    assert_eq!(settings(&given, environment), ["A=b=c", "KNOWN=value", "EMPTY="]);
    assert!(check_setting("=x").is_err() && check_setting("").is_err() && check_setting("x").is_ok());
}

//! Policies against requests: what is allowed, what is denied, and what neither can be.

use std::time::{Duration, Instant};

use bulkhead_protocol::{
    agent::*,
    oci,
    protobuf::{Message, MessageField},
    types,
};

use super::*;

/// A policy of these rules.
fn policy(rules: &str) -> Rules {
    Rules::new(&format!("package agent_policy\n{rules}")).unwrap_or_else(|fault| panic!("{fault}\n{rules}"))
}

fn check<M: Message>(rules: &Rules, request: &M) -> Result<()> {
    rules.check(M::NAME, || input::of_bytes(M::NAME, &request.write_to_bytes().unwrap()))
}

fn allows(rules: &str, request: &impl Message) -> bool {
    check(&policy(rules), request).is_ok()
}

#[track_caller]
fn is_denied(rules: &Rules, request: &impl Message, text: &str) {
    match check(rules, request) {
        Err(Error::Denied(denied)) => assert_eq!(denied, text),
        other => panic!("{other:?}"),
    }
}

/// Whether the condition holds for a container with an image digest, arguments, mounts and annotations.
fn holds(condition: &str) -> bool {
    allows(&format!("CreateContainerRequest if {{\n{condition}\n}}"), &container())
}

fn container() -> CreateContainerRequest {
    let mount = |destination: &str, source: &str| oci::Mount {
        destination: destination.into(),
        source: source.into(),
        type_: "bind".into(),
        options: vec!["rbind".into(), "ro".into()],
        ..Default::default()
    };
    let spec = oci::Spec {
        Process: MessageField::some(oci::Process {
            Args: vec!["/bin/server".into(), "--port".into(), "80".into()],
            Env: vec!["PATH=/bin".into(), "A=1".into()],
            OOMScoreAdj: -998,
            ..Default::default()
        }),
        Root: MessageField::some(oci::Root {
            Path: "/run/rootfs".into(),
            Readonly: true,
            ..Default::default()
        }),
        Mounts: vec![mount("/data", "/run/kata-containers/shared/data"), mount("/etc/hosts", "/run/hosts")],
        Annotations: [("image.digest", "sha256:aaa"), ("k8s.name", "web")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        ..Default::default()
    };
    CreateContainerRequest { container_id: "c1".into(), OCI: MessageField::some(spec), ..Default::default() }
}

fn exec() -> ExecProcessRequest {
    let process = oci::Process { Args: vec!["sh".into()], ..Default::default() };
    ExecProcessRequest {
        container_id: "c1".into(),
        exec_id: "e".into(),
        process: MessageField::some(process),
        ..Default::default()
    }
}

/// The names of all requests, but for some.
fn defaults(except: &[&str]) -> String {
    let names = Layout::requests().iter().map(Layout::name).filter(|name| !except.contains(name));
    names.map(|name| format!("default {name} := true\n")).collect()
}

#[test]
fn conditions_hold_as_the_language_says() {
    for condition in [
        r#"input.container_id == "c1""#,
        r#"input["container_id"] == "c1"; input.OCI.Process.Args[0] == "/bin/server""#,
        r#"input.OCI.Process.Args == ["/bin/server", "--port", "80"]"#,
        r#"count(input.OCI.Process.Args) == 3; count(input.container_id) == 2"#,
        r#"input.OCI.Annotations["image.digest"] in {"sha256:aaa", "sha256:bbb"}"#,
        r#"input.OCI.Process.Env[_] == "A=1""#,
        "some i\ninput.OCI.Mounts[i].destination == \"/data\"\nstartswith(input.OCI.Mounts[i].source, \"/run/kata-containers/\")",
        "input.OCI.Mounts[i].destination == \"/etc/hosts\"\ninput.OCI.Mounts[i].source == \"/run/hosts\"\ni == 1",
        r#"some mount in input.OCI.Mounts; mount.type_ == "bind"; "ro" in mount.options"#,
        r#"some key, value in input.OCI.Annotations; key == "k8s.name"; value == "web""#,
        r#"every mount in input.OCI.Mounts { startswith(mount.source, "/run/") }"#,
        r#"every i, mount in input.OCI.Mounts { i < 2; mount.options[_] == "ro" }"#,
        "every x in input.storages { false }",
        r#"not input.sandbox_pidns; not input.OCI.Root.Path == "/""#,
        "input.OCI.Hooks == null; input.storages == []; input.stdin_port == 0; input.sandbox_pidns == false",
        r#"not input.OCI.Hooks.Prestart"#,
        r#"not "CAP" in input.OCI.Process.Args"#,
        r#"args := input.OCI.Process.Args; args[1] == "--port"; endswith(args[0], "server"); contains(args[0], "in/")"#,
        r#"lower("ABC") == "abc"; input.OCI.Process.OOMScoreAdj == -998; 3 > 2; 2 >= 2; 1 < 2; 1 <= 1; 1 != 2"#,
        r#"x := [input.container_id, 1]; x == ["c1", 1]; "c1" in x; {1, 2, 1} == {2, 1}"#,
        "input.OCI.Mounts[0].options[i] == \"ro\"; input.OCI.Mounts[1].options[i] == \"ro\"",
        "input.OCI.Process.Args[i] == input.OCI.Process.Args[j]; i != j; false == true; 1 == 1\n",
    ] {
        let contradiction = condition.contains("false == true");
        assert_eq!(holds(condition), !contradiction, "{condition}");
    }
}

#[test]
fn conditions_fail_as_the_language_says() {
    for condition in [
        r#"input.container_id == "c2""#,
        "input.absent",
        "input.absent == input.absent",
        "input.OCI.Process.Args[3]",
        "input.OCI.Process.Args[-1]",
        "input.OCI.Hooks.Prestart == []",
        "input.sandbox_pidns",
        "count(input.stdin_port) == 0",
        "startswith(input.stdin_port, \"0\")",
        "every mount in input.OCI.Mounts { mount.destination == \"/data\" }",
        "every x in input.absent { true }",
        "every x in input.container_id { true }",
        "some mount in input.OCI.Mounts; mount.destination == \"/x\"",
        "some x in input.storages",
        "not input.container_id",
        "not \"--port\" in input.OCI.Process.Args",
        "input.OCI.Mounts[i].destination == \"/data\"\ninput.OCI.Mounts[i].source == \"/run/hosts\"",
        r#""c" in input.container_id"#,
        "input.container_id.x",
        "1 == \"1\"",
        "input.OCI.Mounts[input.absent]",
    ] {
        assert!(!holds(condition), "{condition}");
    }
}

#[test]
fn rules_of_one_name_are_alternatives_and_others_can_be_used() {
    let rules = r#"
        images := {"sha256:aaa", "sha256:bbb"}
        default known := false
        known if input.OCI.Annotations["image.digest"] in images
        known { input.OCI.Annotations.digest in images }
        CreateContainerRequest if { known; arguments }
        CreateContainerRequest if input.container_id == "debug"
        arguments if input.OCI.Process.Args[0] == "/bin/server"
    "#;
    assert!(allows(rules, &container()));
    let mut other = container();
    other.OCI.mut_or_insert_default().Annotations.insert("image.digest".into(), "sha256:ccc".into());
    assert!(!allows(rules, &other));
    other.container_id = "debug".into();
    assert!(allows(rules, &other));
    let mut tampered = container();
    tampered.OCI.mut_or_insert_default().Process.mut_or_insert_default().Args.insert(0, "/bin/sh".into());
    assert!(!allows(rules, &tampered));
    // Only `true` allows; and a rule cannot be two things.
    assert!(!allows("CreateContainerRequest := \"true\"", &container()));
    assert!(!allows("CreateContainerRequest := 1", &container()));
    let torn = policy("CreateContainerRequest := true\nCreateContainerRequest := false");
    is_denied(
        &torn,
        &container(),
        "CreateContainerRequest is blocked by policy: a rule of it has two different values",
    );
}

/// The policy that guest images ship to allow everything names all requests but five.
#[test]
fn the_usual_policies_do_what_they_are_named_after() {
    let shipped = defaults(&FORGOTTEN);
    let all = policy(&shipped);
    for request in Layout::requests() {
        let allowed = all.check(request.name(), || input::of_bytes(request.name(), &[]));
        assert!(allowed.is_ok(), "{}: {allowed:?}", request.name());
    }
    let except = policy(&(defaults(&["ExecProcessRequest"]) + "default ExecProcessRequest := false\n"));
    for request in Layout::requests() {
        let allowed = except.check(request.name(), || input::of_bytes(request.name(), &[])).is_ok();
        assert_eq!(allowed, request.name() != "ExecProcessRequest", "{}", request.name());
    }
    is_denied(&except, &exec(), "ExecProcessRequest is blocked by policy");
    // One that denies anything, by a rule or by a condition, means what it says of everything.
    for denying in [
        shipped.clone() + "default SetIPTablesRequest := false\n",
        shipped.replace("ExecProcessRequest := true", "ExecProcessRequest := false"),
        shipped.replace("default ExecProcessRequest := true", "ExecProcessRequest if input.exec_id"),
        defaults(&[&FORGOTTEN[..], &["ExecProcessRequest"]].concat()),
    ] {
        is_denied(&policy(&denying), &SetIPTablesRequest::new(), "SetIPTablesRequest is blocked by policy");
    }
}

#[test]
fn what_has_no_rule_is_denied_unless_all_is_to_be_allowed() {
    let rules = "CreateContainerRequest := true\n";
    is_denied(&policy(rules), &exec(), "ExecProcessRequest is blocked by policy");
    is_denied(&policy(""), &DestroySandboxRequest::new(), "DestroySandboxRequest is blocked by policy");
    let lenient =
        format!("{rules}default AllowRequestsFailingPolicy := true\ndefault ExecProcessRequest := false");
    assert!(allows(&lenient, &exec()) && allows(&lenient, &DestroySandboxRequest::new()));
    assert!(!allows("default AllowRequestsFailingPolicy := false", &exec()));
    assert!(!allows("AllowRequestsFailingPolicy if input.exec_id == \"other\"", &exec()));
    // Trouble is no denial that could be waived.
    let torn = "AllowRequestsFailingPolicy := true\nExecProcessRequest := true\nExecProcessRequest := false";
    assert!(!allows(torn, &exec()));
}

#[test]
fn files_are_judged_by_what_they_are() {
    let rules = r#"
        CopyFileRequest if { startswith(input.path, "/run/kata-containers/shared/"); not contains(input.path, ".."); plain }
        plain if input.file_type in ["Regular", "Directory"]
        plain if { input.file_type == "Symlink"; not startswith(input.symlink_target, "/") }
    "#;
    let request = |path: &str, mode: u32, data: &str| CopyFileRequest {
        path: path.into(),
        file_mode: mode,
        data: data.into(),
        offset: 5,
        uid: -1,
        ..Default::default()
    };
    let shared = "/run/kata-containers/shared/x";
    assert!(allows(rules, &request(shared, 0o100_644, "/contents")));
    assert!(allows(rules, &request(shared, 0o120_777, "..data/x")));
    assert!(!allows(rules, &request(shared, 0o120_777, "/etc/shadow")));
    assert!(!allows(rules, &request(shared, 0o020_644, "")));
    assert!(!allows(rules, &request("/etc/passwd", 0o100_644, "")));
    assert!(!allows(rules, &request("/run/kata-containers/shared/../x", 0o100_644, "")));
    let seen =
        "CopyFileRequest if { input.offset == 5; input.uid == -1; input.file_mode == 33188; not input.data }";
    assert!(allows(seen, &request(shared, 0o100_644, "secret")));
}

#[test]
fn every_kind_of_field_is_seen() {
    let set = MemAgentMemcgConfig { disabled: Some(false), swappiness_max: Some(7), ..Default::default() };
    assert!(allows(
        "MemAgentMemcgConfig if { input.disabled == false; input.swap == null; input.swappiness_max == 7 }",
        &set
    ));
    let probe = MemHotplugByProbeRequest { memHotplugProbeAddr: vec![1, u64::MAX], ..Default::default() };
    assert!(allows(
        "MemHotplugByProbeRequest := true if input.memHotplugProbeAddr == [1, 18446744073709551615]",
        &probe
    ));
    let write = WriteStreamRequest { data: b"ab".to_vec(), ..Default::default() };
    assert!(allows(
        "WriteStreamRequest if { input.data == [97, 98]; input.data[1] == 98; count(input.data) == 2 }",
        &write
    ));
    let address = types::IPAddress { family: types::IPFamily::v6.into(), ..Default::default() };
    let interface = types::Interface { IPAddresses: vec![address], ..Default::default() };
    let update = UpdateInterfaceRequest { interface: MessageField::some(interface), ..Default::default() };
    assert!(allows("UpdateInterfaceRequest if input.interface.IPAddresses[0].family == 1", &update));
    let mut create = container();
    let call = |errno| oci::LinuxSyscall { ErrnoRet: errno, ..Default::default() };
    let seccomp = oci::LinuxSeccomp {
        Syscalls: vec![call(None), call(Some(oci::linux_syscall::ErrnoRet::Errnoret(38)))],
        ..Default::default()
    };
    create.OCI.mut_or_insert_default().Linux.mut_or_insert_default().Seccomp = MessageField::some(seccomp);
    let rules = "CreateContainerRequest if { calls := input.OCI.Linux.Seccomp.Syscalls; calls[0].ErrnoRet == null; calls[1].ErrnoRet.errnoret == 38 }";
    assert!(allows(rules, &create));
}

#[test]
fn a_policy_is_replaced_if_it_allows_that() {
    let policy = Policy::default();
    assert!(policy.check("ExecProcessRequest", &exec().write_to_bytes().unwrap()).is_ok());
    let text = "package agent_policy\nSetPolicyRequest if contains(input.policy, \"release 2\")\nExecProcessRequest := false";
    policy.replace(text).unwrap();
    assert!(matches!(
        policy.check("ExecProcessRequest", &exec().write_to_bytes().unwrap()),
        Err(Error::Denied(_))
    ));
    assert!(matches!(policy.replace("package agent_policy"), Err(Error::Denied(_))));
    // What cannot be read changes nothing.
    assert!(matches!(policy.replace("# release 2"), Err(Error::Invalid(_))));
    assert!(matches!(
        policy.check("ExecProcessRequest", &exec().write_to_bytes().unwrap()),
        Err(Error::Denied(_))
    ));
    policy.replace("package agent_policy # release 2\nExecProcessRequest := true").unwrap();
    assert!(policy.check("ExecProcessRequest", &exec().write_to_bytes().unwrap()).is_ok());
    assert!(matches!(policy.replace(text), Err(Error::Denied(_))), "there is no rule for it any more");
}

#[test]
fn a_file_that_is_named_has_to_be_a_policy() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("policy.rego");
    assert!(matches!(Policy::load(&file), Err(Error::Io { .. })), "it is not there");
    fs::write(&file, "package agent_policy\nx").unwrap();
    assert!(matches!(Policy::load(&file), Err(Error::Invalid(_))));
    fs::write(&file, b"\xff").unwrap();
    assert!(matches!(Policy::load(&file), Err(Error::Io { .. })));
    assert!(matches!(Policy::load(directory.path()), Err(Error::Io { .. })));
    fs::File::create(&file).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(Policy::load(&file), Err(Error::Io { .. })), "too large");
    fs::write(&file, "package agent_policy\n").unwrap();
    assert!(
        Policy::load(&file).unwrap().check("ExecProcessRequest", &exec().write_to_bytes().unwrap()).is_err()
    );
}

#[test]
fn an_image_without_a_policy_allows_everything_and_one_whose_policy_cannot_be_read_is_no_guest() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("policy/default.rego");
    assert!(Policy::of_image(&file).unwrap().check("ExecProcessRequest", &[]).is_ok());
    fs::create_dir(directory.path().join("policy")).unwrap();
    assert!(Policy::of_image(&file).unwrap().check("ExecProcessRequest", &[]).is_ok());
    assert!(matches!(Policy::of_image(&directory.path().join("policy")), Err(Error::Io { .. })));
    std::os::unix::fs::symlink("nowhere", &file).unwrap();
    assert!(matches!(Policy::of_image(&file), Err(Error::Io { .. })), "a link that leads nowhere");
    fs::write(directory.path().join("policy/nowhere"), "package agent_policy\n").unwrap();
    assert!(Policy::of_image(&file).unwrap().check("ExecProcessRequest", &[]).is_err());
    assert!(matches!(Policy::of_image(&file.join("x")), Err(Error::Io { .. })), "a file is no directory");
}

#[test]
fn endless_evaluations_end_in_a_denial() {
    let mut request = container();
    request.OCI.mut_or_insert_default().Process.mut_or_insert_default().Args = vec!["x".repeat(1000); 300];
    let args = "input.OCI.Process.Args";
    let product =
        format!("CreateContainerRequest if {{ {args}[a] == {args}[b]; {args}[c] == {args}[d]; a > 1000 }}");
    let began = Instant::now();
    is_denied(
        &policy(&product),
        &request,
        "CreateContainerRequest is blocked by policy: its evaluation takes more than 100000 steps",
    );
    // Also where it would be waived.
    assert!(!allows(&format!("AllowRequestsFailingPolicy := true\n{product}"), &request));
    let every = format!(
        "CreateContainerRequest if {{ every a in {args} {{ every b in {args} {{ every c in {args} {{ a == b; b == c }} }} }} }}"
    );
    assert!(!allows(&every, &request));
    let deep: String = (0..60).map(|_| format!("{args}[_]\n")).collect();
    assert!(
        check(&policy(&format!("CreateContainerRequest if {{ {deep} false }}")), &request)
            .unwrap_err()
            .to_string()
            .contains("its evaluation")
    );
    request.storages = vec![Storage::new(); 100_000];
    assert!(!allows("CreateContainerRequest if input.container_id", &request));
    assert!(began.elapsed() < Duration::from_secs(60));
}

#[test]
fn rules_do_not_refer_to_themselves() {
    let fault = |rules: &str| {
        Rules::new(&format!("package agent_policy\n{rules}")).map(drop).unwrap_err().to_string()
    };
    assert!(fault("a if a").contains("line 2, column 1: the rule `a` refers to itself"));
    assert!(fault("a if b\nb if not c\nc if { x := [a] }").contains("refers to itself"));
    let chain =
        |length: usize| -> String { (0..length).map(|i| format!("r{i:05} if r{:05}\n", i + 1)).collect() };
    assert!(fault(&(chain(80_000) + "r80000 := true")).contains("deeper than 64"));
    policy(&(chain(60) + "r00060 := true"));
    // A rule may be used often.
    policy(&format!("a := true\nb if {{ {} }}", "a;".repeat(1000)));
}

#[test]
fn large_texts_are_refused() {
    let fault = |text: String| Rules::new(&text).map(drop).unwrap_err().to_string();
    assert!(fault("#".repeat(SIZE_LIMIT + 1)).contains("larger than"));
    assert!(fault(format!("package agent_policy{}", "\n".repeat(LINES_LIMIT + 1))).contains("lines"));
    assert!(
        fault(format!("package agent_policy\n#{}", " ".repeat(65 << 10)))
            .contains("line 2, column 1: the line is longer")
    );
    assert!(fault("\0".repeat(4 << 20)).contains("longer than"));
    let variables = "a,\n".repeat(100_000);
    assert!(
        fault(format!("package agent_policy\nx if {{ some {variables} }}"))
            .contains("more than 64 variables")
    );
    let path = ".a".repeat(10_000);
    assert!(fault(format!("package agent_policy\nimport a{path}")).contains("longer than 64 bytes"));
    let elements = "\"x\",".repeat(10_000) + "\n";
    assert!(
        fault(format!("package agent_policy\nx := [{}]", elements.repeat(26)))
            .contains("more than 250000 terms")
    );
}

/// The bound is loose for a debug build on a busy machine.
#[test]
fn a_decision_takes_little_time() {
    let rules = policy(
        r#"
        images := {"sha256:aaa", "sha256:bbb"}
        CreateContainerRequest if {
            input.OCI.Annotations["image.digest"] in images
            input.OCI.Process.Args == ["/bin/server", "--port", "80"]
            every mount in input.OCI.Mounts { startswith(mount.source, "/run/") }
            input.OCI.Hooks == null
        }
        "#,
    );
    let request = container();
    let began = Instant::now();
    let rounds = 200_u32;
    for _ in 0..rounds {
        check(&rules, &request).unwrap();
    }
    let each = began.elapsed() / rounds;
    eprintln!("a decision on CreateContainer takes {each:?}");
    assert!(each < Duration::from_millis(20), "{each:?}");
}

/// Bytes that another reader could understand differently, so that the agent would do what the policy did not see.
#[test]
fn ambiguous_requests_are_denied() {
    let rules = policy("SignalProcessRequest if { input.signal == 15 }\nCreateContainerRequest := true");
    let check = |name: &str, bytes: &[u8]| rules.check(name, || input::of_bytes(name, bytes));
    check("SignalProcessRequest", &[0x18, 15]).unwrap();
    for (what, bytes) in [
        ("a field twice", &[0x18, 9, 0x18, 15][..]),
        ("more than 32 bits", &[0x18, 0x8f, 0x80, 0x80, 0x80, 0x10]),
        ("a wire type that is another's", &[0x1a, 1, 15, 0x18, 15]),
    ] {
        assert!(check("SignalProcessRequest", bytes).is_err(), "{what}");
    }
    // CreateContainer { OCI: Spec { Annotations: [k -> a, k -> b] } }
    let entry = |value: u8| [0x3a, 6, 0x0a, 1, b'k', 0x12, 1, value];
    let spec = [entry(b'a'), entry(b'b')].concat();
    let request = |spec: &[u8]| [&[0x32, u8::try_from(spec.len()).unwrap()][..], spec].concat();
    check("CreateContainerRequest", &request(&spec)).unwrap();
    let judged = policy("CreateContainerRequest if { input.OCI.Annotations.k == \"a\" }");
    let check = |bytes: &[u8]| {
        judged.check("CreateContainerRequest", || input::of_bytes("CreateContainerRequest", bytes))
    };
    check(&request(&entry(b'a'))).unwrap();
    assert!(check(&request(&spec)).is_err(), "a key twice");
}

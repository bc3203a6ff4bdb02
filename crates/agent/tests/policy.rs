//! Policies over the wire: an agent that is a plain process is given one, and answers by it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with other tests")]
mod support;

use bulkhead_protocol::{agent::*, status::Kind};
use support::{Agent, cannot_run, context, failed, process};

async fn set(agent: &Agent, rules: &str) -> ttrpc::Result<()> {
    let policy = format!("package agent_policy\n{rules}");
    let request = SetPolicyRequest { policy, ..Default::default() };
    agent.client.set_policy(context(), &request).await.map(drop)
}

#[tokio::test]
async fn an_exec_is_denied_and_the_rest_goes_on() {
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED an_exec_is_denied_and_the_rest_goes_on: {reason}");
        return;
    }
    let agent = Agent::start().await;
    let others = [
        "CreateContainer",
        "StartContainer",
        "RemoveContainer",
        "WaitProcess",
        "ReadStream",
        "SignalProcess",
    ];
    let mut rules: String = others.map(|name| format!("default {name}Request := true\n")).concat();
    rules += "default SetPolicyRequest := true\n
        default ExecProcessRequest := false
        ExecProcessRequest if input.process.Args in [[\"echo\", \"allowed\"]]
        DestroySandboxRequest := true\n";
    set(&agent, &rules).await.unwrap();

    agent.run("c1", &["sleep", "1000"]).await;
    let denied = failed(agent.exec("c1", "e1", process(&["sh"])).await, Kind::PermissionDenied);
    assert_eq!(denied, "ExecProcessRequest is blocked by policy");
    // The same id, since nothing has come of the first.
    agent.exec("c1", "e1", process(&["echo", "allowed"])).await.unwrap();
    assert_eq!(agent.stdout("c1", "e1").await, "allowed\n");
    assert_eq!(agent.wait("c1", "e1").await.unwrap(), 0);
    // No rule at all.
    let stats = StatsContainerRequest { container_id: "c1".into(), ..Default::default() };
    let denied = failed(agent.client.stats_container(context(), &stats).await, Kind::PermissionDenied);
    assert_eq!(denied, "StatsContainerRequest is blocked by policy");
    // Health is nobody's to deny.
    agent.health.check(context(), &Default::default()).await.unwrap();
    agent.remove("c1").await.unwrap();
}

#[tokio::test]
async fn a_denied_read_loses_nothing() {
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED a_denied_read_loses_nothing: {reason}");
        return;
    }
    let agent = Agent::start().await;
    agent.run("c1", &["echo", "kept"]).await;
    let rules = "default SetPolicyRequest := true\ndefault AllowRequestsFailingPolicy :=";
    set(&agent, &format!("{rules} false")).await.unwrap();
    failed(agent.read("c1", "c1").await, Kind::PermissionDenied);
    set(&agent, &format!("{rules} true")).await.unwrap();
    assert_eq!(agent.stdout("c1", "c1").await, "kept\n");
    agent.remove("c1").await.unwrap();
}

#[tokio::test]
async fn a_policy_that_is_not_understood_changes_nothing() {
    let agent = Agent::start().await;
    let text = failed(
        set(&agent, "DestroySandboxRequest if {\n  time.now_ns() > 0\n}").await,
        Kind::InvalidArgument,
    );
    assert_eq!(text, "policy, line 3, column 3: `time` is no rule, and no variable with a value");
    let details = agent.client.get_guest_details(context(), &GuestDetailsRequest::new()).await.unwrap();
    assert!(details.agent_details.extra_features.contains(&"agent-policy".to_owned()));

    // Once set, it is the one that says whether another may follow.
    set(&agent, "DestroySandboxRequest := true").await.unwrap();
    failed(set(&agent, "SetPolicyRequest := true").await, Kind::PermissionDenied);
    failed(
        agent.client.get_guest_details(context(), &GuestDetailsRequest::new()).await,
        Kind::PermissionDenied,
    );
    assert!(agent.destroy().await.success());
}

/// Texts as large as a message can be, nested as deeply: each is refused, and the agent lives.
#[tokio::test]
async fn hostile_policies_are_refused() {
    let agent = Agent::start().await;
    for rules in [
        "A := ".to_owned() + &"[\n".repeat(1 << 20),
        "A if {\n".to_owned() + &"every x in input {\n".repeat(100_000),
        "\0".repeat(3 << 20),
        "A := true\n".repeat(300_000),
        "A := \"\\u0000\"\u{feff}".to_owned(),
        (0..100_000).map(|i| format!("r{i} if r{}\n", i + 1)).collect::<String>(),
    ] {
        failed(set(&agent, &rules).await, Kind::InvalidArgument);
    }
    agent.health.check(context(), &Default::default()).await.unwrap();
    agent.client.get_guest_details(context(), &GuestDetailsRequest::new()).await.unwrap();
}

//! The network of an agent that is a plain process: its machine's is told, and left alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use bulkhead_protocol::{
    agent::*,
    protobuf::MessageField,
    status::Kind,
    types::{ARPNeighbor, Interface},
};
use support::{Agent, cannot_run, context, failed};

#[tokio::test]
async fn the_machines_network_is_told_and_left_alone() {
    if let Some(reason) = cannot_run() {
        eprintln!("skipped: {reason}");
        return;
    }
    let agent = Agent::start().await;
    let client = &agent.client;

    let interface = Interface { name: "lo".into(), ..Default::default() };
    let request = UpdateInterfaceRequest { interface: MessageField::some(interface), ..Default::default() };
    let text = failed(client.update_interface(context(), &request).await, Kind::FailedPrecondition);
    assert!(text.contains("network is not the agent's to change"), "{text}");
    let request = UpdateRoutesRequest { routes: MessageField::some(Routes::new()), ..Default::default() };
    failed(client.update_routes(context(), &request).await, Kind::FailedPrecondition);
    let neighbours = ARPNeighbors { ARPNeighbors: vec![ARPNeighbor::new()], ..Default::default() };
    let request = AddARPNeighborsRequest { neighbors: MessageField::some(neighbours), ..Default::default() };
    failed(client.add_arp_neighbors(context(), &request).await, Kind::FailedPrecondition);
    failed(client.set_ip_tables(context(), &SetIPTablesRequest::new()).await, Kind::FailedPrecondition);

    let list = client.list_interfaces(context(), &ListInterfacesRequest::new()).await.unwrap().Interfaces;
    let machines = std::fs::read_to_string("/proc/net/dev").unwrap();
    let names: Vec<_> =
        machines.lines().skip(2).map(|line| line.split_once(':').unwrap().0.trim().to_owned()).collect();
    for name in &names {
        assert!(list.iter().any(|interface| interface.name == *name), "{name} in {list:?}");
    }
    client.list_routes(context(), &ListRoutesRequest::new()).await.unwrap();

    agent.run("c1", &["sleep", "1000"]).await;
    let request = StatsContainerRequest { container_id: "c1".into(), ..Default::default() };
    let figures = client.stats_container(context(), &request).await.unwrap().network_stats;
    assert!(figures.iter().all(|figures| figures.name != "lo"));
    for name in names.iter().filter(|name| *name != "lo") {
        assert!(figures.iter().any(|figures| figures.name == *name), "{name} in {figures:?}");
    }
}

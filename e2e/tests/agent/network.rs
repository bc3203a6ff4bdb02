//! The guest's network: interfaces found, named and addressed, routes, neighbours, the packet filter, figures.

use anyhow::{Context, ensure};
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Agent, Hardware, Nic, context, failed, grant, in_vm, mount, plain, process},
    cases,
};
use bulkhead_protocol::{
    agent::*,
    protobuf::MessageField,
    status::Kind,
    types::{ARPNeighbor, IPAddress, Interface, Route},
};

pub(super) const CASES: &[Case] = cases![
    interfaces_swap_their_names_and_carry_packets,
    an_interface_that_is_plugged_later_is_waited_for,
    routes_become_what_is_wanted_in_both_families,
    the_packet_filter_is_read_and_set_by_the_guests_programs,
    the_network_of_a_plain_agents_machine_is_left_alone,
    the_resolvers_file_is_written_and_nothing_mounted_on_it,
];

const FIRST: &str = "02:00:00:00:00:01";
const SECOND: &str = "02:00:00:00:00:02";

/// QEMU's user network: it answers pings at these addresses.
const GATEWAY: &str = "10.0.2.2";
const GATEWAY_V6: &str = "fec0::2";

fn interface(name: &str, mac: &str, addresses: &[(&str, &str)]) -> Interface {
    let address = |(address, mask): &(&str, &str)| IPAddress {
        address: (*address).into(),
        mask: (*mask).into(),
        ..Default::default()
    };
    Interface {
        name: name.into(),
        hwAddr: mac.into(),
        IPAddresses: addresses.iter().map(address).collect(),
        ..Default::default()
    }
}

fn route(dest: &str, gateway: &str, device: &str) -> Route {
    let scope = if gateway.is_empty() { 253 } else { 0 };
    Route { dest: dest.into(), gateway: gateway.into(), device: device.into(), scope, ..Default::default() }
}

async fn update(agent: &Agent, interface: Interface) -> ttrpc::Result<Interface> {
    let request = UpdateInterfaceRequest { interface: MessageField::some(interface), ..Default::default() };
    agent.client.update_interface(context(), &request).await
}

async fn update_routes(agent: &Agent, routes: &[Route]) -> ttrpc::Result<Vec<Route>> {
    let routes = Routes { Routes: routes.to_vec(), ..Default::default() };
    let request = UpdateRoutesRequest { routes: MessageField::some(routes), ..Default::default() };
    Ok(agent.client.update_routes(context(), &request).await?.Routes)
}

async fn add_neighbour(agent: &Agent, neighbour: ARPNeighbor) -> ttrpc::Result<()> {
    let neighbours = ARPNeighbors { ARPNeighbors: vec![neighbour], ..Default::default() };
    let request = AddARPNeighborsRequest { neighbors: MessageField::some(neighbours), ..Default::default() };
    agent.client.add_arp_neighbors(context(), &request).await.map(drop)
}

/// The interface of a name, as it is listed.
async fn listed(agent: &Agent, name: &str) -> anyhow::Result<Interface> {
    let list = agent.client.list_interfaces(context(), &ListInterfacesRequest::new()).await?.Interfaces;
    list.into_iter().find(|interface| interface.name == name).with_context(|| format!("no interface {name}"))
}

/// The sandbox, and a sleeping container.
async fn run(agent: &Agent, id: &str) -> anyhow::Result<()> {
    agent.pod().await?;
    agent.run(id, &["sleep", "1000"]).await?;
    Ok(())
}

/// Pings from a container; the answer must come.
async fn ping(agent: &Agent, id: &str, exec_id: &str, target: &str) -> anyhow::Result<()> {
    let program = if target.contains(':') { "ping6" } else { "ping" };
    // The first packets may be lost while the interface wakes up.
    let line = format!(
        "exec 2>&1; for n in 1 2 3 4 5; do {program} -c 1 -W 5 {target} && exit 0; done; ip addr; ip route; exit 1"
    );
    let mut process = process(&["sh", "-c", &line]);
    grant(&mut process, &["CAP_NET_RAW"]);
    let (output, code) = agent.output(id, exec_id, process).await?;
    ensure!(code == 0, "{output}");
    Ok(())
}

fn interfaces_swap_their_names_and_carry_packets(scratch: &Scratch) -> anyhow::Result<()> {
    let nics = vec![Nic { hub: Some(1), ..Nic::new(FIRST) }, Nic::new(SECOND)];
    in_vm(scratch, Hardware { nics, ..Hardware::default() }, async |agent| {
        // As hosts do, before the sandbox: the second interface takes the name that the kernel gave to the first.
        let mut wanted = interface("eth0", SECOND, &[("10.0.2.15", "24"), ("fec0::15", "64")]);
        wanted.mtu = 1400;
        let answer = update(agent, wanted.clone()).await?;
        ensure!(answer == wanted, "{answer:?}");
        let (second, first) = (listed(agent, "eth0").await?, listed(agent, "eth1").await?);
        ensure!((second.hwAddr.as_str(), first.hwAddr.as_str()) == (SECOND, FIRST), "{second:?} {first:?}");
        let paths = &agent.addresses()?.nics;
        ensure!([&first.devicePath, &second.devicePath] == [&paths[0], &paths[1]], "{second:?} {first:?}");
        ensure!(
            (second.device.as_str(), second.type_.as_str(), second.mtu) == ("eth0", "device", 1400),
            "{second:?}"
        );
        ensure!(second.raw_flags & 1 == 1 && first.raw_flags & 1 == 0, "{second:?} {first:?}");
        let v6: Vec<bool> = second.IPAddresses.iter().map(|address| address.family.value() == 1).collect();
        let colons: Vec<bool> = second.IPAddresses.iter().map(|ip| ip.address.contains(':')).collect();
        ensure!(v6 == colons && v6.contains(&true) && v6.contains(&false), "{second:?}");

        let missing = failed(
            update(agent, interface("eth7", "02:00:00:00:00:07", &[])).await,
            Kind::FailedPrecondition,
        )?;
        ensure!(missing.contains("Link not found (Name: eth7)"), "{missing}");
        for bad in [interface("eth0", "02:00", &[]), interface("eth0", SECOND, &[("10.0.2.15", "64")])] {
            failed(update(agent, bad).await, Kind::InvalidArgument)?;
        }

        run(agent, "c1").await?;
        ping(agent, "c1", "ping", GATEWAY).await?;
        ping(agent, "c1", "ping6", GATEWAY_V6).await?;
        let mtu = agent.line("c1", "mtu", "cat /sys/class/net/eth0/mtu || ip link show eth0").await?;
        ensure!(mtu.contains("1400"), "{mtu}");

        let before = agent.stats("c1").await?.network_stats;
        ping(agent, "c1", "again", GATEWAY).await?;
        let after = agent.stats("c1").await?.network_stats;
        let names: Vec<_> = after.iter().map(|figures| figures.name.as_str()).collect();
        ensure!(names.contains(&"eth0") && !names.contains(&"lo"), "{names:?}");
        let of = |figures: &[NetworkStats]| {
            let own = figures.iter().find(|figures| figures.name == "eth0");
            own.map(|own| (own.rx_bytes, own.rx_packets, own.tx_bytes, own.tx_packets)).context("no figures")
        };
        let (before, after) = (of(&before)?, of(&after)?);
        ensure!(after.0 > before.0 && after.1 > before.1 && after.2 > before.2 && after.3 > before.3);

        // What is not wanted any more goes.
        update(agent, interface("eth0", SECOND, &[("10.0.2.16", "24")])).await?;
        let addresses = agent.line("c1", "addresses", "ip addr show eth0").await?;
        ensure!(addresses.contains("10.0.2.16/24"), "{addresses}");
        ensure!(!addresses.contains("10.0.2.15") && !addresses.contains("fec0::15"), "{addresses}");
        ensure!(addresses.contains("inet6 fe80::"), "{addresses}");

        let neighbour = ARPNeighbor {
            toIPAddress: MessageField::some(IPAddress { address: "10.0.2.77".into(), ..Default::default() }),
            device: "eth0".into(),
            lladdr: "02:00:00:00:00:77".into(),
            ..Default::default()
        };
        add_neighbour(agent, neighbour.clone()).await?;
        let known = agent.line("c1", "arp", "cat /proc/net/arp").await?;
        ensure!(known.contains("10.0.2.77") && known.contains("02:00:00:00:00:77"), "{known}");
        failed(add_neighbour(agent, ARPNeighbor { state: -1, ..neighbour }).await, Kind::InvalidArgument)?;
        Ok(())
    })
}

fn an_interface_that_is_plugged_later_is_waited_for(scratch: &Scratch) -> anyhow::Result<()> {
    let hardware = Hardware {
        nics: vec![Nic { hub: Some(1), ..Nic::new(FIRST) }],
        kernel_parameters: vec!["agent.hotplug_timeout=60".into()],
        ..Hardware::default()
    };
    in_vm(scratch, hardware, async |agent| {
        // The address is the host's choice, too: the device comes with another one.
        let mut wanted = interface("net1", SECOND, &[("10.0.2.15", "24")]);
        // The first free slot of the bridge.
        wanted.devicePath = "02/01".into();
        let plugging = async {
            agent.check().await?;
            agent.plug_nic(&Nic::new("02:00:00:00:00:09"))
        };
        let (updated, path) = tokio::join!(update(agent, wanted), plugging);
        ensure!(path? == "02/01");
        updated?;
        let interface = listed(agent, "net1").await?;
        ensure!(
            (interface.hwAddr.as_str(), interface.devicePath.as_str()) == (SECOND, "02/01"),
            "{interface:?}"
        );
        update_routes(agent, &[route("", GATEWAY, "net1")]).await?;
        run(agent, "c1").await?;
        ping(agent, "c1", "ping", GATEWAY).await?;
        // The interface from the start is as it was.
        ensure!(listed(agent, "eth0").await?.raw_flags & 1 == 0);
        Ok(())
    })
}

fn routes_become_what_is_wanted_in_both_families(scratch: &Scratch) -> anyhow::Result<()> {
    let nics = vec![Nic::new(FIRST), Nic { hub: Some(1), ..Nic::new(SECOND) }];
    in_vm(scratch, Hardware { nics, ..Hardware::default() }, async |agent| {
        update(agent, interface("eth0", FIRST, &[("10.0.2.15", "24"), ("fec0::15", "64")])).await?;
        update(agent, interface("eth1", SECOND, &[("10.9.0.2", "24"), ("fd09::2", "64")])).await?;
        let on_link = Route { flags: 4, ..route("10.40.0.0/16", "192.168.7.7", "eth1") };
        let preferring =
            Route { source: "10.0.2.15".into(), mtu: 1300, ..route("10.50.0.0/16", GATEWAY, "eth0") };
        let first = [
            route("", GATEWAY, "eth0"),
            route("10.30.0.0/16", "169.254.1.1", "eth1"),
            route("169.254.1.1", "", "eth1"),
            on_link,
            preferring,
            route("", GATEWAY_V6, "eth0"),
            route("fd30::/32", "fd09::1", "eth1"),
        ];
        let all = update_routes(agent, &first).await?;
        for wanted in &first {
            let found = all.iter().find(|route| {
                let dest = match (wanted.dest.as_str(), wanted.gateway.contains(':')) {
                    ("", true) => "::/0",
                    ("", false) => "0.0.0.0/0",
                    (dest, _) => dest,
                };
                route.dest.trim_end_matches("/32") == dest.trim_end_matches("/32")
            });
            let found = found.with_context(|| format!("{wanted:?} in {all:?}"))?;
            let same = |route: &Route| {
                (route.gateway.clone(), route.device.clone(), route.source.clone(), route.flags, route.mtu)
            };
            ensure!(same(found) == same(wanted), "{found:?}");
        }
        let list = agent.client.list_routes(context(), &ListRoutesRequest::new()).await?.Routes;
        ensure!(list.len() == all.len() && list.iter().any(|route| route.dest == "10.0.2.0/24"), "{list:?}");

        run(agent, "c1").await?;
        let table = agent.line("c1", "table", "ip route").await?;
        ensure!(table.contains("default via 10.0.2.2 dev eth0"), "{table}");
        ensure!(table.contains("10.50.0.0/16 via 10.0.2.2 dev eth0"), "{table}");
        // Off the network, so only by its route.
        let second = [route("", GATEWAY, "eth0"), route("fd30::/32", "", "eth1")];
        update_routes(agent, &second).await?;
        let table = agent.line("c1", "table2", "ip route").await?;
        ensure!(table.contains("default via 10.0.2.2") && table.contains("10.0.2.0/24"), "{table}");
        ensure!(
            !table.contains("10.30.") && !table.contains("10.40.") && !table.contains("10.50."),
            "{table}"
        );
        let table = agent.line("c1", "table6", "ip -6 route").await?;
        ensure!(table.contains("fd30::/32 dev eth1") && !table.contains("fd09::1"), "{table}");
        ensure!(!table.contains("default via fec0::2"), "{table}");

        let bad = [route("10.60.0.0/16", GATEWAY, "eth0"), route("10.70.0.0/16", "172.16.0.1", "eth0")];
        let text = failed(update_routes(agent, &bad).await, Kind::Internal)?;
        ensure!(
            text.contains("10.70.0.0/16 by 172.16.0.1 on eth0")
                && text.contains("1 of 2 new routes are there"),
            "{text}"
        );
        let table = agent.line("c1", "table3", "ip route").await?;
        ensure!(table.contains("default via 10.0.2.2") && table.contains("10.60.0.0/16"), "{table}");
        failed(update_routes(agent, &[route("10.0.0.0/99", "", "eth0")]).await, Kind::InvalidArgument)?;
        Ok(())
    })
}

fn the_packet_filter_is_read_and_set_by_the_guests_programs(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        let get = |is_ipv6| GetIPTablesRequest { is_ipv6, ..Default::default() };
        let set =
            |is_ipv6, data: &str| SetIPTablesRequest { is_ipv6, data: data.into(), ..Default::default() };
        for v6 in [false, true] {
            let text =
                failed(agent.client.get_ip_tables(context(), &get(v6)).await, Kind::FailedPrecondition)?;
            ensure!(text.contains("tables-save") && text.contains("package iptables"), "{text}");
            let text =
                failed(agent.client.set_ip_tables(context(), &set(v6, "")).await, Kind::FailedPrecondition)?;
            ensure!(text.contains("tables-restore"), "{text}");
        }
        // Stand-ins for the programs, put into the guest's own root.
        agent.pod().await?;
        let mut spec = agent.spec(&["sleep", "1000"]);
        spec.Mounts.push(mount("/guest", "bind", "/", &["bind", "rw"]));
        agent.run_spec("c1", spec).await?;
        let shell = format!("{}/bin/busybox sh", agent.rootfs());
        let script = format!(
            "set -e; mkdir -p /guest/sbin; cd /guest/sbin; b={}/bin/busybox; \
             for n in iptables ip6tables; do \
             printf '#!{shell}\\n{{ echo \"$0 $*\"; $B cat; }} > /%s-rules\\n$B grep -q good /%s-rules || {{ echo no good >&2; exit 2; }}\\n' $n $n | sed \"s#\\$B#$b#g\" > $n-restore; \
             printf '#!{shell}\\n$B cat /%s-rules\\n' $n | sed \"s#\\$B#$b#g\" > $n-save; done; chmod 755 *tables-*",
            agent.rootfs()
        );
        agent.line("c1", "programs", &script).await?;
        for (v6, name) in [(false, "iptables"), (true, "ip6tables")] {
            agent.client.set_ip_tables(context(), &set(v6, "*filter good\n")).await?;
            let rules = agent.client.get_ip_tables(context(), &get(v6)).await?.data;
            let expected = format!("/sbin/{name}-restore --wait 5\n*filter good\n");
            ensure!(rules == expected.as_bytes(), "{:?}", String::from_utf8_lossy(&rules));
            let text =
                failed(agent.client.set_ip_tables(context(), &set(v6, "bad\n")).await, Kind::Internal)?;
            ensure!(text.contains("it ended with code 2: no good"), "{text}");
        }
        Ok(())
    })
}

fn the_network_of_a_plain_agents_machine_is_left_alone(scratch: &Scratch) -> anyhow::Result<()> {
    plain(scratch, async |agent| {
        let text = failed(update(agent, interface("eth0", FIRST, &[])).await, Kind::FailedPrecondition)?;
        ensure!(text.contains("network"), "{text}");
        failed(update_routes(agent, &[]).await, Kind::FailedPrecondition)?;
        failed(add_neighbour(agent, ARPNeighbor::new()).await, Kind::FailedPrecondition)?;
        let rules = SetIPTablesRequest::new();
        failed(agent.client.set_ip_tables(context(), &rules).await, Kind::FailedPrecondition)?;
        ensure!(listed(agent, "lo").await?.raw_flags & 8 == 8, "IFF_LOOPBACK");
        agent.client.list_routes(context(), &ListRoutesRequest::new()).await?;
        Ok(())
    })
}

fn the_resolvers_file_is_written_and_nothing_mounted_on_it(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        let with = |server: &str| CreateSandboxRequest {
            dns: vec![format!("nameserver {server}"), "search pod".into()],
            // No guest has it, and that is no reason to fail.
            guest_hook_path: "/no/such/hooks".into(),
            ..agent.pod_request()
        };
        let mut failing = with("10.0.0.1");
        failing.storages.push(Storage { driver: "floppy".into(), ..Default::default() });
        for _ in 0..2 {
            failed(agent.client.create_sandbox(context(), &failing).await, Kind::Unimplemented)?;
        }
        agent.client.create_sandbox(context(), &with("10.0.0.2")).await?;
        agent.eye().await?;
        let look = async |exec: &str, path: &str| {
            let mut look = process(&["cat", path]);
            grant(&mut look, &["CAP_SYS_PTRACE"]);
            let (text, code) = agent.output("eye", exec, look).await?;
            ensure!(code == 0, "{path}: {text}");
            Ok(text)
        };
        let mounts = look("mounts", "/guest/proc/1/mountinfo").await?;
        ensure!(mounts.contains(" /run ") && !mounts.contains("resolv.conf"), "{mounts}");
        for (exec, place) in [("etc", "/etc"), ("run", "/run/kata-containers/sandbox")] {
            let text = look(exec, &format!("/guest/proc/1/root{place}/resolv.conf")).await?;
            ensure!(text == "nameserver 10.0.0.2\nsearch pod\n", "{place}: {text}");
        }
        Ok(())
    })
}

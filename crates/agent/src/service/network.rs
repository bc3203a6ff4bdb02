//! The guest's network: interfaces, routes, neighbours, packet filter.

use std::sync::Arc;

use bulkhead_protocol::{
    Empty,
    agent::{
        AddARPNeighborsRequest, GetIPTablesRequest, GetIPTablesResponse, Interfaces, ListInterfacesRequest,
        ListRoutesRequest, Routes, SetIPTablesRequest, SetIPTablesResponse, UpdateInterfaceRequest,
        UpdateRoutesRequest,
    },
    types::Interface,
};

use super::{Service, system::own_machine};
use crate::{
    error::{Error, Result},
    network,
    sync::{blocking, to_the_end},
};

/// Makes an interface what the host wants; waits for one that is told by its device's path and is not there yet.
pub(super) async fn update_interface(
    service: &Service,
    request: UpdateInterfaceRequest,
) -> Result<Interface> {
    own_machine(service, "network")?;
    let wanted = request
        .interface
        .into_option()
        .ok_or_else(|| Error::Invalid("the request has no interface".into()))?;
    // The driver of the host's interfaces is loaded behind the server's back, and hosts ask for them first of all.
    service.sandbox.guest.prepared().await;
    let plugged = if wanted.devicePath.is_empty() {
        None
    } else {
        Some(service.sandbox.devices.interface_by_pci(&wanted.devicePath).await?)
    };
    let network = Arc::clone(&service.network);
    to_the_end(blocking(move || network.update_interface(&wanted, plugged.as_deref()))).await
}

/// Makes the routes what the host wants; answers with all there are.
pub(super) async fn update_routes(service: &Service, request: UpdateRoutesRequest) -> Result<Routes> {
    own_machine(service, "network")?;
    let wanted =
        request.routes.into_option().ok_or_else(|| Error::Invalid("the request has no routes".into()))?;
    service.sandbox.guest.prepared().await;
    let network = Arc::clone(&service.network);
    let routes = to_the_end(blocking(move || network.update_routes(&wanted.Routes))).await?;
    Ok(Routes { Routes: routes, ..Default::default() })
}

/// Lists the interfaces.
pub(super) async fn interfaces(service: &Service, _: ListInterfacesRequest) -> Result<Interfaces> {
    service.sandbox.guest.prepared().await;
    Ok(Interfaces { Interfaces: blocking(network::interfaces).await?, ..Default::default() })
}

/// Lists the routes of the main table.
pub(super) async fn routes(_: &Service, _: ListRoutesRequest) -> Result<Routes> {
    Ok(Routes { Routes: blocking(network::routes).await?, ..Default::default() })
}

/// Tells the guest the hardware addresses of neighbours.
pub(super) async fn add_neighbours(service: &Service, request: AddARPNeighborsRequest) -> Result<Empty> {
    own_machine(service, "network")?;
    let wanted = request
        .neighbors
        .into_option()
        .ok_or_else(|| Error::Invalid("the request has no neighbours".into()))?;
    service.sandbox.guest.prepared().await;
    let network = Arc::clone(&service.network);
    to_the_end(blocking(move || network.add_neighbours(&wanted.ARPNeighbors))).await?;
    Ok(Empty::new())
}

/// Reads the rules of the packet filter.
pub(super) async fn ip_tables(service: &Service, request: GetIPTablesRequest) -> Result<GetIPTablesResponse> {
    let reaper = Arc::clone(&service.sandbox.reaper);
    let data = blocking(move || network::ip_tables(&reaper, request.is_ipv6)).await?;
    Ok(GetIPTablesResponse { data, ..Default::default() })
}

/// Sets rules of the packet filter.
pub(super) async fn set_ip_tables(
    service: &Service,
    request: SetIPTablesRequest,
) -> Result<SetIPTablesResponse> {
    own_machine(service, "packet filter")?;
    let reaper = Arc::clone(&service.sandbox.reaper);
    let work = move || network::set_ip_tables(&reaper, request.is_ipv6, &request.data);
    let data = to_the_end(blocking(work)).await?;
    Ok(SetIPTablesResponse { data, ..Default::default() })
}
